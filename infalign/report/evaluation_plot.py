"""What `evaluate` measured: win rates of every decoder with their limits, and the rewards of base and policy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from infalign.evaluation.summary import DecoderRow, ordered_labels
from infalign.report.names import procedure_name
from infalign.report.style import BASE, GOLD, LIMIT, MUTED, OTHERS, POLICY, new_figure, percent, styled

Floats = NDArray[np.float64]


@styled()
def draw_win_rates(rows: Sequence[DecoderRow], trained: str) -> Figure:
    """One line a decoder, with interval and limit; a gold judge's measurements stand below the reward's.

    Args:
        rows: `win_rates` of evaluation.json.
        trained: the label of the procedure that was trained for; it is printed bold.
    """
    labels = ordered_labels(rows)
    judges = list(dict.fromkeys(row.judge for row in rows))
    figure, (axes,) = new_figure(size=(6.4, 1.7 + (0.24 + 0.14 * len(judges)) * len(labels)))
    shifts = np.linspace(-0.17, 0.17, len(judges)) if len(judges) > 1 else np.zeros(1)
    others = itertools.cycle(OTHERS)
    colors = [{"reward": POLICY, "gold": GOLD}.get(judge) or next(others) for judge in judges]
    for judge, color, shift in zip(judges, colors, shifts, strict=True):
        mine = [row for row in rows if row.judge == judge]
        places = [labels.index(row.label) + shift for row in mine]
        for row, place in zip(mine, places, strict=True):
            axes.plot([row.low, row.high], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
        name = {"reward": "judged by the reward", "gold": "judged by the gold reward"}.get(judge, f"judged by {judge}")
        axes.plot([row.mean for row in mine], places, "o", color=color, markersize=7, label=name)
    limits = {labels.index(row.label): row.limit for row in rows if np.isfinite(row.limit) or row.judge == "reward"}
    style: dict[str, Any] = {"color": LIMIT, "markersize": 15, "markeredgewidth": 2, "label": "limit"}
    axes.plot(list(limits.values()), list(limits), "|", **style)
    axes.axvline(0.5, color=MUTED, linewidth=1.0, linestyle="--")
    axes.set_yticks(range(len(labels)), [procedure_name(label) for label in labels])
    for label in {trained, *(row.label for row in rows if row.weight > 0)} & set(labels):
        axes.get_yticklabels()[labels.index(label)].set_fontweight("bold")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    percent(axes.xaxis)
    axes.set_xlabel("win rate of the policy against its base")
    axes.set_title("Win rates by decoder")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


_LARGEST = 1e100  # a larger reward is drawn at this one: bins of more overflow


@styled()
def draw_rewards(base: Floats, policy: Floats, reward: str) -> Figure:
    """Two histograms of raw rewards on the same bins.

    Args:
        base, policy: finite rewards of single samples, any number.
        reward: its name.
    """
    figure, (axes,) = new_figure()
    shown = np.clip(np.concatenate([base, policy]), -_LARGEST, _LARGEST)
    base, policy = shown[: base.size], shown[base.size :]
    # 20 to 40 bins; a reward with few values gets one for each
    distinct = np.unique(shown).size
    bins = int(np.clip(np.sqrt(base.size), 20, 40)) if distinct > 20 else max(distinct, 2)
    edges = np.histogram_bin_edges(shown, bins=bins)
    for values, color, name in ((base, BASE, "base"), (policy, POLICY, "policy")):
        share = np.histogram(values, bins=edges)[0] / values.size
        axes.stairs(share, edges, fill=True, color=color, alpha=0.25)
        axes.stairs(share, edges, color=color, linewidth=1.6, label=f"{name}, mean {values.mean():.3g}")
        axes.axvline(values.mean(), color=color, linewidth=1.2, linestyle="--")
    axes.set_xlabel(f"reward of one sample ({reward})")
    axes.set_ylabel("share of samples")
    percent(axes.yaxis)
    axes.set_ylim(bottom=0.0)
    axes.set_title("Rewards before decoding")
    axes.legend(loc="best")
    return figure
