"""What else a policy can be trained for: rival objectives on the raw reward, each by one word of a recipe.

`objective: raw | pkpo | iama | par | grpo` changes only the value that a rollout gets; sampling, the KL inside the
reward, its steering, the optimiser and the budget stay the same, so that what differs in the result is the objective.
(Objectives on the calibrated reward are transforms: identity, log, normal_icdf, exponential.) For the m scored rollouts
of a prompt, sorted ascending r_(1) .. r_(m), and its base rewards s_1 .. s_K:

| word | value of rollout i | source |
|---|---|---|
| raw | `r_i`: RLHF as it is usually done | RLOO, arXiv:2402.14740 |
| pkpo | `(m-1) (U - U_{-i})` with U = `sum_i a_i r_(i)`, a = `order_weights(m)`: max@k | arXiv:2505.15201 |
| iama | `sum_{j<i} g(j/m) (r_(j+1) - r_(j))`: the first variation of the decoded mean reward | arXiv:2602.01603 |
| par | `1/K sum_k sigmoid(r_i - s_k)`: the chance that it is preferred to a base sample | arXiv:2502.18770 |
| grpo | `(r_i - mean) / std` of the group | arXiv:2402.03300 |

Deviations. PKPO's max@k is Best-of-k; here it is the decoded mean of any procedure, with the same leave-one-out
baseline. IAMA adds up several such functionals; here it has one, and the group's own distribution function stands for
the policy's; its division by the group's standard deviation is left out (`grpo` shows what that does). GRPO's KL is
inside the value as for all others. `raw`, `pkpo` and `iama` are divided by one number, the base rewards' standard
deviation within prompts, so that beta does not depend on the reward's unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from infalign.theory.procedures import Procedure
from infalign.theory.tilted import tilt
from infalign.theory.transforms import Transform, identity, normal_icdf
from infalign.training.direct import direct_rewards
from infalign.types import InputError

Array = NDArray[np.float64]
Name = Literal["raw", "pkpo", "iama", "par", "grpo"]
BASELINES: tuple[Name, ...] = get_args(Name)
"""The words that `objective` takes for them."""

_ROUNDS = 12
"""Of the iteration for the aim of an objective that depends on its own policy."""
_STEADY = 1e-4
"""Added to a group's standard deviation, as in TRL: a group whose rewards are all equal gets 0."""


@dataclass(frozen=True)
class Baseline:
    """A rival objective, given to `CTRLReward` in place of a transform.

    Args:
        name: which one.
        procedure: decodes; `pkpo` and `iama` are for it, the others are only measured under it.
        scale: what `raw`, `pkpo` and `iama` are divided by: the base rewards' standard deviation (`base_spread`).
        beta: the KL coefficient that a trainer takes when it is given none.

    Raises:
        InputError: an unknown name, or a scale that is not positive.
    """

    name: Name
    procedure: Procedure
    scale: float = 1.0
    beta: float | None = None

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise InputError(f"unknown baseline {self.name!r}: one of {', '.join(BASELINES)}")
        if not self.scale > 0 or not np.isfinite(self.scale):
            raise InputError(f"scale must be a positive number, got {self.scale!r}: the base rewards' spread")

    @property
    def label(self) -> str:
        """What tells it from others, the same text in every run and version."""
        return f"{self.name} {self.procedure!r}" if self.name in ("pkpo", "iama") else self.name

    @property
    def fewest(self) -> int:
        """The fewest scored rollouts of a prompt that give values."""
        return {"pkpo": self.procedure.n + 1, "grpo": 2}.get(self.name, 1)

    def values(self, rewards_G: ArrayLike, ref_rewards_K: ArrayLike) -> Array:
        """(G,) values of a prompt's rollouts; NaN where there is no score, or too few rollouts have one.

        Args:
            rewards_G: raw rewards of its rollouts, NaN for no score.
            ref_rewards_K: raw rewards of its base samples; NaN is left out.

        >>> from infalign import BestOfN
        >>> Baseline("grpo", BestOfN(4)).values([0.0, 2.0], []).round(3).tolist()
        [-0.707, 0.707]
        """
        rewards = np.asarray(rewards_G, dtype=np.float64)
        scored = ~np.isnan(rewards)
        found = np.full(rewards.shape, np.nan)
        if np.count_nonzero(scored) >= self.fewest:
            found[scored] = _VALUES[self.name](self, rewards[scored], np.asarray(ref_rewards_K, dtype=np.float64))
        return found


