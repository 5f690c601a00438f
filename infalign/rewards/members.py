"""The members of a reward that is made of others: loading them, asking all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.rewards.contract import Text
from infalign.rewards.loader import Reward
from infalign.types import InputError

Load = Callable[..., Reward]
"""`load_reward`, mostly with the recipe's folder and policy bound."""

_KEYS = ("reward", "reward_kwargs", "weight")


def load_members(members: Any, load: Load, what: str) -> list[Reward]:
    """The rewards that `members` names.

    Args:
        members: a list of specs (or callables), or of mappings with `reward`, `reward_kwargs` and perhaps `weight`.
        load: loads one.
        what: the combination, the first words of every message.

    Raises:
        InputError: no list, an empty one, an entry of another form, or a member that can't be loaded.
    """
    if isinstance(members, (str, Mapping)) or not isinstance(members, Sequence) or not members:
        raise InputError(
            f"{what}: members is a list of rewards, e.g. [{{reward: a.py:build, reward_kwargs: {{...}}}}, b.py:build], "
            f"got {members!r:.80}"
        )
    loaded = []
    for number, member in enumerate(members):
        given = dict(member) if isinstance(member, Mapping) else {"reward": member}
        unknown = [key for key in given if key not in _KEYS]
        if unknown or "reward" not in given:
            problem = f"does not take {unknown[0]!r}" if unknown else "has no `reward`"
            raise InputError(f"{what}: member {number} {problem}; its keys are {', '.join(_KEYS)}")
        reward = given["reward"]
        loaded.append(reward if isinstance(reward, Reward) else load(reward, given.get("reward_kwargs")))
    return loaded


def weights_of(members: Sequence[Any], what: str) -> list[float]:
    """The members' weights, 1 where none is given.

    Raises:
        InputError: a weight that is no finite number.
    """
    weights = [member.get("weight", 1.0) if isinstance(member, Mapping) else 1.0 for member in members]
    for number, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not np.isfinite(weight):
            raise InputError(f"{what}: the weight of member {number} is a finite number, got {weight!r}")
    return [float(weight) for weight in weights]


def scores_of(
    members: Sequence[Reward],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    completion_ids: Any,
    columns: Mapping[str, Any],
) -> NDArray[np.float64]:
    """Every member's scores (members, B), one member after the other; NaN for no score.

    Raises:
        RewardError: a member failed.
    """
    return np.array([
        member(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        for member in members
    ]).reshape(len(members), len(completions))  # fmt: skip
