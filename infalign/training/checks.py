"""What must hold before training, and at step 0, where the policy still is the base: KL 0, calibrated mean 1/2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import get_scheduler

from infalign.training.direct import Direct
from infalign.training.reward import CTRLReward
from infalign.training.trl_keys import WEIGHT
from infalign.types import InputError

MOST_KL_AT_START = 0.05  # nats; rounding gives about 1e-4 in float32 and up to 1e-2 in bf16
SIGMAS = 6.0
NEUTRAL = {
    **{"do_sample": True, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "n": 1, "best_of": 1},
    **{"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "length_penalty": 1.0, "diversity_penalty": 0.0},
    **{"no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    **{
        "min_length": 0,
        "min_new_tokens": 0,
        "min_tokens": 0,
        "remove_invalid_values": False,
        "renormalize_logits": False,
    },
}
"""Values of further fields of `GenerationConfig` and vLLM's `SamplingParams` that sample from the model's own
distribution; None does, whatever the field."""
HARMLESS = {"seed", "use_cache", "cache_implementation", "disable_compile", "detokenize", "skip_special_tokens"}


def check_batch(arguments: Any, prompts: int) -> None:
    """A generation needs so many distinct prompts; with fewer, training makes no step.

    Args:
        arguments: a `CTRLConfig`.
        prompts: rows of the training data.

    Raises:
        InputError: there are fewer.
    """
    needed = int(arguments.generation_batch_size or 0) // int(arguments.num_generations or 1)
    if prompts < needed:
        raise InputError(
            f"{prompts} training prompts are fewer than the {needed} of one batch (per_device_train_batch_size x "
            "processes x steps_per_generation / num_generations): add prompts, or lower per_device_train_batch_size"
        )


MEASURED = ("winrate", "winrate_1", "kl_seq")
"""What `evaluate` measures during training, and `metric_for_best_model` may name."""


def best_model_settings(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`metric_for_best_model` and `greater_is_better` where something needs them and the recipe leaves them out.

    Args:
        keys: of the recipe.

    Raises:
        InputError: a metric that is not measured.

    >>> best_model_settings({"load_best_model_at_end": True})
    {'metric_for_best_model': 'winrate', 'greater_is_better': True}
    """
    if not keys.get("load_best_model_at_end") and keys.get("lr_scheduler_type") != "reduce_lr_on_plateau":
        return {}
    metric = keys.get("metric_for_best_model") or "winrate"
    if metric.removeprefix("eval_") not in MEASURED:
        raise InputError(
            f"metric_for_best_model {metric!r} is not measured; one of {', '.join(MEASURED)} (left out: winrate)"
        )
    return {"metric_for_best_model": metric, "greater_is_better": not metric.endswith("kl_seq")}


def check_loop(arguments: Any) -> None:
    """What only the training loop would find: the optimizer's rate, the schedule, the data loader.

    Args:
        arguments: a `CTRLConfig`.

    Raises:
        InputError: one of them can't be built; the library's words are passed on.
    """
    if arguments.dataloader_persistent_workers and not arguments.dataloader_num_workers:
        raise InputError("dataloader_persistent_workers needs dataloader_num_workers above 0: leave it out")
    if not (math.isfinite(arguments.learning_rate) and arguments.learning_rate >= 0):
        raise InputError(f"learning_rate must be a number of at least 0, got {arguments.learning_rate}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    kind, options = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)), {}
    try:
        options = dict(arguments.lr_scheduler_kwargs or {})
        get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"lr_scheduler_type {kind} with lr_scheduler_kwargs {options}: {' '.join(str(error).split())}"
        ) from error


