"""`CTRLConfig`: TRL's `RLOOConfig` with the defaults that the method needs, and nothing that would break it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from trl import RLOOConfig

from infalign.runtime.console import notice
from infalign.training.checks import check_rollout_settings
from infalign.training.engine import MODES
from infalign.training.trl_keys import refusals, without_effect
from infalign.types import InputError

SOLVERS = ("online", "offline")
_TOLD: set[tuple[str | None, str]] = set()


@dataclass
class CTRLConfig(RLOOConfig):
    """Arguments of `CTRLTrainer`. Everything of TRL's `RLOOConfig` is here; the fields below differ or are new.

    Args:
        beta: KL coefficient, in units of the transformed reward per nat of sequence KL. None takes the transform's own
            (an optimal transform depends on its beta), or TRL's default where nothing is calibrated.
        beta_start: start from this larger KL coefficient and come down to `beta` geometrically over the first 60 % of
            the steps. A small beta from the start lets the policy collapse on what it finds first, from which it
            recovers slowly: worth it for Worst-of-N, whose betas are small. None: constant.
        target_kl: steer beta during training so that the sequence KL of the rollouts comes to this many nats and stays
            there (`kl_control.KLControl`); `beta` is where it starts. None: beta is what it is.
        kl_interpolation: with `target_kl`, go at the end along the line from the base's weights to the trained ones to
            where the KL is the target (`interpolation`); False leaves the trained ones.
        num_generations: G, rollouts a prompt; the leave-one-out baseline is over them.
        solver: "online" draws rollouts; "offline" trains on the base samples in the data set, without rollouts and
            without calls of the reward (`offline`): rows need `ref_completion_ids` and `ref_logps`.
        loss: of the offline solver: "variance" (None is that), "qrpo", "tup", "ipo" or "bonbon".
        loss_kwargs: `{threshold: ...}` of "tup", `{alpha: ...}` of "bonbon".
        kl_budget: stop when the rollouts' sequence KL, averaged over three logs (of `logging_steps` each), exceeds this
            many nats.
        max_skipped_steps: a step whose loss or gradients are not finite is skipped; so many in a row stop the run.
        initial_weights: a checkpoint or policy folder to start the policy from (optimizer, schedule and step count
            begin anew; the reference stays the base model). The way to go on with another number of processes.
        vllm_tolerance: with `use_vllm`, nats a token that the engine's distribution may be off by (`engine`); beyond,
            the run stops. TRL loads the engine in half precision: up to 7e-4 was seen.
        vllm_importance_sampling_correction: weigh the engine's completions by policy over engine, as TRL's GRPO does.
        vllm_importance_sampling_mode: "sequence_mask" leaves completions out whose weight is out of bounds,
            "sequence_truncate" cuts the weight.
        vllm_importance_sampling_clip_min, vllm_importance_sampling_clip_max: the bounds; None is none.
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
    target_kl: float | None = field(default=None, metadata={"help": "Steer beta to keep this sequence KL (nats)."})
    kl_interpolation: bool = field(default=True, metadata={"help": "At the end, move the weights to target_kl."})
    solver: str = field(default="online", metadata={"help": "online: rollouts; offline: the base samples."})
    loss: str | None = field(default=None, metadata={"help": "Of the offline solver; None: variance."})
    loss_kwargs: dict = field(default_factory=dict, metadata={"help": "Options of the loss."})
    num_generations: int | None = field(default=8, metadata={"help": "Rollouts per prompt (G)."})
    kl_budget: float | None = field(default=None, metadata={"help": "Stop above this sequence KL (nats)."})
    max_skipped_steps: int = field(default=3, metadata={"help": "Stop after so many non-finite steps in a row."})
    initial_weights: str | None = field(default=None, metadata={"help": "Start from these weights, all else anew."})
    vllm_tolerance: float = field(default=2e-3, metadata={"help": "Nats a token that vLLM may be off by."})
    vllm_importance_sampling_correction: bool = field(default=True, metadata={"help": "Weigh vLLM's completions."})
    vllm_importance_sampling_mode: str = field(default="sequence_mask", metadata={"help": "Or sequence_truncate."})
    vllm_importance_sampling_clip_min: float | None = field(default=None, metadata={"help": "Smallest such weight."})
    vllm_importance_sampling_clip_max: float | None = field(default=3.0, metadata={"help": "Largest such weight."})
    shared_prefix: bool = field(default=True, metadata={"help": "Compute each prompt once (exact)."})
    disable_dropout: bool = field(default=True, metadata={"help": "Disable dropout."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for memory."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Look for unused parameters."})

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not torch.cuda.is_available()):
            self.bf16 = False
        self.check()
        if getattr(self, "activation_checkpointing", False) is None:  # transformers' new name for the same setting
            self.activation_checkpointing = self.gradient_checkpointing
        idle = without_effect(vars(self), _defaults())
        super().__post_init__()
        self.check()  # again: transformers has read what was the path of a file
        for line in idle:
            if (self.output_dir, line) not in _TOLD:  # a run makes its arguments several times
                _TOLD.add((self.output_dir, line))
                notice(line)

    def check(self) -> None:
        """See that no setting works against the method.

        Raises:
            InputError: one does; all of them are named, each with the reason and the way out.
        """
        problems = refusals(vars(self))
        for name, value in (("beta", self.beta), ("beta_start", self.beta_start), ("target_kl", self.target_kl)):
            if value is not None and not value > 0:
                problems.append(f"{name} must be above 0 for KL-regularised training, got {value}")
        if self.target_kl is not None and self.beta_start is not None:
            problems.append("target_kl steers beta, and beta_start lets it come down by itself: give one of them")
        if self.solver not in SOLVERS:
            problems.append(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        elif self.solver == "online" and (self.loss is not None or self.loss_kwargs):
            problems.append("loss and loss_kwargs are the offline solver's: set solver: offline, or leave them out")
        if self.vllm_importance_sampling_mode not in MODES:
            problems.append(
                f"vllm_importance_sampling_mode must be {' or '.join(MODES)} (RLOO's ratio is that of a whole "
                f"completion), got {self.vllm_importance_sampling_mode!r}"
            )
        if not self.vllm_tolerance > 0:
            problems.append(f"vllm_tolerance must be above 0 (nats a token), got {self.vllm_tolerance}")
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if not (low or 0.0) < 1.0 < (high or math.inf):
            problems.append(
                f"vllm_importance_sampling_clip_min and _max must have 1 between them, got {low} and {high}"
            )
        if self.max_skipped_steps < 1:
            problems.append(f"max_skipped_steps must be at least 1, got {self.max_skipped_steps}")
        if problems:
            raise InputError("; ".join(problems))
        shared = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        length = dict.fromkeys(("max_new_tokens", "max_tokens"), self.max_completion_length)
        check_rollout_settings(given, {**length, **{name: getattr(self, name) for name in shared}})


def _defaults() -> dict[str, Any]:
    """Every field of `CTRLConfig` with what it holds when it is left out."""
    factories = {one.name: one.default_factory for one in fields(CTRLConfig) if one.default_factory is not MISSING}
    values = {one.name: one.default for one in fields(CTRLConfig)}
    return {**values, **{name: make() for name, make in factories.items()}}


def as_ctrl_config(args: RLOOConfig, *, knows_beta: bool, tell: bool = True) -> CTRLConfig:
    """An `RLOOConfig` as the `CTRLConfig` that says the same; a `CTRLConfig` as it is.

    Two of TRL's defaults give way: dropout is off, and a `beta` left at TRL's default is the transform's own.

    Args:
        args: the arguments of a trainer.
        knows_beta: whether there is a transform with a beta of its own.
        tell: say how they were read.

    Raises:
        InputError: other arguments, or settings that `CTRLConfig` refuses.
    """
    if isinstance(args, CTRLConfig):
        return args
    if not isinstance(args, RLOOConfig):
        raise InputError(f"args must be a CTRLConfig (or TRL's RLOOConfig), got {_described(args)}")
    converted = object.__new__(CTRLConfig)  # `__post_init__` would set again what TRL has set already
    converted.__dict__ |= {**_defaults(), **vars(args), "disable_dropout": True}
    if knows_beta and args.beta == RLOOConfig.beta:
        converted.beta = None
    converted.check()
    shown = "the transform's own" if converted.beta is None else f"{converted.beta:g}"
    if tell:
        notice(f"args is TRL's RLOOConfig: read as CTRLConfig, with beta {shown} and without dropout")
    return converted


def _described(args: Any) -> str:
    """The kind of other arguments, and which keys of theirs there are none of here."""
    kind = type(args).__name__
    if not isinstance(args, TrainingArguments):
        return kind
    known, own = {one.name for one in fields(CTRLConfig)}, {one.name: one.default for one in fields(args)}
    lost = [name for name, default in own.items() if name not in known and getattr(args, name) != default]
    but = f", but for {', '.join(lost)}" if lost else ""
    return f"a {kind}: its keys are here under the same names{but}"


def own_beta(weighted: Sequence[tuple[Any, float]]) -> float | None:
    """The KL coefficient that the transforms of `(reward, weight)` were made for: the weighted sum of their own.

    None where there is no reward, or a transform has none.
    """
    own = [(getattr(reward.transform, "beta", None), weight) for reward, weight in weighted]
    known = [weight * beta for beta, weight in own if beta is not None]
    return float(sum(known)) if known and len(known) == len(own) else None


def resolve_beta(args: CTRLConfig, own: float | None, *, plain: bool = False) -> float:
    """The KL coefficient of a run: that of the arguments, or else the transforms' own.

    Args:
        args: of the run.
        own: `own_beta` of its rewards.
        plain: nothing is calibrated, so that TRL's default holds.

    Raises:
        InputError: neither has one.
    """
    beta = args.beta if args.beta is not None else own
    if beta is None and plain:
        beta = RLOOConfig.beta
    if beta is None:
        raise InputError(
            "beta is not set and the transform has none of its own: give CTRLConfig(beta=...), or use "
            "optimal_transform(procedure, kl=...), or tilt(transform, kl=...).beta"
        )
    return float(beta)
