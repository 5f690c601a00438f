"""Bradley-Terry training of a whole reward model or of adapters, with TRL's `RewardTrainer`.

The pairs are tokenized here and not by TRL, by the very function that scores with the model later
(`infalign.rewards.encoding`): what is trained is what is used. Checkpoints are sealed, so that a killed run goes on
from the newest whole one.
"""

# transformers and trl type what they return as unions of everything that it may be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer

from infalign.runtime.console import notice
from infalign.runtime.distributed import is_main
from infalign.training.checkpoints import newest_whole, seal
from infalign.training.progress import TrainingProgress, pairs_note, quiet
from infalign.types import InputError, TrainingError

Encoded = tuple[list[int], list[int]]
"""Token ids of the chosen and of the rejected side, prompt included."""


def make_trainer(
    base_path: str,
    arguments: RewardConfig,
    pairs: Sequence[Encoded],
    tokenizer: Any,
    *,
    margins: Sequence[float] | None = None,
    peft_config: Any = None,
    identity: Mapping[str, Any],
) -> RewardTrainer:
    """A `RewardTrainer` on encoded pairs.

    Args:
        base_path: folder or Hub id of the backbone; its head is new, or a reward model's own.
        arguments: TRL's.
        pairs: for training, within the length limit.
        tokenizer: the backbone's.
        margins: by how much the chosen side must score higher for the loss of a tie, one a pair; None is 0.
        peft_config: of the adapters, or None for a full fine-tuning.
        identity: what a run must share with a checkpoint to go on from it.

    Raises:
        InputError: TRL refuses the settings.
    """
    columns: dict[str, Any] = {"chosen_ids": [c for c, _ in pairs], "rejected_ids": [r for _, r in pairs]}
    rows = Dataset.from_dict(columns | ({} if margins is None else {"margin": list(margins)}))
    try:
        trainer = RewardTrainer(
            model=base_path,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[Sealing(identity), TrainingProgress("reward model: train", pairs_note)],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"the training keys do not fit: {' '.join(str(error).split())}") from error
    quiet(trainer)
    return trainer


def train(trainer: RewardTrainer, identity: Mapping[str, Any]) -> None:
    """Train from the start, or from the newest whole checkpoint of the same run.

    Raises:
        InputError: the checkpoints are another run's, or no step was made.
        TrainingError: the weights are not finite at the end.
    """
    folder = Path(str(trainer.args.output_dir))
    newest, skipped = newest_whole(folder)
    for path, why in skipped:
        notice(f"{path} is skipped: {why}")
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    if trainer.state.global_step == 0:
        raise InputError("training made 0 steps: max_steps or num_train_epochs is 0, or there is too little data")
    model: Any = trainer.model
    bad = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise TrainingError(f"weights are not finite ({', '.join(bad[:3])}): lower learning_rate; nothing is saved")


class Sealing(TrainerCallback):
    """Marks every checkpoint as whole once it is written."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = identity

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint of this step."""
        if is_main():
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.identity)