def check_kl_at_start(kl_B: NDArray[np.float64], policy: str, reference: str) -> None:
    """Policy and reference must be one model before the first step.

    Args:
        kl_B: (B,) log-ratios of the first rollouts, nats.
        policy, reference: where each was loaded from, for the message.

    Raises:
        InputError: they differ.
    """
    error = float(kl_B.std(ddof=1) / math.sqrt(kl_B.size)) if kl_B.size > 1 else 0.0
    mean = float(kl_B.mean())
    if not math.isfinite(mean) or abs(mean) > MOST_KL_AT_START + SIGMAS * error or error > MOST_KL_AT_START:
        raise InputError(
            f"at step 0 the sequence KL is {mean:.3g} ± {error:.2g} nats and must be 0: the policy ({policy}) and the "
            f"reference ({reference}) are not the same model, or dropout or a temperature differs between them"
        )


def check_calibration_at_start(mean: float, rollouts: int, prompts: int, references: int) -> None:
    """The base policy's own calibrated reward has mean 1/2, ties included.

    Args:
        mean: of the first rollouts' calibrated rewards.
        rollouts, prompts: how many rollouts, on how many distinct prompts.
        references: K, the smallest number of reference rewards behind them.

    Raises:
        InputError: the mean is further from 1/2 than chance allows (six standard deviations of a uniform).
    """
    # a uniform has variance 1/12; rollouts and the references that they are ranked among both add theirs
    spread = math.sqrt((1.0 / rollouts + 1.0 / (prompts * references)) / 12.0)
    if abs(mean - 0.5) > SIGMAS * spread:
        raise InputError(
            f"at step 0 the mean calibrated reward is {mean:.3f} and must be 0.5 ± {SIGMAS * spread:.3f}: the "
            "calibration was not sampled from this policy with these prompts, template, temperature and length limit, "
            "or the reward is not the one it was scored with: run `infalign calibrate --overwrite`, which scores the "
            "samples anew"
        )


def check_rollout_settings(generation_kwargs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Rollouts must be drawn from the distribution that calibration was.

    TRL lays `generation_kwargs` over the settings, in `generate` as in vLLM (`use_vllm`).

    Args:
        generation_kwargs: TRL's further arguments of generation.
        settings: the sampling settings that calibration shares, by their names there.

    Raises:
        InputError: they change the distribution, or may.
    """
    neutral = {**NEUTRAL, **settings}
    other = {
        name: value
        for name, value in generation_kwargs.items()
        if name not in HARMLESS
        and value is not None
        # 0 and None mean the same (`top_k`, `min_p`)
        and not (name in neutral and (value or None) == (neutral[name] or None))
    }
    if other:
        shown = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise InputError(
            f"generation_kwargs would draw rollouts otherwise than calibration ({shown}): leave it out, and set "
            "temperature and max_completion_length, which both share"
        )


def check_rewards(functions: Sequence[Any], ours: Sequence[CTRLReward], weights: Sequence[float] | None) -> None:
    """See that several rewards can be told apart, and that `reward_weights` leaves transforms as they are.

    Win rates may be weighted (`Direct`): their weighted sum is what is then maximised.

    Args:
        functions: all reward functions.
        ours: those among them that calibrate.
        weights: of the functions, or None.

    Raises:
        InputError: two have one name or share a column of references that are not of one reward, or a transform's
            weight is not 1.
    """
    names = [one.name for one in ours]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"{len(ours)} CTRLRewards, several of them named {twice[0]!r}: give each CTRLReward(name=...)")
    columns: dict[str, CTRLReward] = {}
    for one in ours:
        other = columns.setdefault(one.column, one)
        if other.raw.fingerprint != one.raw.fingerprint:
            raise InputError(
                f"{other.name!r} and {one.name!r} are two rewards and read their reference rewards from one column, "
                f"{one.column!r}: attach a column for each (SampleTable.attach), and give CTRLReward(column=...)"
            )
    if weights is None or len(weights) != len(functions):
        return  # TRL itself refuses another number of weights
    for one in ours:
        if weights[functions.index(one)] != 1.0 and not isinstance(one.transform, Direct):
            raise InputError(f"reward_weights={list(weights)}: {WEIGHT}")
