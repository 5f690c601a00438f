"""Mix or merge: the table of families, and where all policies lie under two terms."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from infalign.evaluation.combined import Axis, Combined, Interval, columns
from infalign.evaluation.sweep import CellResult, SweepResult
from infalign.report.names import procedure_name
from infalign.report.style import INK, LINES, MUTED, new_figure, percent, styled
from infalign.report.table import ABSENT, Table, number
from infalign.runtime.console import clock

PARETO = (
    "A small point is a policy of a search on all test prompts; a large one is what the search chose, on the prompts "
    "that it was not chosen on, with its intervals. Diamonds are the endpoints: the base, and the experts of one term."
)


def combined_tables(result: SweepResult) -> list[tuple[str, Table]]:
    """A title and the families, best first, at each point of the grid."""
    if not result.combined:
        return []
    level = f"{100 * result.confidence:g} %"
    axes = [f"{procedure_name(axis.decoder)}, {axis.judge}" for axis in result.axes]
    gaps = any("merge_gap" in one.facts for one in result.combined)
    heads = ("family", "chosen", "of", "KL", *axes, "least retention", f"{level} interval", "ahead of reference")
    heads = (*heads, f"{level} interval", *(("merge gap",) if gaps else ()), "time with search")
    points = list(dict.fromkeys(repr(one.at) for one in result.combined))
    found = []
    for point in points:
        rows = [one for one in result.combined if repr(one.at) == point]
        rows.sort(key=lambda one: math.inf if math.isnan(one.score.mean) else -one.score.mean)
        at = ", ".join(f"{name} {value}" for name, value in rows[0].at.items())
        experts = {axis.expert for axis in result.axes}
        score = "least retention" if all(experts) else "least win rate: there is no expert of each term alone"
        title = f"Mix or merge{f', {at}' if at else ''}: on prompts that nothing was chosen on; {score}"
        reference = next((at for at, one in enumerate(rows) if one.difference.mean == 0.0), None)
        marked = () if reference is None else (reference,)
        found.append((title, Table(heads, tuple(_cells(one, gaps) for one in rows), marked)))
    return found


def _cells(one: Combined, gaps: bool) -> tuple[str, ...]:
    kept = [
        number(wins.mean, 3) + ("" if math.isnan(kept.mean) else f" ({number(kept.mean, 2)})")
        for wins, kept in zip(one.wins, one.retentions, strict=True)
    ]
    return (
        one.family,
        one.arm,
        str(one.candidates),
        number(one.kl, 2),
        *kept,
        number(one.score.mean, 2),
        _interval(one.score),
        number(one.difference.mean, 2),
        _interval(one.difference),
        *((number(one.facts.get("merge_gap"), 3),) if gaps else ()),
        clock(one.seconds) if math.isfinite(one.seconds) else ABSENT,
    )


def _interval(one: Interval) -> str:
    return ABSENT if math.isnan(one.low) else f"[{one.low:.2f}, {one.high:.2f}]"


@styled()
def draw_pareto(result: SweepResult) -> Figure:
    """The first two terms against each other, a panel for each point of the grid."""
    points = list(dict.fromkeys(repr(one.at) for one in result.combined))
    figure, panels = new_figure(1, len(points), size=(4.2 * len(points) + 2.6, 4.6))
    first, second = result.axes[:2]
    families = list(dict.fromkeys(one.family for one in result.combined))
    experts = [axis.expert for axis in (first, second)]
    for panel, point in zip(panels, points, strict=True):
        chosen = [one for one in result.combined if repr(one.at) == point]
        panel.plot(0.5, 0.5, "D", color=MUTED, markersize=7, label="base")
        for cell in result.cells:
            at = {name: value for name, value in cell.varied.items() if name != "seed"}
            across, up = _wins(cell, first), _wins(cell, second)
            if not cell.finished or repr(at) != point or across is None or up is None:
                continue
            mark, color = ("D", INK) if cell.arm in experts else (".", MUTED)
            panel.plot(across, up, mark, color=color, markersize=6, alpha=0.8)
        for one in chosen:
            if one.arm in experts:
                continue
            place = families.index(one.family)
            across, up = one.wins[0], one.wins[1]
            panel.errorbar(
                across.mean, up.mean,
                xerr=_bars(across), yerr=_bars(up), fmt="osv^P*"[place // len(LINES) % 6],
                color=LINES[place % len(LINES)], markersize=8, elinewidth=0.8, label=one.family,
            )  # fmt: skip
        panel.set_title(", ".join(f"{name} {value}" for name, value in chosen[0].at.items()))
        panel.set_xlabel(f"wins: {columns([first])[0]}")
        percent(panel.xaxis)
        percent(panel.yaxis)
    panels[0].set_ylabel(f"wins: {columns([second])[0]}")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _wins(cell: CellResult, axis: Axis) -> float | None:
    return next((row.mean for row in cell.rows if (row.judge, row.label) == (axis.judge, axis.decoder)), None)


def _bars(one: Interval) -> list[list[float]] | None:
    return None if math.isnan(one.low) else [[max(0.0, one.mean - one.low)], [max(0.0, one.high - one.mean)]]
