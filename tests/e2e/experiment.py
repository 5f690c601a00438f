"""A whole experiment on a tiny model, in seconds: model, prompts, reward and recipe in one folder."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import tiny_causal

REWARD = '''
def reward(completion_ids, **_):
    """More of the higher tokens is better; ties are rare."""
    return [sum(ids) + 0.01 * ids[0] for ids in completion_ids]


def gold(completion_ids, **_):
    return [float(max(ids)) for ids in completion_ids]


def fails(completions, **_):
    raise RuntimeError("the reward server is down")


def slow(completions, **_):
    import time

    time.sleep(5)
    return [0.0] * len(completions)


def short(completions, **_):
    return [1.0]


def strings(completions, **_):
    return ["good"] * len(completions)


def infinite(completions, **_):
    return [float("inf")] * len(completions)


def nothing(completions, **_):
    return [None] * len(completions)


def nan(completions, **_):
    return [float("nan")] * len(completions)


def sometimes(completion_ids, **_):
    return [None if ids[0] % 5 == 0 else float(sum(ids)) for ids in completion_ids]
'''

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran"]


def tiny_experiment(folder: Path, prompts: int = 12) -> dict[str, object]:
    """Files under `folder`; returns a recipe's keys, to be changed by the test and handed to `load_recipe`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_causal(folder / "model", "llama")
    rows = []
    for number in range(prompts):
        words = [WORDS[(number + step * (1 + number // 8)) % 8] for step in range(2 + number % 3)]
        rows.append({"prompt": " ".join([*words, WORDS[number // 8]])})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "score.py").write_text(REWARD)
    return {
        "model_name_or_path": model,
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward": f"{folder / 'score.py'}:reward",
        "output_dir": str(folder / "out"),
        "num_train_prompts": 6,
        "num_test_prompts": 4,
        "procedure": "best_of_n",
        "n": 2,
        "target_kl": 0.5,
        "num_calibration_samples": 12,
        "max_completion_length": 5,
        "eval_samples": 8,
        "eval_n": [1, 2],
        "kl_samples": 4,
        "tokens_per_batch": 100,
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "reward_retries": 0,
    }
