"""The page of a sweep, from its `sweep.json`: where every objective lies, and who is ahead at equal KL."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from infalign.evaluation.matched import AtKL
from infalign.evaluation.summary import GOLD, PROXY, DecoderRow
from infalign.evaluation.sweep import MERGED, CellResult, Compared, SweepResult, judged_decoders
from infalign.report.combined_page import GAP, PARETO, combined_tables, draw_gap, draw_pareto, merges, weak_experts
from infalign.report.frontier_plot import draw_frontier
from infalign.report.key_plot import draw_key, plotted_keys
from infalign.report.names import procedure_name
from infalign.report.page import Plot, templates
from infalign.report.style import to_png
from infalign.report.table import ABSENT, Table, markdown, number
from infalign.report.transfer_plot import draw_transfer
from infalign.runtime.artifacts import from_plain, read_json, write_whole
from infalign.runtime.console import clock

FILE = "sweep.json"
TRAINED = 0.8
"""Attainment from which on a cell counts as trained."""


def report_sweep(folder: Path) -> Path:
    """Write `report/index.html` and a plot a decoder, each whole or not at all; returns the page's path."""
    result: SweepResult = from_plain(SweepResult, read_json(folder / FILE, "the sweep"))
    finished = [cell for cell in result.cells if cell.finished]
    curves = {curve.decoder: curve for curve in result.limits}
    plots = []
    for judge, decoder in judged_decoders(finished, list(curves)):
        beside = [] if judge == PROXY else re.sub(r"\W+", " ", judge).lower().split()
        words = ["frontier", *procedure_name(decoder).lower().split(), *beside]
        figure = draw_frontier(finished, result.arms, judge, curves[decoder])
        plots.append(Plot("-".join(words), "", _CAPTION, to_png(figure)))
    keys = [Plot(f"by-{name}", "", _BY_KEY, to_png(draw_key(finished, name))) for name in plotted_keys(finished)]
    crossed = [Plot(name, "", _TRANSFER, png) for name, png in _transfer_plots(result)]
    pareto = [Plot("pareto", "", PARETO, to_png(draw_pareto(result)))] if result.combination.families else []
    pareto += [Plot("merge-gap", "", GAP, to_png(draw_gap(result)))] if merges(result) else []
    for plot in [*plots, *keys, *crossed, *pareto]:
        write_whole(folder / "report" / f"{plot.name}.png", lambda path, png=plot.png: path.write_bytes(png))
    tables = compared_tables(result)
    html = (
        templates()
        .get_template("sweep.html.jinja")
        .render(
            title=f"infalign sweep \N{MIDDLE DOT} {folder.resolve().name}",
            headline=headline(result),
            outcome=_outcome(result),
            remarks=remarks(result),
            failures=[cell for cell in result.cells if not cell.finished],
            noted=_by_note(finished),
            plots=plots,
            keys=keys,
            crossed=crossed,
            pareto=pareto,
            confidence=result.confidence,
            combined=[(title, table, markdown(table)) for title, table in combined_tables(result)],
            compared=[(title, table, markdown(table)) for title, table in tables],
            cells=cell_table(result.cells),
        )
    )
    page = folder / "report" / "index.html"
    write_whole(page, lambda path: path.write_text(html, encoding="utf-8"))
    return page


_CAPTION = (
    "A point is a cell with its interval over prompts; the line joins the cells of one objective and seed as the "
    "comparison interpolates them. The black curve is the most that any method reaches at a KL, for a reward without "
    "ties."
)


_BY_KEY = (
    "A point is a cell under the decoder that it was trained for; lines join means over seeds. Attainment is the share "
    "of what any method can gain at the measured KL."
)
_TRANSFER = (
    "A row is what was trained for, a column what decodes. Bold: the best of its column; the deeper the red, the "
    "further behind it. Grey: the exact policy for the row's N at the measured KL, for a reward without ties. N = 1 is "
    "the identity transform."
)