def start(name: Name, procedure: Procedure, kl: float | None = None) -> Transform:
    """What a baseline aims at with Gaussian base rewards, as a transform of the quantile: a first beta follows from it.

    `raw` and `grpo` are the normal quantile z, and `par` is near the identity. The two that know the decoder have the
    first variation of the decoded mean reward, `int_0^u g(Q(v)) dz(v)`, with Q their own optimal policy at `kl` nats
    (None: the base).
    """
    if name not in ("pkpo", "iama"):
        return identity if name == "par" else normal_icdf
    found = _FirstVariation(procedure, _FirstVariation.u_Q)
    for _ in range(_ROUNDS if kl is not None else 0):
        now = _FirstVariation(procedure, tilt(found, kl=kl).cdf(_FirstVariation.u_Q))
        found.phi_Q = (found.phi_Q + now.phi_Q) / 2.0  # halfway: the whole step may swing
    return found


def base_spread(rewards: Sequence[Array]) -> float:
    """The standard deviation of base rewards within prompts, NaN left out; 1 where no two of a prompt differ.

    >>> base_spread([np.array([0.0, 2.0]), np.array([5.0, 5.0])])
    1.0
    """
    variances = [np.nanvar(row, ddof=1) for row in rewards if np.count_nonzero(~np.isnan(row)) > 1]
    spread = float(np.sqrt(np.mean(variances))) if variances else 0.0
    return spread if spread > 0 and np.isfinite(spread) else 1.0


class _FirstVariation:
    """`int g(Q(v)) dz(v)` up to u, bounded at the ends of a fine grid; `cdf_Q` is Q there."""

    name = "first_variation"
    u_Q = np.linspace(0.0, 1.0, 2049)[1:-1]

    def __init__(self, procedure: Procedure, cdf_Q: Array) -> None:
        middles = procedure.density(np.clip((cdf_Q[1:] + cdf_Q[:-1]) / 2.0, 0.0, 1.0))
        self.phi_Q = np.concatenate([[0.0], np.cumsum(middles * np.diff(special.ndtri(self.u_Q)))])

    def __call__(self, u: ArrayLike) -> Array:
        """The value at u in [0, 1], any shape."""
        return np.interp(np.asarray(u, dtype=np.float64), self.u_Q, self.phi_Q)


def _raw(baseline: Baseline, rewards_m: Array, refs_K: Array) -> Array:
    return rewards_m / baseline.scale


def _pkpo(baseline: Baseline, rewards_m: Array, refs_K: Array) -> Array:
    return direct_rewards(rewards_m, baseline.procedure) / baseline.scale


def _iama(baseline: Baseline, rewards_m: Array, refs_K: Array) -> Array:
    order = np.argsort(rewards_m, kind="stable")
    ascending, count = rewards_m[order], rewards_m.size
    slopes = baseline.procedure.density(np.arange(1, count) / count)  # g at the distribution function between two
    found = np.empty(count)
    found[order] = np.concatenate([[0.0], np.cumsum(slopes * np.diff(ascending))])
    return found / baseline.scale


def _par(baseline: Baseline, rewards_m: Array, refs_K: Array) -> Array:
    refs = refs_K[~np.isnan(refs_K)]
    return special.expit(rewards_m[:, None] - refs).mean(1)


def _grpo(baseline: Baseline, rewards_m: Array, refs_K: Array) -> Array:
    return (rewards_m - rewards_m.mean()) / (rewards_m.std(ddof=1) + _STEADY)


_VALUES: dict[str, Callable[[Baseline, Array, Array], Array]] = {
    "raw": _raw,
    "pkpo": _pkpo,
    "iama": _iama,
    "par": _par,
    "grpo": _grpo,
}
