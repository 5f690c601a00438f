"""`infalign reward-model`: Bradley-Terry training on preference pairs, and what held-out pairs say of the result.

Three ways: the whole backbone or adapters with TRL's `RewardTrainer`, or an exact head on frozen features
(`freeze_backbone: true`). Pairs are split by prompt: no prompt is in both parts, and with one seed the prompts that a
recipe of `infalign run` holds out of the same data are among those held out here.
"""

# transformers, peft and trl type what they return as unions of everything that it may be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import RewardConfig

from infalign.data.columns import parse_columns, renamed
from infalign.data.preferences import LoadedPreferences, Preference, preferences_from_rows, split_pairs
from infalign.data.sources import read_rows
from infalign.data.splits import split_prompts
from infalign.data.templates import last_tokens
from infalign.models.loading import choose_device, load_tokenizer, model_fingerprint, replicated, resolve_model
from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.encoding import encode_pair
from infalign.runtime.artifacts import disk_errors, fingerprint, whole_folder, write_manifest
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import barrier, is_main, together
from infalign.runtime.launch import join
from infalign.stages.output import leaves_nothing, reusable
from infalign.stages.reward_model.quality import measure
from infalign.stages.reward_model.recipe import RewardModelRecipe
from infalign.stages.training_keys import adapter_of, split_training
from infalign.training.packages import missing_packages
from infalign.training.reward_head import candidate_depths, features, fit_head
from infalign.training.reward_model import Encoded, make_trainer, train
from infalign.types import InputError, Prompt

CHECKED = 16  # training completions that the saved model must score as the head that was fitted


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of a run, split, and what their backbone and tokenizer are called."""

    base_path: str
    tokenizer: Any
    train: tuple[Preference, ...]
    test: tuple[Preference, ...]


@leaves_nothing("*")
def reward_model(recipe: RewardModelRecipe) -> dict[str, Any]:
    """Train a reward model, or find it trained, and measure it on held-out pairs.

    Returns:
        The content of `reward_model.json`, with `folder`, where the model is: a reward by its path.

    Raises:
        InputError: the recipe names what is not there or does not fit, needs a package that is not installed, or the
            folder holds another model.
        TrainingError: losses or weights are not finite.
    """
    join(recipe.use_cpu)
    if recipe.output.exists() and not recipe.output.is_dir():
        raise InputError(f"output_dir {recipe.output} is a file: give a folder")
    missing = missing_packages(recipe.training)
    if missing:
        raise InputError("; ".join(missing))
    pairs = load_pairs(recipe)
    parts = _parts(recipe, pairs)
    folder = recipe.output / "reward_model"
    if reusable(folder, "reward_model", parts, recipe.overwrite):
        say(f"reward model: {folder} is trained already")
    else:
        how = _fit_head if recipe.freeze_backbone else _train
        how(recipe, pairs, folder, parts)
    barrier()
    with replicated():
        result = measure(recipe, pairs.train, pairs.test, folder) if is_main() else {}
    barrier()
    return {**result, "folder": str(folder)}


def load_pairs(recipe: RewardModelRecipe) -> Pairs:
    """The recipe's pairs, split by prompt.

    Raises:
        InputError: no such data, or too few prompts.
    """
    train = _load(recipe, recipe.dataset_train_split)
    test = _load(recipe, recipe.dataset_test_split) if recipe.dataset_test_split else None
    pools = [None if one is None else _distinct(one.pairs) for one in (train, test)]
    splits = split_prompts(
        pools[0] or [],
        pools[1],
        num_train=recipe.num_train_prompts,
        num_validation=0,
        num_test=recipe.num_test_prompts,
        seed=recipe.seed,
    )
    keys, held_out = ({prompt.key for prompt in part} for part in (splits.train, splits.test))
    chosen, _ = split_pairs([pair for pair in train.pairs if pair.key in keys], held_out)
    _, kept = split_pairs((test or train).pairs, held_out)
    base_path = resolve_model(recipe.model_name_or_path, recipe.base_dir)
    tokenizer = load_tokenizer(base_path, recipe.model_revision, recipe.trust_remote_code)
    return Pairs(base_path, tokenizer, chosen, kept)


def _distinct(pairs: Sequence[Preference]) -> list[Prompt]:
    """The pairs' prompts, near copies counted once."""
    return list({pair.key: Prompt(pair.prompt, pair.key) for pair in reversed(pairs)}.values())


def _load(recipe: RewardModelRecipe, split: str) -> LoadedPreferences:
    rows = read_rows(
        str(recipe.dataset_name),
        config=recipe.dataset_config,
        split=split,
        data_dir=recipe.dataset_data_dir,
        base_dir=recipe.base_dir,
    )
    rows = renamed(rows, parse_columns(recipe.columns), str(recipe.dataset_name))
    loaded = preferences_from_rows(
        rows, str(recipe.dataset_name), prompt_column=recipe.prompt_column, data_format=recipe.data_format
    )
    if loaded.note:
        say(f"{loaded.source}: {loaded.note}")
    if loaded.identical or loaded.duplicates:
        notice(f"{loaded.identical} pairs with two equal sides and {loaded.duplicates} repeated pairs are left out")
    return loaded


