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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infalign.data.columns import parse_columns, renamed
from infalign.data.prompts import BadRow, LoadedPrompts, prompts_or_problems
from infalign.data.sources import COMPRESSED, iter_rows
from infalign.data.templates import check_lengths
from infalign.decoding.decode import Decoded, decode, plan_decoding
from infalign.decoding.strategy import Strategy
from infalign.generation.plan import Request
from infalign.models.loading import context_length
from infalign.rewards.scoring import score_samples
from infalign.runtime.artifacts import fingerprint, write_json
from infalign.runtime.console import Progress, notice, say
from infalign.runtime.distributed import barrier, is_main, my_share, together, world_size
from infalign.stages.experiment import Experiment, tell_how_read
from infalign.stages.generated_file import (
    claim_parts,
    failed_rows,
    is_made,
    is_same,
    line,
    parts_folder,
    plain,
    write_output,
)
from infalign.stages.output import nothing_left_behind
from infalign.stages.recipe import Recipe, require
from infalign.stages.reference_sampler import REFERENCE, reference_sampler
from infalign.stages.strategy import load_strategy
from infalign.types import InputError, Prompt, RewardError

STANDARD = "-"
"""In place of a file: standard input or output."""

ENOUGH = 8
"""Rows that a reward may fail on, and on no other, before it is taken to be broken."""


def generate(
    recipe: Recipe, *, prompts: str | None = None, output: str | None = None, split: str | None = None
) -> Path | None:
    """Decode prompts and write one JSON object a line: prompt, completion, reward, all candidates, what it has cost.

    A row of input gives a row of output, in order, with its columns. A row that can't be decoded (no usable prompt, too
    long, a reward that fails on it) has `error` in place of a completion, and the others go on.

    Args:
        recipe: model, procedure, reward and sampling settings (here top_p, top_k, ... may be set).
        prompts: a file of prompts, or "-" for standard input: JSON objects or plain text, one a line; by default the
            recipe's test prompts.
        output: the JSONL to write, or "-" for standard output; by default `generations.jsonl` in `output_dir`.
        split: of a folder of prompts that has several.

    Returns:
        The path written, None for standard output.

    Raises:
        InputError: no policy, no prompts, or not one that can be decoded.
        RewardError: the reward fails on every row.
    """
    for name, value in {"prompts": prompts, "output": output, "split": split}.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"--{name} takes one {'name' if name == 'split' else 'path'}, got {value!r}")
    if STANDARD in (prompts, output) and world_size() > 1:
        raise InputError(
            "--prompts - and --output - are one process' own: give files, or leave --accelerate_config out"
        )
    if output == STANDARD:
        results = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # whatever else is said must not come between the lines
            _print(_rows(Experiment(recipe), prompts, split), results)
        return None
    experiment = Experiment(recipe)
    if output is None:
        require(recipe, "output_dir")
    path = Path(output).absolute() if output else recipe.output / "generations.jsonl"
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file")
    if path.suffix.lower() in (".csv", ".tsv", ".parquet", *COMPRESSED):
        raise InputError(f"--output {path}: what is written is JSON lines: name it .jsonl")
    if (
        prompts is not None
        and path.exists()
        and any(is_same(path, file) for file in (prompts, recipe.base_dir / prompts))
    ):
        raise InputError(f"--output {path} is the file of prompts, which would be lost: name another file")
    requested = _asked(experiment, prompts, split)
    batches = plan_decoding(
        requested.prompts,
        requested.ids,
        _strategy(experiment),
        max_tokens=recipe.max_completion_length,
        tokens_per_batch=recipe.tokens_per_batch,
    )
    identity = _identity(experiment, batches, requested)
    with together("the look at what is made already"):  # every rank looks, and one of them speaks
        made = is_made(path, identity, recipe.overwrite)
    if made:
        say(f"{path} is made already ({len(requested.rows)} completions by {_strategy(experiment)!r})")
        if is_main() and failed_rows(path):
            notice(f"{failed_rows(path)} of its rows have an error: --overwrite tries all of them again")
        return path
    with nothing_left_behind(parts_folder(path, identity), "*.json"):
        parts = claim_parts(path, identity, batches)
        missing = [file for file in my_share(list(parts)) if not file.exists()]
        if missing:
            _decode_batches(experiment, requested, {file: parts[file] for file in missing})
    barrier()
    if is_main():
        order = [_bad_row(one) if isinstance(one, BadRow) else one.key for one in requested.rows]
        rows = write_output(list(parts), order, path, identity)
        _tell_failed(rows)
        say(f"{len(rows)} completions by {_strategy(experiment)!r} in {path}")
    barrier()
    return path


