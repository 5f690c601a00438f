"""Win rate against KL: what was measured, beside the most that any method reaches.

theory: `W*(KL)` is `infalign.theory.optimum.win_rate_limit`; the curves of other transforms are `tilt(...)` at the same
KL, decoded by the same procedure (arXiv:2412.19792).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import CARETDOWN
from numpy.typing import NDArray

from infalign.report.names import procedure_name
from infalign.report.style import BASE, LIMIT, MUTED, POLICY, new_figure, percent, styled
from infalign.theory.optimum import LARGEST_KL, win_rate_limit
from infalign.theory.procedures import Procedure
from infalign.theory.tilted import tilt
from infalign.theory.transforms import identity, log, log_mirror
from infalign.types import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One measured policy: KL in nats with the half-width of its interval, win rate with its interval.

    `tie_limit` is the limit with the reward's ties; `aim` is where the trained transform's exact optimum lies,
    (KL, win rate), or None when it is not known.
    """

    kl: float
    kl_half_width: float
    win_rate: float
    low: float
    high: float
    tie_limit: float | None = None
    aim: tuple[float, float] | None = None

    @property
    def shows_aim(self) -> bool:
        """True when `aim` lies within the plot."""
        return self.aim is not None and self.aim[0] <= kl_grid(self.kl, self.aim[0])[-1]


@styled()
def draw_limit(procedure: Procedure, point: Point) -> Figure:
    """The limit curve from 0 to about twice the measured KL, with the measured point on it."""
    figure, (axes,) = new_figure(size=(6.4, 5.0))
    kl_Q = kl_grid(point.kl, point.aim[0] if point.aim else 0.0)
    limit_Q = win_rate_limit(procedure, kl_Q)
    axes.fill_between(kl_Q, limit_Q, 1.0, color=MUTED, alpha=0.10, linewidth=0)
    axes.plot(kl_Q, limit_Q, color=LIMIT, label="limit")
    axes.text(0.02, 0.97, "no method reaches here", color=MUTED, va="top", transform=axes.transAxes)
    for name, transform, line in comparisons(procedure):
        axes.plot(kl_Q, tilted_win_rates(transform, procedure, kl_Q), line, color=MUTED, linewidth=1.4, label=name)
    _draw_point(axes, point)
    _frame(axes, point, kl_Q[-1], float(limit_Q[-1]))
    axes.set_title(f"Win rate against its base, both decoded by {procedure_name(repr(procedure))}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def kl_grid(kl: float, aim: float = 0.0, count: int = 40) -> Floats:
    """KLs from 0 to twice `kl` (at least 0.1 nats; a little more where that shows `aim`), denser near 0.

    >>> kl_grid(0.01, count=3).round(3).tolist()
    [0.0, 0.025, 0.1]
    """
    end = max(0.1, 2.0 * kl)
    if end < 1.1 * aim <= 1.5 * end:
        end = 1.1 * aim
    return min(end, LARGEST_KL) * np.linspace(0.0, 1.0, count) ** 2


def comparisons(procedure: Procedure) -> list[tuple[str, Any, str]]:
    """(name, transform, line style) of what the limit is compared with; identity is the limit itself for one sample."""
    falling = procedure.monotone == "decreasing"
    distilled = (
        ("transform \N{MINUS SIGN}log(1\N{MINUS SIGN}u)", log_mirror, ":")
        if falling
        else ("log: Best-of-N distillation", log, ":")
    )
    plain = ("identity: win-rate RLHF", identity, "--")
    return [distilled] if procedure.n == 1 else [plain, distilled]


def tilted_win_rates(transform: Any, procedure: Procedure, kl_Q: Floats) -> Floats:
    """(Q,) win rates of the policies tilted by `transform` at each KL; 1/2 at 0, NaN where it reaches no such KL."""
    return np.array([0.5 if kl == 0 else _tilted_win_rate(transform, procedure, float(kl)) for kl in kl_Q])


def _tilted_win_rate(transform: Any, procedure: Procedure, kl: float) -> float:
    try:
        return tilt(transform, kl=kl).win_rate(procedure)
    except InputError:  # a bounded transform ends at some KL
        return float("nan")


def _draw_point(axes: Axes, point: Point) -> None:
    down, up = max(point.win_rate - point.low, 0.0), max(point.high - point.win_rate, 0.0)
    bars: dict[str, Any] = {} if np.isnan(down + up) else {"yerr": [[down], [up]]}
    if np.isfinite(point.kl_half_width):
        bars["xerr"] = [[point.kl_half_width]]
    axes.errorbar(
        [point.kl], [point.win_rate], **bars, fmt="o", color=POLICY, markersize=8, capsize=3, zorder=5, label="measured"
    )
    if point.tie_limit is not None:
        axes.plot(
            [point.kl],
            [point.tie_limit],
            marker=CARETDOWN,
            linestyle="",
            color=BASE,
            markersize=11,
            zorder=6,
            label="limit with this reward's ties",
        )
    if point.aim is not None and point.shows_aim:
        style: dict[str, Any] = {"color": "white", "markeredgecolor": POLICY, "markersize": 7, "zorder": 4}
        axes.plot(*point.aim, "D", label="aim of training", **style)


def _frame(axes: Axes, point: Point, end: float, top: float) -> None:
    axes.axhline(0.5, color=MUTED, linewidth=0.8)
    heights = [point.win_rate, top, *(value for value in (point.low, point.high, point.tie_limit) if value is not None)]
    heights = [value for value in heights if np.isfinite(value)]
    axes.set_ylim(max(min([0.5, *heights]) - 0.03, 0.0), min(max(heights) + 0.04, 1.0))
    axes.set_xlim(0.0, end)
    axes.set_xlabel("sequence KL to the base policy (nats)")
    axes.set_ylabel("win rate")
    percent(axes.yaxis)
