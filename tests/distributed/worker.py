"""What two processes check together; started by `accelerate launch` from test_many.py, once per launch file.

python worker.py FOLDER CHECK [CHECK ...]: every check runs on all ranks; rank 0 writes FOLDER/CHECK.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from infalign.rewards.loader import load_reward
from infalign.runtime.distributed import barrier, end_process, gathered, is_main, rank, world_size
from infalign.runtime.launch import join
from infalign.theory.procedures import BestOfN, WorstOfN
from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.direct import Direct
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from tests.training.test_offline import base_samples
from tests.training.test_resume import final, rows
from tests.training.test_trainer import config, token_sum

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
MODEL = str(FOLDER / "model")


def make(folder: Path, reward=token_sum, dtype=None, peft_config=None, **changes) -> CTRLTrainer:
    """A trainer of six steps with a checkpoint after each, eight rollouts a step over all ranks."""
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, **changes}
    made = reward if isinstance(reward, (CTRLReward, list)) else CTRLReward(reward, identity)
    arguments = CTRLConfig(**config(folder, **settings))
    policy = MODEL if dtype is None else AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    data = base_samples(MODEL) if changes.get("solver") == "offline" else rows()
    return CTRLTrainer(policy, made, arguments, train_dataset=data, peft_config=peft_config)


def saved(subject: CTRLTrainer, folder: Path) -> dict[str, torch.Tensor]:
    """The whole model as every rank reads it back."""
    subject.save_model(str(folder))
    barrier()
    return load_file(next(folder.glob("*model.safetensors")))


def copy_checkpoint(source: Path, target: Path, step: int) -> None:
    if is_main():
        shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    barrier()


def resume(name: str, stop: int, **layout) -> dict:
    """Weights and log of a run resumed at `stop` against those of the whole run, bit by bit."""
    whole = make(FOLDER / name / "whole", **layout)
    whole.train()
    begin = load_file(next((FOLDER / name / "whole" / "checkpoint-1").glob("*model.safetensors")))
    expected = saved(whole, FOLDER / name / "whole_end"), final(whole)[1]
    copy_checkpoint(FOLDER / name / "whole", FOLDER / name / "resumed", stop)
    resumed = make(FOLDER / name / "resumed", **layout)
    resumed.train(resume_from_checkpoint=True)
    found = saved(resumed, FOLDER / name / "resumed_end"), final(resumed)[1]
    return {
        "processes": world_size(),
        "sharding": resumed.identity["sharding"],
        "steps": resumed.state.global_step,
        "moved": max(float((value - begin[n]).abs().max()) for n, value in expected[0].items()),
        "differing": [n for n, value in expected[0].items() if not torch.equal(value, found[0][n])],
        "same_log": expected[1] == found[1],
        "kl": [row["kl_seq"] for row in expected[1] if "kl_seq" in row],
    }


def check_resume() -> dict:
    return resume("resume", 3)


def check_resume_buffered() -> dict:
    return resume("buffered", 3, per_device_train_batch_size=2, steps_per_generation=4, num_iterations=2)


def check_resume_offline() -> dict:
    return resume("offline", 3, solver="offline", num_iterations=2)


def check_offline_invariance() -> dict:
    """Two processes with a group each, on base samples."""
    return invariant(FOLDER / "offline_invariance", per_device_train_batch_size=4, solver="offline")


def check_whole_offline() -> dict:
    """One process with both groups."""
    return invariant(FOLDER / "whole_offline", per_device_train_batch_size=8, solver="offline")


def check_sharded_rollouts() -> dict:
    """Rollouts that don't gather ZeRO-3's weights: ranks of unlike lengths keep step, and draw the same."""
    found = {}
    for gather in (True, False):
        folder = FOLDER / f"gather-{gather}"
        subject = make(folder, max_steps=2, save_strategy="no", ds3_gather_for_generation=gather)
        subject.train()
        found[str(gather)] = [row["reward/raw"] for row in subject.state.log_history if "reward/raw" in row]
    return found


def check_padded_batches() -> dict:
    """`pad_to_multiple_of`: batches are wider than what some rank has sampled, and ranks still ask the same."""
    found = {}
    for multiple in (1, 8):
        folder = FOLDER / f"multiple-{multiple}"
        subject = make(folder, max_steps=3, save_strategy="no", max_completion_length=8, pad_to_multiple_of=multiple)
        subject.train()
        found[str(multiple)] = [row["loss"] for row in subject.state.log_history if "loss" in row]
    return found


def check_resume_lora() -> dict:
    return resume("lora", 3, peft_config=LoraConfig(r=4, target_modules="all-linear"))


def check_evaluate() -> dict:
    """An odd number of held-out prompts: ranks with a prompt less must not leave the others waiting."""
    subject = make(FOLDER / "evaluate", max_steps=1, save_strategy="no")
    subject.procedure = BestOfN(2)
    subject.eval_dataset = rows().select(range(3))
    subject.train()
    return {"metrics": gathered(subject.evaluate())}


def check_reward_fails_on_one_rank() -> dict:
    def fails(completion_ids, trainer_state=None, **_):
        if rank() == 1 and trainer_state.global_step == 1:
            raise RuntimeError("the reward server is down")
        return token_sum(completion_ids)

    return told(make(FOLDER / "fails", CTRLReward(guarded(fails), identity), save_strategy="no"))


def check_reward_of_a_group_fails_on_one_rank() -> dict:
    """Where ranks gather each other's rewards a failing one must not leave the other waiting."""

    def fails_early(completion_ids, trainer_state=None, **_):
        if rank() == 1 and trainer_state.global_step == 1:
            raise RuntimeError("the reward server is down")
        return token_sum(completion_ids)

    reward = of_groups(guarded(fails_early))
    return told(make(FOLDER / "fails_early", reward, save_strategy="no", num_generations=8))


