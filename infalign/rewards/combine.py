"""Several rewards as one: ensembles of rewards on one scale, and sums of rewards on any.

    reward: infalign.rewards.combine:mean             # or minimum, pessimistic, weighted_sum
    reward_kwargs:
      members: [{reward: a.py:build, reward_kwargs: {seed: 0}}, {reward: OWNER/MODEL}]

A member is anything a recipe's `reward` is; each has its own guard. Where one member has no score, the combination has
none: a mean over whoever answered would be another reward for each completion.

`mean`, `minimum` and `pessimistic` compare raw scores, so their members must share a scale: reward models trained alike
from other seeds. The minimum and the penalty are those of Coste et al., arXiv:2310.02743 ("worst-case" and
"uncertainty-weighted"); they subtract a multiple of the variance, here it is of the standard deviation, which has the
scores' unit. `weighted_sum` adds calibrated rewards, for which scales do not matter (`calibrated_sum`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.rewards.calibrated_sum import CalibratedSum
from infalign.rewards.contract import Text
from infalign.rewards.fingerprint import digest
from infalign.rewards.loader import Reward, load_reward
from infalign.rewards.members import Load, load_members, scores_of, weights_of
from infalign.types import InputError

__all__ = ["mean", "minimum", "pessimistic", "weighted_sum"]

Floats = NDArray[np.float64]


class Ensemble:
    """A reward function that makes one score of its members'.

    Args:
        name: for logs.
        members: at least one.
        join: (members, B) scores to (B,); NaN in, NaN out.
        options: what shapes `join`, for the fingerprint.

    Attributes:
        members: as given.
        fingerprint: of the members and the way they are joined.
    """

    tries_again = True

    def __init__(self, name: str, members: Sequence[Reward], join: Callable[[Floats], Floats], *options: float) -> None:
        self.__name__ = name
        self.members = list(members)
        self._join = join
        self.fingerprint = digest(name, [member.fingerprint for member in members], options)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> Floats:
        """Scores (B,), NaN where a member has none.

        Raises:
            RewardError: a member failed.
        """
        return self._join(scores_of(self.members, prompts, completions, completion_ids, columns))


def mean(members: Sequence[Any], load_member: Load = load_reward) -> Ensemble:
    """The mean of the members' scores.

    Args:
        members: see `load_members`.
        load_member: loads one.

    Raises:
        InputError: members that are none.
    """
    return Ensemble("mean", load_members(members, load_member, "mean"), lambda scores_SB: scores_SB.mean(0))


def minimum(members: Sequence[Any], load_member: Load = load_reward) -> Ensemble:
    """The least of the members' scores; as for `mean`."""
    return Ensemble("minimum", load_members(members, load_member, "minimum"), lambda scores_SB: scores_SB.min(0))


def pessimistic(members: Sequence[Any], penalty: float = 1.0, load_member: Load = load_reward) -> Ensemble:
    """The members' mean minus `penalty` times their standard deviation (over the S members, divided by S).

    Args:
        members: see `load_members`; at least two.
        penalty: 0 or more, in standard deviations.
        load_member: loads one.

    Raises:
        InputError: one member only, or a penalty that is none.
    """
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 <= penalty < np.inf:
        raise InputError(f"pessimistic: penalty is a number, 0 or more, got {penalty!r}")
    loaded = load_members(members, load_member, "pessimistic")
    if len(loaded) < 2:
        raise InputError("pessimistic: members do not differ where there is only one: give two or more")
    return Ensemble("pessimistic", loaded, lambda scores_SB: scores_SB.mean(0) - penalty * scores_SB.std(0), penalty)


def weighted_sum(members: Sequence[Any], load_member: Load = load_reward) -> CalibratedSum:
    """`sum_k w_k C_k(x, y)`: the members' calibrated rewards, weighted; see `CalibratedSum`.

    Args:
        members: see `load_members`; each mapping may have a `weight` (1), negative ones too.
        load_member: loads one.

    Raises:
        InputError: members or weights that are none.
    """
    loaded = load_members(members, load_member, "weighted_sum")
    return CalibratedSum(loaded, weights_of(members, "weighted_sum"))
