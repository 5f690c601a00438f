"""A sum of calibrated rewards in an experiment: where its members' scores of base samples come from.

The calibration table holds them: one folder of scores for each member, on the samples of train and validation prompts
as for any reward, and of the test prompts too, since scoring a test sample needs the quantiles of its own prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.table import SampleTable
from infalign.rewards.calibrated_sum import sums_in
from infalign.rewards.fingerprint import digest
from infalign.rewards.loader import Reward
from infalign.types import InputError, prompt_key


@dataclass
class MemberScores:
    """Each member's scores of a prompt's first K base samples, by prompt.

    Args:
        open_table: opens the calibration table, when a score is first needed.
        members: of the sum.
        count: K.
    """

    open_table: Callable[[], SampleTable]
    members: Sequence[Reward]
    count: int

    def __call__(self, prompt: Any) -> list[NDArray[np.float64]]:
        """(members, K) scores, NaN for no score.

        Raises:
            InputError: the prompt was never calibrated.
        """
        key = prompt_key(prompt)
        rows = [scores.get(key, np.empty(0))[: self.count] for scores in self._by_member]
        if any(len(row) < self.count for row in rows):
            raise InputError(
                f"the reward adds quantiles among {self.count} base samples of the prompt, and there are none of "
                f"{str(prompt)[:80]!r}: run `infalign calibrate` with this recipe; only its own prompts can be scored"
            )
        return rows

    @cached_property
    def _by_member(self) -> list[dict[str, NDArray[np.float64]]]:
        table = self.open_table()
        return [table.rewards(member.fingerprint) for member in self.members]


def bind_sums(reward: Reward, open_table: Callable[[], SampleTable], sampling: Mapping[str, Any], count: int) -> Reward:
    """A reward whose calibrated sums find their members' scores in the calibration table; others as they are.

    Its fingerprint then covers the base samples, K and how they were drawn.
    """
    sums = sums_in(reward)
    for one in sums:
        one.bind(MemberScores(open_table, one.members, count))
    if sums:
        reward.fingerprint = digest(reward.fingerprint, dict(sampling), count)
    return reward


def members_to_score(reward: Reward) -> list[Reward]:
    """The rewards whose scores of base samples must be in the table before `reward` can score."""
    found = {member.fingerprint: member for one in sums_in(reward) for member in one.members}
    return list(found.values())
