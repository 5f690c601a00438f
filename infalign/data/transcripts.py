r"""Transcripts of the hh-rlhf kind, `"\n\nHuman: ...\n\nAssistant: ..."`, as chats and back.

A header is `\n\nHuman:` or `\n\nAssistant:` followed by one space or by the end of the text; anything else that looks
like one stays content. Text is kept to the letter, so that text -> messages -> text is the identity.
"""

from __future__ import annotations

import re

from infalign.types import InputError, Messages

_HEADER = re.compile(r"\n\n(Human|Assistant):(?: |\Z)")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_NAMES = {role: name for name, role in _ROLES.items()}


def parse_transcript(text: str) -> Messages:
    r"""The turns of a transcript, contents to the letter.

    Args:
        text: starts with `"\n\nHuman: "`. Consecutive turns of one speaker and empty assistant turns occur in the
            published data and are kept.

    Returns:
        Messages with the roles `user` and `assistant`.

    Raises:
        InputError: `text` is no string, does not start with a human turn, or has an empty human turn.

    >>> parse_transcript("\n\nHuman: hi\n\nAssistant: hello")
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}]
    """
    if not isinstance(text, str):
        raise InputError(f"a transcript is a string, got {type(text).__name__}")
    pieces = _HEADER.split(text)
    if pieces[0] or len(pieces) == 1 or pieces[1] != "Human":
        raise InputError(f"a transcript starts with '\\n\\nHuman: ', got {text[:40]!r}")
    messages = [
        {"role": _ROLES[name], "content": content} for name, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    for number, message in enumerate(messages, start=1):
        if message["role"] == "user" and not message["content"].strip():
            raise InputError(f"turn {number} of the transcript, a human one, is empty")
    return messages


def render_transcript(messages: Messages) -> str:
    r"""The transcript of a chat of user and assistant turns: the inverse of `parse_transcript`.

    Raises:
        InputError: another role (a transcript has no system turn).

    >>> render_transcript([{"role": "user", "content": "hi"}])
    '\n\nHuman: hi'
    """
    unknown = sorted({str(message["role"]) for message in messages} - set(_NAMES))
    if unknown:
        raise InputError(f"a transcript has the roles user and assistant only, got {', '.join(unknown)}")
    return "".join(f"\n\n{_NAMES[message['role']]}: {message['content']}" for message in messages)


def prompt_of(messages: Messages) -> Messages:
    """The chat up to the last user turn: trailing assistant turns dropped, neighbours of one role joined.

    Joined with a blank line, because most chat templates refuse two turns of one role in a row; turns that hold more
    than text (tool calls) stay apart.

    Raises:
        InputError: there is no user turn.

    >>> prompt_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    [{'role': 'user', 'content': 'a'}]
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise InputError("the chat has no user turn to answer")
    joined: Messages = []
    for turn in messages[: last + 1]:
        before = joined[-1] if joined else {}
        if set(before) == set(turn) == {"role", "content"} and before["role"] == turn["role"]:
            joined[-1] = {"role": turn["role"], "content": f"{before['content']}\n\n{turn['content']}"}
        else:
            joined.append(turn)
    return joined
