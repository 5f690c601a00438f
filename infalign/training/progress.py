"""Training as a person watches it: a bar with step, reward, KL and time left, in place of TRL's dictionaries."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, TrainerCallback

from infalign.runtime.console import Progress


class TrainingProgress(TrainerCallback):
    """One `Progress` over the steps; the latest transformed reward, calibrated reward and sequence KL beside it."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.seen = state.global_step
        self.progress = Progress("train", state.max_steps, "steps", done=self.seen).__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Move the bar to the current step."""
        if self.progress is None or not logs or "reward/calibrated" not in logs:
            return
        note = f"calibrated {logs['reward/calibrated']:.3f}  KL {logs.get('kl_seq', float('nan')):.3f}"
        self.progress.advance(state.global_step - self.seen, note)
        self.seen = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.progress is not None:
            self.progress.__exit__(None, None, None)
            self.progress = None


def quiet(trainer: Any) -> None:
    """Take away the callback that prints every log as a dictionary."""
    trainer.remove_callback(PrinterCallback)
