"""`with_references`: what a TRL script's data lack for `CTRLReward`, the rewards of base samples, in one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoConfig
from trl import RLOOConfig

from infalign.calibration.table import SampleTable, Wanted
from infalign.data.forms import from_prompt
from infalign.data.prompts import RESERVED_COLUMNS, numbered, read_checked
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
from infalign.rewards.loader import Reward, load_reward
from infalign.rewards.scoring import score_samples
from infalign.runtime.console import Progress
from infalign.runtime.distributed import gathered, is_main, my_share, together
from infalign.stages.calibrate import see_noise
from infalign.stages.experiment import CALIBRATION, ENGINE
from infalign.stages.sampling import fill
from infalign.training.config import as_ctrl_config
from infalign.types import InputError, Messages, Prompt, SamplingSettings

COLUMN = "ref_rewards"
_WITHHELD = ("completion",)  # which TRL withholds from rewards too
_AT_A_TIME = 256  # samples that a reward is asked about


def with_references(
    dataset: Any,
    model: str,
    reward: Any,
    args: RLOOConfig,
    *,
    count: int = 64,
    folder: str | Path | None = None,
    column: str = COLUMN,
    tokens_per_batch: int = 16_384,
) -> Any:
    """A data set with the rewards of `count` samples of the base policy on each prompt, for `CTRLReward`.

    Samples are kept: the same call finds them, and more samples or prompts are added to them. The reward is asked anew
    at every call, because of a function in a script nobody can tell whether it has changed. Every process of a launch
    draws and scores its share. Prompts are rendered by the model's own tokenizer, as the trainer does by default.

    Args:
        dataset: a `datasets.Dataset` whose rows hold `prompt` (texts or chats) and what the reward reads.
        model: the base policy as it is given to the trainer: a folder or Hub id.
        reward: as TRL takes it, or anything that a recipe's `reward` may be (`load_reward`).
        args: the trainer's: temperature, length limit, template variables, seed and dtype are its rollouts'.
        count: K. What too few cost (Best-of-4, one nat): .027 win rate at 32, .017 at 64, .010 at 128.
        folder: where samples are kept; None is `calibration` in the arguments' output_dir.
        column: the name of the new column, `CTRLReward`'s; one of that default name is replaced.
        tokens_per_batch: KV-cache tokens of a sampling batch.

    Raises:
        InputError: data or prompts that can't be read, settings that the trainer refuses, a model or reward that can't
            be loaded, prompts without a single score, or a folder with the samples of another model or setting.
        RewardError: the reward failed.
    """
    _check(dataset, model, count, column)
    args = as_ctrl_config(args, knows_beta=True, tell=False)
    if args.max_completion_length is None:
        raise InputError("max_completion_length is not set: samples and rollouts need the same limit")
    path = resolve_model(model)
    given: dict[str, Any] = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    revision = given.get("revision")
    trusted = bool(args.trust_remote_code or given.get("trust_remote_code"))
    dtype = _dtype(given.get("dtype"), path, revision, trusted)
    tokenizer = load_tokenizer(path, revision, trusted)
    settings = SamplingSettings(max_tokens=args.max_completion_length, temperature=args.temperature)
    prompts = _prompts(dataset, column)
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
    home = Path(folder or Path(str(args.output_dir)) / "calibration")
    if home.exists() and not home.is_dir():
        raise InputError(f"folder {home} is a file: give a folder")

    @functools.cache
    def sampler() -> HFSampler:
        policy = load_policy(
            path, device=choose_device(args.use_cpu), dtype=dtype, revision=revision, trust_remote_code=trusted
        )
        lay_columnwise(policy)
        return HFSampler(policy, tokenizer, settings, end_token_ids(policy, tokenizer), f"{args.seed}/{CALIBRATION}")

    table, asked = SampleTable.open(home, parts), load_reward(reward)
    rewards: list[NDArray[np.float64]] = []
    for some in (wanted[:1], wanted[1:]):  # a reward that can't score is found after one prompt, not after all
        title = "references" if rewards else ""
        fill(table, some, [], sampler, max_tokens=settings.max_tokens, tokens_per_batch=tokens_per_batch, title=title)
        rewards += _scored(asked, table, some, title, look=not rewards)
    bare = dataset.remove_columns(column) if column in dataset.column_names else dataset
    return bare.add_column(column, [row.tolist() for row in rewards])


def _prompts(dataset: Dataset, column: str) -> tuple[Prompt, ...]:
    """A prompt of each row, a text as it is (TRL reads no chats from it), with the columns that TRL gives rewards."""
    rows: list[dict[str, Any]] = [dict(row) for row in dataset]  # pyright: ignore[reportCallIssue, reportArgumentType]
    where = "the data set, column 'prompt'"
    contents = read_checked(rows, where, lambda row: _content(row["prompt"]))
    if len({isinstance(content, str) for content in contents}) > 1:
        raise InputError(f"{where}: some prompts are text and some are chats; make them alike")
    withheld = {"prompt", column, *_WITHHELD, *RESERVED_COLUMNS}
    further = [{name: value for name, value in row.items() if name not in withheld} for row in rows]
    return numbered(zip(contents, further, strict=True))


def _content(value: Any) -> str | Messages:
    if not isinstance(value, str):
        return from_prompt(value)
    if not value.strip():
        raise InputError("the prompt is empty")
    return value


def _scored(
    reward: Reward, table: SampleTable, wanted: Sequence[Wanted], title: str, *, look: bool
) -> list[NDArray[np.float64]]:
    """The rewards of each prompt's samples, without those that have no score; every rank scores its share.

    Raises:
        InputError: prompts without a single score.
    """
    held = table.samples() if wanted else {}
    pairs = [(entry.prompt, sample) for entry in wanted for sample in held[entry.prompt.key][: entry.count]]
    pieces = list(enumerate(pairs[at : at + _AT_A_TIME] for at in range(0, len(pairs), _AT_A_TIME)))
    mine: dict[int, NDArray[np.float64]] = {}
    named = title and f"{title}: scoring with {reward.name}"
    with together("the scoring of base samples"), Progress(named, len(pieces), "batches") as progress:
        for number, piece in my_share(pieces):
            prompts, samples = [prompt for prompt, _ in piece], [sample for _, sample in piece]
            mine[number] = score_samples(reward, prompts, samples)
            if look and number == 0 and is_main():
                see_noise(reward, prompts, samples, mine[number])
            progress.advance()
    found = {number: values for part in gathered(mine) for number, values in part.items()}
    scores = np.concatenate([np.empty(0), *(found[number] for number, _ in pieces)])
    ends = np.cumsum([entry.count for entry in wanted])
    rows = [row[~np.isnan(row)] for row in np.split(scores, ends[:-1])] if wanted else []
    silent = [entry.prompt for entry, row in zip(wanted, rows, strict=True) if not len(row)]
    if silent:
        raise InputError(
            f"reward {reward.name!r} gave no score to any sample of {len(silent)} of {len(wanted)} prompts (first: "
            f"{str(silent[0].content)[:80]!r}): fix the reward, or leave these prompts out"
        )
    return rows


def _check(dataset: Any, model: Any, count: Any, column: str) -> None:
    if not isinstance(model, str):
        raise InputError(f"model must be the folder or Hub id that the trainer is given, got a {type(model).__name__}")
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"the data set must be a datasets.Dataset (one split, no stream), got a {type(dataset).__name__}"
        )
    if not len(dataset):
        raise InputError("the data set is empty")
    if dataset.format["type"] is not None:
        raise InputError(f"the data set has the format {dataset.format['type']!r}: give it with_format(None)")
    names = dataset.column_names
    if "prompt" not in names:
        raise InputError(
            f"the data set has no column 'prompt'; its columns are {', '.join(map(repr, names))}: rename_column"
        )
    if seen := [name for name in ("image", "images") if name in names]:
        raise InputError(f"the data set has a column {seen[0]!r}: base samples are drawn from texts and chats alone")
    if column in names and column != COLUMN:
        raise InputError(f"the data set has a column {column!r} already: choose another name for the references")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"count must be a whole number of samples, at least 1, got {count!r}")


def _dtype(named: Any, path: str, revision: str | None, trusted: bool) -> torch.dtype:
    """What TRL loads a policy in: float32 unless its `model_init_kwargs` say otherwise; "auto" is as it was saved."""
    if named in (None, "auto"):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusted) if named else None
        named = getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(found, torch.dtype):
        raise InputError(f"dtype {named!r} in model_init_kwargs is none of torch's: give e.g. bfloat16")
    return found
