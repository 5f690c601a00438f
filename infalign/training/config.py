"""`CTRLConfig`: TRL's `RLOOConfig` with the defaults that the method needs, and nothing that would break it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import RLOOConfig

from infalign.training.checks import check_rollout_settings
from infalign.types import InputError


@dataclass
class CTRLConfig(RLOOConfig):
    """Arguments of `CTRLTrainer`. Everything of TRL's `RLOOConfig` is here; the fields below differ or are new.

    Args:
        beta: KL coefficient, in units of the transformed reward per nat of sequence KL. None takes the transform's own
            (an optimal transform depends on its beta).
        beta_start: start from this larger KL coefficient and come down to `beta` geometrically over the first 60 % of
            the steps. A small beta from the start lets the policy collapse on what it finds first, from which it
            recovers slowly: worth it for Worst-of-N, whose betas are small. None: constant.
        num_generations: G, rollouts a prompt; the leave-one-out baseline is over them.
        kl_budget: stop when the rollouts' sequence KL, averaged over three logs, exceeds this many nats.
        max_skipped_steps: a step whose loss or gradients are not finite is skipped; so many in a row stop the run.
        initial_weights: a checkpoint or policy folder to start the policy from (optimizer, schedule and step count
            begin anew; the reference stays the base model). The way to go on with another number of processes.
        shared_prefix: compute each prompt once and repeat its KV cache (exact); False draws the same rollouts row by
            row and takes TRL's own log-probabilities.
        disable_dropout: True, so that sampling and training see one policy.
        gradient_checkpointing: False by default; True saves memory and gives up the shared prefix where there are
            gradients.
        bf16: None means bf16 on an accelerator and float32 on the CPU.
    """

    beta: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]  # wider than TRL's
        default=None, metadata={"help": "KL coefficient; None: the optimal transform's own."}
    )
    beta_start: float | None = field(default=None, metadata={"help": "KL coefficient at step 0; None: beta."})
    num_generations: int | None = field(default=8, metadata={"help": "Rollouts per prompt (G)."})
    kl_budget: float | None = field(default=None, metadata={"help": "Stop above this sequence KL (nats)."})
    max_skipped_steps: int = field(default=3, metadata={"help": "Stop after so many non-finite steps in a row."})
    initial_weights: str | None = field(default=None, metadata={"help": "Start from these weights, all else anew."})
    shared_prefix: bool = field(default=True, metadata={"help": "Compute each prompt once (exact)."})
    disable_dropout: bool = field(default=True, metadata={"help": "Disable dropout."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for memory."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Look for unused parameters."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not torch.cuda.is_available()):
            self.bf16 = False
        if self.beta is not None and self.beta <= 0:
            raise InputError(f"beta must be above 0 for KL-regularised training, got {self.beta}")
        if self.beta_start is not None and self.beta_start <= 0:
            raise InputError(f"beta_start must be above 0, got {self.beta_start}")
        if self.max_skipped_steps < 1:
            raise InputError(f"max_skipped_steps must be at least 1, got {self.max_skipped_steps}")
        if self.normalize_advantages:
            raise InputError("normalize_advantages: true rescales the transform away: leave it false")
        if self.top_p != 1.0 or self.top_k != 0 or self.min_p or self.repetition_penalty != 1.0:
            raise InputError(
                "top_p, top_k, min_p and repetition_penalty must be neutral (1.0, 0, unset, 1.0) in training: "
                f"log-probabilities and KL would be those of another distribution; got top_p={self.top_p}, "
                f"top_k={self.top_k}, min_p={self.min_p}, repetition_penalty={self.repetition_penalty}"
            )
        if self.use_vllm and self.vllm_structured_outputs_regex:
            raise InputError(
                "vllm_structured_outputs_regex constrains rollouts, and calibration samples are free: leave it out"
            )
        if getattr(self, "activation_checkpointing", False) is None:  # transformers' new name for the same setting
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        shared = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        check_rollout_settings(given, {name: getattr(self, name) for name in shared})
