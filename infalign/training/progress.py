"""Training as a person watches it: a bar with steps, what matters of the latest log, and time left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from infalign.runtime.console import Progress


def rollouts_note(logs: Mapping[str, float]) -> str | None:
    """Calibrated reward and sequence KL of a step's rollouts, or else its loss; None for a log of something else."""
    if "reward/calibrated" not in logs:
        return f"loss {logs['loss']:.4g}" if "loss" in logs else None
    return f"calibrated {logs['reward/calibrated']:.3f}  KL {logs.get('kl_seq', float('nan')):.3f}"


def pairs_note(logs: Mapping[str, float]) -> str | None:
    """Loss and accuracy of a step's preference pairs; None for a log of something else."""
    return f"loss {logs['loss']:.3f}  accuracy {logs['accuracy']:.3f}" if {"loss", "accuracy"} <= set(logs) else None


class TrainingProgress(TrainerCallback):
    """One `Progress` over the steps, in place of TRL's dictionaries.

    Args:
        title: of the bar.
        note: what a log says beside it; None for a log that is no step's.
    """

    def __init__(self, title: str = "train", note: Callable[[Mapping[str, float]], str | None] = rollouts_note) -> None:
        self.title, self.note = title, note
        self.progress: Progress | None = None
        self.seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.seen = state.global_step
        self.progress = Progress(self.title, state.max_steps, "steps", done=self.seen).__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Move the bar to the current step."""
        note = self.note(logs or {})
        if self.progress is not None and note is not None:
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
