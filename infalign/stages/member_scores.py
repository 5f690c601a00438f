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
from infalign.rewards.scoring import columns_digest
from infalign.types import InputError, Prompt, prompt_key


@dataclass
class MemberScores:
    """Each member's scores of a prompt's first K base samples, by prompt.

    Args:
        open_table: opens the calibration table, when a score is first needed.
        prompts: all that may be scored, looked up by content and columns (rows of equal content may differ there).
        members: of the sum.
        count: K.
    """

    open_table: Callable[[], SampleTable]
    prompts: Callable[[], Sequence[Prompt]]
    members: Sequence[Reward]
    count: int

    def __call__(self, prompt: Any, columns: Mapping[str, Any]) -> list[NDArray[np.float64]]:
        """(members, K) scores, NaN for no score.

        Args:
            prompt: its content.
            columns: its row's.

        Raises:
            InputError: the prompt was never calibrated.
        """
        key = self._keys.get(_identity(prompt, columns), "")
        rows = [scores.get(key, np.empty(0))[: self.count] for scores in self._by_member]
        if any(len(row) < self.count for row in rows):
            raise InputError(
                f"the reward adds quantiles among {self.count} base samples of the prompt, and there are none of "
                f"{str(prompt)[:80]!r}: run `infalign calibrate` with this recipe; only its own prompts can be scored"
            )
        return rows

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {_identity(prompt.content, prompt.columns): prompt.key for prompt in self.prompts()}

    @cached_property
    def _by_member(self) -> list[dict[str, NDArray[np.float64]]]:
        table = self.open_table()
        digests = [{prompt.key: columns_digest(one, prompt) for prompt in self.prompts()} for one in self.members]
        return [table.rewards(one.fingerprint, columns) for one, columns in zip(self.members, digests, strict=True)]


def _identity(content: Any, columns: Mapping[str, Any]) -> str:
    """A row by content and columns: of two that share both, either has the samples for a score."""
    return digest(prompt_key(content), {name: value for name, value in columns.items() if value is not None})


def bind_sums(
    reward: Reward,
    open_table: Callable[[], SampleTable],
    prompts: Callable[[], Sequence[Prompt]],
    sampling: Mapping[str, Any],
    count: int,
) -> Reward:
    """A reward whose calibrated sums find their members' scores in the calibration table; others as they are.

    Its fingerprint then covers the base samples, K and how they were drawn.
    """
    sums = sums_in(reward)
    for one in sums:
        one.bind(MemberScores(open_table, prompts, one.members, count))
    if sums:
        reward.fingerprint = digest(reward.fingerprint, dict(sampling), count)
    return reward


def members_to_score(reward: Reward) -> list[Reward]:
    """The rewards whose scores of base samples must be in the table before `reward` can score."""
    found = {member.fingerprint: member for one in sums_in(reward) for member in one.members}
    return list(found.values())
