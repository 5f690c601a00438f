"""`infalign generate`: decode prompts with the policy and the procedure that it was aligned for, to JSONL.

To a file: batches are shared out over the processes and written as they are done; a killed run goes on with what is
missing, and the file is there whole or not at all. To standard output: batches of neighbouring prompts, each printed as
soon as it is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infalign.data.prompts import LoadedPrompts, load_prompts, prompts_from_rows
from infalign.data.templates import check_lengths
from infalign.decoding.course import Strategy
from infalign.decoding.decode import Decoded, decode, plan_decoding
from infalign.generation.plan import Request
from infalign.rewards.scoring import score_samples
from infalign.runtime.artifacts import fingerprint, write_json
from infalign.runtime.console import Progress, notice, say
from infalign.runtime.distributed import barrier, is_main, my_share, together, world_size
from infalign.runtime.models import context_length
from infalign.stages.experiment import Experiment
from infalign.stages.generated_file import claim_parts, is_made, is_same, line, parts_folder, write_output
from infalign.stages.output import nothing_left_behind
from infalign.stages.recipe import Recipe, require
from infalign.stages.reference import REFERENCE, reference_sampler
from infalign.stages.strategy import load_strategy
from infalign.types import InputError, Prompt

STANDARD = "-"
"""In place of a file: standard input or output."""


def generate(recipe: Recipe, *, prompts: str | None = None, output: str | None = None) -> Path | None:
    """Decode prompts and write one JSON object a line: prompt, completion, reward, all candidates, what it has cost.

    Args:
        recipe: model, procedure, reward and sampling settings (here top_p, top_k, ... may be set).
        prompts: a file of prompts, or "-" for standard input: JSON objects or plain text, one a line; by default the
            recipe's test prompts.
        output: the JSONL to write, or "-" for standard output; by default `generations.jsonl` in `output_dir`.

    Returns:
        The path written, None for standard output.

    Raises:
        InputError: no policy, no prompts, or prompts that do not fit the model.
    """
    if STANDARD in (prompts, output) and world_size() > 1:
        raise InputError(
            "--prompts - and --output - are one process' own: give files, or leave --accelerate_config out"
        )
    if output == STANDARD:
        results = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # whatever else is said must not come between the lines
            _print(_rows(Experiment(recipe), prompts), results)
        return None
    experiment = Experiment(recipe)
    if output is None:
        require(recipe, "output_dir")
    path = Path(output).absolute() if output else recipe.output / "generations.jsonl"
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file")
    if (
        prompts is not None
        and path.exists()
        and any(is_same(path, file) for file in (prompts, recipe.base_dir / prompts))
    ):
        raise InputError(f"--output {path} is the file of prompts, which would be lost: name another file")
    chosen, ids = _prompts(experiment, prompts)
    by_key = {prompt.key: prompt for prompt in chosen}
    batches = plan_decoding(
        chosen,
        ids,
        _strategy(experiment),
        max_tokens=recipe.max_completion_length,
        tokens_per_batch=recipe.tokens_per_batch,
    )
    identity = _identity(experiment, batches)
    with together():  # every rank looks, and one of them speaks
        made = is_made(path, identity, recipe.overwrite)
    if made:
        say(f"{path} is made already ({len(chosen)} completions by {_strategy(experiment)!r})")
        return path
    with nothing_left_behind(parts_folder(path, identity), "*.json"):
        parts = claim_parts(path, identity, batches)
        missing = [file for file in my_share(list(parts)) if not file.exists()]
        if missing:
            _decode_batches(experiment, by_key, {file: parts[file] for file in missing})
    barrier()
    if is_main():
        unscored = write_output(list(parts), [prompt.key for prompt in chosen], path, identity)
        _tell_unscored(unscored, len(chosen))
        say(f"{len(chosen)} completions by {_strategy(experiment)!r} in {path}")
    barrier()
    return path


def _decode_batches(experiment: Experiment, by_key: dict[str, Prompt], todo: dict[Path, list[Request]]) -> None:
    """Decode this rank's missing batches, each into its file."""
    decoded = _decoded(experiment, by_key, list(todo.values()))
    count = sum(len(batch) for batch in todo.values())
    with Progress(f"generate: {_strategy(experiment)!r}", count, "prompts") as progress:
        for file, batch in zip(todo, decoded, strict=True):
            write_json(file, [[one.prompt.key, _record(one)] for one in batch])
            progress.advance(len(batch))


def _decoded(
    experiment: Experiment, by_key: dict[str, Prompt], batches: Sequence[Sequence[Request]]
) -> Iterator[list[Decoded]]:
    return decode(
        batches,
        by_key,
        experiment.sampler(experiment.judged_path, "generate"),
        lambda rows, samples: score_samples(experiment.reward, rows, samples),
        _strategy(experiment),
        experiment.recipe.seed,
        reference=reference_sampler(experiment),
    )