def _decode_batches(experiment: Experiment, asked: Asked, todo: dict[Path, list[Request]]) -> None:
    """Decode this rank's missing batches, each into its file."""
    decoded = _decoded(experiment, asked, list(todo.values()))
    count = sum(len(batch) for batch in todo.values())
    with Progress(f"generate: {_strategy(experiment)!r}", count, "prompts") as progress:
        for file, batch in zip(todo, decoded, strict=True):
            write_json(file, [[key, plain(row)] for key, row in batch.items()])
            progress.advance(len(batch))


def _decoded(
    experiment: Experiment, asked: Asked, batches: Sequence[Sequence[Request]]
) -> Iterator[dict[str, dict[str, Any]]]:
    """The rows of every batch by key; prompts that the reward fails on are tried alone, and then have an error.

    Raises:
        RewardError: it has failed on everything so far, and that is `ENOUGH` or all there is.
    """
    by_key = {prompt.key: prompt for prompt in asked.prompts}
    sampler, reference = experiment.sampler(experiment.judged_path, "generate"), reference_sampler(experiment)

    def decode_one(batch: Sequence[Request]) -> dict[str, dict[str, Any]]:
        (found,) = decode(
            [batch],
            by_key,
            sampler,
            lambda rows, samples: score_samples(experiment.reward, rows, samples),
            _strategy(experiment),
            experiment.recipe.seed,
            reference=reference,
        )
        return {one.prompt.key: _record(one) for one in found}

    done, failed, count = 0, 0, sum(map(len, batches))
    for batch in batches:
        rows: dict[str, dict[str, Any]] = {}
        try:
            rows = decode_one(batch)
        except RewardError as error:
            for request in batch:
                try:
                    rows |= decode_one([request]) if len(batch) > 1 else _failed_row(by_key[request.key], error)
                except RewardError as alone:
                    rows |= _failed_row(by_key[request.key], alone)
                failed += "error" in rows[request.key]
                if failed == done + len(rows) and failed >= min(ENOUGH, count):
                    raise
        done += len(rows)
        yield {request.key: rows[request.key] for request in batch}


def _strategy(experiment: Experiment) -> Strategy:
    """How candidates are drawn and one is chosen; by default as the recipe's procedure says."""
    return load_strategy(experiment.recipe, experiment.procedure)


# --- to standard output -------------------------------------------------------------------------------------------


def _rows(experiment: Experiment, prompts: str | None, split: str | None) -> Iterator[list[dict[str, Any]]]:
    """What is decoded, in the order of the input, a batch at a time."""
    requested = _asked(experiment, prompts, split)
    batches = _neighbours(experiment, requested.prompts, requested.ids)
    waiting = list(reversed(requested.rows))
    told: list[dict[str, Any]] = []
    with Progress(f"generate: {_strategy(experiment)!r}", len(requested.prompts), "prompts") as progress:
        for decoded in _decoded(experiment, requested, batches):
            ready: list[dict[str, Any]] = []
            while waiting and (isinstance(one := waiting[-1], BadRow) or one.key in decoded):
                ready.append(_bad_row(one) if isinstance(one, BadRow) else decoded[one.key])
                waiting.pop()
            yield ready
            told += [{name: one[name] for name in one if name == "error"} for one in ready]
            progress.advance(len(decoded))
    _tell_failed(told)


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


def _identity(experiment: Experiment, batches: list[list[Request]], asked: Asked) -> dict[str, Any]:
    """Everything that the completions depend on, by name."""
    compares = experiment.recipe.strategy != "procedure"  # a strategy may draw from the base too, a procedure never
    return {
        **experiment.sampling_parts(experiment.judged_path, "generate"),
        "procedure": repr(_strategy(experiment)),
        **({"reference": experiment.sampling_parts(experiment.base_path, REFERENCE)} if compares else {}),
        "reward": experiment.reward.fingerprint,
        "batches": fingerprint([[(request.key, request.prompt_ids) for request in batch] for batch in batches]),
        "rows": fingerprint(plain([_bad_row(one) if isinstance(one, BadRow) else one.columns for one in asked.rows])),
    }


def _tell_failed(rows: Sequence[Mapping[str, Any]]) -> None:
    """How many rows have an error, and the most frequent one."""
    errors = Counter(row["error"] for row in rows if "error" in row)
    if errors:
        often, times = errors.most_common(1)[0]
        notice(f"{errors.total()} of {len(rows)} rows have an error in place of a completion ({times}x: {often})")


# --- prompts and records ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """The rows of input, in order: prompts and rows that have none; and the tokens of the prompts."""

    rows: list[Prompt | BadRow]
    ids: list[tuple[int, ...]]

    @property
    def prompts(self) -> list[Prompt]:
        """The rows that can be decoded; `ids` are theirs."""
        return [one for one in self.rows if isinstance(one, Prompt)]


