"""Columns under other names: `--columns prompt=question,completions=answers` in every verb that reads files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infalign.types import InputError

OURS = (
    "prompt",
    "completion",
    "completions",
    "reward",
    "rewards",
    "gold_reward",
    "gold_rewards",
    "chosen",
    "rejected",
    "tools",
    "chat_template_kwargs",
)
"""Names that can be given another: everything that a reader looks for."""


def parse_columns(given: Any) -> dict[str, str]:
    """Our name -> the data's name, from a flag (`a=b,c=d`), a recipe's mapping, or None.

    Raises:
        InputError: another form, or a name that no reader looks for.

    >>> parse_columns("prompt=question,completions=answers")
    {'prompt': 'question', 'completions': 'answers'}
    """
    if given is None or given in ("", {}, [], ()):
        return {}
    if isinstance(given, Mapping):
        pairs = [(str(name), value) for name, value in given.items()]
    else:
        words = [word for one in ([given] if isinstance(given, str) else list(given)) for word in str(one).split(",")]
        pairs = [(name.strip(), value.strip()) for name, _, value in (word.partition("=") for word in words)]
    for name, value in pairs:
        if not isinstance(value, str) or not value:
            raise InputError(f"columns: {name!r} needs the name of a column, e.g. columns prompt=question")
        if name not in OURS:
            raise InputError(f"columns: {name!r} is not a name that is read; one of {', '.join(OURS)}")
    return dict(pairs)


def renamed(rows: Sequence[dict[str, Any]], columns: Mapping[str, str] | None, source: str) -> list[dict[str, Any]]:
    """The rows with our names; a column that stood under one of them before is hidden.

    Raises:
        InputError: no row has a column that was named.
    """
    if not columns or not rows:
        return list(rows)
    for name, theirs in columns.items():
        if not any(theirs in row for row in rows):
            there = ", ".join(map(repr, dict.fromkeys(one for row in rows[:100] for one in row)))
            raise InputError(f"{source}: columns {name}={theirs}: no column {theirs!r}; the columns are {there}")
    return [rename(row, columns) for row in rows]


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """One row with our names in place of the data's."""
    theirs = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in theirs and name not in columns}
    return kept | {name: row[value] for name, value in columns.items() if value in row}
