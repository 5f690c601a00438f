"""Preference pairs: hh-rlhf transcripts and TRL's preference formats, checked row by row.

A pair is a prompt with the completion that was chosen and the one that was rejected. TRL's formats: `prompt`, `chosen`,
`rejected` as texts or as chats ("explicit", the prompt also under the names of `infalign.data.forms`), or whole
conversations under `chosen` and `rejected` ("implicit"), of which the turns that both begin with are the prompt. A
transcript is an implicit conversation. With answers that are chats a prompt that is a text is the user's turn
(UltraFeedback). A row's `tools` and `chat_template_kwargs` go to the chat template, its `margin` to the loss (TRL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from infalign.data.chats import from_sharegpt
from infalign.data.forms import from_prompt, how_read, named_form
from infalign.data.prompts import read_checked
from infalign.data.sources import Row
from infalign.data.transcripts import parse_transcript, prompt_of
from infalign.types import InputError, Messages, group_key, template_variables

PairFormat = Literal["auto", "prompt", "transcript"]
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """One pair: `chosen` and `rejected` follow `prompt`, all three texts or all three chats.

    `template` are the row's variables of the chat template; `margin` is in the unit of scores, None where the data has
    none. `key` is the prompt's (`types.group_key` of the chat up to the last user turn that both sides answer).
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    key: str
    template: Mapping[str, Any] = field(default_factory=dict)
    margin: float | None = None


@dataclass(frozen=True)
class LoadedPreferences:
    """Pairs; rows left out because their two sides are the same, or repeated; `note` on how rows were read."""

    pairs: tuple[Preference, ...]
    source: str
    rows: int
    identical: int
    duplicates: int
    note: str | None = None


def preferences_from_rows(
    rows: Sequence[Row], source: str, *, prompt_column: str = "prompt", data_format: PairFormat = "auto"
) -> LoadedPreferences:
    """Check rows and turn them into distinct pairs, in order.

    Args:
        rows: with `chosen` and `rejected`, and for the explicit formats `prompt_column`.
        source: the data's name, for messages.
        prompt_column: the column of explicit prompts.
        data_format: `transcript` reads texts as transcripts; `prompt` asks for an explicit prompt; `auto` looks.

    Raises:
        InputError: no rows, a missing column, or pairs that cannot be read (counted, the first five shown).

    >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}]
    >>> preferences_from_rows(rows, "rows").pairs[0].chosen
    '4'
    """
    if not rows:
        raise InputError(f"{source}: no rows")
    for column in ("chosen", "rejected"):
        if column not in rows[0]:
            raise InputError(
                f"{source}: no column {column!r}; preference pairs have chosen and rejected, the columns are "
                f"{', '.join(map(repr, rows[0]))}"
            )
    explicit = prompt_column in rows[0] and data_format != "transcript"
    if data_format == "prompt" and not explicit:
        raise InputError(f"{source}: no column {prompt_column!r}; set prompt_column, or data_format: auto")
    read_prompt: Callable[[Row], str | Messages] | None = None
    note: str | None = None
    if explicit:
        read_prompt = lambda row: from_prompt(row.get(prompt_column))  # noqa: E731 - as the form's
    elif data_format == "auto" and (form := named_form(rows[0])) is not None:
        read_prompt, note = form.read, how_read(form, rows)
    read = read_checked(rows, source, lambda row: _preference(row, read_prompt))
    if len({isinstance(pair.prompt, str) for pair in read}) > 1:
        raise InputError(f"{source}: some pairs are texts and some are chats; make them alike")
    distinct: dict[str, Preference] = {}
    for pair in read:
        if pair.chosen != pair.rejected:
            distinct.setdefault(repr(pair), pair)
    identical = sum(pair.chosen == pair.rejected for pair in read)
    if not distinct:
        raise InputError(f"{source}: chosen and rejected are the same in all {len(rows)} rows")
    return LoadedPreferences(
        tuple(distinct.values()), source, len(rows), identical, len(read) - identical - len(distinct), note
    )


def split_pairs(
    pairs: Sequence[Preference], test_keys: set[str]
) -> tuple[tuple[Preference, ...], tuple[Preference, ...]]:
    """Pairs for training and pairs held out: those whose prompt is one of `test_keys`; no prompt is in both."""
    train = tuple(pair for pair in pairs if pair.key not in test_keys)
    return train, tuple(pair for pair in pairs if pair.key in test_keys)


def _preference(row: Row, read_prompt: Callable[[Row], str | Messages] | None) -> Preference:
    pair = _implicit(row) if read_prompt is None else _explicit(row, read_prompt(row))
    template = {} if isinstance(pair.prompt, str) else template_variables(row)
    return replace(pair, template=template, margin=_margin(row.get("margin")))


def _margin(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        margin = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise InputError(f"margin is {str(value)[:40]!r}; a finite number or null is wanted")
    return margin


def _explicit(row: Row, prompt: str | Messages) -> Preference:
    if isinstance(prompt, str) and any(isinstance(row.get(name), (list, tuple, dict)) for name in _SIDES):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        sides = [_text(row.get(name), name) for name in _SIDES]
    else:
        sides = [_answer(row.get(name), prompt, name) for name in _SIDES]
    return Preference(prompt, sides[0], sides[1], group_key(prompt))


def _implicit(row: Row) -> Preference:
    sides = (row.get(name) for name in ("chosen", "rejected"))
    chosen, rejected = (parse_transcript(one) if isinstance(one, str) else from_sharegpt(one) for one in sides)
    least = min(len(chosen), len(rejected))
    shared = next((turn for turn in range(least) if chosen[turn] != rejected[turn]), least - 1)
    while shared and chosen[shared - 1]["role"] == "assistant":  # the answer belongs to what is compared
        shared -= 1
    if not shared:
        raise InputError("chosen and rejected have no first turn in common: they answer different prompts")
    prompt = prompt_of(chosen[:shared])
    return Preference(prompt, chosen[shared:], rejected[shared:], group_key(prompt))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {value!r:.40}, no text, but the prompt is a text")
    return value


def _answer(value: Any, prompt: Messages, name: str) -> Messages:
    """The turns after the prompt; a text is one assistant turn, a conversation that repeats the prompt loses it."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = from_sharegpt([value] if isinstance(value, dict) else value)
    turns = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if not turns or turns[-1]["role"] != "assistant":
        raise InputError(f"{name} does not end with an assistant turn")
    return turns
