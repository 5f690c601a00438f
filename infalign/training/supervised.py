"""Supervised fine-tuning on prompts with completions, with TRL's `SFTTrainer`; only completions count in the loss.

Tokenized by the caller, so that what is trained is what is scored later. Checkpoints are sealed as everywhere.
"""

# transformers and trl type what they return as unions of everything that it may be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from infalign.training.progress import TrainingProgress, quiet
from infalign.training.reward_model import Sealing
from infalign.types import InputError

IGNORED = -100
"""torch's label for a token that does not count."""


def make_supervised_trainer(
    model_path: str,
    arguments: SFTConfig,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokenizer: Any,
    *,
    title: str,
    peft_config: Any = None,
    identity: Mapping[str, Any],
) -> SFTTrainer:
    """An `SFTTrainer` on tokenized examples.

    Args:
        model_path: folder or Hub id to start from.
        arguments: TRL's.
        examples: token ids of a prompt and of its completion.
        tokenizer: the model's.
        title: of the progress bar.
        peft_config: of the adapters, or None for a full fine-tuning.
        identity: what a run must share with a checkpoint to go on from it.

    Raises:
        InputError: TRL refuses the settings.
    """
    rows = Dataset.from_dict(
        {
            "input_ids": [[*prompt, *completion] for prompt, completion in examples],
            "labels": [[*[IGNORED] * len(prompt), *completion] for prompt, completion in examples],
        }
    )
    try:
        trainer = SFTTrainer(
            model=model_path,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[Sealing(identity), TrainingProgress(title, _note)],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"the training keys do not fit: {' '.join(str(error).split())}") from error
    quiet(trainer)
    return trainer


def _note(logs: Mapping[str, float]) -> str | None:
    return f"loss {logs['loss']:.3f}" if "loss" in logs else None
