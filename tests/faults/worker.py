"""What two processes do when a reward fails at a random step on a random rank; started by test_ranks.py.

python worker.py FOLDER: every failure of test_rewards.py under both policies; rank 0 writes FOLDER/faults.json.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
import warnings
from pathlib import Path

import torch

from infalign.runtime.distributed import barrier, end_process, gathered, is_main, rank
from infalign.runtime.launch import join
from infalign.training.checkpoints import newest_whole
from tests.faults.test_rewards import BROKEN, FAILURES, SILENT, STEPS, make
from tests.training.test_trainer import token_sum


def faulty(spoil, step: int, failing: int):
    """`token_sum`, spoiled at one step on one rank."""

    def mine(completion_ids, trainer_state=None, **_):
        rewards = token_sum(completion_ids)
        return spoil(rewards) if (trainer_state.global_step, rank()) == (step, failing) else rewards

    return mine


def check(folder: Path, kind: str, spoil, policy: str) -> dict:
    """One training with one failure: what each rank raised, what is left on disk, and what was logged."""
    dice = random.Random(f"{kind} {policy}")
    step, failing = dice.randrange(1, STEPS), dice.randrange(2)
    output = folder / f"{kind}-{policy}".replace(" ", "-")
    layout = {"per_device_train_batch_size": 4, "save_total_limit": 1}
    subject = make(str(folder / "model"), output, faulty(spoil, step, failing), policy, **layout)
    start, error = time.monotonic(), None
    try:
        subject.train()
    except Exception as raised:  # every rank's own
        error = f"{type(raised).__name__}: {raised}"
    newest, _ = newest_whole(output)
    weights = torch.cat([p.detach().flatten() for p in subject.model.parameters()])
    digests = gathered(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    return {
        "errors": gathered(error),
        "seconds": time.monotonic() - start,
        "step": step,
        "rank": failing,
        "newest": newest.name if newest else None,
        "finite": all(gathered(bool(torch.isfinite(weights).all()))),
        "alike": len(set(digests)) == 1,
        "unscored": [row["reward/unscored"] for row in subject.state.log_history if "reward/unscored" in row],
    }


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    join(use_cpu=True)
    both = {kind: spoil for kind, (spoil, _) in FAILURES.items()}
    cases = [(kind, spoil, "error") for kind, spoil in [*both.items(), *((k, s) for k, (s, _) in BROKEN.items())]]
    cases += [(kind, spoil, "mask") for kind, spoil in [*both.items(), *SILENT.items()]]
    found = {f"{kind}, {policy}": check(folder, kind, spoil, policy) for kind, spoil, policy in cases}
    if is_main():
        (folder / "faults.json").write_text(json.dumps(found))
    barrier()


if __name__ == "__main__":
    main()
    end_process(0)