def _parts(recipe: RewardModelRecipe, pairs: Pairs) -> dict[str, Any]:
    """Everything that the model depends on, by name."""
    shaping = ("dtype", "freeze_backbone", "keep_layers", "max_length", "chat_template_kwargs", "seed")
    return {
        **{name: getattr(recipe, name) for name in shaping},
        **recipe.training,
        "model": model_fingerprint(pairs.base_path, recipe.model_revision),
        "training pairs": fingerprint([dataclasses.astuple(pair) for pair in pairs.train]),
    }


# --- the head alone ---------------------------------------------------------------------------------------------------


def _fit_head(recipe: RewardModelRecipe, pairs: Pairs, folder: Path, parts: dict[str, Any]) -> None:
    """Features of the training pairs, the best head, and a model that carries it (rank 0 does it)."""
    if not is_main():
        return
    model = _backbone(recipe, pairs, None)
    layers = int(model.config.get_text_config().num_hidden_layers)
    if recipe.keep_layers is not None and recipe.keep_layers > layers:
        raise InputError(f"keep_layers is {recipe.keep_layers}, the backbone has {layers} layers")
    depths = candidate_depths(layers) if recipe.keep_layers is None else (recipe.keep_layers,)
    sequences = [ids for pair in encoded(recipe, pairs.tokenizer, pairs.train) for ids in pair]
    names = [f"{number}" for number in range(len(pairs.train)) for _ in range(2)]
    found = features(model, sequences, names, depths, tokens=recipe.tokens_per_batch)
    clusters = [pair.key for pair in pairs.train]
    margins = _margins(pairs.train)
    differences = found[0::2] - found[1::2]
    head = fit_head(differences, depths, clusters, recipe.seed, None if margins is None else np.array(margins))
    say(
        f"reward model: {head.depth} of {layers} layers, penalty {head.penalty:.3g}; cross-validated on "
        f"{len(pairs.train)} training pairs: loss {head.cv_loss:.4f} (chance 0.6931), accuracy {head.cv_accuracy:.3f}"
    )
    del model
    model = _backbone(recipe, pairs, head.depth)
    with torch.no_grad():
        model.score.weight.copy_(torch.as_tensor(head.weights_H)[None])
    facts = {"layers": head.depth, "penalty": head.penalty, "cv_loss": head.cv_loss, "cv_accuracy": head.cv_accuracy}
    _save(recipe, pairs, model, folder, parts, method="head", **facts)
    place = depths.index(head.depth)
    _check_saved(folder, sequences[:CHECKED], found[:CHECKED, place].astype(np.float64) @ head.weights_H)


def _backbone(recipe: RewardModelRecipe, pairs: Pairs, layers: int | None) -> Any:
    """The base model's first layers with a new head of one score, in eval mode.

    Raises:
        InputError: it is no decoder with a linear `score` on top.
    """
    config: Any = AutoConfig.from_pretrained(
        pairs.base_path, revision=recipe.model_revision, trust_remote_code=recipe.trust_remote_code, num_labels=1
    )
    text = config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = pairs.tokenizer.pad_token_id
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with replicated():
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            pairs.base_path,
            config=config,
            revision=recipe.model_revision,
            dtype=getattr(torch, recipe.dtype),
            trust_remote_code=recipe.trust_remote_code,
            use_safetensors=True,
        )
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise InputError(
            f"freeze_backbone needs a decoder with a linear score on top, {type(model).__name__} has none: train it "
            "whole, or with use_peft: true"
        )
    head.float()
    return model.to(choose_device(recipe.use_cpu)).eval()


def _check_saved(folder: Path, sequences: Sequence[list[int]], wanted: np.ndarray) -> None:
    """The saved model scores as the head that was fitted."""
    found = ClassifierReward(str(folder)).score(sequences)
    if not np.allclose(found, wanted, atol=1e-2 * max(1.0, float(np.abs(wanted).max()))):
        raise InputError(
            f"{folder} does not score as the head that was fitted (apart by {np.abs(found - wanted).max():.3g}): the "
            "backbone can't be cut; set keep_layers to all of its layers, or train it whole"
        )


# --- the whole model, or adapters -------------------------------------------------------------------------------------


