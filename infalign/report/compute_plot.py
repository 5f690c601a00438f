"""What a win rate costs: tokens and reward calls of every decoder, and what training saves of them.

Every point has the same opponent, one plain base sample, so that base and policy can be read off one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from infalign.evaluation.compute import Compute, ComputeRow, Match
from infalign.report.names import procedure_name
from infalign.report.style import BASE, INK, MUTED, POLICY, new_figure, percent, styled
from infalign.report.table import Table, number
from infalign.report.verdict import interval

COMPUTE_CAPTION = (
    "Up is better, left is cheaper: what each decoder spends on a prompt and how often it then beats one plain base "
    "sample. Dots are Best-of-N with N beside them; bands are intervals. The dotted arrow is what the base "
    "must spend to win as often as one policy sample. Stars are the recipe's own decoder."
)
_COLORS = {"base": BASE, "policy": POLICY}


@styled()
def draw_compute(compute: Compute) -> Figure:
    """Win rate against generated tokens per prompt (log scale), a curve for base and policy.

    Args:
        compute: what was measured.
    """
    figure, (axes,) = new_figure(size=(6.4, 4.6))
    for side, color in _COLORS.items():
        _draw_curve(axes, [row for row in compute.curves if row.side == side], color, side)
    for row in compute.decoder:
        style: dict[str, Any] = {"color": _COLORS[row.side], "markersize": 15, "zorder": 6}
        axes.plot([row.tokens], [row.mean], "*", markeredgecolor="white", **style)
    axes.axhline(0.5, color=MUTED, linewidth=0.8)
    _draw_match(axes, compute.match)
    _frame(axes, [row.tokens for row in (*compute.curves, *compute.decoder)])
    if compute.decoder:
        name = procedure_name(compute.decoder[0].label)
        axes.plot([], [], "*", color=INK, markersize=11, label=name if len(name) < 24 else "the recipe's decoder")
    axes.set_title("Win rate against compute")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _draw_curve(axes: Axes, rows: Sequence[ComputeRow], color: str, side: str) -> None:
    tokens, mean = [row.tokens for row in rows], [row.mean for row in rows]
    low, high = (
        [np.nan if getattr(row, end) is None else getattr(row, end) for row in rows] for end in ("low", "high")
    )
    axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(tokens, mean, "o-", color=color, markersize=6, label=side)
    place = {"policy": (-4, 7, "right"), "base": (5, -13, "left")}[side]
    for row in rows:
        axes.annotate(
            str(row.n),
            (row.tokens, row.mean),
            xytext=place[:2],
            textcoords="offset points",
            ha=place[2],
            color=color,
            fontsize=9,
        )


def _draw_match(axes: Axes, match: Match | None) -> None:
    """An arrow from one policy sample to where the base wins as often; none where the base gets there at once."""
    if match is None or match.tokens is None or match.tokens <= match.policy_tokens:
        return
    ends: dict[str, Any] = {"xy": (match.tokens, match.win), "xytext": (match.policy_tokens, match.win)}
    axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": INK, "linestyle": ":", "linewidth": 1.4})


def _frame(axes: Axes, tokens: Sequence[float]) -> None:
    axes.set_xscale("log")
    ends = min(tokens) / 1.25, max(tokens) * 1.25
    axes.set_xlim(*ends)
    steps = [m * 10.0**e for e in range(-1, 9) for m in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([one for one in steps if ends[0] <= one <= ends[1]]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value:,.0f}"))
    percent(axes.yaxis)
    axes.set_xlabel("tokens generated per prompt (log scale)")
    axes.set_ylabel("win rate against one base sample")


def saving(compute: Compute) -> str:
    """What training saves, in a sentence, and no more than the interval allows; "" where it was not measured.

    >>> saving(Compute(match=Match(n=1.0, low=1.0, high=1.2, largest=8, win=0.48, base_tokens=9.0, policy_tokens=9.0)))
    'One policy sample wins 48.0 % against one base sample: at one sample, training saves no tokens.'
    """
    match = compute.match
    said = [] if match is None else [_matched(match)]
    return " ".join(said + [f"The recipe's decoder is not shown: {compute.problem}." for _ in [0] if compute.problem])


def _matched(match: Match) -> str:
    start = f"One policy sample wins {100 * match.win:.1f} % against one base sample"
    if match.n == 1.0:
        return f"{start}: at one sample, training saves no tokens."
    start += f" and takes {match.policy_tokens:.0f} tokens."
    if match.n is None or match.tokens is None:
        most = match.largest
        return f"{start} The base does not win as often by Best-of-{most}, the most that these samples can tell."
    times = match.tokens / match.policy_tokens
    return (
        f"{start} To win as often, the base needs Best-of-N with N about {match.n:.1f} {_range(match)}: "
        f"{match.tokens:.0f} tokens, {times:.1f} times as many, and {match.n:.1f} reward calls where the policy "
        "needs none."
    )


def _range(match: Match) -> str:
    if match.low is None and match.high is None:
        return interval(float("nan"), float("nan"))
    low, high = (
        f"more than {match.largest}" if getattr(match, e) is None else f"{getattr(match, e):.1f}"
        for e in ("low", "high")
    )
    return f"[{low}, {high}]"


def compute_table(compute: Compute) -> Table:
    """Every decoder on both sides; the recipe's own is set off."""
    drawn = {(row.side, row.label) for row in compute.curves}
    rows = [*compute.curves, *[row for row in compute.decoder if (row.side, row.label) not in drawn]]
    own = {(row.side, row.label) for row in compute.decoder}
    cells = [
        (
            f"{row.side}, {procedure_name(row.label)}",
            number(row.mean, 3),
            f"{number(row.low, 3)} to {number(row.high, 3)}",
            number(row.tokens, 1),
            number(row.reward_calls, 1),
        )
        for row in rows
    ]
    marked = tuple(at for at, row in enumerate(rows) if (row.side, row.label) in own)
    return Table(("decoder", "win rate", "interval", "tokens", "reward calls"), tuple(cells), marked)