def _transfer_plots(result: SweepResult) -> list[tuple[str, bytes]]:
    """A name and a PNG for each family and kind of policies that were trained for several N."""
    groups = dict.fromkeys((box.family, box.kind) for box in result.transfers)
    found = []
    for family, kind in groups:
        figure = draw_transfer([box for box in result.transfers if (box.family, box.kind) == (family, kind)])
        found.append((f"transfer-{family.lower()}-{kind}", to_png(figure)))
    return found


def compared_tables(result: SweepResult) -> list[tuple[str, Table]]:
    """For each judge and decoder a title and the objectives at each KL, best first, the reference set off."""
    groups = dict.fromkeys((one.judge, one.decoder) for one in result.compared)
    level = f"{100 * result.confidence:g} %"
    heads = ("KL", "objective", "win rate", f"{level} interval", "attainment", "regret ratio", "ahead of reference")
    heads = (*heads, f"{level} interval", "theory", "by seed")
    found = []
    for judge, decoder in groups:
        rows = [one for one in result.compared if (one.judge, one.decoder) == (judge, decoder)]
        rows.sort(key=lambda one: (one.at.kl, math.inf if math.isnan(one.at.win) else -one.at.win))
        cells = tuple(_compared_cells(one, result.reference) for one in rows)
        marked = tuple(at for at, one in enumerate(rows) if one.arm == result.reference)
        judged = ", judged by the gold reward" if judge == GOLD else "" if judge == PROXY else f", judged by {judge}"
        title = f"Decoded by {procedure_name(decoder)}{judged}; reference: {result.reference}"
        found.append((title, Table(heads, cells, marked)))
    return found


def _compared_cells(one: Compared, reference: str) -> tuple[str, ...]:
    at = one.at
    attained = (at.win - 0.5) / (one.limit - 0.5) if one.limit > 0.5 else math.nan
    regret = (1.0 - at.win) / (1.0 - one.limit) if one.limit < 1.0 else math.nan
    itself = one.arm == reference
    return (
        f"{at.kl:g}",
        one.arm,
        number(at.win, 3),
        _interval(at.low, at.high, 3),
        number(attained, 2),
        number(regret, 1),
        ABSENT if itself else _signed(at.difference),
        ABSENT
        if itself or math.isnan(at.difference_low)
        else f"[{_signed(at.difference_low)}, {_signed(at.difference_high)}]",
        ABSENT if itself else _signed(one.predicted),
        ABSENT if itself or len(at.by_seed) < 2 else _by_seed(at),
    )


def _by_seed(at: AtKL) -> str:
    return ", ".join(f"{seed}: {_signed(gap)}" for seed, gap in zip(at.seeds, at.by_seed, strict=True))


def cell_table(cells: Sequence[CellResult]) -> Table:
    """Every cell under the decoder that it was trained for."""
    heads = ("cell", "KL", "win rate", "interval", "limit", "attainment", "regret ratio", "exact", "length", "time")
    return Table(heads, tuple(_cell_cells(cell) for cell in cells))


def _cell_cells(cell: CellResult) -> tuple[str, ...]:
    row = next((row for row in cell.rows if _is_own(cell, row)), None)
    if row is None:
        return (cell.name, *[ABSENT] * 9)
    return (
        cell.name,
        f"{number(cell.kl, 3)} ± {number(cell.kl_error, 3)}",
        number(row.mean, 3),
        _interval(row.low, row.high, 3),
        number(row.limit, 3),
        number(row.attainment, 2),
        number(row.regret_ratio, 1),
        number(cell.exact.get(row.label), 3),
        number(cell.length, 1),
        clock(cell.seconds),
    )


