"""One training with `use_vllm` in a process of its own: `python -m tests.engines.rollouts FOLDER JSON`.

JSON: `keys` of `CTRLConfig`, `broken` (what to break), `lora`. Prints one line of JSON: the log, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.training.test_resume import rows
from tests.training.test_trainer import config, token_sum


def trained(folder: Path, job: dict) -> dict:
    """Train, and say what was logged."""
    keys = {"use_vllm": True, "vllm_mode": "colocate", "max_steps": 4, "learning_rate": 3e-2, "max_grad_norm": 10.0}
    arguments = CTRLConfig(**config(folder / job.get("out", "out"), **{**keys, **job.get("keys", {})}))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if job.get("lora") else None
    subject = CTRLTrainer(
        str(folder / "model"), CTRLReward(token_sum, identity), arguments, train_dataset=rows(), peft_config=lora
    )
    engine = subject.vllm_generation
    if job.get("broken") == "not synced":
        engine.sync_weights = lambda: None
    if job.get("broken") == "temperature":
        engine.temperature = 2.0
    subject.train(resume_from_checkpoint=job.get("resume"))
    weights = torch.cat([p.detach().flatten() for p in subject.model.parameters()])
    return {"log": subject.state.log_history, "norm": float(weights.norm()), "steps": subject.state.global_step}


def main() -> None:
    """Run the job of the command line."""
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        found = trained(folder, job)
    except InputError as error:
        found = {"error": str(error)}
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
