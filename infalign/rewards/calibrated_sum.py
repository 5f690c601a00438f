"""A weighted sum of calibrated rewards: what is added are quantiles, so the members' scales do not matter.

`R(x, y) = sum_k w_k C_k(x, y)`, where `C_k` is the mid-rank quantile of member k's score of y among its scores of K
samples that the base policy drew for the same x (`calibration.quantile`). An increasing map of a member's score changes
nothing. Every score therefore needs the members' scores of the prompt's base samples: in a recipe `infalign calibrate`
makes them, for the test prompts too, and they are found by prompt. A prompt that was never calibrated has none, which
is an error and no score. In Python: `bind` them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.calibration.quantile import calibrate
from infalign.calibration.table import SampleTable
from infalign.rewards.contract import TRAINERS, Text
from infalign.rewards.fingerprint import digest
from infalign.rewards.loader import Reward
from infalign.rewards.members import scores_of
from infalign.rewards.scoring import columns_digest
from infalign.types import InputError, Prompt, prompt_key

References = Callable[[Text, Mapping[str, Any]], Sequence[ArrayLike]]
"""By prompt and its row's columns, each member's scores of the prompt's base samples; NaN is no score."""


class CalibratedSum:
    """A reward function with the values `sum_k w_k C_k(x, y)`.

    Args:
        members: loaded rewards.
        weights: one for each.

    Attributes:
        members, weights: as given.
        fingerprint: of members and weights; not of the reference samples, which `bind`s caller knows.

    Raises:
        InputError: a member is itself a calibrated sum, or holds one.
    """

    tries_again = True

    def __init__(self, members: Sequence[Reward], weights: Sequence[float]) -> None:
        if any(sums_in(member) for member in members):
            raise InputError(
                "weighted_sum: a member is a weighted sum itself: a quantile of quantiles needs reference samples of "
                "both; list all members in one sum"
            )
        self.__name__ = "weighted_sum"
        self.members, self.weights = list(members), list(weights)
        self.fingerprint = digest("calibrated sum", [member.fingerprint for member in members], self.weights)
        self._references: References | None = None

    def bind(self, references: References) -> None:
        """Say where the members' scores of base samples come from."""
        self._references = references

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> NDArray[np.float64]:
        """Scores (B,), NaN where a member has none for the completion, or for none of its prompt's base samples.

        Raises:
            InputError: the members' scores of base samples are not there.
            RewardError: a member failed.
        """
        if self._references is None:
            raise InputError(
                "weighted_sum: it adds quantiles among base samples, and there are none here: name it as `reward` in a "
                "recipe and run `infalign calibrate`, or give them with bind()"
            )
        data = {name: values for name, values in columns.items() if name not in TRAINERS}
        of_row = [{name: values[row] for name, values in data.items()} for row in range(len(prompts))]
        names = [digest(prompt_key(prompt), own) for prompt, own in zip(prompts, of_row, strict=True)]
        # completions of one prompt share its references: they are looked up once, for the first row of that name
        first = {name: row for row, name in reversed(list(enumerate(names)))}
        found: dict[str, list[NDArray[np.float64]]] = {}  # by row, each member's scores of its base samples
        for name, row in first.items():
            references = [np.asarray(one, dtype=np.float64) for one in self._references(prompts[row], of_row[row])]
            found[name] = [one[~np.isnan(one)] for one in references]
        rows = [found[name] for name in names]
        scores_SB = scores_of(self.members, prompts, completions, completion_ids, columns)
        total = np.zeros(len(completions))
        for number, weight in enumerate(self.weights):
            total += weight * _quantiles(scores_SB[number], [row[number] for row in rows])
        return total


def sums_in(reward: Reward) -> list[CalibratedSum]:
    """Every calibrated sum that a reward is or is made of."""
    return list(_sums(reward))


def _sums(reward: Reward) -> Iterator[CalibratedSum]:
    if isinstance(reward.function, CalibratedSum):
        yield reward.function
    else:
        for member in getattr(reward.function, "members", ()):
            if isinstance(member, Reward):
                yield from _sums(member)


def _quantiles(scores_B: NDArray[np.float64], references_B: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """(B,) mid-rank quantiles, NaN where there is no score or no reference."""
    known = [row for row, reference in enumerate(references_B) if reference.size]
    found = np.full(len(scores_B), np.nan)
    if known:
        found[known] = calibrate(scores_B[known, None], [references_B[row] for row in known])[:, 0]
    return found


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
