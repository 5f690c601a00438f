"""The page's tables of samples, diagnostics and training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from infalign.evaluation.summary import Evaluation
from infalign.report.table import ABSENT, Table, number, share
from infalign.report.training_plot import Log, series


def sample_table(evaluation: Evaluation) -> Table:
    """What the samples of base and policy look like."""
    rows = []
    for name, label, show in (
        ("reward", "mean reward", lambda value: number(value, 4)),
        ("tokens", "mean tokens", lambda value: number(value, 1)),
        ("clipped", "cut at the length limit", share),
        ("duplicates", "duplicates of an earlier sample", share),
    ):
        rows.append((label, *(show(getattr(side, name)) for side in (evaluation.base, evaluation.policy))))
    return Table(("one sample", "base", "policy"), tuple(rows))


def diagnostics_table(diagnostics: Mapping[str, Any]) -> Table:
    """The calibration's diagnostics (fields of `Diagnostics`)."""
    rows = [
        ("prompts", str(diagnostics["prompts"])),
        ("base samples", str(diagnostics["samples"])),
        ("tied rewards (pairs of one prompt)", share(diagnostics["ties"])),
        ("duplicate completions", share(diagnostics["duplicates"])),
        ("cut at the length limit", share(diagnostics["clipped"])),
        ("without a score", share(diagnostics["unscored"])),
        ("drawn alike: p-value", number(diagnostics["uniformity"], 3)),
    ]
    if diagnostics.get("cost") is not None:
        at = f" at {number(diagnostics['cost_kl'], 2)} nats"
        rows.append((f"win rate this K is expected to cost{at}", f"{100 * diagnostics['cost']:.1f} points"))
    return Table(("calibration", ""), tuple(rows))


_LOGGED = (
    ("reward/raw", "reward"),
    ("reward/calibrated", "calibrated reward"),
    ("reward/transformed", "transformed reward"),
    ("kl_seq", "sequence KL (nats)"),
    ("reward/unscored", "samples without a score"),
    ("entropy", "entropy (nats per token)"),
    ("completions/mean_length", "completion length (tokens)"),
    ("completions/clipped_ratio", "cut at the length limit"),
    ("grad_norm", "gradient norm"),
    ("loss", "loss"),
    ("eval_winrate", "validation win rate, as decoded"),
    ("eval_winrate_1", "validation win rate, one sample"),
    ("eval_kl_seq", "validation sequence KL (nats)"),
)


def training_table(log: Log) -> Table:
    """Whatever was logged: its mean over the first and the last tenth of the logs."""
    rows = []
    for name, label in _LOGGED:
        values = series(log, name)[1]
        if values.size:
            tenth = max(1, values.size // 10)
            rows.append((label, _mean(values[:tenth]), _mean(values[-tenth:])))
    return Table(("mean over logs", "first tenth", "last tenth"), tuple(rows))


def _mean(values: np.ndarray) -> str:
    mean = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    return ABSENT if math.isnan(mean) else f"{mean:.4g}"
