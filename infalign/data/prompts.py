"""Prompts from data sets: read, checked row by row, merged by key.

A prompt is known by the hash of its normalised text, so that copies which differ in case, width or white space are
one prompt: it is sampled once, and never sits in train and test at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from infalign.data.sources import Row, read_rows
from infalign.data.transcripts import parse_transcript, prompt_of
from infalign.types import InputError, Messages, Prompt, prompt_key

DataFormat = Literal["auto", "prompt", "transcript"]
DATA_FORMATS = ("auto", "prompt", "transcript")
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that every reward call fills itself: no column may have such a name."""

Content = TypeVar("Content")

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHOWN = 5


@dataclass(frozen=True)
class LoadedPrompts:
    """Prompts and what was found on the way: `rows` read, `duplicates` merged away (rows - len(prompts)).

    `columns` are the other columns of the data (also in every `Prompt.columns`), `data_format` the one in use.
    """

    prompts: tuple[Prompt, ...]
    source: str
    rows: int
    duplicates: int
    data_format: str
    columns: tuple[str, ...]

    def summary(self) -> str:
        """One line for the log, e.g. `rows.jsonl: 12 prompts (3 duplicate rows merged)`."""
        merged = f" ({self.duplicates} duplicate rows merged)" if self.duplicates else ""
        return f"{self.source}: {len(self.prompts)} prompts{merged}"


def load_prompts(
    dataset_name: str,
    *,
    config: str | None = None,
    split: str = "train",
    prompt_column: str = "prompt",
    data_format: DataFormat = "auto",
    base_dir: str | Path | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
) -> LoadedPrompts:
    """The distinct prompts of a data set, in the order of the data.

    Args:
        dataset_name: local file, folder or Hub id, see `infalign.data.sources.read_rows`.
        config: configuration name on the Hub.
        split: which split (a single local file is read whole).
        prompt_column: column with a string or a chat, for the format `prompt`.
        data_format: `prompt`; `transcript` (column `chosen`, hh-rlhf text or a chat: the last user turn is the one to
            answer, what follows is dropped); `auto` takes `prompt_column` if there is one, else `chosen`.
        base_dir: folder of the recipe, for relative paths.
        limit: at most so many rows are used, from the first.
        data_dir: folder inside the data set.
        data_files: files inside the data set.

    Raises:
        InputError: with all problems found in the rows, and their row numbers (from 1).
    """
    check_choices(data_format, limit)
    rows = read_rows(
        dataset_name,
        config=config,
        split=split,
        data_dir=data_dir,
        data_files=data_files,
        base_dir=None if base_dir is None else Path(base_dir),
        text_column=prompt_column,
    )
    return prompts_from_rows(rows[:limit], dataset_name, prompt_column=prompt_column, data_format=data_format)


def prompts_from_rows(
    rows: Sequence[Row], source: str, *, prompt_column: str = "prompt", data_format: DataFormat = "auto"
) -> LoadedPrompts:
    """Check rows and turn them into distinct prompts; of rows with one key the first is kept.

    Raises:
        InputError: no rows, a missing or reserved column, or bad prompts (all of them counted, the first five shown).

    >>> prompts_from_rows([{"prompt": "hi", "answer": "4"}], "rows").prompts[0].columns
    {'answer': '4'}
    """
    if not rows:
        raise InputError(f"{source}: no rows")
    column, found_format = _pick_column(rows[0], source, prompt_column, data_format)
    read = _from_transcript if found_format == "transcript" else from_prompt
    contents = _read_contents(rows, source, column, read)
    dropped = {"chosen", "rejected"} if found_format == "transcript" else {column}
    columns = tuple(dict.fromkeys(name for row in rows for name in row if name not in dropped))
    reserved = [name for name in columns if name in RESERVED_COLUMNS]
    if reserved:
        raise InputError(f"{source}: the column name {reserved[0]!r} is taken by the reward call; rename the column")
    prompts = [
        Prompt(content, prompt_key(content), {name: row.get(name) for name in columns})
        for content, row in zip(contents, rows, strict=True)
    ]
    distinct = merge_duplicates(prompts)
    return LoadedPrompts(distinct, source, len(rows), len(rows) - len(distinct), found_format, columns)


def merge_duplicates(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """The first prompt of every key, in order."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.key, prompt)
    return tuple(first.values())


def check_choices(data_format: str, limit: int | None) -> None:
    """Raise InputError unless `data_format` is known and `limit` is None or positive."""
    if data_format not in DATA_FORMATS:
        raise InputError(f"data_format {data_format!r} is unknown; one of {', '.join(DATA_FORMATS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 row, got {limit}")


def _pick_column(row: Row, source: str, prompt_column: str, data_format: str) -> tuple[str, str]:
    if data_format != "transcript" and prompt_column in row:
        return prompt_column, "prompt"
    if data_format != "prompt" and "chosen" in row:
        return "chosen", "transcript"
    wanted = {"prompt": repr(prompt_column), "transcript": "'chosen'"}.get(
        data_format, f"{prompt_column!r} (and no 'chosen')"
    )
    raise InputError(
        f"{source}: no column {wanted}; the columns are {', '.join(map(repr, row))}; set prompt_column or data_format"
    )


def _read_contents(
    rows: Sequence[Row], source: str, column: str, read: Callable[[Any], str | Messages]
) -> list[str | Messages]:
    contents = read_checked(rows, f"{source}, column {column!r}", lambda row: read(row.get(column)))
    kinds = {isinstance(content, str) for content in contents}
    if len(kinds) > 1:
        raise InputError(f"{source}, column {column!r}: some prompts are text and some are chats; make them alike")
    return contents


def read_checked(rows: Sequence[Row], where: str, read: Callable[[Row], Content]) -> list[Content]:
    """What `read` makes of every row.

    Raises:
        InputError: with the rows that cannot be read: how many, and the first five with their numbers (from 1).
    """
    contents: list[Content] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            contents.append(read(row))
        except InputError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        head = f"{where}: {len(problems)} of {len(rows)} rows cannot be used: "
        raise InputError(head + "; ".join(problems[:_SHOWN]) + more)
    return contents


def from_prompt(value: Any) -> str | Messages:
    """A prompt as data has it: a text, or a chat that ends with the user's turn. Raises InputError."""
    if isinstance(value, str):
        if not value.strip():
            raise InputError("the prompt is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InputError("the prompt holds half a surrogate pair, which is no text")
        return value
    if not isinstance(value, (list, tuple)):
        raise InputError(f"the prompt is {value!r:.40}, neither text nor a chat")
    messages = checked_chat(value)
    if messages[-1]["role"] not in ("user", "tool"):
        raise InputError(f"the last turn is the {messages[-1]['role']}'s, it must be the user's")
    return messages


def _from_transcript(value: Any) -> Messages:
    return prompt_of(parse_transcript(value) if isinstance(value, str) else checked_chat(value))


def checked_chat(value: Any) -> Messages:
    """A chat, its turns reduced to role and content. Raises InputError for anything else."""
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"an empty chat or none at all ({value!r:.40})")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise InputError(f"turn {number} is not {{'role': ..., 'content': text}}")
        if turn.get("role") not in _ROLES:
            raise InputError(f"turn {number} has the role {turn.get('role')!r}; one of {', '.join(_ROLES)}")
    if not value[-1]["content"].strip() and value[-1]["role"] == "user":
        raise InputError("the user's last turn is empty")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
