"""`merge_method: dam`: the parents' data and words, the coefficients, and the model that they make.

What the parents say of their examples is written down first, one parent at a time, so that no two models are in memory
for it. While coefficients are learned the parents' weights are mapped from their files. Everything on the way is kept
beside the output folder under a hidden name until the model is whole: a killed merge goes on.
"""

# peft and transformers type what they return as unions of everything that it may be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from infalign.data.examples import Example, read_examples
from infalign.merging.dam import TeacherLogits, Weights, coefficient_shapes, merged, teacher_logits
from infalign.merging.learning import DAMSettings, Learned, learn, padded
from infalign.merging.parents import mapped
from infalign.merging.plan import MergePlan
from infalign.models.loading import choose_device, load_policy, load_tokenizer, local_path
from infalign.report.merge_plot import draw_coefficients
from infalign.report.style import to_png
from infalign.runtime.artifacts import fingerprint, whole_folder, write_json, write_whole
from infalign.runtime.config import coerce
from infalign.runtime.console import Progress, say
from infalign.runtime.distributed import barrier, is_main, together, world_size
from infalign.runtime.seeds import stream
from infalign.stages.merge.recipe import MergeRecipe
from infalign.stages.merge.result import finish, short_names
from infalign.types import InputError, TrainingError

MAX_LENGTH, NUM_EXAMPLES = 512, 1700
"""Tokens of an example, and examples of a parent, unless the parameters say otherwise."""
TEACHING_TOKENS = 4096
"""Of a forward pass of a parent."""


def merge_by_dam(recipe: MergeRecipe, plan: MergePlan, names: dict[str, str], parts: dict[str, Any]) -> None:
    """Learn the coefficients and write the merged model (every rank calls this)."""
    with together("the checks before DAM"):
        settings, limits = dam_settings(plan, recipe.seed)
        paths = [names[parent.model] for parent in plan.parents]
        tokenizer = _common_tokenizer(paths, recipe)
        examples = [
            read_examples(_data_path(str(parent.data), recipe), tokenizer, *limits, stream(recipe.seed, "dam examples"))
            for parent in plan.parents
        ]
    identity = {**parts, "examples": fingerprint([[one.ids for one in own] for own in examples])}
    work = recipe.output.parent / f".{recipe.output.name}.{fingerprint(identity)}.dam"
    work.mkdir(parents=True, exist_ok=True)
    whole = [_whole(work, parent, path, recipe.trust_remote_code) for parent, path in enumerate(paths)]
    with together("the parents' words"):
        for parent, folder in enumerate(whole if is_main() else ()):
            _teach(work / f"teacher-{parent}.safetensors", folder, examples[parent], settings, recipe, parent)
    model: Any = load_policy(whole[0], device=choose_device(recipe.use_cpu), trust_remote_code=recipe.trust_remote_code)
    weights = _weights(model, whole)
    learned = _learn(work, model, weights, examples, settings, identity)
    with together("writing the merged model"):
        if is_main():
            with whole_folder(recipe.output) as temporary:
                _write(temporary, model, weights, learned, recipe, [parent.model for parent in plan.parents])
                tokenizer.save_pretrained(temporary)
                finish(temporary, recipe, plan, parts)
            shutil.rmtree(work)


def dam_settings(plan: MergePlan, seed: int) -> tuple[DAMSettings, tuple[int, int]]:
    """DAM's settings from the plan's parameters; and the most tokens of an example and examples of a parent.

    Raises:
        InputError: a value of another type, or out of its range.
    """
    given = dict(plan.yaml.get("parameters") or {})
    types: dict[str, type] = dict.fromkeys(given, float)
    types |= dict.fromkeys(("steps", "batch_size", "top_k", "max_length", "num_examples"), int)
    problems = []
    for name, value in given.items():
        try:
            given[name] = coerce(value, types[name])
        except TypeError as error:
            problems.append(f"parameters: {name}: {error}")
            continue
        least = (
            0 if name in ("cosine", "l1", "l2") else 2 if name == "max_length" else 1 if types[name] is int else None
        )
        if least is not None and given[name] < least:
            problems.append(f"parameters: {name} must be at least {least}, got {value}")
        elif least is None and not given[name] > 0:
            problems.append(f"parameters: {name} must be more than 0, got {value}")
    if not problems and given.get("batch_size", DAMSettings.batch_size) < world_size():
        problems.append(f"parameters: batch_size must be at least the number of processes, {world_size()}")
    if problems:
        raise InputError("; ".join(problems))
    limits = given.pop("max_length", MAX_LENGTH), given.pop("num_examples", NUM_EXAMPLES)
    return DAMSettings(**given, seed=seed), limits


def _data_path(name: str, recipe: MergeRecipe) -> str:
    path = local_path(name, recipe.base_dir)
    if path is None:
        raise InputError(f"data {name!r}: no such file: give a JSONL of prompts with completions, or of texts")
    return str(path)