def check_wrong_count_on_one_rank() -> dict:
    def short(completion_ids, trainer_state=None, **_):
        rewards = token_sum(completion_ids)
        return rewards[:-1] if rank() == 1 and trainer_state.global_step == 1 else rewards

    return told(make(FOLDER / "short", CTRLReward(guarded(short), identity), save_strategy="no"))


def check_reward_is_late_on_one_rank() -> dict:
    def late(completion_ids, trainer_state=None, **_):
        time.sleep(5 if rank() == 1 and trainer_state.global_step == 1 else 0)
        return token_sum(completion_ids)

    reward = CTRLReward(guarded(late, timeout=0.5), identity)
    return told(make(FOLDER / "late", reward, save_strategy="no"))


def check_non_finite_weights_are_not_saved() -> dict:
    """One weight of one rank's part is made infinite after the second step."""
    subject = make(FOLDER / "infinite", save_steps=2)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2 and rank() == 1:
                parameter = next(model.parameters())
                getattr(parameter, "ds_tensor", parameter).data.view(-1)[0] = float("inf")

    subject.callback_handler.callbacks.insert(0, Break())
    found = told(subject)
    return {**found, "files": [path.name for path in (FOLDER / "infinite").rglob("*.safetensors")]}


def check_nan_loss_on_one_rank() -> dict:
    """The step is left out on both ranks; weights stay equal and finite."""
    subject = make(FOLDER / "nan", max_steps=3, save_strategy="no")
    poison(subject, {1})
    subject.train()
    weights = saved(subject, FOLDER / "nan_end")
    return {
        "skipped": subject.not_finite.skipped,
        "finite": all(bool(torch.isfinite(value).all()) for value in weights.values()),
        "steps": subject.state.global_step,
    }


def check_nan_loss_stays() -> dict:
    subject = make(FOLDER / "stays", save_strategy="no")
    poison(subject, {1, 2, 3, 4, 5})
    return told(subject)


