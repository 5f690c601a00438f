"""The keys of `infalign reward-model`, with TRL's names where TRL has the thing.

Everything else belongs to TRL's `RewardConfig` or `ModelConfig` and travels in `RewardModelRecipe.training`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from infalign.stages.recipe import key, read_keys, settle_paths, settled_output, training_help
from infalign.types import InputError


@dataclass(frozen=True)
class RewardModelRecipe:
    """One reward model. `base_dir` is the folder that relative paths start from (the YAML's)."""

    model_name_or_path: str = key("", "backbone: folder, .gguf file, package://PACKAGE/FILE, or Hub id", "model")
    model_revision: str | None = key(None, "revision on the Hub", "model")
    dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "precision of the backbone", "model")
    attn_implementation: str | None = key(None, "attention kernel, e.g. sdpa", "model")
    trust_remote_code: bool = key(False, "run code that ships with a model", "model")
    use_cpu: bool = key(False, "stay on the CPU even where there is a GPU", "model")
    freeze_backbone: bool = key(False, "fit the head alone, exactly (convex); minutes on a CPU", "model")
    keep_layers: int | None = key(None, "with freeze_backbone: layers kept; unset: by cross-validation", "model")

    dataset_name: str | None = key(
        None, "pairs: file (.jsonl .json .csv .parquet, also .gz), folder, or Hub id", "data"
    )
    dataset_config: str | None = key(None, "configuration name on the Hub", "data")
    dataset_data_dir: str | None = key(None, "folder inside the data set, e.g. harmless-base", "data")
    dataset_train_split: str = key("train", "split that training pairs come from", "data")
    dataset_test_split: str | None = key(None, "split of the held-out pairs; unset: prompts of the train split", "data")
    prompt_column: str = key("prompt", "column of explicit prompts", "data")
    columns: dict | list[str] | str = key({}, "other names of columns, e.g. chosen=better,rejected=worse", "data")
    data_format: Literal["auto", "prompt", "transcript"] = key("auto", "transcript: hh-rlhf's texts", "data")
    num_train_prompts: int | None = key(None, "prompts whose pairs are trained on; unset: all that are left", "data")
    num_test_prompts: int = key(512, "prompts whose pairs are held out", "data")
    max_length: int | None = key(1024, "tokens of prompt and completion; longer ones lose tokens at the left", "data")
    chat_template_kwargs: dict = key({}, "variables of the chat template", "data")
    tokens_per_batch: int = key(8192, "padded tokens of a forward pass when features and scores are computed", "data")

    confidence: float = key(0.95, "of the intervals", "evaluation")

    output_dir: str = key(
        "",
        "folder, relative to the working directory; the model is in its folder reward_model",
        "output",
    )
    seed: int = key(42, "of the split, the folds and the training", "output")
    overwrite: bool = key(False, "make it anew instead of refusing", "output")

    training: dict = field(default_factory=dict, metadata={"kind": "training", "help": training_help("RewardConfig")})
    base_dir: Path = field(default=Path(), metadata={"kind": "internal"})

    __post_init__ = settle_paths
    output = property(settled_output)


def load_reward_model_recipe(
    config: str | Path | Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None
) -> RewardModelRecipe:
    """A checked recipe from a YAML path or a mapping, with flags on top; see `recipe.load_recipe`.

    Raises:
        InputError: everything that is wrong with it, at once.
    """
    recipe = RewardModelRecipe(**read_keys(RewardModelRecipe, config, flags, _training_hints))
    _check_together(recipe)
    return recipe


def _training_hints() -> dict[str, Any]:
    from infalign.stages.training_keys import reward_training_hints  # noqa: PLC0415 - imports TRL, seconds

    return reward_training_hints()


def _check_together(recipe: RewardModelRecipe) -> None:
    missing = [name for name in ("model_name_or_path", "dataset_name", "output_dir") if not getattr(recipe, name)]
    problems = [f"{', '.join(missing)} must be given (in the YAML, or as --NAME VALUE)"] if missing else []
    for name in ("num_test_prompts", "tokens_per_batch", "max_length", "keep_layers", "num_train_prompts"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            problems.append(f"{name} must be at least 1, got {value}")
    if not 0 < recipe.confidence < 1:
        problems.append(f"confidence must be between 0 and 1, got {recipe.confidence}")
    if not 0 <= recipe.seed < 2**32:
        problems.append(f"seed must be between 0 and 2**32 - 1, got {recipe.seed}")
    if recipe.keep_layers is not None and not recipe.freeze_backbone:
        problems.append("keep_layers goes with freeze_backbone: true")
    if recipe.freeze_backbone and recipe.training:
        problems.append(
            f"freeze_backbone: true fits the head exactly and takes no training keys ({', '.join(recipe.training)}): "
            "leave them out, or freeze_backbone"
        )
    if problems:
        raise InputError("; ".join(problems))
