"""The KL that was asked for, at the end: weights on the line from the base's to the trained policy's.

Steering brings the KL near its target; what remains is what the last steps happened to do, which in a run of twenty
steps is a factor of 1.4. Along the line `base + w (policy - base)` the KL grows about with the square of w, and the
win rate with it as if the policy had been trained to that KL (recipes/LOG.md). So the last thing a steered run does is
to measure its KL on prompts of training, and to go along the line to where it is the target: a little back, or a little
beyond. A difference within the measurement's own error moves nothing. Between initialisation and policy this is known
as LITI (WARP, arXiv:2406.16768), there to choose a KL afterwards.

An adapter is moved by its `lora_B`, in which it is linear.
"""

# TRL and transformers type their attributes as unions of everything that they may ever hold.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from infalign.evaluation.limits import Estimate, cluster_mean
from infalign.runtime.distributed import gathered
from infalign.training.held_out import drawn_samples

PROMPTS, SAMPLES = 64, 128
"""Of the training data, evenly spread, and samples on all of them, for a measurement of the KL."""
NEAR = 0.04
"""Of the target: near enough."""
NEAREST, FARTHEST = 0.1, 1.5
"""The weights that are tried; a policy that would need another one stays as it is."""
MEASUREMENTS = 4
"""At most, that of the policy itself included."""
LINES = -2
"""In place of a generation's number: the random streams of these samples, the same at every weight."""


@dataclass(frozen=True)
class Interpolated:
    """Where a policy came to lie: `weight` on the line from the base (0) to the trained one (1), and KLs in nats."""

    weight: float
    kl: float
    trained_kl: float


def search(kl_at: Callable[[float], Estimate], target: float) -> Interpolated:
    """The weight whose KL is `target`, or 1 where that is near enough or out of reach.

    Args:
        kl_at: measures the KL at a weight, with its standard error; called a few times, first at 1. All measurements
            share their random streams, so that their differences are better known than their level.
        target: nats.

    >>> round(search(lambda weight: Estimate(1.5 * weight**1.9, 0.01), 1.0).weight, 2)
    0.82
    >>> search(lambda weight: Estimate(1.1 * weight**2, 0.12), 1.0).weight  # may be 1.0 as well
    1.0
    """
    first = kl_at(1.0)
    trained = first.mean
    tried = [Interpolated(1.0, trained, trained)]
    power = 2.0
    if abs(trained - target) <= first.error:
        return tried[0]
    while len(tried) < MEASUREMENTS and abs(tried[-1].kl - target) > NEAR * target:
        last = tried[-1]
        if last.kl <= 0.0:  # hardly trained: the mean of a few log-ratios may be anything
            break
        weight = last.weight * (target / last.kl) ** (1.0 / power)
        if not NEAREST <= weight <= FARTHEST:
            break
        now = kl_at(weight).mean
        tried.append(Interpolated(weight, now, trained))
        if now > 0.0 and abs(math.log(weight / last.weight)) > 1e-3:
            power = min(4.0, max(1.0, math.log(now / last.kl) / math.log(weight / last.weight)))
    best = min(tried, key=lambda one: abs(one.kl - target))
    return best if best.kl > 0.0 else tried[0]


def interpolate(trainer: Any, target: float) -> Interpolated | None:
    """Move the trained policy of a `CTRLTrainer` to where its KL is `target`; every rank calls it.

    Returns:
        Where it is now; None where it can't be moved (sharded weights, adapters other than plain LoRA) or the data is a
        stream.
    """
    moving = _moving(trainer)
    if moving is None or not hasattr(trainer.train_dataset, "__len__"):
        return None
    trained = [parameter.detach().clone() for parameter, _ in moving]

    def place(weight: float) -> None:
        with torch.no_grad():
            for (parameter, base), end in zip(moving, trained, strict=True):
                start = torch.zeros_like(end) if base is None else base.detach().to(end.device)
                exact = torch.promote_types(end.dtype, torch.float32)  # bfloat16 would round on the way
                parameter.copy_(end if weight == 1.0 else torch.lerp(start.to(exact), end.to(exact), weight))

    def kl_at(weight: float) -> Estimate:
        place(weight)
        return _kl(trainer)

    training = trainer.model.training
    trainer.model.eval()
    try:
        found = search(kl_at, target)
        place(found.weight)
    finally:
        trainer.model.train(training)
    return found


def _moving(trainer: Any) -> list[tuple[Tensor, Tensor | None]] | None:
    """The parameters that training moved, each with the base's (None: zeros); None where there is no such line."""
    if trainer._sharding() in ("zero3", "fsdp"):
        return None
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(policy):
        settings = policy.active_peft_config
        plain = settings.peft_type.value == "LORA" and not settings.use_dora and settings.bias == "none"
        if not plain or settings.modules_to_save:
            return None
        return [
            (one, None) for name, one in policy.named_parameters() if "lora_B" in name or "lora_embedding_B" in name
        ]
    if trainer.ref_model is None:
        return None
    base = dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
    return [(one, base[name]) for name, one in policy.named_parameters() if one.requires_grad]


def _kl(trainer: Any) -> Estimate:
    """KL of the policy on samples of its own, on prompts of training, over all ranks."""
    count = len(trainer.train_dataset)
    chosen = sorted({count * place // PROMPTS for place in range(PROMPTS)})
    rows = [trainer.train_dataset[row] for row in chosen]
    drawn = drawn_samples(trainer, rows, max(1, SAMPLES // len(rows)), LINES, conditional=True)
    mine = [(number, kl_M) for number, _, kl_M in drawn]
    of_all_ranks = sorted((one for part in gathered(mine) for one in part), key=lambda one: one[0])
    return cluster_mean([kl_M for _, kl_M in of_all_ranks])
