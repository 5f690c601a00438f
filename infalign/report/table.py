"""Tables as rows of text: a terminal, the page and Markdown say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from infalign.evaluation.summary import PROXY, DecoderRow, ordered_labels
from infalign.report.names import procedure_name

ABSENT = "\N{EN DASH}"
_LARGE = 1e5


@dataclass(frozen=True)
class Table:
    """Column heads, rows of cells, and the rows (by index) that are set off."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[int, ...] = ()


def win_rate_table(rows: Sequence[DecoderRow], trained: str, confidence: float) -> Table:
    """Every decoder and judge; what was trained for is marked: rows with a weight, or else those labelled `trained`.

    Columns that say nothing are left out: the judge where there is one, limits where the KL is not known.
    """
    labels = ordered_labels(rows)
    ordered = sorted(rows, key=lambda row: (row.judge != PROXY, labels.index(row.label)))
    level = f"{100 * confidence:g} %"
    heads = ("decoder", "judge", "weight", "win rate", f"{level} interval", "limit", "attainment", "regret ratio")
    heads = (*heads, "decoded reward", "at equal length")
    cells = [_cells(row) for row in ordered]
    weighted = any(row.weight > 0 for row in rows)
    silent = {at for at, column in enumerate(zip(*cells, strict=True)) if set(column) == {ABSENT}}
    if len({row.judge for row in rows}) == 1:
        silent.add(1)
    kept = [at for at in range(len(heads)) if at not in silent]
    return Table(
        tuple(heads[at] for at in kept),
        tuple(tuple(row[at] for at in kept) for row in cells),
        tuple(at for at, row in enumerate(ordered) if (row.weight > 0 if weighted else row.label == trained)),
    )


def _cells(row: DecoderRow) -> tuple[str, ...]:
    controlled = row.length_controlled
    length = ABSENT if math.isnan(controlled.mean) else number(controlled.mean, 3)
    if not math.isnan(controlled.low):
        length += f" [{controlled.low:.3f}, {controlled.high:.3f}]"
    rewards = f"{number(row.base_reward, 3)} \N{RIGHTWARDS ARROW} {number(row.policy_reward, 3)}"
    return (
        procedure_name(row.label),
        row.judge,
        ABSENT if math.isnan(row.weight) else f"{row.weight:g}",
        number(row.mean, 3),
        ABSENT if math.isnan(row.low) else f"[{row.low:.3f}, {row.high:.3f}]",
        number(row.limit, 3),
        number(row.attainment, 2),
        number(row.regret_ratio, 1),
        ABSENT if math.isnan(row.base_reward) else rewards,
        length,
    )


def plain_text(table: Table) -> list[str]:
    """The table's lines for a terminal, columns aligned; set-off rows begin with a star.

    >>> plain_text(Table(("a", "long head"), (("1", "2"), ("345", "6")), (1,)))
    ['  a    long head', '  1    2', '* 345  6']
    """
    widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    marks = ["* " if at in table.marked else "  " for at in range(len(table.rows))]
    return ["  " + line(table.heads), *(mark + line(row) for mark, row in zip(marks, table.rows, strict=True))]


def markdown(table: Table) -> str:
    """The table in Markdown; set-off rows are bold.

    >>> print(markdown(Table(("a", "b"), (("1", "2"),), (0,))))
    | a | b |
    |---|---|
    | **1** | **2** |
    """
    rows = [_line([f"**{cell}**" if at in table.marked else cell for cell in row]) for at, row in enumerate(table.rows)]
    return "\n".join([_line(table.heads), "|" + "---|" * len(table.heads), *rows])


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals, or a dash where there is none.

    >>> number(0.71234, 3), number(float("nan"), 3), number(None, 1), number(2.5e11, 1)
    ('0.712', '\N{EN DASH}', '\N{EN DASH}', '2.5e+11')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:.{digits}f}" if abs(value) < _LARGE else f"{value:.{digits}e}"


def share(value: float) -> str:
    """A share in per cent.

    >>> share(0.0312)
    '3.1 %'
    """
    return ABSENT if math.isnan(value) else f"{100 * value:.1f} %"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
