"""What a policy is trained for: a procedure, a transform, a beta, and the KL and win rate that they aim at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.theory.judged import JudgedTransform
from infalign.theory.optimum import OptimalTransform, optimal_transform
from infalign.theory.procedures import Procedure
from infalign.theory.tilted import TiltedPolicy, one_of, tilt
from infalign.theory.truncated import UniformAbove
from infalign.types import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """E[transform(C)] - beta KL, for decoding with a procedure. Made by `objective`.

    `policy` is what it aims at, in base quantiles: None where a transform has no such policy (it diverges on [0, 1],
    and is trained on clipped quantiles all the same). `label` says which transform it is, the same in every run.
    With a `gold_optimal` transform at its own beta `win_rate` is the one under the gold reward.
    """

    procedure: Procedure
    transform: Callable[[ArrayLike], Floats]
    beta: float
    policy: OptimalTransform | JudgedTransform | TiltedPolicy | UniformAbove | None
    label: str

    @property
    def kl(self) -> float | None:
        """The sequence KL aimed at, in nats."""
        return None if self.policy is None else float(self.policy.kl)

    @property
    def win_rate(self) -> float | None:
        """The win rate aimed at, base and policy decoded by the procedure, for a reward without ties."""
        return None if self.policy is None else float(self.policy.win_rate(self.procedure))

    def record(self) -> dict[str, Any]:
        """What artifacts keep of it, to be compared by `differing`."""
        return {
            "procedure": repr(self.procedure),
            "transform": self.label,
            "beta": float(f"{self.beta:.6g}"),
        }


def objective(
    procedure: Procedure,
    transform: Callable[[ArrayLike], Floats] | None = None,
    beta: float | None = None,
    kl: float | None = None,
    label: str = "",
) -> Objective:
    """The objective of a transform (None: the optimal one) at `beta`, or at the beta that aims at `kl` nats.

    Raises InputError unless exactly one of beta and kl is given, and where no beta gives the KL.

    >>> from infalign.theory.procedures import BestOfN
    >>> from infalign.theory.transforms import identity
    >>> round(objective(BestOfN(4), identity, kl=1.0).win_rate, 4), round(objective(BestOfN(4), kl=1.0).win_rate, 4)
    (0.877, 0.9411)
    """
    one_of(beta, kl)
    if transform is None:
        transform = optimal_transform(procedure, beta, kl)
    if isinstance(transform, OptimalTransform | JudgedTransform):
        given = transform.beta if beta is None else beta
        policy = transform if math.isclose(given, transform.beta) else tilt(transform, given)
        return Objective(procedure, transform, given, policy, label or transform.label)
    try:
        policy = tilt(transform, beta, kl)
    except InputError:
        if beta is None:
            raise
        return Objective(procedure, transform, float(beta), None, label)
    return Objective(procedure, transform, policy.beta if beta is None else float(beta), policy, label)


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The names in two records of objectives that do not mean the same; what one of them lacks does not count.

    An optimal transform is told by its procedure and its beta, a beta is known to five digits.

    >>> differing({"procedure": "BestOfN(4)", "beta": 0.1}, {"procedure": "BestOfN(2)", "beta": 0.1000001})
    ['procedure']
    """
    names = [name for name in ("procedure", "transform", "beta") if name in first and name in second]
    return [name for name in names if not _same(first[name], second[name])]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-5)
    kinds = [str(one).startswith("OptimalTransform(") for one in (first, second)]
    return all(kinds) or str(first) == str(second)
