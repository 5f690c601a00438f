"""The direct objective: rewards whose policy gradient is that of the inference-time win rate itself, without bias.

With `f(y)` the chance that the decoded base loses to `y` (ties half), the win rate of a rank-based procedure is an
order statistic of f over the policy's own samples, and both parts have unbiased estimates (infalign/theory/README.md,
equations 14 and 15):

    f from K base samples:      f(y) = sum_j b_j (1[s_(j) < r(y)] + 1/2 1[=]),   b = order_weights(K)
    W from m policy samples:    U = sum_i a_i f_(i),                             a = order_weights(m)
    its gradient:               grad W = E sum_i (U - U_{-i}) grad log pi(y_i),  U_{-i}: the other m - 1 samples

A sample's advantage is what the estimate of the win rate loses without it. There is no transform, and nothing depends
on beta. The mean of U_{-i} over i is U (it is an average over subsets), so advantages sum to 0, and RLOO's
leave-one-out baseline gives `m (U - U_{-i})`, the gradient of W for losses that are means, from rewards
`(m - 1) (U - U_{-i})`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.evaluation.winrate import tied_weights
from infalign.theory.procedures import Procedure
from infalign.types import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Direct:
    """The direct objective, given to `CTRLReward` in place of a transform.

    Args:
        procedure: decodes both sides.
        beta: the KL coefficient that a trainer takes when it is given none (the optimum's, `optimal_transform`).
    """

    procedure: Procedure
    beta: float | None = None

    @property
    def label(self) -> str:
        """What tells it from others, the same text in every run and version."""
        return f"direct {self.procedure!r}"

    @property
    def fewest(self) -> int:
        """The fewest scored rollouts of a prompt that give values."""
        return self.procedure.n + 1

    def values(self, rewards_G: ArrayLike, ref_rewards_K: ArrayLike) -> Array:
        """(G,) values of a prompt's rollouts (`direct_rewards`), from raw rewards of them and of K base samples."""
        return direct_rewards(beats_decoded_base(rewards_G, ref_rewards_K, self.procedure), self.procedure)


def check_group(objective: Any, num_generations: int) -> None:
    """See that a group has enough samples for an objective of groups (`Direct`, `baselines.Baseline`).

    Raises:
        InputError: it has not.
    """
    if num_generations < objective.fewest:
        raise InputError(
            f"objective {objective.label} needs num_generations above {objective.fewest - 1}, got {num_generations}: "
            "without one sample, too few would be left"
        )


def beats_decoded_base(rewards_G: ArrayLike, ref_rewards_K: ArrayLike, procedure: Procedure) -> Array:
    """(G,) unbiased estimates of f: the chance that the decoded base loses to a sample, ties half.

    Args:
        rewards_G: rewards of policy samples, NaN for no score.
        ref_rewards_K: rewards of K >= n base samples of the prompt; NaN is left out.
        procedure: decodes the base.

    Raises:
        InputError: fewer base samples than the procedure draws.

    >>> from infalign import BestOfN
    >>> beats_decoded_base([0.5, 1.5, 3.0], [1.0, 2.0], BestOfN(2)).tolist()  # the base's best of its two is 2
    [0.0, 0.0, 1.0]
    """
    rewards, refs = np.asarray(rewards_G, dtype=np.float64), np.asarray(ref_rewards_K, dtype=np.float64)
    refs = refs[~np.isnan(refs)]
    if refs.size < procedure.n:
        raise InputError(
            f"{procedure!r} needs {procedure.n} base samples with a score for each prompt, one has {refs.size}: raise "
            "num_calibration_samples"
        )
    weights = tied_weights(refs, procedure)  # of each base sample, as it stands in refs
    below = (refs < rewards[:, None]) + 0.5 * (refs == rewards[:, None])
    return np.where(np.isnan(rewards), np.nan, below @ weights)


def direct_rewards(beats_G: Array, procedure: Procedure) -> Array:
    """(G,) rewards `(m - 1) (U - U_{-i})` of a prompt's samples; NaN where there is no score.

    All are NaN where m is not above the n that the procedure draws: without one sample, too few would be left.

    Args:
        beats_G: f of each sample, NaN for no score; m of them have one.
        procedure: decodes the policy.

    >>> from infalign import BestOfN
    >>> direct_rewards(np.array([0.0, 0.0, 1.0]), BestOfN(2)).round(3).tolist()  # only the best one's loss is felt
    [-0.667, -0.667, 1.333]
    """
    scored = np.flatnonzero(~np.isnan(beats_G))
    count = scored.size
    if count <= procedure.n:
        return np.full(beats_G.size, np.nan)
    order = scored[np.argsort(beats_G[scored], kind="stable")]
    ascending = beats_G[order]
    all_of_them, others = procedure.order_weights(count), procedure.order_weights(count - 1)
    # without the sample of rank i, those below keep their rank and those above move down by one
    below = np.concatenate([[0.0], np.cumsum(others * ascending[:-1])])
    above = np.concatenate([np.cumsum((others * ascending[1:])[::-1])[::-1], [0.0]])
    found = np.full(beats_G.size, np.nan)
    found[order] = (count - 1) * (all_of_them @ ascending - (below + above))
    return found
