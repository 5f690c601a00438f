"""A whole synthetic run on disk: plausible numbers, the real sample tables, no model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from infalign.calibration.diagnostics import Diagnostics, tie_rate, uniformity
from infalign.calibration.table import SampleTable, Wanted, write_samples, write_scores
from infalign.decoding.by_procedure import ByProcedure
from infalign.decoding.replay import Pool
from infalign.evaluation.compute import Contest, measure_compute
from infalign.evaluation.winrate import win_rate
from infalign.runtime.artifacts import write_json, write_manifest
from infalign.stages.recipe import Recipe
from infalign.theory.optimum import optimal_transform, win_rate_limit
from infalign.theory.procedures import BestOfN, Procedure, WorstOfN
from infalign.types import Prompt, Sample

FINGERPRINT, REWARD = "0123456789abcdef", "vader"
ATTACK = "<script>alert('x')</script> & <img src=x onerror=alert(1)>"
KL = 0.42


def write_run(folder: Path, *, shift: float = 0.9, gold: bool = False, steps: int = 120, prompts: int = 60) -> Path:
    """Everything a finished run leaves in `folder`; the policy's rewards are the base's plus `shift`."""
    write_recipe(folder, gold)
    write_calibration(folder, prompts)
    write_policy(folder, steps)
    write_evaluation(folder, shift, gold)
    return folder


def write_recipe(folder: Path, gold: bool = False) -> None:
    """recipe.json as `Experiment.claim_output` writes it."""
    recipe = Recipe(
        model_name_or_path="sshleifer/tiny",
        dataset_name="prompts.jsonl",
        reward="vader.py:build",
        target_kl=0.5,
        n=4,
        gold_reward="length.py:build" if gold else None,
        output_dir="outputs/test",
        training={"learning_rate": 1e-5, "max_steps": 120},
    )
    values = {one.name: getattr(recipe, one.name) for one in dataclasses.fields(recipe)}
    values = {name: value for name, value in values.items() if name not in ("base_dir", "overwrite")}
    write_json(folder / "recipe.json", {"identity": {}, "fingerprint": "0", "recipe": values})


def write_calibration(folder: Path, prompts: int = 60, samples: int = 40) -> None:
    """A calibration table of exchangeable rewards, with its manifest."""
    rng = np.random.default_rng(1)
    rewards_PK = rng.normal(rng.normal(size=(prompts, 1)), 1.0, (prompts, samples))
    write_table(folder / "calibration", rewards_PK)
    found = Diagnostics(
        prompts, prompts * samples, 0.02, tie_rate(list(rewards_PK)), 0.1, 0.0, uniformity(list(rewards_PK)), 0.012, 0.5
    )
    parts = {"sampling": "s", "prompts": "p", "num_calibration_samples": samples, "reward": f"{REWARD} {FINGERPRINT}"}
    more = {"diagnostics": dataclasses.asdict(found), "prompts": prompts, "samples_per_prompt": samples}
    write_manifest(folder / "calibration", "calibration", parts, **more)


def write_table(folder: Path, rewards_PK: np.ndarray) -> None:
    """A sample table with these rewards."""
    table = SampleTable.open(folder, {"model": "m", "temperature": 1.0})
    keys = [f"k{at:03d}" for at in range(len(rewards_PK))]
    table.request([Wanted(Prompt(f"prompt {key}", key), (1, 2), rewards_PK.shape[1]) for key in keys], 4096)
    rows = [
        Sample(key, index, (1, 2), np.zeros(2, np.float32), f"text {index}", True)
        for key in keys
        for index in range(rewards_PK.shape[1])
    ]
    write_samples(table.shard(table.segments[0], 0), rows)
    write_scores(table.new_score_shard(table.segments[0], 0, FINGERPRINT), rows, rewards_PK.ravel(), [""] * len(rows))


def write_policy(folder: Path, steps: int = 120) -> None:
    """A policy's manifest and its training log."""
    optimum = optimal_transform(BestOfN(4), kl=0.5)
    parts = {"procedure": "BestOfN(4)", "transform": repr(optimum), "beta": optimum.beta}
    write_json(folder / "policy" / "training_log.json", training_log(steps))
    write_manifest(folder / "policy", "policy", parts, steps=steps)


def training_log(steps: int) -> list[dict[str, Any]]:
    """TRL-like rows: one a step, a validation row every 20 steps, and the summary."""
    rng = np.random.default_rng(2)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rise = 1.0 - np.exp(-2.5 * step / steps)
        rows.append(
            {
                "step": step,
                "kl_seq": 0.45 * rise + 0.02 * rng.normal(),
                "kl_seq_error": 0.02 + 0.02 * rise,
                "reward/raw": rise + 0.2 * rng.normal(),
                "reward/calibrated": 0.5 + 0.22 * rise + 0.03 * rng.normal(),
                "reward/transformed": 0.3 + 0.8 * rise + 0.1 * rng.normal(),
                "reward/unscored": 0.0,
                "loss": 0.01,
                "grad_norm": 1.0,
                "entropy": 2.0,
                "completions/mean_length": 60 - 8 * rise,
                "completions/clipped_ratio": 0.1,
            }
        )
        if step % 20 == 0:
            rows.append(
                {
                    "step": step,
                    "eval_winrate": 0.5 + 0.25 * rise,
                    "eval_winrate_1": 0.5 + 0.15 * rise,
                    "eval_kl_seq": 0.45 * rise,
                }
            )
    return [*rows, {"step": steps, "train_runtime": 754.0, "train_loss": 0.01}]


