"""`infalign generate`: decode prompts with the policy and the procedure that it was aligned for, to JSONL.

Batches are shared out over the processes and written as they are done; a killed run goes on with what is missing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from infalign.data.prompts import load_prompts
from infalign.data.templates import check_lengths
from infalign.decoding.decode import Decoded, decode, plan_decoding
from infalign.generation.plan import Request
from infalign.rewards.scoring import score_samples
from infalign.runtime.artifacts import fingerprint, read_json, write_json, write_whole
from infalign.runtime.console import Progress, notice, say
from infalign.runtime.distributed import barrier, is_main, my_share
from infalign.runtime.models import context_length
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import Recipe, require
from infalign.types import InputError, Prompt


def generate(recipe: Recipe, *, prompts: str | None = None, output: str | None = None) -> Path:
    """Decode prompts and write one JSON object a line: prompt, completion, reward, and all candidates.

    Args:
        recipe: model, procedure, reward and sampling settings (here top_p, top_k, ... may be set).
        prompts: a file of prompts; by default the recipe's test prompts.
        output: the JSONL to write; by default `generations.jsonl` in `output_dir`.

    Returns:
        The path written.

    Raises:
        InputError: no policy, no prompts, or prompts that do not fit the model.
    """
    experiment = Experiment(recipe)
    if output is None:
        require(recipe, "output_dir")
    path = Path(output) if output else recipe.output / "generations.jsonl"
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen, ids = _prompts(experiment, prompts)
    by_key = {prompt.key: prompt for prompt in chosen}
    batches = plan_decoding(
        chosen,
        ids,
        experiment.procedure,
        max_tokens=recipe.max_completion_length,
        tokens_per_batch=recipe.tokens_per_batch,
    )
    parts = _claim_parts(experiment, path, batches)
    missing = [file for file in my_share(list(parts)) if not file.exists()]
    if missing:
        _decode_batches(experiment, by_key, {file: parts[file] for file in missing})
    barrier()
    if is_main():
        _merge(list(parts), [prompt.key for prompt in chosen], path)
        say(f"{len(chosen)} completions by {experiment.procedure!r} in {path}")
    barrier()
    return path


def _decode_batches(experiment: Experiment, by_key: dict[str, Prompt], todo: dict[Path, list[Request]]) -> None:
    """Decode this rank's missing batches, each into its file."""
    decoded = decode(
        list(todo.values()),
        by_key,
        experiment.sampler(experiment.judged_path, "generate"),
        lambda rows, samples: score_samples(experiment.reward, rows, samples),
        experiment.procedure,
        experiment.recipe.seed,
    )
    count = sum(len(batch) for batch in todo.values())
    with Progress(f"generate: {experiment.procedure!r}", count, "prompts") as progress:
        for file, batch in zip(todo, decoded, strict=True):
            write_json(file, [[one.prompt.key, _record(one)] for one in batch])
            progress.advance(len(batch))


def _claim_parts(experiment: Experiment, path: Path, batches: list[list[Request]]) -> dict[Path, list[Request]]:
    """The file of every batch, in a folder beside the output that a killed run finds again if nothing has changed."""
    identity = {
        **experiment.sampling_parts(experiment.judged_path, "generate"),
        "procedure": repr(experiment.procedure),
        "reward": experiment.reward.fingerprint,
        "batches": fingerprint([[(request.key, request.prompt_ids) for request in batch] for batch in batches]),
    }
    folder = path.parent / f".{path.name}.{fingerprint(identity)}.parts"
    if is_main():
        for other in path.parent.glob(f".{path.name}.*.parts"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(exist_ok=True)
    barrier()
    return {folder / f"{number:06d}.json": batch for number, batch in enumerate(batches)}


def _merge(files: list[Path], order: list[str], path: Path) -> None:
    """One JSONL in the order of the prompts, whole; the batches' files go."""
    rows = {key: row for file in files for key, row in read_json(file, "the batch")}
    unscored = sum(row["chosen"] is None for row in rows.values())
    if unscored:
        notice(f"{unscored} of {len(rows)} prompts have no scored candidate: their completion is null")
    lines = "".join(json.dumps(rows[key], ensure_ascii=False) + "\n" for key in order)
    write_whole(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    if files:
        shutil.rmtree(files[0].parent)


def _prompts(experiment: Experiment, file: str | None) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    recipe = experiment.recipe
    if file is None:
        test = list(experiment.splits.test)
        return test, [experiment.prompt_ids[prompt.key] for prompt in test]
    if not any(candidate.exists() for candidate in (Path(file), recipe.base_dir / file)):
        raise InputError(f"--prompts {file!r}: no such file")
    loaded = load_prompts(
        file, prompt_column=recipe.prompt_column, data_format=recipe.data_format, base_dir=recipe.base_dir
    )
    if loaded.duplicates:
        notice(
            f"{loaded.duplicates} duplicate prompts merged: {len(loaded.prompts)} completions for {loaded.rows} rows"
        )
    prompts = experiment.with_system_prompt(loaded.prompts)
    checked = check_lengths(
        {prompt.key: experiment.render(prompt.content) for prompt in prompts},
        recipe.max_prompt_length,
        recipe.prompt_length_policy,
        context_length(experiment.base_path, recipe.model_revision, recipe.trust_remote_code),
        reserve=recipe.max_completion_length,
        bos_token_id=experiment.tokenizer.bos_token_id,
    )
    kept = [prompt for prompt in prompts if prompt.key in checked.ids]
    return kept, [tuple(checked.ids[prompt.key]) for prompt in kept]


def _record(one: Decoded) -> dict[str, Any]:
    rewards = [None if value != value else float(value) for value in one.rewards_N.tolist()]
    return {
        "prompt": one.prompt.content,
        "completion": one.text,
        "reward": None if one.chosen is None else rewards[one.chosen],
        "chosen": one.chosen,
        "candidates": [
            {"completion": sample.text, "reward": reward, "finished": sample.finished}
            for sample, reward in zip(one.candidates, rewards, strict=True)
        ],
    }