def headline(result: SweepResult) -> str:
    """Who is ahead at the middle KL under the first decoder, in a sentence."""
    best = _best(result)
    if best is None:
        made = f"{sum(cell.finished for cell in result.cells)} of {result.planned} cells are finished"
        return f"{made}. No comparison at equal KL yet: {result.lacking or 'nothing is measured at the same KL'}."
    at = best.at
    text = f"Decoded by {procedure_name(best.decoder)} at {at.kl:g} nats, {best.arm} wins most: {100 * at.win:.1f} %"
    if best.arm == result.reference:
        rivals = [one for one in _rows_beside(result, best) if one is not best]
        if not rivals:
            return f"{text}; nobody else was measured there."
        second = max(rivals, key=lambda one: one.at.win)
        gap, low, high = (
            -100 * one for one in (second.at.difference, second.at.difference_high, second.at.difference_low)
        )
        sure = "" if low > 0 else " (the interval includes 0: no evidence that it is ahead)"
        return f"{text}, ahead of {second.arm} by {gap:.1f} points [{low:.1f}, {high:.1f}]{sure}; it is the reference."
    sure = "" if at.difference_low > 0 else " (the interval includes 0: no evidence that it is ahead)"
    return (
        f"{text}, ahead of {result.reference} by {100 * at.difference:.1f} points "
        f"[{100 * at.difference_low:.1f}, {100 * at.difference_high:.1f}]{sure}."
    )


def _outcome(result: SweepResult) -> str:
    best = _best(result)
    if best is None:
        return "unknown"
    return "better" if best.at.difference_low > 0 else "unclear"


def _best(result: SweepResult) -> Compared | None:
    """The objective with the highest win rate, judged by the reward, at the middle KL that is measured."""
    rows = [one for one in result.compared if one.judge == PROXY and not math.isnan(one.at.difference)]
    rows = [one for one in rows if one.decoder == rows[0].decoder]
    kls = sorted({one.at.kl for one in rows})
    middle = [one for one in rows if one.at.kl == kls[len(kls) // 2]]
    return max(middle, key=lambda one: one.at.win, default=None)


def _rows_beside(result: SweepResult, one: Compared) -> list[Compared]:
    """Everybody under the same judge and decoder at the same KL, who was measured there."""
    where = (one.judge, one.decoder, one.at.kl)
    return [
        other
        for other in result.compared
        if (other.judge, other.decoder, other.at.kl) == where and not math.isnan(other.at.difference)
    ]


def _by_note(cells: Sequence[CellResult]) -> list[tuple[str, list[str]]]:
    """Every note with the cells that it is about."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for note in cell.notes:
            found.setdefault(note, []).append(cell.name)
    return list(found.items())


def remarks(result: SweepResult) -> list[str]:
    """What a reader of the headline needs beside it."""
    finished = [cell for cell in result.cells if cell.finished]
    lines = [f"{len(finished)} of {result.planned} cells are finished, {len(result.cells) - len(finished)} failed."]
    seeds = len({cell.seed for cell in finished})
    if seeds > 1:
        lines.append(
            f"Means over {seeds} seeds. Intervals are over prompts; each seed's difference stands beside them."
        )
    else:
        lines.append("One seed of training: another one may come out differently by more than the interval.")
    few = [row.low for cell in finished for row in cell.rows if math.isnan(row.low)]
    if few:
        lines.append("A single test prompt has no intervals: raise num_test_prompts.")
    trained = [cell for cell in finished if not cell.transform.startswith(MERGED)]
    reached = [row.attainment for cell in trained for row in cell.rows if _is_own(cell, row)]
    low = [one for one in reached if one < TRAINED]  # NaN is not known, and not low
    if low:
        lines.append(
            f"{len(low)} of {len(reached)} cells reach {min(low):.2f} to {max(low):.2f} of what is possible at their "
            "KL: where training is too short, differences are its own rather than the objectives'. Raise max_steps "
            "(and lower learning_rate) until attainment stops rising."
        )
    lines += weak_experts(result.combination)
    noted = sum(bool(cell.notes) for cell in finished)
    if noted:
        lines.append(f"{noted} of {len(finished)} cells have notes on what limited them.")
    if result.lacking and _best(result) is not None:  # without one the headline says it
        lines.append(f"{result.lacking}.")
    return lines


def _is_own(cell: CellResult, row: DecoderRow) -> bool:
    """Whether a row is of the decoder that its cell was trained for; of several objectives, of one with a weight."""
    if any(one.weight > 0 for one in cell.rows):
        return row.weight > 0
    return (row.judge, row.label) == (PROXY, cell.procedure)


def _interval(low: float, high: float, digits: int) -> str:
    return ABSENT if math.isnan(low) else f"[{low:.{digits}f}, {high:.{digits}f}]"


def _signed(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
