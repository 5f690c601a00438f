"""Tables as rows of text: the page's and the Markdown one say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infalign.report.evaluation_plot import ordered_labels
from infalign.report.names import procedure_name
from infalign.report.training_plot import Log, series

ABSENT = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """Column heads, rows of cells, and the rows (by index) that are set off."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[int, ...] = ()


def win_rate_table(evaluation: Mapping[str, Any]) -> Table:
    """Every decoder and judge, with limit, attainment and regret ratio; the trained procedure is marked.

    The limit is that of the reward that decodes, so a gold judge's rows have none.
    """
    labels = ordered_labels(evaluation["win_rates"])
    rows = sorted(evaluation["win_rates"], key=lambda row: (row["judge"] != "reward", labels.index(row["label"])))
    heads = ("decoder", "judge", "win rate", "interval", "limit", "attainment", "regret ratio", "at equal length")
    marked = tuple(at for at, row in enumerate(rows) if row["label"] == evaluation["procedure"])
    return Table(heads, tuple(_win_rate_row(row) for row in rows), marked)


def _win_rate_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    own = row["judge"] == "reward"
    return (
        procedure_name(row["label"]),
        row["judge"],
        number(row["mean"], 3),
        f"{number(row['low'], 3)} to {number(row['high'], 3)}",
        number(row["limit"], 3) if own else ABSENT,
        number(row["attainment"], 2) if own else ABSENT,
        number(row["regret_ratio"], 1) if own else ABSENT,
        number(row.get("length_controlled", {}).get("mean"), 3),
    )


def sample_table(evaluation: Mapping[str, Any]) -> Table:
    """What the samples of base and policy look like."""
    rows = []
    for name, label, show in (
        ("reward", "mean reward", lambda value: number(value, 4)),
        ("tokens", "mean tokens", lambda value: number(value, 1)),
        ("clipped", "cut at the length limit", share),
        ("duplicates", "duplicates of an earlier sample", share),
    ):
        rows.append((label, *(show(evaluation[side][name]) for side in ("base", "policy"))))
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

    >>> number(0.71234, 3), number(float("nan"), 3), number(None, 1)
    ('0.712', '\N{EN DASH}', '\N{EN DASH}')
    """
    return ABSENT if value is None or math.isnan(value) else f"{value:.{digits}f}"


def share(value: float) -> str:
    """A share in per cent.

    >>> share(0.0312)
    '3.1 %'
    """
    return ABSENT if math.isnan(value) else f"{100 * value:.1f} %"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mean(values: np.ndarray) -> str:
    mean = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    return ABSENT if math.isnan(mean) else f"{mean:.4g}"