def poison(subject: CTRLTrainer, steps: set[int]) -> None:
    """Make the loss of the given steps NaN on the last rank."""
    plain = subject._get_per_token_logps_and_entropies

    def poisoned(model, *args, **kwargs):
        logps, *rest = plain(model, *args, **kwargs)
        bad = torch.is_grad_enabled() and rank() == world_size() - 1 and subject.state.global_step in steps
        return (logps * float("nan") if bad else logps, *rest)

    subject._get_per_token_logps_and_entropies = poisoned


def guarded(function, **options):
    """The reward without retries, so that a failure is told at once."""
    return load_reward(function, retries=0, **options)


def told(subject: CTRLTrainer) -> dict:
    """What each rank raised, and how long that took."""
    start, error = time.monotonic(), None
    try:
        subject.train()
    except Exception as raised:  # every rank's own
        error = f"{type(raised).__name__}: {raised}"
    return {"errors": gathered(error), "seconds": time.monotonic() - start}


def check_invariance() -> dict:
    """Two processes of four rollouts, in float64 with SGD: losses and weights, for the test to compare with one."""
    return invariant(FOLDER / "invariance", per_device_train_batch_size=4)


def check_whole_batch() -> dict:
    """One process with all eight rollouts: what the others are compared with."""
    return invariant(FOLDER / "whole_batch", per_device_train_batch_size=8)


def check_groups_over_ranks() -> dict:
    """One prompt's eight rollouts on two processes: two direct objectives on pooled ranks, with beta steered."""
    return invariant(FOLDER / "groups_over_ranks", two_of_groups(), per_device_train_batch_size=4, **STEERED)


def check_whole_groups() -> dict:
    """One process with all of them."""
    return invariant(FOLDER / "whole_groups", two_of_groups(), per_device_train_batch_size=8, **STEERED)


def check_interpolated() -> dict:
    """Two processes that measure the KL together and move the weights along the line from the base."""
    return invariant(FOLDER / "interpolated", per_device_train_batch_size=4, **MOVED)


def check_whole_interpolated() -> dict:
    """One process that does."""
    return invariant(FOLDER / "whole_interpolated", per_device_train_batch_size=8, **MOVED)


STEERED = {
    "num_generations": 8,
    "beta": 0.2,
    "target_kl": 0.05,
    "reward_weights": [0.5, 0.25],
    "kl_interpolation": False,
}
MOVED = {"beta": 0.2, "target_kl": 0.05}


def two_of_groups() -> list[CTRLReward]:
    return [of_groups(), CTRLReward(token_sum, Direct(WorstOfN(2)), method="pooled", name="second")]


def of_groups(reward=token_sum) -> CTRLReward:
    return CTRLReward(reward, Direct(BestOfN(4)), method="pooled")


def invariant(folder: Path, reward=token_sum, **layout) -> dict:
    subject = make(
        folder,
        reward,
        max_steps=4,
        save_strategy="no",
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_iterations=2,  # the second pass is off-policy: its loss is not zero
        dtype=torch.float64,
        **layout,
    )
    subject.train()
    weights = saved(subject, folder / "end")
    flat = torch.cat([weights[name].flatten() for name in sorted(weights)])
    losses = [row["loss"] for row in subject.state.log_history if "loss" in row]
    if is_main():
        np.save(folder / "weights.npy", flat.numpy())
    return {
        "losses": losses,
        "dtype": str(flat.dtype),
        "rewards": [r["reward"] for r in subject.state.log_history if "reward" in r],
        "weight": subject.interpolated.weight if subject.interpolated else None,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    join(use_cpu=True)
    for check in sys.argv[2:]:
        found = globals()[f"check_{check}"]()
        if is_main():
            (FOLDER / f"{check}.json").write_text(json.dumps(found))
        barrier()


if __name__ == "__main__":
    main()
    end_process(0)
