"""`infalign theory`: every catalogue transform against the optimum, at one KL or one beta. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infalign.runtime.console import say
from infalign.theory import transforms
from infalign.theory.optimum import optimal_transform
from infalign.theory.procedures import BestOfN, Procedure
from infalign.theory.tilted import tilt

TILTS = (5.0, 10.0)


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
    say(f"  {'transform':<22}{'beta':>10}{'W_1':>9}{'W':>9}{'to the best':>13}")
    for row in rows:
        gap = row["win_rate"] - best
        say(
            f"  {row['transform']:<22}{row['beta']:>10.5g}{row['win_rate_1']:>9.4f}{row['win_rate']:>9.4f}"
            f"{'' if gap == 0 else f'{100 * gap:+.2f} points':>13}"
        )
    say()
    say(f"  W_1: the standard win rate; W: the win rate when both sides are decoded by {procedure}.")
