"""`infalign theory`: every catalogue transform against the optimum, at one KL or one beta. Loads no torch."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infalign.runtime.config import check
from infalign.runtime.console import say
from infalign.stages.objective import find_procedure
from infalign.theory import transforms
from infalign.theory.optimum import optimal_transform
from infalign.theory.procedures import BUILT_IN, BestOfN, Procedure
from infalign.theory.tilted import tilt
from infalign.types import InputError

TILTS = (5.0, 10.0)


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of `infalign theory`."""
    parser.add_argument("--procedure", default="best_of_n", help=f"{', '.join(BUILT_IN)}, or path.py:name")
    parser.add_argument("--n", type=int, help="candidates drawn [4]")
    parser.add_argument("--k", type=int, help="for kth_of_n: the k-th best; for top_of_n and bottom_of_n: one of the k")
    parser.add_argument("--tilt", type=float, help="for soft_best_of_n")
    parser.add_argument("--pmf", type=float, nargs="+", help="for random_n: P(N=1) P(N=2) ...")
    parser.add_argument("--procedure_kwargs", default="{}", help="as in a recipe, e.g. '{k: 2}'")
    parser.add_argument("--kl", type=float, help="nats; give exactly one of --kl and --beta")
    parser.add_argument("--beta", type=float)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--plot", metavar="FILE.png", help="draw transforms, densities and win rates")


def theory_verb(given: Namespace) -> None:
    """`theory` of parsed arguments."""
    if given.plot and Path(given.plot).suffix.lower() != ".png":
        raise InputError(f"--plot writes a PNG, got {given.plot!r}: name it FILE.png")
    kwargs = check({}, {"procedure_kwargs": given.procedure_kwargs}, {"procedure_kwargs": dict[str, Any]})
    arguments = kwargs["procedure_kwargs"] | {
        name: getattr(given, name) for name in ("k", "tilt", "pmf") if getattr(given, name) is not None
    }
    procedure = find_procedure(given.procedure, given.n, arguments, Path())
    theory(procedure, kl=given.kl, beta=given.beta, as_json=given.json, plot=given.plot)


def theory(
    procedure: Procedure,
    *,
    kl: float | None = None,
    beta: float | None = None,
    as_json: bool = False,
    plot: str | None = None,
) -> list[dict[str, Any]]:
    """Compare transforms for a procedure.

    Args:
        procedure: the decoder.
        kl, beta: give exactly one; with `kl` all rows have that KL, with `beta` the optimum's KL is used.
        as_json: print JSON instead of the table.
        plot: also draw the transforms and their win rates into this PNG.

    Returns:
        One row a transform, best first: name, beta, kl, win_rate_1, win_rate.
    """
    optimum = optimal_transform(procedure, beta=beta, kl=kl)
    rows = [_row("optimal", optimum, optimum, procedure)]
    rows += [_row(label(one), one, tilt(one, kl=optimum.kl), procedure) for one in candidates(procedure)]
    rows.sort(key=lambda row: -row["win_rate"])
    if plot:
        from infalign.report.theory_plot import draw_theory  # noqa: PLC0415 - matplotlib only when asked for

        draw_theory(procedure, optimum, [tilt(one, kl=optimum.kl) for one in candidates(procedure)], Path(plot))
    if as_json:
        say(json.dumps({"procedure": repr(procedure), "kl": float(optimum.kl), "transforms": rows}, indent=2))
    else:
        _tell(procedure, float(optimum.kl), rows)
        if plot:
            say(f"plot: {plot}")
    return rows


def candidates(procedure: Procedure) -> Sequence[Any]:
    """The catalogue, with the falling sign of the exponential and the mirror of log where low quantiles count."""
    falling = procedure.monotone == "decreasing"
    signs = [-t if falling else t for t in TILTS]
    logs = [transforms.log, transforms.log_mirror] if falling else [transforms.log]
    return [transforms.identity, *logs, transforms.normal_icdf, *(transforms.exponential(t) for t in signs)]


def label(transform: Any) -> str:
    """A transform's name as it stands in a recipe, with its tilt: `exponential t=10`."""
    tilt_of = getattr(transform, "t", None)
    return transform.name if tilt_of is None else f"{transform.name} t={tilt_of:g}"


def _row(name: str, transform: Any, policy: Any, procedure: Procedure) -> dict[str, Any]:
    standard = (
        tilt(transform, beta=policy.beta).win_rate(BestOfN(1)) if name == "optimal" else policy.win_rate(BestOfN(1))
    )
    mine = policy.win_rate if name == "optimal" else policy.win_rate(procedure)
    return {
        "transform": name,
        "beta": float(policy.beta),
        "kl": float(policy.kl),
        "win_rate_1": float(standard),
        "win_rate": float(mine),
    }


def _tell(procedure: Procedure, kl: float, rows: list[dict[str, Any]]) -> None:
    best = max(row["win_rate"] for row in rows)
    say(f"{procedure} at KL {kl:.4g} nats: win rates of a policy tilted by each transform, against its base")
    say()
    say(f"  {'transform':<22}{'beta':>10}{'W_1':>9}{'W':>9}{'to the best':>15}")
    for row in rows:
        gap = row["win_rate"] - best
        say(
            f"  {row['transform']:<22}{row['beta']:>10.5g}{row['win_rate_1']:>9.4f}{row['win_rate']:>9.4f}"
            f"{'' if gap == 0 else f'{100 * gap:+.2f} points':>15}"
        )
    say()
    say(f"  W_1: the standard win rate; W: the win rate when both sides are decoded by {procedure}.")