def _common_tokenizer(paths: Sequence[str], recipe: MergeRecipe) -> Any:
    """The first parent's tokenizer, which must give every text the others' tokens.

    Raises:
        InputError: vocabularies differ.
    """
    tokenizers = [load_tokenizer(path.split("+")[0], None, recipe.trust_remote_code) for path in paths]
    for path, other in zip(paths[1:], tokenizers[1:], strict=True):
        if other.get_vocab() != tokenizers[0].get_vocab():
            raise InputError(
                f"dam merges models of one vocabulary: the tokenizers of {paths[0]} and {path} have other tokens"
            )
    return tokenizers[0]


def _whole(work: Path, parent: int, path: str, trust_remote_code: bool) -> str:
    """A parent's folder; an adapter is merged into its model first."""
    model, _, adapter = path.partition("+")
    if not adapter:
        return model
    folder = work / f"parent-{parent}"
    if is_main() and not folder.is_dir():
        from peft import PeftModel  # noqa: PLC0415 - an extra

        base = load_policy(model, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
        with whole_folder(folder) as temporary:
            PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(temporary)
    barrier()
    return str(folder)


def _teach(
    file: Path, folder: str, examples: Sequence[Example], settings: DAMSettings, recipe: MergeRecipe, parent: int
) -> None:
    """Write down what a parent says of its examples, unless it stands there."""
    if file.exists():
        return
    device, trusted = choose_device(recipe.use_cpu), recipe.trust_remote_code
    model: Any = load_policy(folder, device=device, trust_remote_code=trusted).eval()
    tops, ids = [], []
    size = max(1, TEACHING_TOKENS // max(len(one.ids) for one in examples))
    with torch.no_grad(), Progress(f"dam: parent {parent + 1} reads", len(examples), "examples") as progress:
        for start in range(0, len(examples), size):
            chosen = examples[start : start + size]
            inputs, counts_BL = padded(chosen, model.device)
            kept = teacher_logits(model(**inputs).logits[counts_BL], settings.top_k, settings.temperature)
            tops.append(kept.top_RK.cpu())
            ids.append(kept.ids_RK.to(torch.int32).cpu())
            progress.advance(len(chosen))
    held = {"top": torch.cat(tops), "ids": torch.cat(ids)}
    write_whole(file, lambda temporary: save_file(held, temporary))


def _teachers(
    work: Path, examples: Sequence[Sequence[Example]], device: torch.device
) -> Callable[[int, Sequence[int]], TeacherLogits]:
    """What `learn` asks for, read from the files."""
    held = []
    for parent in range(len(examples)):
        with safe_open(work / f"teacher-{parent}.safetensors", framework="pt") as file:
            held.append((file.get_tensor("top"), file.get_tensor("ids")))
    ends = [np.cumsum([0, *(len(one.ids) - one.start for one in own)]) for own in examples]

    def teach(parent: int, chosen: Sequence[int]) -> TeacherLogits:
        rows = np.concatenate([np.arange(ends[parent][number], ends[parent][number + 1]) for number in chosen])
        top, ids = (one[torch.from_numpy(rows)].to(device) for one in held[parent])
        return TeacherLogits(top, ids.long())

    return teach


def _learn(
    work: Path,
    model: Any,
    weights: Sequence[Weights],
    examples: Sequence[Sequence[Example]],
    settings: DAMSettings,
    identity: dict[str, Any],
) -> Learned:
    with Progress("dam: learning", settings.steps, "steps") as progress:
        learned = learn(
            model,
            weights,
            examples,
            _teachers(work, examples, model.device),
            settings,
            checkpoint=work / "checkpoint.pt",
            identity=identity,
            advance=lambda note: progress.advance(1, f"KL to the parents {note}"),
        )
    if not np.isfinite(learned.losses).all():
        raise TrainingError("DAM's losses are not finite: lower parameters.learning_rate")
    first, last = (np.mean(rows, axis=0) for rows in (learned.losses[:10], learned.losses[-10:]))
    say(
        "dam: divergence from the parents, first and last ten steps: "
        + ", ".join(f"{a:.4f} -> {b:.4f}" for a, b in zip(first, last, strict=True))
    )
    return learned


def _weights(model: Any, folders: Sequence[str]) -> list[Weights]:
    """The parents' weights, mapped from their files; on a GPU they are held."""
    names = list(coefficient_shapes(model))
    return [{name: one.to(model.device) for name, one in mapped(Path(folder), names).items()} for folder in folders]


def _write(
    folder: Path,
    model: Any,
    weights: Sequence[Weights],
    learned: Learned,
    recipe: MergeRecipe,
    labels: Sequence[str],
) -> None:
    """The merged model, its coefficients, their plot, and the losses."""
    with torch.no_grad():
        whole = merged(weights, learned.coefficients)
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[name])
    model.save_pretrained(folder, max_shard_size=int(recipe.shard_gb * 1e9))
    coefficients = {name: c_S.contiguous().cpu() for name, c_S in learned.coefficients.items()}
    about = folder / "dam"  # not beside the weights, which are every safetensors there
    about.mkdir()
    save_file(coefficients, about / "coefficients.safetensors")
    plain = {name: c_S.numpy() for name, c_S in coefficients.items()}
    (about / "coefficients.png").write_bytes(to_png(draw_coefficients(plain, short_names(labels))))
    write_json(about / "losses.json", {"parents": list(labels), "divergence": learned.losses})
