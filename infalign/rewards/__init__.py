"""Rewards: the contract, one door to load any, the guard around it; classifiers, servers, judges, combinations.

Importing this package imports no torch: names are loaded when they are asked for.

>>> from infalign.rewards import load_reward
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infalign.rewards.classifier import ClassifierReward
    from infalign.rewards.contract import (
        RewardFunction,
        as_rewards,
        completion_text,
        shape_completions,
        strip_reasoning,
    )
    from infalign.rewards.guard import GuardedReward
    from infalign.rewards.http import HTTPReward
    from infalign.rewards.judge import Judge, Verdicts, both_orders, load_judge
    from infalign.rewards.loader import Reward, load_reward
    from infalign.rewards.process import ProcessReward

_HOMES = {
    "ClassifierReward": "classifier",
    "RewardFunction": "contract",
    "as_rewards": "contract",
    "completion_text": "contract",
    "shape_completions": "contract",
    "GuardedReward": "guard",
    "HTTPReward": "http",
    "Judge": "judge",
    "ProcessReward": "process",
    "Reward": "loader",
    "Verdicts": "judge",
    "both_orders": "judge",
    "load_judge": "judge",
    "load_reward": "loader",
    "strip_reasoning": "contract",
}

__all__ = [
    "ClassifierReward",
    "GuardedReward",
    "HTTPReward",
    "Judge",
    "ProcessReward",
    "Reward",
    "RewardFunction",
    "Verdicts",
    "as_rewards",
    "both_orders",
    "completion_text",
    "load_judge",
    "load_reward",
    "shape_completions",
    "strip_reasoning",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
