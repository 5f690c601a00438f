"""`with_references`: what a TRL script's data lack for `CTRLReward`, the rewards of base samples, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from trl import RLOOConfig

from infalign.calibration.table import SampleTable, Wanted
from infalign.data.prompts import prompts_from_rows
from infalign.data.templates import render
from infalign.generation.hf import HFSampler
from infalign.models.layout import lay_columnwise
from infalign.models.loading import (
    choose_device,
    end_token_ids,
    load_policy,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from infalign.rewards.loader import load_reward
from infalign.runtime.distributed import is_main
from infalign.stages.calibrate import see_noise
from infalign.stages.experiment import CALIBRATION, ENGINE
from infalign.stages.sampling import fill
from infalign.training.trl_keys import refusals
from infalign.types import InputError, SamplingSettings


def with_references(
    dataset: Any,
    model: str,
    reward: Any,
    args: RLOOConfig,
    *,
    count: int = 64,
    folder: str | Path | None = None,
    column: str = "ref_rewards",
    tokens_per_batch: int = 16_384,
) -> Any:
    """A data set with the rewards of `count` samples of the base policy on each prompt, for `CTRLReward`.

    What was drawn is kept: the same call finds it, more samples or prompts are added to it, and another reward scores
    the samples that are there. Every process of a launch draws its share.

    Args:
        dataset: a `datasets.Dataset` whose rows hold `prompt` (texts or chats) and what the reward reads.
        model: the base policy as it is given to the trainer: a folder or Hub id.
        reward: as TRL takes it, or anything that a recipe's `reward` may be (`load_reward`).
        args: the trainer's: temperature, length limit, template variables, seed and dtype are its rollouts'.
        count: K. What too few cost (Best-of-4, one nat): .027 win rate at 32, .017 at 64, .010 at 128.
        folder: where samples are kept; None is `calibration` in the arguments' output_dir.
        column: the name of the new column, `CTRLReward`'s.
        tokens_per_batch: KV-cache tokens of a sampling batch.

    Raises:
        InputError: prompts that can't be read, settings that rollouts may not have, a model or reward that can't be
            loaded, or a folder with the samples of another model or setting.
        RewardError: the reward failed.
    """
    if not isinstance(model, str):
        raise InputError(f"model must be the folder or Hub id that the trainer is given, got a {type(model).__name__}")
    if problems := refusals({**vars(args), "disable_dropout": True}):  # the trainer switches it off
        raise InputError("; ".join(problems))
    path = resolve_model(model)
    given: dict[str, Any] = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    revision = given.get("revision")
    trusted = bool(args.trust_remote_code or given.get("trust_remote_code"))
    dtype = _dtype(given.get("dtype"), path, revision, trusted)
    tokenizer = load_tokenizer(path, revision, trusted)
    settings = SamplingSettings(max_tokens=int(args.max_completion_length or 0), temperature=args.temperature)
    prompts = prompts_from_rows(list(dataset), "the data set").prompts
    variables: dict[str, Any] = args.chat_template_kwargs if isinstance(args.chat_template_kwargs, dict) else {}
    wanted = [
        Wanted(one, tuple(render(tokenizer, one.content, chat_template_kwargs={**variables, **one.template})), count)
        for one in prompts
    ]
    parts = {
        "model": model_fingerprint(path, revision),
        **settings.as_dict(),
        "dtype": str(dtype),
        "seed": args.seed,
        "purpose": CALIBRATION,
        "engine": ENGINE,
    }

    def sampler() -> HFSampler:
        policy = load_policy(
            path, device=choose_device(args.use_cpu), dtype=dtype, revision=revision, trust_remote_code=trusted
        )
        lay_columnwise(policy)
        return HFSampler(policy, tokenizer, settings, end_token_ids(policy, tokenizer), f"{args.seed}/{CALIBRATION}")

    table = SampleTable.open(Path(folder or Path(str(args.output_dir)) / "calibration"), parts)
    loaded = load_reward(reward)
    fill(
        table,
        wanted,
        [loaded],
        sampler,
        max_tokens=settings.max_tokens,
        tokens_per_batch=tokens_per_batch,
        title="references",
        look=see_noise if is_main() else None,
    )
    return table.attach(dataset, loaded.fingerprint, count=count, column=column)


def _dtype(named: Any, path: str, revision: str | None, trusted: bool) -> torch.dtype:
    """What TRL loads a policy in: float32 unless its `model_init_kwargs` say otherwise; "auto" is as it was saved."""
    if named in (None, "auto"):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusted) if named else None
        named = getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(found, torch.dtype):
        raise InputError(f"dtype {named!r} in model_init_kwargs is none of torch's: give e.g. bfloat16")
    return found
