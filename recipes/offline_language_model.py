"""Offline, online, and one after the other at equal CPU seconds, on the language model of minutes.

First `python recipes/small_language_model.py CHATS.jsonl`, then `python recipes/offline_language_model.py --seeds 1 2`:
trains for Best-of-4 at one nat on 64 calibration samples a prompt, which all runs share, and prints a row a run: CPU
seconds of training (loading and saving included), KL, Best-of-4 win rate and attainment on held-out prompts. `online
400` has 400 steps; `offline 120` as many on the calibration samples; `120+320` both, the second part online.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from infalign.stages.calibrate import calibrate
from infalign.stages.evaluate import evaluate
from infalign.stages.experiment import Experiment
from infalign.stages.objective import load_procedure
from infalign.stages.recipe import load_recipe
from infalign.stages.train import train

RECIPE = Path(__file__).parent / "small_language_model.yaml"
SIZE: dict[str, Any] = {
    "num_calibration_samples": 64,
    "num_train_prompts": 960,
    "num_test_prompts": 240,
    "eval_n": [1, 4],
    "target_kl": 1.1,
    "kl_samples": 32,
}
SHARED = ("calibration", "evaluation/base")


def keys_of(arm: str) -> dict[str, Any]:
    """Recipe keys of `400` (online), `offline 120`, or `120+320`."""
    if arm.startswith("offline "):
        return {"solver": "offline", "max_steps": int(arm.removeprefix("offline "))}
    if "+" in arm:
        first, second = map(int, arm.split("+"))
        return {"solver": "offline+online", "offline_training": {"max_steps": first}, "max_steps": second}
    return {"max_steps": int(arm)}


def measured(arm: str, seed: int, folder: Path, donor: Path) -> str:
    """Train and measure one arm in `folder`, with the samples of `donor` where there are some; a row of the table."""
    recipe = load_recipe(RECIPE, {**SIZE, **keys_of(arm), "seed": seed, "output_dir": str(folder)})
    Experiment(recipe).claim_output()
    for name in SHARED:
        if (donor / name).exists() and not (folder / name).exists():
            shutil.copytree(donor / name, folder / name)
    calibrate(recipe)
    start = time.process_time()
    train(recipe)
    spent = time.process_time() - start
    found = evaluate(recipe)
    row = next(row for row in found.win_rates if row.label == repr(load_procedure(recipe)))
    shutil.rmtree(folder / "policy")
    wins = f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]"
    return f"| {seed} | {arm} | {spent:.0f} | {found.kl.mean:.2f} | {wins} | {row.attainment:.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=["400", "120+320", "200", "120+120", "offline 120"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/offline_language_model"))
    arguments = parser.parse_args()
    print("| seed | steps | CPU seconds | KL | Best-of-4 | attainment |\n|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        folders = [arguments.output_dir / f"{arm.replace(' ', '_')}-seed={seed}" for arm in arguments.arms]
        for arm, folder in zip(arguments.arms, folders, strict=True):
            print(measured(arm, seed, folder, folders[0]), flush=True)


if __name__ == "__main__":
    main()
