"""Chats as data sets hold them: checked turn by turn, text parts joined, everything that a template may read kept."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from infalign.types import InputError, Messages

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def checked_chat(value: Any) -> Messages:
    """A chat with the content of every turn as text; further entries of a turn (`tool_calls`, `name`, ...) stay.

    Entries that are None are dropped (Arrow adds them), except the content of a turn with tool calls.

    Raises:
        InputError: not a list of turns, a role or a content of another kind, or an empty last turn of the user.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"an empty chat or none at all ({value!r:.40})")
    turns = [_turn(turn, number) for number, turn in enumerate(value, start=1)]
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        raise InputError("the user's last turn is empty")
    return turns


def _turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise InputError(f"turn {number} is not {{'role': ..., 'content': text}}")
    if turn["role"] not in _ROLES:
        raise InputError(f"turn {number} has the role {turn['role']!r}; one of {', '.join(_ROLES)}")
    further = {name: one for name, one in turn.items() if name not in ("role", "content") and one is not None}
    content = turn.get("content")
    if content is None and not further.get("tool_calls"):
        raise InputError(f"turn {number} has no content, which only a turn with tool_calls may lack")
    return {"role": turn["role"], "content": content if content is None else _text(content, number), **further}


def _text(content: Any, number: int) -> str:
    """The text of a turn: a string, or the joined text parts of a list."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(f"turn {number} is not {{'role': ..., 'content': text}}")
    parts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"turn {number} holds a part of type {kind!r}; only text parts can be read")
        parts.append(part["text"])
    return "".join(parts)


def to_be_answered(messages: Messages) -> Messages:
    """The chat without the assistant's turns at its end.

    Raises:
        InputError: nothing is left.

    >>> to_be_answered([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    [{'role': 'user', 'content': 'a'}]
    """
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end or messages[end - 1]["role"] not in ("user", "tool"):
        raise InputError("the chat has no user turn to answer")
    return messages[:end]


def from_sharegpt(value: Any, system: Any = None) -> Messages:
    """A ShareGPT conversation, `[{"from": "human", "value": "..."}, ...]`, as a chat; turns of the usual form too.

    Raises:
        InputError: not a list of such turns, or an unknown speaker.
    """
    if not isinstance(value, (list, tuple)):
        raise InputError(f"the conversation is {value!r:.40}, not a list of turns")
    turns: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or "from" not in turn:
            turns.append(turn)
            continue
        if turn["from"] not in _SHAREGPT:
            known = ", ".join(_SHAREGPT)
            raise InputError(f"turn {number} is from {turn['from']!r}; one of {known}")
        turns.append({"role": _SHAREGPT[turn["from"]], "content": turn.get("value")})
    return checked_chat(turns)


def from_text(text: str) -> Any:
    """A list that stands in a text as JSON or as Python wrote it (`csv` can hold nothing else); None for other text.

    >>> from_text('["a", "b"]'), from_text("[{'role': 'user'}]"), from_text("[sic]")
    (['a', 'b'], [{'role': 'user'}], None)
    """
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(inner)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) else None
    return None


def is_chat_text(text: str) -> bool:
    """Whether a text is a chat that was written out, e.g. into a cell of a CSV file."""
    found = from_text(text) if '"role"' in text or "'role'" in text else None
    return bool(found) and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in found or ())


def shown(value: Any) -> str:
    """The last turn of a chat, or the text itself, shortened: to name a row in a message."""
    last = value[-1] if isinstance(value, Sequence) and value and not isinstance(value, str) else value
    text = last.get("content") if isinstance(last, Mapping) else last
    return repr(text)[:80]
