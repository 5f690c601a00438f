"""Where a row's prompt stands, under the names that data sets of the field use.

| columns | the prompt |
|---|---|
| `prompt` (or the recipe's `prompt_column`) | a text, or a chat that ends with the user's turn |
| `messages` | a chat; the assistant's turns at its end are left out |
| `conversations`, `conversation` | ShareGPT's turns (`from`, `value`), likewise |
| `instruction`, perhaps with `input` | both, a blank line between |
| `question`, `problem`, `query`, `input` | a text |
| `chosen` | hh-rlhf's transcript or a chat, up to the last user turn |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infalign.data.chats import checked_chat, from_sharegpt, from_text, is_chat_text, to_be_answered
from infalign.data.sources import Row
from infalign.data.transcripts import parse_transcript, prompt_of
from infalign.types import InputError, Messages


@dataclass(frozen=True)
class Form:
    """How rows hold their prompts.

    `columns` are those that the prompt is made of (no reward gets them); `read` makes it of a row; `format` is what a
    recipe calls it; `named` is true for the names that are read without being asked for, which is worth a line.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], str | Messages]
    format: str = "prompt"
    named: bool = False


def find_form(row: Row, source: str, prompt_column: str, data_format: str) -> Form:
    """The form of rows like `row`.

    Raises:
        InputError: none of the columns is known, with those that there are.
    """
    if data_format == "chat":
        form = find_form(row, source, prompt_column, "auto")
        return replace(form, read=lambda one: _as_user(form.read(one)))
    if data_format != "transcript" and prompt_column in row:
        return Form((prompt_column,), lambda one: from_prompt(one.get(prompt_column)))
    named = named_form(row) if data_format == "auto" and prompt_column == "prompt" else None
    if named is not None:
        return named
    if data_format != "prompt" and "chosen" in row:
        return Form(("chosen", "rejected"), lambda one: _from_transcript(one.get("chosen")), "transcript")
    wanted = "'chosen'" if data_format == "transcript" else repr(prompt_column)
    others = ", ".join(form.columns[0] for form in _NAMED)
    hint = f" (nor {others}, chosen)" if data_format == "auto" and prompt_column == "prompt" else ""
    raise InputError(
        f"{source}: no column {wanted}{hint}; the columns are {', '.join(map(repr, row))}; set prompt_column, "
        "data_format, or columns (e.g. --columns prompt=NAME)"
    )


def _as_user(content: str | Messages) -> Messages:
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def named_form(row: Row) -> Form | None:
    """The form of rows that hold their prompt under another tool's name, None for rows that don't."""
    return next((form for form in _NAMED if form.columns[0] in row), None)


def from_prompt(value: Any) -> str | Messages:
    """A prompt as data has it: a text, or a chat that ends with the user's turn (also written out as text).

    Raises:
        InputError: anything else.
    """
    if isinstance(value, str) and is_chat_text(value):
        value = from_text(value)
    if isinstance(value, str):
        return _checked_text(value)
    if not isinstance(value, (list, tuple)):
        raise InputError(f"the prompt is {value!r:.40}, neither text nor a chat")
    messages = checked_chat(value)
    if messages[-1]["role"] not in ("user", "tool"):
        raise InputError(f"the last turn is the {messages[-1]['role']}'s, it must be the user's")
    return messages


def _checked_text(value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"the prompt is {value!r:.40}, which is not text")
    if not value.strip():
        raise InputError("the prompt is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError("the prompt holds half a surrogate pair, which is no text")
    return value


def _instruction(row: Row) -> str:
    instruction = _checked_text(row.get("instruction"))
    given = row.get("input")
    if given is None or (isinstance(given, str) and not given.strip()):
        return instruction
    if not isinstance(given, str):
        raise InputError(f"input is {given!r:.40}, which is not text")
    return f"{instruction}\n\n{given}"


def _conversation(column: str) -> Callable[[Row], Messages]:
    return lambda row: to_be_answered(from_sharegpt(row.get(column), row.get("system")))


def _messages(row: Row) -> Messages:
    value = row.get("messages")
    return to_be_answered(checked_chat(from_text(value) if isinstance(value, str) else value))


def _text_in(column: str) -> Form:
    return Form((column,), lambda row: from_prompt(row.get(column)), named=True)


def _from_transcript(value: Any) -> Messages:
    return prompt_of(parse_transcript(value) if isinstance(value, str) else checked_chat(value))


_NAMED = (
    Form(("messages",), _messages, named=True),
    Form(("conversations", "system"), _conversation("conversations"), named=True),
    Form(("conversation", "system"), _conversation("conversation"), named=True),
    Form(("instruction", "input"), _instruction, named=True),
    *map(_text_in, ("question", "problem", "query", "input")),
)


def how_read(form: Form, rows: Sequence[Row]) -> str | None:
    """A line on what was read as the prompt where nobody said so, None for the usual columns."""
    present = [name for name in form.columns if any(name in row for row in rows)]
    cut = sum(_ends_answered(row.get(form.columns[0])) for row in rows) if form.named else 0
    if form.named:
        left = f"; {cut} of {len(rows)} end with the assistant's turn, which is left out" if cut else ""
        return f"prompts are read from {' and '.join(map(repr, present))}{left}"
    written = sum(isinstance(one := row.get(form.columns[0]), str) and is_chat_text(one) for row in rows)
    return f"{written} of {len(rows)} prompts are chats written out as text: read as chats" if written else None


def _ends_answered(value: Any) -> bool:
    if isinstance(value, str):
        value = from_text(value)
    last = value[-1] if isinstance(value, (list, tuple)) and value else None
    return isinstance(last, dict) and last.get("role", last.get("from")) in ("assistant", "gpt", "chatgpt")