def _strategy(experiment: Experiment) -> Strategy:
    """How candidates are drawn and one is chosen; by default as the recipe's procedure says."""
    return load_strategy(experiment.recipe, experiment.procedure)


def _reference_parts(experiment: Experiment) -> dict[str, Any]:
    """What a strategy's comparisons with the base depend on; a procedure makes none."""
    if experiment.recipe.strategy == "procedure":
        return {}
    return {"reference": experiment.sampling_parts(experiment.base_path, REFERENCE)}


# --- to standard output -------------------------------------------------------------------------------------------


def _rows(experiment: Experiment, prompts: str | None) -> Iterator[list[dict[str, Any]]]:
    """What is decoded, in the order of the prompts, a batch at a time."""
    chosen, ids = _prompts(experiment, prompts)
    batches = _neighbours(experiment, chosen, ids)
    by_key = {prompt.key: prompt for prompt in chosen}
    place = {prompt.key: number for number, prompt in enumerate(chosen)}
    unscored = 0
    with Progress(f"generate: {_strategy(experiment)!r}", len(chosen), "prompts") as progress:
        for decoded in _decoded(experiment, by_key, batches):
            unscored += sum(one.chosen is None for one in decoded)
            yield [_record(one) for one in sorted(decoded, key=lambda one: place[one.prompt.key])]
            progress.advance(len(decoded))
    _tell_unscored(unscored, len(chosen))


def _neighbours(experiment: Experiment, prompts: list[Prompt], ids: list[tuple[int, ...]]) -> list[list[Request]]:
    """Batches of prompts that follow each other: the first can be printed before the last is read by the model."""
    recipe = experiment.recipe

    def batches(start: int, end: int) -> list[list[Request]]:
        return plan_decoding(
            prompts[start:end],
            ids[start:end],
            _strategy(experiment),
            max_tokens=recipe.max_completion_length,
            tokens_per_batch=recipe.tokens_per_batch,
        )

    found: list[list[Request]] = []
    start = 0
    while start < len(prompts):
        end = start + 1
        while end < len(prompts) and len(batches(start, end + 1)) == 1:
            end += 1
        found += batches(start, end)
        start = end
    return found


def _print(rows: Iterator[list[dict[str, Any]]], results: Any) -> None:
    """JSON lines on a stream, flushed a batch at a time; a reader that has had enough ends it quietly."""
    try:
        for batch in rows:
            text = "".join(line(row) for row in batch)
            if hasattr(results, "buffer"):
                results.buffer.write(text.encode())  # UTF-8 whatever the locale
            else:
                results.write(text)
            results.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # what is still in the buffer has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())


def _identity(experiment: Experiment, batches: list[list[Request]]) -> dict[str, Any]:
    """Everything that the completions depend on, by name."""
    return {
        **experiment.sampling_parts(experiment.judged_path, "generate"),
        "procedure": repr(_strategy(experiment)),
        **_reference_parts(experiment),
        "reward": experiment.reward.fingerprint,
        "batches": fingerprint([[(request.key, request.prompt_ids) for request in batch] for batch in batches]),
    }


def _tell_unscored(unscored: int, count: int) -> None:
    if unscored:
        notice(f"{unscored} of {count} prompts have no scored candidate: their completion is null")


# --- prompts and records ------------------------------------------------------------------------------------------


def _prompts(experiment: Experiment, file: str | None) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    recipe = experiment.recipe
    if file is None:
        test = list(experiment.splits.test)
        return test, [experiment.prompt_ids[prompt.key] for prompt in test]
    loaded = _loaded(recipe, file)
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


def _loaded(recipe: Recipe, file: str) -> LoadedPrompts:
    """The prompts in a file or on standard input."""
    if file == STANDARD:
        rows = _read_lines(
            sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode(), recipe
        )
        source = "standard input"
        return prompts_from_rows(rows, source, prompt_column=recipe.prompt_column, data_format=recipe.data_format)
    if not any(candidate.exists() for candidate in (Path(file), recipe.base_dir / file)):
        raise InputError(f"--prompts {file!r}: no such file")
    return load_prompts(
        file, prompt_column=recipe.prompt_column, data_format=recipe.data_format, base_dir=recipe.base_dir
    )


def _read_lines(content: bytes, recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of standard input: JSON objects, if the first line is one, else a prompt a line; blank lines don't count.

    Raises:
        InputError: not UTF-8, or a line that is no JSON object after one that was.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines or not isinstance(_json(lines[0][1]), dict):
        return [{recipe.prompt_column: line} for _, line in lines]
    rows = [(number, _json(line)) for number, line in lines]
    bad = next((number for number, row in rows if not isinstance(row, dict)), None)
    if bad is not None:
        raise InputError(
            f"standard input, line {bad}: not a JSON object, as line {rows[0][0]} is: make the lines alike"
        )
    return [row for _, row in rows]


def _json(line: str) -> Any:
    """What a line holds as JSON; None for no JSON."""
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None


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
        "spent": dataclasses.asdict(one.spent),
    }
