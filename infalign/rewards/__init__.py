"""Rewards: the contract, one door to load any, the guard around it, and sequence-classification models.

Importing this package imports no torch: names are loaded when they are asked for.

>>> from infalign.rewards import load_reward
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infalign.rewards.classifier import ClassifierReward
    from infalign.rewards.contract import RewardFunction, as_rewards, completion_text, shape_completions
    from infalign.rewards.guard import GuardedReward
    from infalign.rewards.loader import Reward, load_reward
    from infalign.rewards.reasoning import strip_reasoning

_HOMES = {
    "ClassifierReward": "classifier",
    "RewardFunction": "contract",
    "as_rewards": "contract",
    "completion_text": "contract",
    "shape_completions": "contract",
    "GuardedReward": "guard",
    "Reward": "loader",
    "load_reward": "loader",
    "strip_reasoning": "reasoning",
}

__all__ = [
    "ClassifierReward",
    "GuardedReward",
    "Reward",
    "RewardFunction",
    "as_rewards",
    "completion_text",
    "load_reward",
    "shape_completions",
    "strip_reasoning",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