def _asked(experiment: Experiment, file: str | None, split: str | None) -> Asked:
    """The rows to decode.

    Raises:
        InputError: there are none, or not one of them can be decoded.
    """
    recipe = experiment.recipe
    if file is None:
        test = list(experiment.splits.test)
        return Asked([*test], [experiment.prompt_ids[prompt.key] for prompt in test])
    rows, loaded = _loaded(recipe, file, split)
    tell_how_read(loaded)
    prompts = iter(experiment.with_system_prompt(loaded.prompts))
    rows = [one if isinstance(one, BadRow) else next(prompts) for one in rows]
    rendered = [one if isinstance(one, BadRow) else _rendered(experiment, one) for one in rows]
    ids = {
        one.key: ids
        for one, ids in zip(rows, rendered, strict=True)
        if isinstance(one, Prompt) and isinstance(ids, list)
    }
    if not ids:
        raise InputError(next(one.problem for one in rendered if isinstance(one, BadRow)))
    checked = check_lengths(
        ids,
        recipe.max_prompt_length,
        "drop" if recipe.prompt_length_policy == "error" else recipe.prompt_length_policy,
        context_length(experiment.base_path, recipe.model_revision, recipe.trust_remote_code),
        reserve=recipe.max_completion_length,
        bos_token_id=experiment.tokenizer.bos_token_id,
    )
    if checked.truncated:
        notice(f"{len(checked.truncated)} of {len(ids)} prompts truncated: longer than {checked.limit} tokens")
    kept: list[Prompt | BadRow] = []
    for one, tokens in zip(rows, rendered, strict=True):
        if isinstance(tokens, BadRow):
            kept.append(tokens)
        elif isinstance(one, Prompt) and one.key in checked.ids:
            kept.append(one)
        elif isinstance(one, Prompt):
            problem = (
                f"the prompt has {len(tokens)} tokens, more than {checked.limit} (max_prompt_length, or the context)"
            )
            kept.append(BadRow({"prompt": one.content, **one.columns}, problem))
    return Asked(kept, [tuple(checked.ids[one.key]) for one in kept if isinstance(one, Prompt)])


def _rendered(experiment: Experiment, prompt: Prompt) -> list[int] | BadRow:
    """A prompt's tokens, or why it has none."""
    try:
        return experiment.render(prompt)
    except InputError as error:
        return BadRow({"prompt": prompt.content, **prompt.columns}, str(error))


def _loaded(recipe: Recipe, file: str, split: str | None) -> tuple[list[Prompt | BadRow], LoadedPrompts]:
    """The rows of a file or of standard input, and how they were read."""
    if file == STANDARD:
        rows = _read_lines(
            sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode(), recipe
        )
        source = "standard input"
    elif not any(candidate.exists() for candidate in (Path(file), recipe.base_dir / file)):
        raise InputError(f"--prompts {file!r}: no such file")
    else:
        source = file
        rows = list(iter_rows(file, split=split, base_dir=recipe.base_dir, text_column=recipe.prompt_column))
    rows = renamed(rows, parse_columns(recipe.columns), source)
    return prompts_or_problems(rows, source, prompt_column=recipe.prompt_column, data_format=recipe.data_format)


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
    except (ValueError, RecursionError):  # also numbers of too many digits
        return None


def _record(one: Decoded) -> dict[str, Any]:
    rewards = [None if value != value else float(value) for value in one.rewards_N.tolist()]
    made = {
        "completion": one.text,
        "reward": None if one.chosen is None else rewards[one.chosen],
        "chosen": one.chosen,
        "candidates": [
            {"completion": sample.text, "reward": reward, "finished": sample.finished}
            for sample, reward in zip(one.candidates, rewards, strict=True)
        ],
        "spent": dataclasses.asdict(one.spent),
    }
    error = {"error": "no candidate has a score"} if one.chosen is None else {}
    return _row({"prompt": one.prompt.content, **one.prompt.columns}, {**made, **error})


def _failed_row(prompt: Prompt, error: Exception) -> dict[str, dict[str, Any]]:
    """The row of a prompt that could not be decoded, by its key."""
    return {prompt.key: _bad_row(BadRow({"prompt": prompt.content, **prompt.columns}, str(error)))}


def _bad_row(bad: BadRow) -> dict[str, Any]:
    return _row(bad.columns, {**_NOTHING, "error": bad.problem})


_NOTHING = {"completion": None, "reward": None, "chosen": None, "candidates": []}


def _row(given: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """A row of output: the input's columns, then ours; columns of the input that are called like ours go to `input`."""
    names = {*_NOTHING, "spent", "error"}
    covered = {name: value for name, value in given.items() if name in names}
    kept = {name: value for name, value in given.items() if name not in names}
    return {**kept, **({"input": covered} if covered else {}), **made}
