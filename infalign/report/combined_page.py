"""Mix or merge: the table of families, and where all policies lie under two terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from infalign.evaluation.combined import LEAST_GAIN, Axis, Combination, Combined, Interval, columns
from infalign.evaluation.sweep import LOST, MERGED, CellResult, SweepResult
from infalign.report.names import procedure_name
from infalign.report.style import INK, LINES, MUTED, new_figure, percent, styled
from infalign.report.table import ABSENT, Table, number
from infalign.runtime.console import clock

Row = tuple[str, ...]

NO_EXPERTS = "; there is no expert of each term alone, and no retention"

GAP = (
    "Each merge, with a 95 % interval of the sampling: the KL from the mixture of its experts' logits, with its "
    "weights, to the merge. The mixture is what a joint training at the same weights aims at."
)
PARETO = (
    "A small point is a policy of a search on all test prompts; a large one is what the search chose, on the prompts "
    "that it was not chosen on, with its intervals. Diamonds are the endpoints: the base, and the experts of one term."
)


def combined_tables(result: SweepResult) -> list[tuple[str, Table]]:
    """A title and the families, best first, at each point of the grid; then what nobody was trained for."""
    found = result.combination
    terms: list[tuple[str, Table]] = []
    beside: list[tuple[str, Table]] = []
    experts = all(axis.expert for axis in found.axes)
    score = "least retention" if experts else "least win rate"
    for rows in by_point(found):
        at = ", ".join(f"{name} {value}" for name, value in rows[0].at.items())
        rows = sorted(rows, key=lambda one: math.inf if math.isnan(one.score.mean) else -one.score.mean)
        reference = next((at for at, one in enumerate(rows) if one.difference.mean == 0.0), None)
        marked = () if reference is None else (reference,)
        where = f"{f', {at}' if at else ''}: on prompts that nothing was chosen on"
        heads, cells = _terms(rows, found.axes, score)
        terms.append((f"Mix or merge{where}{'' if experts else NO_EXPERTS}", Table(heads, cells, marked)))
        heads, cells = _beside(rows, found.beside)
        if len(heads) > 2:
            title = f"What nobody was trained for{where}; nats a token more than the base on held-out texts"
            beside.append((title, Table(heads, cells, marked)))
    return [*terms, *beside]


def weak_experts(found: Combination) -> list[str]:
    """A line for each term whose expert won too little for retention to mean anything, at any point of the grid."""
    lines = []
    for place, axis in enumerate(found.axes):
        wins = [one.wins[place].mean for one in found.families if one.arm == axis.expert]
        weak = [win for win in wins if not win - 0.5 > LEAST_GAIN]
        if weak:
            lines.append(
                f"{axis.expert}, the expert of {_named([axis])[0]}, wins {min(weak):.3f} there: nothing to keep and no "
                "retention. Train the experts longer, or at a larger KL."
            )
    unsure = [one.family for one in found.families if one.candidates > 1 and math.isnan(one.validated)]
    if unsure and all(axis.expert for axis in found.axes):
        lines.append(
            f"{', '.join(dict.fromkeys(unsure))}: chosen by the least win rate, because an expert is missing or won "
            "too little on the prompts that choose."
        )
    return lines


def by_point(found: Combination) -> list[list[Combined]]:
    """The families at each point of the grid."""
    points = dict.fromkeys(repr(one.at) for one in found.families)
    return [[one for one in found.families if repr(one.at) == point] for point in points]


def _terms(rows: Sequence[Combined], axes: Sequence[Axis], score: str) -> tuple[Row, tuple[Row, ...]]:
    gaps = any("merge_gap" in one.facts for one in rows)
    heads = ("family", "chosen", "of", "KL", *_named(axes), score, "ahead of reference")
    heads = (*heads, *(("merge gap",) if gaps else ()), "time with search")
    return heads, tuple(_cells(one, gaps) for one in rows)


def _beside(rows: Sequence[Combined], beside: Sequence[Axis]) -> tuple[Row, tuple[Row, ...]]:
    """Win rates that no policy was trained for, and what was lost on held-out texts."""
    texts = [name for name in rows[0].facts if name.startswith(LOST) and not name.endswith(" error")]
    cells = []
    for one in rows:
        wins = [_with_interval(win, 3) for win in one.beside]
        lost = [
            f"{number(one.facts.get(name), 4)} \N{PLUS-MINUS SIGN} {number(one.facts.get(f'{name} error'), 4)}"
            for name in texts
        ]
        cells.append((one.family, one.arm, *wins, *lost))
    return ("family", "chosen", *_named(beside), *texts), tuple(cells)


def _named(axes: Sequence[Axis]) -> list[str]:
    return [f"{procedure_name(axis.decoder)}, {axis.judge}" for axis in axes]


def _cells(one: Combined, gaps: bool) -> Row:
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
        _with_interval(one.score, 2),
        _with_interval(one.difference, 2),
        *((number(one.facts.get("merge_gap"), 4),) if gaps else ()),
        clock(one.seconds) if math.isfinite(one.seconds) else ABSENT,
    )


def _with_interval(one: Interval, digits: int) -> str:
    interval = "" if math.isnan(one.low) else f" [{one.low:.{digits}f}, {one.high:.{digits}f}]"
    return f"{number(one.mean, digits)}{interval}"


@styled()
def draw_pareto(result: SweepResult) -> Figure:
    """The first two terms against each other, a panel for each point of the grid."""
    points = by_point(result.combination)
    figure, panels = new_figure(1, len(points), size=(4.2 * len(points) + 2.6, 4.6))
    first, second = result.combination.axes[:2]
    families = list(dict.fromkeys(one.family for one in result.combination.families))
    experts = [axis.expert for axis in result.combination.axes]
    for panel, chosen in zip(panels, points, strict=True):
        panel.plot(0.5, 0.5, "D", color=MUTED, markersize=7, label="base")
        for cell in result.cells:
            at = {name: value for name, value in cell.varied.items() if name != "seed"}
            across, up = _wins(cell, first), _wins(cell, second)
            if not cell.finished or at != chosen[0].at or across is None or up is None:
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


def merges(result: SweepResult) -> dict[str, list[CellResult]]:
    """The merges whose distance from the mixture of logits is known, by method, where the experts' KL varies."""
    found: dict[str, list[CellResult]] = {}
    for cell in result.cells:
        if cell.finished and {"merge_gap", "experts_kl"} <= set(cell.facts):
            found.setdefault(cell.transform.removeprefix(MERGED), []).append(cell)
    kls = {cell.facts["experts_kl"] for cells in found.values() for cell in cells}
    return found if len(kls) > 1 else {}


