"""Does a policy look at what it has written? `python recipes/by_position.py outputs/language_model_sweep`.

The reward of `small_language_model.py` is a sum over positions. Its variance on a prompt is the sum of the positions'
variances and of the covariances between them. A policy that moves each token alike, whatever stands before it, can
widen the positions; only one that reacts to the sum so far can make them vary together. Printed for the base and for
each cell, in units of the base's variance on the same prompt, averaged over prompts: the variance of the rewards, the
part of the positions, and that of the covariances.

Beside them what theory says of the best policy of the first kind, for T positions that share a normal reward equally:
a shift m and a spread s with the KL of the policy's ranks, `m^2 / 2 + T (s^2 - 1 - 2 log s) / 2`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

import small_language_model as small
from where_it_goes import kl_of_ranks, normal_wins, rewards

from infalign import BestOfN
from infalign.calibration.table import SampleTable
from infalign.evaluation.sweep import CellResult
from infalign.report.table import Table, plain_text
from infalign.runtime.artifacts import from_plain, read_json
from infalign.theory.procedures import Procedure

Floats = NDArray[np.float64]


def parts(folder: Path) -> tuple[Floats, Floats]:
    """(P,) variance of the rewards, and (P,) sum of the positions' variances, of one side of a cell."""
    table = SampleTable.open(folder, json.loads((folder / "plan.json").read_text())["parts"])
    prompts, found = table.stored_prompt_ids(), []
    for key, samples in sorted(table.samples().items()):
        whole = [one.token_ids for one in samples if len(one.token_ids) == small.COMPLETION]  # nearly all
        adds_MT = small.by_position(prompts[key], np.array(whole))
        found.append((adds_MT.sum(1).var(ddof=1), adds_MT.var(axis=0, ddof=1).sum()))
    whole_P, alone_P = np.array(found).T
    return whole_P, alone_P


def best_memoryless(procedure: Procedure, kl: float, positions: int = small.COMPLETION) -> tuple[float, float]:
    """Win rate and spread of the best shift and spread that positions can do each for itself at `kl` nats.

    >>> win, spread = best_memoryless(BestOfN(16), 0.714)
    >>> round(win, 3), round(spread, 2)
    (0.947, 1.08)
    """
    spreads = np.linspace(0.8, 2.0, 241)
    left = kl - positions * (spreads**2 - 1.0 - 2.0 * np.log(spreads)) / 2.0
    tried = [
        (normal_wins(float(np.sqrt(2.0 * rest)), float(spread), procedure), float(spread))
        for spread, rest in zip(spreads, left, strict=True)
        if rest >= 0
    ]
    return max(tried)


def main() -> None:
    """Print a row for the base and for each finished cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    arguments = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    for path in sorted((arguments.sweep / "results").glob("*.json")):
        cell = from_plain(CellResult, read_json(path, "the cell"))
        if not cell.finished:
            continue
        folder = arguments.sweep / "cells" / cell.name
        base, base_alone = parts(folder / "evaluation" / "base")
        whole, alone = parts(folder / "evaluation" / "policy")
        if not rows:
            share = np.mean(base_alone / base)
            rows.append(("base", "", "", "1.00", f"{share:.2f}", f"{1.0 - share:.2f}", ""))
        procedure = BestOfN(1) if "identity" in cell.arm else BestOfN(int(cell.keys.get("n", 4)))
        win, spread = best_memoryless(procedure, kl_of_ranks(*rewards(folder)))
        measured = next(row.mean for row in cell.rows if row.label == repr(procedure))
        shares = np.mean(whole / base), np.mean(alone / base)
        rows.append(
            (
                cell.name, repr(procedure), f"{measured:.3f}", f"{shares[0]:.2f}", f"{shares[1]:.2f}",
                f"{shares[0] - shares[1]:.2f}", f"{win:.3f}, {spread**2:.2f}",
            )
        )  # fmt: skip
    heads = ("cell", "decoder", "win rate", "variance", "of positions", "of covariances")
    heads = (*heads, "best memoryless: win rate, variance")
    print("\n".join(plain_text(Table(heads, tuple(rows)))))


if __name__ == "__main__":
    main()
