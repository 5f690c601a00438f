"""Callbacks: stop at a KL budget; refuse a GRPO set-up that would divide the transform away."""

from __future__ import annotations

from collections import deque
from typing import Any

from transformers import TrainerCallback

from infalign.runtime.console import say
from infalign.types import InputError


class KLBudget(TrainerCallback):
    """Stop training once the rollouts' sequence KL, averaged over `window` logs, exceeds `budget` nats."""

    def __init__(self, budget: float, window: int = 3) -> None:
        self.budget = budget
        self.recent: deque[float] = deque(maxlen=window)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Look at `kl_seq` in what was logged."""
        if not logs or "kl_seq" not in logs:
            return
        self.recent.append(logs["kl_seq"])
        mean = sum(self.recent) / len(self.recent)
        if len(self.recent) == self.recent.maxlen and mean > self.budget:
            say(f"  stopping at step {state.global_step}: sequence KL {mean:.3f} is above kl_budget {self.budget}")
            control.should_training_stop = True


class GRPOCheck(TrainerCallback):
    """For `CTRLReward` in TRL's `GRPOTrainer`: its default group scaling would erase the transform."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse scaled rewards and beta = 0.

        Raises:
            InputError: naming the setting and its right value.
        """
        if getattr(args, "scale_rewards", "none") not in ("none", False):
            raise InputError(
                f'scale_rewards={args.scale_rewards!r} divides the transform away: use scale_rewards="none"'
            )
        if not args.beta:
            raise InputError("beta is 0: CTRL is KL-regularised; use the beta of optimal_transform or tilt")