def write_evaluation(folder: Path, shift: float = 0.9, gold: bool = False) -> dict[str, Any]:
    """Evaluation tables and evaluation.json, with the fields that `stages/evaluate.py` writes."""
    rng = np.random.default_rng(3)
    centre_P1 = rng.normal(size=(48, 1))
    base_PM = np.round(rng.normal(centre_P1, 1.0, (48, 16)), 2)
    policy_PM = np.round(rng.normal(centre_P1 + shift, 1.0, (48, 16)), 2)
    write_table(folder / "evaluation" / "base", base_PM)
    write_table(folder / "evaluation" / "policy", policy_PM)
    procedures = list(dict.fromkeys([BestOfN(4), *(kind(n) for kind in (BestOfN, WorstOfN) for n in (1, 2, 4, 8))]))
    judges = ["reward", "gold"] if gold else ["reward"]
    rows = [_row(policy_PM, base_PM, one, judge) for judge in judges for one in procedures]
    tied = rows[0]["limit"] - 0.012
    side = {"reward": 0.1, "tokens": 57.3, "clipped": 0.125, "duplicates": 0.0625}
    result = {
        "procedure": "BestOfN(4)",
        "transform": repr(optimal_transform(BestOfN(4), kl=0.5)),
        "beta": optimal_transform(BestOfN(4), kl=0.5).beta,
        "target_kl": 0.5,
        "reward": REWARD,
        "gold_reward": "length" if gold else None,
        "prompts": 48,
        "samples": 16,
        "confidence": 0.95,
        "seed": 42,
        "kl": {"mean": KL, "error": 0.031, "k1": 0.437, "k1_error": 0.048},
        "win_rates": rows,
        "main": {
            **rows[0],
            "tie_limit": tied,
            "tie_attainment": (rows[0]["mean"] - 0.5) / (tied - 0.5),
            "tie_rate": 0.031,
        },
        "base": side,
        "policy": {**side, "reward": 0.1 + shift},
        "examples": [_example(at) for at in range(3)],
        "pairwise": {
            "judge": "judges.py:build",
            "win_rate": {"mean": 0.6251, "low": 0.5512, "high": 0.7003},
            "pairs": 160,
            "unjudged": 0,
            "disagreement": 0.1375,
            "first_preferred": 0.52,
            "proxy_agreement": 0.8,
        },
        "compute": dataclasses.asdict(measure_compute(_contests(base_PM, policy_PM), ByProcedure(BestOfN(4)))),
    }
    write_json(folder / "evaluation.json", result)
    return json.loads((folder / "evaluation.json").read_text())


def _contests(base_PM: np.ndarray, policy_PM: np.ndarray) -> list[Contest]:
    """The samples with lengths, the policy's a little shorter."""
    rng = np.random.default_rng(4)
    return [
        Contest(Prompt(f"prompt {at}", f"k{at:03d}"), _table(base_M, rng, 60), _table(policy_M, rng, 50))
        for at, (base_M, policy_M) in enumerate(zip(base_PM, policy_PM, strict=True))
    ]


def _table(rewards_M: np.ndarray, rng: np.random.Generator, tokens: int) -> Pool:
    lengths = rng.integers(tokens // 2, 3 * tokens // 2, rewards_M.size)
    samples = [Sample("k", at, (1,) * int(length), np.zeros(1), "", True) for at, length in enumerate(lengths)]
    return Pool(samples, rewards_M)


def _row(policy_PM: np.ndarray, base_PM: np.ndarray, procedure: Procedure, judge: str) -> dict[str, Any]:
    found = win_rate(policy_PM - (0.4 if judge == "gold" else 0.0), base_PM, procedure)
    limit = float(win_rate_limit(procedure, KL))
    bounds = (limit, (found.mean - 0.5) / (limit - 0.5), (1 - found.mean) / (1 - limit))
    if judge == "gold":
        bounds = (None, None, None)
    return {
        "label": repr(procedure),
        "kind": procedure.name,
        "n": procedure.n,
        "judge": judge,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "length_controlled": {"mean": found.mean - 0.0125, "low": found.low - 0.0125, "high": found.high - 0.0125},
        **dict(zip(("limit", "attainment", "regret_ratio"), bounds, strict=True)),
        "policy_reward": float(policy_PM.mean()),
        "weight": None,
        "base_reward": float(base_PM.mean()),
    }


def _example(at: int) -> dict[str, Any]:
    prompt: Any = f"Prompt {at}: say something kind about the weather, please."
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}]
    found: dict[str, Any] = {"prompt": chat if at else prompt}
    for side in ("base", "policy"):
        texts = [f"{side} answer {row} {ATTACK if row == 0 else ''}" for row in range(4)]
        samples = [{"text": text, "reward": 0.25 * row} for row, text in enumerate(texts)]
        found[side] = {"decoded": samples[-1], "samples": samples}
    return found
