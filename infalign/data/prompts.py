"""Prompts from data sets: read, checked row by row, each row a prompt of its own.

A row is known by its exact content; rows of equal content are counted, so that each has its own samples. Near copies
(case, width, white space) only stay on one side of a split, see `types.group_key`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from infalign.data.columns import renamed
from infalign.data.forms import Form, find_form, how_read
from infalign.data.sources import Row, read_rows, saved_splits
from infalign.types import TEMPLATE_COLUMNS, InputError, Messages, Prompt, prompt_key, row_keys

DataFormat = Literal["auto", "chat", "prompt", "transcript"]
DATA_FORMATS = ("auto", "chat", "prompt", "transcript")
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "self")
"""Arguments that every reward call fills itself: columns of such names are left out, which is said."""

Content = TypeVar("Content")

_SHOWN = 5


@dataclass(frozen=True)
class LoadedPrompts:
    """The prompts of P rows, in order, and what was found on the way.

    `repeated` rows have the content of a row before them. `columns` are the other columns of the data (each prompt has
    its row's own in `Prompt.columns`), `data_format` the one in use, `notes` lines on how the rows were read.
    """

    prompts: tuple[Prompt, ...]
    source: str
    data_format: str
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def repeated(self) -> int:
        """Rows whose exact content an earlier row has."""
        return len(self.prompts) - len({prompt_key(prompt.content, prompt.template) for prompt in self.prompts})

    def summary(self) -> str:
        """One line for the log, e.g. `rows.jsonl: 12 prompts (3 repeat another row's; each row counts)`."""
        repeats = f" ({self.repeated} repeat another row's; each row counts)" if self.repeated else ""
        return f"{self.source}: {len(self.prompts)} prompts{repeats}"


@dataclass(frozen=True)
class BadRow:
    """A row without a usable prompt: its columns (what stands for the prompt as `prompt`), and why."""

    columns: Row
    problem: str


def load_prompts(
    dataset_name: str,
    *,
    config: str | None = None,
    split: str = "train",
    prompt_column: str = "prompt",
    data_format: DataFormat = "auto",
    columns: Mapping[str, str] | None = None,
    base_dir: str | Path | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
) -> LoadedPrompts:
    """The prompts of a data set, one a row, in the order of the data.

    Args:
        dataset_name: local file, folder or Hub id, see `infalign.data.sources.read_rows`.
        config: configuration name on the Hub.
        split: which split (a single local file is read whole).
        prompt_column: column with a string or a chat, for the format `prompt`.
        data_format: `prompt`; `transcript` (column `chosen`, hh-rlhf text or a chat: the last user turn is the one to
            answer, what follows is dropped); `auto` looks for the columns of `infalign.data.forms`, in that order;
            `chat` likewise, and makes a text the user's turn of a chat.
        columns: our name -> the data's, for columns under other names.
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
    rows = renamed(rows[:limit], columns, dataset_name)
    loaded = prompts_from_rows(rows, dataset_name, prompt_column=prompt_column, data_format=data_format)
    splits = saved_splits(dataset_name, None if base_dir is None else Path(base_dir))
    note = (f"split {split!r} of {', '.join(splits)}",) if len(splits) > 1 else ()
    return replace(loaded, notes=(*note, *loaded.notes))


def prompts_from_rows(
    rows: Sequence[Row], source: str, *, prompt_column: str = "prompt", data_format: DataFormat = "auto"
) -> LoadedPrompts:
    """Check rows and turn each into a prompt.

    Raises:
        InputError: no rows, a missing column, or bad prompts (all of them counted, the first five shown).

    >>> prompts_from_rows([{"prompt": "hi", "answer": "4"}], "rows").prompts[0].columns
    {'answer': '4'}
    """
    form = _form_of(rows, source, prompt_column, data_format)
    where = f"{source}, column {form.columns[0]!r}"
    contents = read_checked(rows, where, lambda row: _content(row, form))
    if len({isinstance(content, str) for content in contents}) > 1:
        raise InputError(f"{where}: some prompts are text and some are chats; make them alike")
    columns = [_further(row, form) for row in rows]
    note = how_read(form, rows)
    taken = [name for name in RESERVED_COLUMNS if name not in form.columns and any(name in row for row in rows)]
    names = ", ".join(map(repr, taken))
    left_out = f"columns are left out that are called like an argument of every reward: {names}" if taken else None
    return LoadedPrompts(
        numbered(zip(contents, columns, strict=True)),
        source,
        form.format,
        tuple(dict.fromkeys(name for row in columns for name in row)),
        tuple(line for line in (note, left_out) if line is not None),
    )


def prompts_or_problems(
    rows: Sequence[Row], source: str, *, prompt_column: str = "prompt", data_format: DataFormat = "auto"
) -> tuple[list[Prompt | BadRow], LoadedPrompts]:
    """All rows in order, each a prompt or what is wrong with it; and what `prompts_from_rows` gives of the usable ones.

    Raises:
        InputError: no rows, a missing column, or not a single usable prompt.
    """
    form = _form_of(rows, source, prompt_column, data_format)
    problems: dict[int, BadRow] = {}
    for number, row in enumerate(rows):
        try:
            _content(row, form)
        except InputError as error:
            problems[number] = BadRow({"prompt": row.get(form.columns[0]), **_further(row, form)}, str(error))
    good = [row for number, row in enumerate(rows) if number not in problems]
    loaded = prompts_from_rows(good or rows, source, prompt_column=prompt_column, data_format=data_format)
    prompts = iter(loaded.prompts)
    return [problems[number] if number in problems else next(prompts) for number in range(len(rows))], loaded


def numbered(rows: Iterable[tuple[str | Messages, Mapping[str, Any]]]) -> tuple[Prompt, ...]:
    """Prompts of (content, columns), each with its own identity, also where contents are equal (`types.row_keys`)."""
    pairs = list(rows)
    keys = row_keys(pairs)
    return tuple(Prompt(content, key, columns) for (content, columns), key in zip(pairs, keys, strict=True))


def check_choices(data_format: str, limit: int | None) -> None:
    """Raise InputError unless `data_format` is known and `limit` is None or positive."""
    if data_format not in DATA_FORMATS:
        raise InputError(f"data_format {data_format!r} is unknown; one of {', '.join(DATA_FORMATS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 row, got {limit}")


def _form_of(rows: Sequence[Row], source: str, prompt_column: str, data_format: str) -> Form:
    """How the rows hold their prompts; the first row that has anything decides."""
    if not rows:
        raise InputError(f"{source}: no rows")
    form = find_form(next((row for row in rows if row), rows[0]), source, prompt_column, data_format)
    return form


def _content(row: Row, form: Form) -> str | Messages:
    """A row's prompt, after a look at the columns that a chat's template reads."""
    content = form.read(row)
    for name, kind, wanted in zip(TEMPLATE_COLUMNS, (list, dict), ("a list of tools", "a mapping"), strict=True):
        value = row.get(name)
        if name == "tools" and isinstance(value, str) and value:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        if value is not None and not isinstance(value, kind) and not isinstance(content, str):
            raise InputError(f"{name} must be {wanted}, got {value!r:.40}")
    return content


def _further(row: Row, form: Form) -> dict[str, Any]:
    """The row's columns that its prompt is not made of."""
    return {name: value for name, value in row.items() if name not in form.columns and name not in RESERVED_COLUMNS}


def read_checked(rows: Sequence[Row], where: str, read: Callable[[Row], Content]) -> list[Content]:
    """What `read` makes of every row.

    Raises:
        InputError: with the rows that cannot be read: how many, and the first five with their numbers (from 1).
    """
    contents: list[Content] = []
    problems: dict[str, list[int]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            contents.append(read(row))
        except InputError as error:
            problems.setdefault(str(error), []).append(number)
    if problems:
        count = sum(map(len, problems.values()))
        shown: list[str] = []  # "row 3: ...", "rows 1, 2, 3, 4, 5 and 7 more: ..."
        for problem, numbers in list(problems.items())[:_SHOWN]:
            further = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
            places = ", ".join(map(str, numbers[:_SHOWN]))
            shown.append(f"row{'s' if len(numbers) > 1 else ''} {places}{further}: {problem}")
        more = f"; and {len(problems) - _SHOWN} other problems" if len(problems) > _SHOWN else ""
        raise InputError(f"{where}: {count} of {len(rows)} rows cannot be used: {'; '.join(shown)}{more}")
    return contents
