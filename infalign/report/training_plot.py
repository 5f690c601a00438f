"""Training curves from TRL's log history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from infalign.report.style import BASE, MUTED, POLICY, new_figure, percent, smooth, styled

Floats = NDArray[np.float64]
Log = Sequence[Mapping[str, Any]]


@styled()
def draw_training(log: Log, target_kl: float | None = None) -> Figure:
    """Calibrated reward, transformed reward (offline: loss), sequence KL, held-out win rates or completion length.

    Args:
        log: rows with `step` and whatever was logged there.
        target_kl: nats, drawn as a line; None when the recipe sets beta.
    """
    figure, (calibrated, transformed, kl, last) = new_figure(2, 2, (9.0, 6.2))
    _draw_reward(calibrated, log, "reward/calibrated", "Calibrated reward")
    calibrated.axhline(0.5, color=MUTED, linewidth=1.0, linestyle="--")
    if any("reward/transformed" in row for row in log):
        _draw_reward(transformed, log, "reward/transformed", "Transformed reward")
    else:  # offline: there are no rollouts to earn it
        _draw_reward(transformed, log, "loss", "Loss")
    _draw_kl(kl, log, target_kl)
    if any("eval_winrate" in row for row in log):
        _draw_held_out(last, log)
    else:
        _draw_reward(last, log, "completions/mean_length", "Completion length (tokens)")
    for axes in (calibrated, transformed, kl, last):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (kl, last):
        axes.set_xlabel("step")
    return figure


def series(log: Log, name: str) -> tuple[Floats, Floats]:
    """(steps, values) of the rows that log `name`.

    >>> series([{"step": 1, "loss": 0.5}, {"step": 2}], "loss")[1].tolist()
    [0.5]
    """
    rows = [row for row in log if row.get(name) is not None and "step" in row]
    return (
        np.array([row["step"] for row in rows], dtype=np.float64),
        np.array([row[name] for row in rows], dtype=np.float64),
    )


def window_of(count: int) -> int:
    """How many logs a smoothed curve averages: a twentieth of them, odd.

    >>> window_of(10), window_of(100)
    (1, 5)
    """
    return max(1, count // 20) | 1


def _draw_reward(axes: Axes, log: Log, name: str, title: str) -> None:
    steps, values = series(log, name)
    axes.set_title(title)
    if not steps.size:
        _say_absent(axes, name)
        return
    window = window_of(steps.size)
    if window == 1:
        axes.plot(steps, values, color=POLICY, marker="o" if steps.size < 25 else "", markersize=4)
        return
    axes.plot(steps, values, color=POLICY, alpha=0.3, linewidth=1.0)
    axes.plot(steps, smooth(values, window), color=POLICY, label=f"mean of {window} logs")
    axes.legend(loc="best")


def _draw_kl(axes: Axes, log: Log, target_kl: float | None) -> None:
    steps, values = series(log, "kl_seq")
    axes.set_title("Sequence KL to the base policy (nats)")
    if not steps.size:
        _say_absent(axes, "kl_seq")
        return
    error_steps, errors = series(log, "kl_seq_error")
    if np.array_equal(error_steps, steps):
        axes.fill_between(
            steps, values - errors, values + errors, color=POLICY, alpha=0.2, linewidth=0, label="± standard error"
        )
    axes.plot(
        steps,
        values,
        color=POLICY,
        linewidth=1.4,
        label="rollouts" if any("reward/transformed" in row for row in log) else "importance weights",
    )
    held_steps, held = series(log, "eval_kl_seq")
    if held.size:
        axes.plot(held_steps, held, "o", color=BASE, markersize=5, label="held-out prompts")
    if target_kl is not None:
        axes.axhline(target_kl, color=MUTED, linewidth=1.2, linestyle="--", label="target_kl")
    axes.set_ylim(min(0.0, float(np.nanmin(values))))
    axes.legend(loc="best")


def _draw_held_out(axes: Axes, log: Log) -> None:
    axes.set_title("Win rate on validation prompts")
    axes.axhline(0.5, color=MUTED, linewidth=1.0, linestyle="--")
    for name, label, color in (("eval_winrate", "as decoded", POLICY), ("eval_winrate_1", "one sample", BASE)):
        steps, values = series(log, name)
        axes.plot(steps, values, "o-", color=color, markersize=5, label=label)
    percent(axes.yaxis)
    axes.legend(loc="best")


def _say_absent(axes: Axes, name: str) -> None:
    axes.text(0.5, 0.5, f"{name}\nwas not logged", ha="center", va="center", color=MUTED, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
