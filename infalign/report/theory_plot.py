"""`infalign theory --plot`: transforms, the policies they aim for, and their win rates against the limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from infalign.report.limit_plot import kl_grid, tilted_win_rates
from infalign.report.names import procedure_name, transform_name
from infalign.report.style import INK, LINES, MUTED, new_figure, percent, styled, to_png
from infalign.report.transform_plot import quantile_grid
from infalign.runtime.artifacts import write_whole
from infalign.theory.optimum import OptimalTransform, win_rate_limit
from infalign.theory.procedures import Procedure
from infalign.theory.tilted import TiltedPolicy

Floats = NDArray[np.float64]

_POINTS = 24


def draw_theory(procedure: Procedure, optimum: OptimalTransform, policies: Sequence[TiltedPolicy], path: Path) -> None:
    """Draw the comparison into `path`, a PNG, whole or not at all.

    Args:
        procedure: decodes both sides.
        optimum: the optimal transform at some KL.
        policies: other transforms' policies at the same KL.
        path: where the PNG goes.
    """
    png = to_png(theory_figure(procedure, optimum, policies))
    write_whole(path, lambda temporary: temporary.write_bytes(png))


@styled()
def theory_figure(procedure: Procedure, optimum: OptimalTransform, policies: Sequence[TiltedPolicy]) -> Figure:
    """Four panels: Phi scaled to [0, 1], q, win rate against KL, and what is lost against the limit."""
    figure, (phi, density, rate, loss) = new_figure(2, 2, (11.0, 8.2))
    u_Q = quantile_grid()
    phi.plot(u_Q, unit_range(optimum(u_Q)), color=INK, linewidth=2.6, label="optimal")
    density.plot(u_Q, optimum.density(u_Q), color=INK, linewidth=2.6)
    kl_Q = kl_grid(float(optimum.kl), count=_POINTS)
    limit_Q = win_rate_limit(procedure, kl_Q)
    rate.plot(kl_Q, limit_Q, color=INK, linewidth=2.6)
    loss.axhline(0.0, color=INK, linewidth=2.6)
    for at, policy in enumerate(policies):
        style: dict[str, Any] = {"color": LINES[at % len(LINES)], "linewidth": 1.7}
        phi.plot(u_Q, unit_range(policy.transform(u_Q)), label=transform_name(policy.transform), **style)
        density.plot(u_Q, policy.density(u_Q), **style)
        win_rates_Q = tilted_win_rates(policy.transform, procedure, kl_Q)
        rate.plot(kl_Q, win_rates_Q, **style)
        loss.plot(kl_Q, 100.0 * (win_rates_Q - limit_Q), **style)
    _label(phi, density, rate, loss, float(optimum.kl), float(kl_Q[-1]))
    figure.suptitle(f"Transforms for {procedure_name(repr(procedure))} at KL {optimum.kl:.3g} nats", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=min(len(policies) + 1, 6))
    return figure


def unit_range(values: Floats) -> Floats:
    """Values shifted and scaled to [0, 1]; a tilted policy at a given KL does not change by it.

    >>> unit_range(np.array([2.0, 3.0, 6.0])).tolist()
    [0.0, 0.25, 1.0]
    """
    values = np.asarray(values, dtype=np.float64)
    return (values - values.min()) / max(float(np.ptp(values)), 1e-300)


def _label(phi: Axes, density: Axes, rate: Axes, loss: Axes, kl: float, end: float) -> None:
    phi.set_title("Transform Φ(u), scaled to [0, 1]")
    density.set_title("Policy it aims for, q(u) (log scale)")
    rate.set_title("Win rate as decoded")
    loss.set_title("Difference to the limit (percentage points)")
    density.axhline(1.0, color=MUTED, linewidth=1.0, linestyle="--")
    tallest = max(float(np.max(line.get_ydata())) for line in density.get_lines())
    density.set_yscale("log")
    density.set_ylim(0.02, 1.5 * tallest)
    for axes in (phi, density):
        axes.set_xlabel("calibrated reward u")
        axes.set_xlim(0.0, 1.0)
    for axes in (rate, loss):
        axes.axvline(kl, color=MUTED, linewidth=1.0, linestyle="--")
        axes.set_xlabel("sequence KL to the base policy (nats)")
        axes.set_xlim(0.0, end)
    percent(rate.yaxis)
