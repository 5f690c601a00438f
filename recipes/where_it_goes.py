"""What lies between a sweep's win rates and the limit at their KL: `python recipes/where_it_goes.py outputs/SWEEP`.

From the samples that each cell was measured on, rewards in units of the base's spread on the same prompt:

    limit         the most that any method reaches at the sequence KL
    of the ranks  the most at the KL of the policy's ranks among the base's samples: KL that moves no rank is lost
    normal        what normal rewards with the policy's mean and spread win: a shape that is a mere shift and stretch
    measured

and beside them mean and spread of the policy, and those of the optimum for the decoder at the KL of the ranks. Where
`normal` is near what was measured and the spread far from the optimum's, the policy has not learned the optimum's
shape.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from infalign.calibration.quantile import calibrate
from infalign.calibration.table import SampleTable
from infalign.evaluation.limits import limit_at
from infalign.evaluation.sweep import CellResult
from infalign.report.table import Table, plain_text
from infalign.runtime.artifacts import from_plain, read_json
from infalign.theory.objective import objective
from infalign.theory.procedures import BestOfN, Procedure

Floats = NDArray[np.float64]
Z_Q = np.linspace(-8.0, 8.0, 8001)
"""A grid of normal scores."""


def rewards(cell: Path) -> tuple[list[Floats], list[Floats]]:
    """Of policy and base, a row a prompt."""
    sides = []
    for side in ("policy", "base"):
        folder = cell / "evaluation" / side
        table = SampleTable.open(folder, json.loads((folder / "plan.json").read_text())["parts"])
        sides.append(table.rewards(next(folder.glob("scores-*")).name.removeprefix("scores-")))
    keys = [key for key in sides[0] if key in sides[1]]
    return [sides[0][key] for key in keys], [sides[1][key] for key in keys]


def kl_of_ranks(policy: list[Floats], base: list[Floats]) -> float:
    """KL to uniform of the policy's ranks among M base samples, M + 1 of them, averaged over prompts; nats."""
    count = base[0].size
    below = np.concatenate(list(calibrate(policy, base))) * count
    q = np.bincount(np.rint(below).astype(int), minlength=count + 1) / below.size * (count + 1)
    return float(np.mean(q[q > 0] * np.log(q[q > 0])))


def in_units(policy: list[Floats], base: list[Floats]) -> Floats:
    """The policy's rewards less the base's mean, by the base's standard deviation, prompt by prompt."""
    rows = [(ours - theirs.mean()) / theirs.std(ddof=1) for ours, theirs in zip(policy, base, strict=True)]
    return np.concatenate(rows)


def normal_wins(mean: float, spread: float, procedure: Procedure) -> float:
    """How often decoded N(mean, spread^2) beats decoded N(0, 1): `1 - int G(F(z)) dG(Phi(z))`.

    >>> round(normal_wins(0.0, 1.0, BestOfN(4)), 4), round(normal_wins(1.0, 1.0, BestOfN(1)), 4)
    (0.5, 0.7602)
    """
    ours, theirs = (procedure.cdf(one) for one in (stats.norm.cdf(Z_Q, mean, spread), stats.norm.cdf(Z_Q)))
    return 1.0 - float(np.sum((ours[1:] + ours[:-1]) / 2.0 * np.diff(theirs)))


def optimum(procedure: Procedure, kl: float) -> tuple[float, float]:
    """Mean and spread of the optimal policy's normal scores at `kl` nats."""
    u = (np.arange(100_000) + 0.5) / 100_000
    aim = objective(procedure, kl=kl).policy
    assert aim is not None
    density, z = aim.density(u), stats.norm.ppf(u)
    mean = float(np.mean(z * density))
    return mean, float(np.sqrt(np.mean(z * z * density) - mean**2))


def row(cell: CellResult, folder: Path, procedure: Procedure) -> tuple[str, ...]:
    """The row of a cell under a decoder."""
    policy, base = rewards(folder)
    scores, ranks = in_units(policy, base), kl_of_ranks(policy, base)
    mean, spread = float(scores.mean()), float(scores.std())
    measured = next((one.mean for one in cell.rows if one.label == repr(procedure)), float("nan"))
    wins = limit_at(procedure, cell.kl), limit_at(procedure, ranks), normal_wins(mean, spread, procedure), measured
    shown = [f"{one:.3f}" for one in (cell.kl, ranks, *wins)]
    return (cell.name, repr(procedure), *shown, *(f"{one:.2f}" for one in (mean, spread, *optimum(procedure, ranks))))


def main() -> None:
    """Print a row for each finished cell and N."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--n", type=int, nargs="+", default=[4, 16])
    arguments = parser.parse_args()
    rows = []
    for path in sorted((arguments.sweep / "results").glob("*.json")):
        cell = from_plain(CellResult, read_json(path, "the cell"))
        if cell.finished:
            rows += [
                row(cell, arguments.sweep / "cells" / cell.name, procedure) for procedure in map(BestOfN, arguments.n)
            ]
    heads = ("cell", "decoder", "KL", "of ranks", "limit", "of the ranks", "normal", "measured")
    heads = (*heads, "mean", "spread", "optimum's", "spread")
    print("\n".join(plain_text(Table(heads, tuple(rows)))))


if __name__ == "__main__":
    main()