@styled()
def draw_gap(result: SweepResult) -> Figure:
    """How far merges are from the mixture of their experts' logits, along the experts' KL."""
    figure, (panel,) = new_figure(size=(9.0, 5.0))
    for place, (method, cells) in enumerate(merges(result).items()):
        cells = sorted(cells, key=lambda cell: cell.facts["experts_kl"])
        errors = [1.96 * cell.facts.get("merge_gap_error", math.nan) for cell in cells]
        panel.errorbar(
            [cell.facts["experts_kl"] for cell in cells], [cell.facts["merge_gap"] for cell in cells], yerr=errors,
            fmt="osv^P*"[place // len(LINES) % 6], color=LINES[place % len(LINES)], markersize=6, elinewidth=0.8,
            label=method,
        )  # fmt: skip
    panel.set_xlim(left=0.0)
    panel.set_ylim(bottom=0.0)
    panel.set_xlabel("sequence KL of the experts to the base, mean (nats)")
    panel.set_ylabel("KL of the mixture to the merge (nats)")
    panel.set_title("What merging weights loses")
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _wins(cell: CellResult, axis: Axis) -> float | None:
    return next((row.mean for row in cell.rows if (row.judge, row.label) == (axis.judge, axis.decoder)), None)


def _bars(one: Interval) -> list[list[float]] | None:
    return None if math.isnan(one.low) else [[max(0.0, one.mean - one.low)], [max(0.0, one.high - one.mean)]]