def _train(recipe: RewardModelRecipe, pairs: Pairs, folder: Path, parts: dict[str, Any]) -> None:
    """TRL's RewardTrainer, and the whole model (adapters merged) in `folder`."""
    ours, rest = split_training(recipe.training, RewardConfig)
    peft = adapter_of({"lora_task_type": "SEQ_CLS", **rest})
    work = recipe.output / "training"
    with together("the start of the reward model's training"):  # a mistake that all ranks find is told once
        trainer = make_trainer(
            pairs.base_path,
            _arguments(recipe, ours, work),
            encoded(recipe, pairs.tokenizer, pairs.train),
            pairs.tokenizer,
            margins=_margins(pairs.train),
            peft_config=peft,
            identity=parts,
        )
    train(trainer, parts)
    facts = {"method": "full" if peft is None else "adapters", "steps": trainer.state.global_step}
    if peft is None:
        trainer.save_model(str(work / "whole"))
    else:
        trainer.save_model(str(work / "adapter"), _internal_call=True)
    barrier()
    if is_main():
        with replicated():  # rank 0 alone: ZeRO-3 would wait for the others to take their shares
            model = _trained(recipe, pairs, work, merged=peft is not None)
        _save(recipe, pairs, model, folder, parts, **facts)
    barrier()


def _trained(recipe: RewardModelRecipe, pairs: Pairs, work: Path, *, merged: bool) -> Any:
    """The trained model, whole and on the CPU."""
    if not merged:
        return AutoModelForSequenceClassification.from_pretrained(str(work / "whole"), use_safetensors=True)
    from peft import PeftModel  # noqa: PLC0415 - an extra

    base = AutoModelForSequenceClassification.from_pretrained(
        pairs.base_path,
        num_labels=1,
        revision=recipe.model_revision,
        dtype=getattr(torch, recipe.dtype),
        trust_remote_code=recipe.trust_remote_code,
        use_safetensors=True,
    )
    base.config.get_text_config().pad_token_id = pairs.tokenizer.pad_token_id
    return PeftModel.from_pretrained(base, str(work / "adapter")).merge_and_unload()


def _arguments(recipe: RewardModelRecipe, ours: dict[str, Any], work: Path) -> RewardConfig:
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if ours.get(name, 1) < 1:
            raise InputError(f"{name} must be at least 1, got {ours[name]}")
    shared = {
        "output_dir": str(work),
        "seed": recipe.seed,
        "use_cpu": recipe.use_cpu,
        "trust_remote_code": recipe.trust_remote_code,
        "disable_tqdm": True,
        "max_length": None,  # cut here, not filtered there
        "model_init_kwargs": {"revision": recipe.model_revision, "use_safetensors": True, "dtype": recipe.dtype}
        | ({"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {})
        | (ours.get("model_init_kwargs") or {}),
    }
    on_cpu = recipe.use_cpu or not torch.cuda.is_available()
    defaults = {
        "save_total_limit": 1,
        "logging_steps": 1,
        "bf16": not on_cpu,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    try:
        return RewardConfig(**{**defaults, "dataloader_pin_memory": not on_cpu, **ours, **shared})
    except (ValueError, TypeError) as error:
        raise InputError(f"the training keys do not fit: {' '.join(str(error).split())}") from error


# --- both -------------------------------------------------------------------------------------------------------------


def _margins(pairs: Sequence[Preference]) -> list[float] | None:
    """The margins of pairs, 0 where a row has none; None where the data has none at all."""
    margins = [pair.margin for pair in pairs]
    if all(margin is None for margin in margins):
        return None
    say(f"reward model: the data's margins are part of the loss ({sum(m is not None for m in margins)} pairs)")
    return [margin or 0.0 for margin in margins]


def encoded(recipe: RewardModelRecipe, tokenizer: Any, pairs: Sequence[Preference]) -> list[Encoded]:
    """Token ids of both sides as the reward will see them, cut at the left to `max_length`."""
    cut = 0
    found: list[Encoded] = []
    for pair in pairs:
        sides = [
            encode_pair(
                tokenizer,
                pair.prompt,
                side,
                name=recipe.model_name_or_path,
                chat_template_kwargs={**recipe.chat_template_kwargs, **pair.template},
            )
            for side in (pair.chosen, pair.rejected)
        ]
        if recipe.max_length is not None:
            cut += any(len(ids) > recipe.max_length for ids in sides)
            sides = [last_tokens(ids, recipe.max_length, tokenizer.bos_token_id) for ids in sides]
        found.append((sides[0], sides[1]))
    if cut:
        notice(f"{cut} of {len(pairs)} training pairs are longer than {recipe.max_length} tokens: cut at the left")
    return found


def _save(
    recipe: RewardModelRecipe, pairs: Pairs, model: Any, folder: Path, parts: dict[str, Any], **facts: Any
) -> None:
    with whole_folder(folder) as temporary:
        with disk_errors(temporary):
            model.save_pretrained(temporary)
            pairs.tokenizer.save_pretrained(temporary)
        write_manifest(temporary, "reward_model", parts, base=recipe.model_name_or_path, **facts)
    say(f"reward model: {folder}")
