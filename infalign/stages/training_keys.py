"""The keys of a recipe that TRL declares. A module of its own, because importing TRL takes seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trl import ModelConfig, RewardConfig, SFTConfig, get_peft_config, get_quantization_config

from infalign.runtime.config import field_hints
from infalign.training.config import CTRLConfig

_AS_TRL_READS = {"resume_from_checkpoint": bool | str | None, "lora_target_modules": list[str] | str | None}
"""Keys that TRL's documentation gives values of another type than their declaration says: true, "all-linear"."""


def training_hints() -> dict[str, Any]:
    """Every field of `CTRLConfig` and TRL's `ModelConfig` with its type."""
    return field_hints(CTRLConfig, ModelConfig) | _AS_TRL_READS


def reward_training_hints() -> dict[str, Any]:
    """Every field of TRL's `RewardConfig` and `ModelConfig` with its type."""
    return field_hints(RewardConfig, ModelConfig) | _AS_TRL_READS


def supervised_training_hints() -> dict[str, Any]:
    """Every field of TRL's `SFTConfig` and `ModelConfig` with its type."""
    return field_hints(SFTConfig, ModelConfig) | _AS_TRL_READS


def split_training(values: dict[str, Any], config: type = CTRLConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe's training keys as those of `config` and those of `ModelConfig` (adapters, quantisation)."""
    ours = set(field_hints(config))
    return (
        {name: value for name, value in values.items() if name in ours},
        {name: value for name, value in values.items() if name not in ours},
    )


def adapter_of(values: Mapping[str, Any]) -> Any | None:
    """PEFT's config of the `ModelConfig` keys among a recipe's, None without `use_peft`.

    TRL hands a list of one name on as text, which PEFT takes for a pattern of the whole path: `[q_proj]` would match
    nothing. A name without a pattern's signs is a module.
    """
    config: Any = get_peft_config(ModelConfig(**values))
    named = getattr(config, "target_modules", None)
    if isinstance(named, str) and re.fullmatch(r"[\w.]+", named):
        config.target_modules = {named}
    return config


def quantization_of(values: dict[str, Any]) -> Any | None:
    """transformers' quantisation config of a recipe's training keys, as training itself builds it."""
    return get_quantization_config(ModelConfig(**split_training(values)[1]))
