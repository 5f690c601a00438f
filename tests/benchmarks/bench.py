"""`make bench`: infalign beside TRL and plain transformers, in one process, in turns, one thread, CPU seconds.

Each case first asserts that both sides compute the same, then prints one JSON line with sizes, seconds and the ratio.
`python -m tests.benchmarks.bench CASE ...` runs some of them: step, sampling, scoring.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from trl import RLOOConfig, RLOOTrainer

from infalign import BestOfN, CTRLConfig, CTRLReward, CTRLTrainer, optimal_transform
from infalign.generation.hf import decode_rows
from infalign.rewards.loader import load_reward
from infalign.types import SamplingSettings
from tests.benchmarks.subjects import interleaved, policy, prompts, reward_model

K, NEW = 8, 64
VERSIONS = {name: version(name) for name in ("infalign", "torch", "transformers", "trl")}


def told(case: str, seconds: dict[str, float], **sizes: Any) -> None:
    """Print one result; the first subject is the other side."""
    other, ours = seconds
    rounded = {name: round(value, 4) for name, value in seconds.items()}
    line = {
        "case": case,
        **sizes,
        "cpu_seconds": rounded,
        "ratio": round(seconds[other] / seconds[ours], 2),
        **VERSIONS,
    }
    print(json.dumps(line), flush=True)


# --- (a) a training step ----------------------------------------------------------------------------------------------


def step(folder: Path) -> None:
    """A CTRL step against TRL's RLOO step: 2 prompts x 8 completions of 64 tokens, the same classifier as reward."""
    for length in (64, 256):
        theirs, ours = _trainers(folder, length, rows=2 * K)
        _assert_same_gradients(theirs, ours)
        seconds = interleaved({"trl": _stepper(theirs), "infalign": _stepper(ours)}, repeats=3)
        told("step", seconds, prompt=length, k=K, new_tokens=NEW, rows=2 * K)


def _trainers(folder: Path, length: int, rows: int) -> tuple[RLOOTrainer, CTRLTrainer]:
    texts = prompts(rows, length)
    references = np.random.default_rng(0).normal(0, 0.1, 32).tolist()
    data = Dataset.from_dict({"prompt": texts, "ref_rewards": [references] * len(texts)})
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": rows,
        "num_generations": K,
        "max_completion_length": NEW,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1e-5,
        "beta": 0.1,
        "gradient_checkpointing": False,
        "disable_dropout": True,
    }
    path, judge = policy(folder), reward_model(folder)
    theirs = RLOOTrainer(
        path,
        AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1),
        RLOOConfig(**settings),
        train_dataset=data.remove_columns("ref_rewards"),
        reward_processing_classes=AutoTokenizer.from_pretrained(judge),
    )
    reward = CTRLReward(load_reward(judge), optimal_transform(BestOfN(4), beta=0.1))
    ours = CTRLTrainer(path, reward, CTRLConfig(**settings), train_dataset=data)
    for trainer in (theirs, ours):  # every completion has all its tokens, on either side
        trainer.eos_token_ids = []
        if getattr(trainer, "generation_config", None) is not None:
            trainer.generation_config.eos_token_id = None
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
    return theirs, ours


def _assert_same_gradients(theirs: RLOOTrainer, ours: CTRLTrainer) -> None:
    """The loss of one batch moves the weights alike: log-probabilities and gradients against TRL's own pass."""
    ours.model.train()
    batch = ours._prepare_inputs(next(iter(ours.get_train_dataloader())))
    gradients = []
    for trainer in (theirs, ours):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        trainer.model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)
    ours._buffered_inputs, ours._step = None, 0


def _stepper(trainer: Any) -> Callable[[], None]:
    """One whole step: rollouts, rewards, reference, loss, backward, optimizer."""
    batches = iter([])

    def run() -> None:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(trainer.get_train_dataloader())
            batch = next(batches)
        trainer.training_step(trainer.model, batch, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1

    return run


# --- (b) sampling -----------------------------------------------------------------------------------------------------


def sampling(folder: Path) -> None:
    """K completions a prompt against `generate` on replicated prompts: 2 prompts x 8 completions of 32 tokens."""
    path = policy(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    new = 32
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    for length in (64, 256, 512):
        rows = [tokenizer(text).input_ids for text in prompts(2, length) for _ in range(K)]
        ids = torch.tensor(rows)
        mask = torch.ones_like(ids)
        _assert_same_tokens(model, rows, model.generate(ids, attention_mask=mask, generation_config=greedy)[:, length:])
        uniforms = np.random.default_rng(0).random((len(rows), new))

        def theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            model.generate(ids, attention_mask=mask, generation_config=plain)

        def ours(rows: list = rows, uniforms: np.ndarray = uniforms) -> None:
            with torch.no_grad():
                decode_rows(model, rows, uniforms, SamplingSettings(new), [])

        seconds = interleaved({"generate": theirs, "infalign": ours}, repeats=3)
        told("sampling", seconds, prompt=length, k=K, new_tokens=new, rows=len(rows))


def _assert_same_tokens(model: Any, rows: list[list[int]], greedy: torch.Tensor) -> None:
    """At a temperature near 0 the sampler takes the tokens that greedy decoding takes."""
    cold = SamplingSettings(greedy.shape[1], temperature=1e-4)
    with torch.no_grad():
        found = decode_rows(model, rows, np.full((len(rows), greedy.shape[1]), 0.5), cold, [])
    assert [ids for ids, _ in found] == greedy.tolist()


# --- (c) scoring ------------------------------------------------------------------------------------------------------


def scoring(folder: Path) -> None:
    """A classifier on 4 prompts x 8 completions of 8 to 128 tokens against TRL's one batch padded to the longest."""
    path = reward_model(folder)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    reward = load_reward(path)
    rng = np.random.default_rng(0)
    texts = [text for text in prompts(4, 256) for _ in range(K)]
    completions = [" " + " ".join(f"w{w}" for w in rng.integers(0, 2000, rng.integers(8, 129))) for _ in texts]
    whole = [text + completion for text, completion in zip(texts, completions, strict=True)]

    def theirs() -> torch.Tensor:
        inputs = tokenizer(
            text=whole, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        with torch.inference_mode():
            return model(**inputs).logits[:, 0]

    def ours() -> np.ndarray:
        return reward(prompts=texts, completions=completions)

    np.testing.assert_allclose(ours(), theirs().numpy(), atol=1e-4)
    told("scoring", interleaved({"trl": theirs, "infalign": ours}, repeats=3), prompt=256, k=K, rows=len(texts))


CASES = {"step": step, "sampling": sampling, "scoring": scoring}


def main(names: list[str]) -> None:
    """Run the cases of these names, all when there are none."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            CASES[name](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
