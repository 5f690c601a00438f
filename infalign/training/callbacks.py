"""Callbacks: a KL budget, steps that are not finite, a checkpoint on SIGTERM, GRPO set-ups that can't work."""

from __future__ import annotations

import math
import signal
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from infalign.runtime.console import notice, say
from infalign.runtime.distributed import any_rank, fail, gathered
from infalign.types import InputError, TrainingError


class KLBudget(TrainerCallback):
    """Stop training once the rollouts' sequence KL, averaged over `window` logs, exceeds `budget` nats."""

    def __init__(self, budget: float, window: int = 3) -> None:
        self.budget = budget
        self.window = window

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Look at `kl_seq` in what was logged (the state's history survives a restart)."""
        if not logs or "kl_seq" not in logs:
            return
        recent = [row["kl_seq"] for row in state.log_history if "kl_seq" in row][-self.window :]
        mean = sum(recent) / len(recent)
        if len(recent) == self.window and mean > self.budget:
            say(f"  stopping at step {state.global_step}: sequence KL {mean:.3f} is above kl_budget {self.budget}")
            control.should_training_stop = True


class NegativeKL(TrainerCallback):
    """Warn once when the rollouts' sequence KL stays negative, which no pair of policies can have.

    Single means of log-ratios may well be; ten logs that are below 0 by three standard errors are not chance.
    """

    LOGS, SIGMAS = 10, 3.0

    def __init__(self) -> None:
        self.told = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Look at the last logs."""
        rows = [row for row in state.log_history if "kl_seq" in row and "kl_seq_error" in row][-self.LOGS :]
        if self.told or not logs or len(rows) < self.LOGS:
            return
        mean = sum(row["kl_seq"] for row in rows) / self.LOGS
        # the standard error of a mean of independent logs: root of the summed squares, over their number
        error = math.sqrt(sum(row["kl_seq_error"] ** 2 for row in rows)) / self.LOGS
        if mean < -self.SIGMAS * error - 1e-4:  # 1e-4: rounding, where errors are 0
            self.told = True
            notice(
                f"the sequence KL stays negative ({mean:.3f} ± {error:.3f} nats over {self.LOGS} logs): sampling and "
                "log-probabilities are not those of one policy (temperature, precision, or a changed end of sequence)"
            )


class SkipNotFinite(TrainerCallback):
    """Leave out optimizer steps whose loss or gradients are not finite; stop after `limit` of them in a row.

    DeepSpeed steps inside its backward pass: there the loss is checked before it (`CTRLTrainer.training_step`), and
    overflowing gradients by DeepSpeed itself (fp16 and bf16).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self.poisoned = False  # a micro-step of the current step had a loss that is not finite

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Take the gradients away from a step that must not be made.

        Raises:
            TrainingError: `limit` steps in a row were skipped.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = self.poisoned or not all(bool(torch.isfinite(_local(p.grad)).all()) for p in parameters)
        self.poisoned = False
        if not any_rank(bad):
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        notice(f"step {state.global_step + 1} is skipped: its loss or gradients are not finite")
        if self.in_a_row >= self.limit:
            fail(
                TrainingError(
                    f"{self.in_a_row} steps in a row had a loss or gradients that are not finite (the last: "
                    f"{state.global_step + 1}): lower learning_rate, raise beta, or look at the reward; the newest "
                    "checkpoint is sound"
                )
            )


def check_finite_weights(model: Any) -> None:
    """A model that is not finite is never saved; every rank looks at its own part.

    Raises:
        TrainingError: some weight is NaN or infinite; a few are named.
    """
    shards = ((name, _local(getattr(p, "ds_tensor", p))) for name, p in model.named_parameters())
    bad = [name for name, shard in shards if shard.is_floating_point() and not bool(torch.isfinite(shard).all())]
    names = sorted({name for found in gathered(bad[:3]) for name in found})
    if names:
        fail(
            TrainingError(
                f"the policy's weights are not finite ({', '.join(names[:3])}): it is not saved; go on from the newest "
                "checkpoint with a lower learning_rate"
            )
        )


def _local(tensor: Any) -> Tensor:
    """This rank's part of a tensor that FSDP may have sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class SaveOnSignal(TrainerCallback):
    """On SIGTERM (a preempted node, a time limit) finish the step, save a checkpoint and stop.

    Attributes:
        stopped: whether that happened.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen (in the main thread, the only one that may)."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop on all ranks when one was asked to."""
        if any_rank(self._asked):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


class ContinueLoss(TrainerCallback):
    """After resuming, the loss summed since the last log goes on where the checkpoint left it."""

    def __init__(self, trainer: Any, loss: float, logged_at: int) -> None:
        self.trainer, self.loss, self.logged_at = trainer, loss, logged_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put it back once: the trainer has just set it to zero."""
        self.trainer._tr_loss += self.loss
        self.trainer._globalstep_last_logged = self.logged_at
        self.loss, self.logged_at = 0.0, state.global_step


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
