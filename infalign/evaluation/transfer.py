"""Trained for N, decoded with another N': what a sweep measured, and what the exact policies win."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infalign.evaluation.summary import PROXY
from infalign.theory.objective import objective
from infalign.theory.procedures import BestOfN, Procedure, WorstOfN
from infalign.theory.transforms import identity
from infalign.types import InputError

if TYPE_CHECKING:
    from infalign.evaluation.sweep import CellResult

FAMILIES = {"BestOfN": BestOfN, "WorstOfN": WorstOfN}


@dataclass(frozen=True)
class Transfer:
    """One pair of N and N', averaged over seeds.

    Attributes:
        family: "BestOfN" or "WorstOfN".
        kind: "optimal" or "direct", what the policies were trained with.
        target_kl: that the cells were asked for, nats.
        trained, decoded: N and N'; N = 1 is the identity transform, which is the optimum for one sample.
        kl: measured, nats.
        win: measured win rate under the decoder of N'.
        exact: that of the exact policy for N at the measured KL, for a reward without ties.
    """

    family: str
    kind: str
    target_kl: float
    trained: int
    decoded: int
    kl: float
    win: float
    exact: float


def transfers(cells: Sequence[CellResult]) -> tuple[Transfer, ...]:
    """Every pair, of families and kinds in which finished cells were trained for at least two N.

    Baselines on the raw reward and other transforms have no such matrix and are left out.
    """
    groups: dict[tuple[str, str, float], dict[int, list[CellResult]]] = {}
    for cell in cells:
        target = cell.keys.get("target_kl")
        known = _trained_for(cell)
        if known is None or not isinstance(target, (int, float)):
            continue
        family, kind, n = known
        for other in [kind] if kind else ["optimal", "direct"]:
            for one in [family] if kind else list(FAMILIES):
                groups.setdefault((one, other, float(target)), {}).setdefault(n, []).append(cell)
    found: list[Transfer] = []
    for (family, kind, target), by_n in groups.items():
        if len(set(by_n) - {1}) < 2:
            continue
        for n, group in sorted(by_n.items()):
            found += _row(family, kind, target, n, group)
    return tuple(found)


def _trained_for(cell: CellResult) -> tuple[str, str, int] | None:
    """Family, kind and N of a cell; no kind is the identity transform, None is an objective without an N."""
    family, _, rest = cell.procedure.partition("(")
    size = rest.rstrip(")")
    if cell.transform.startswith("Identity"):
        return family, "", 1
    kind = "optimal" if cell.transform.startswith("OptimalTransform") else "direct"
    if (kind == "direct" and cell.transform != "direct") or family not in FAMILIES or not size.isdigit():
        return None
    return family, kind, int(size)


def _row(family: str, kind: str, target: float, n: int, cells: Sequence[CellResult]) -> list[Transfer]:
    """One N under every decoder of its family that all of its cells were measured under."""
    measured = [
        {row.n: row.mean for row in cell.rows if row.judge == PROXY and row.label == f"{family}({row.n})"}
        for cell in cells
    ]
    shared = sorted(set.intersection(*(set(one) for one in measured)))
    kl = float(np.mean([cell.kl for cell in cells]))
    rule = FAMILIES[family]
    return [
        Transfer(
            family,
            kind,
            target,
            n,
            decoded,
            kl,
            float(np.mean([one[decoded] for one in measured])),
            exact(rule(n), kl, rule(decoded)),
        )
        for decoded in shared
    ]


def exact(trained: Procedure, kl: float, decoder: Procedure) -> float:
    """What the exact policy for one procedure wins under another one at `kl` nats; NaN where there is no such policy.

    >>> round(exact(BestOfN(4), 1.0, BestOfN(4)), 4), round(exact(BestOfN(1), 1.0, BestOfN(4)), 4)
    (0.9411, 0.877)
    """
    try:
        policy = objective(trained, identity if trained.n == 1 else None, kl=kl).policy
    except InputError:
        return math.nan
    return math.nan if policy is None else float(policy.win_rate(decoder))
