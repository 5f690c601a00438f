"""Reasoning blocks out of completions, so that a reward sees the answer only."""

from __future__ import annotations

from infalign.rewards.contract import Text

_REASONING_KEYS = ("reasoning_content", "thinking")


def strip_reasoning(completion: Text, open: str = "<think>", close: str = "</think>") -> Text:
    """A completion without its reasoning; the same form (text or messages) comes back.

    Complete blocks go, an unclosed one goes to the end of the text, and text before a closing tag that has no opening
    one goes too (some templates open the block in the prompt). White space left at the front is removed.

    Args:
        completion: text, or messages (whose separate reasoning fields are dropped as well).
        open: the opening tag.
        close: the closing tag.

    >>> strip_reasoning("<think>hm</think> 4")
    '4'
    """
    if isinstance(completion, str):
        return _strip_text(completion, open, close)
    return [
        {key: _strip_text(value, open, close) if key == "content" and isinstance(value, str) else value
         for key, value in turn.items() if key not in _REASONING_KEYS}
        for turn in completion
    ]  # fmt: skip


def _strip_text(text: str, open: str, close: str) -> str:
    if open not in text and close not in text:
        return text
    kept: list[str] = []
    rest = text
    if close in rest and (open not in rest or rest.index(close) < rest.index(open)):
        rest = rest.split(close, 1)[1]
    while open in rest:
        before, block = rest.split(open, 1)
        kept.append(before)
        rest = block.split(close, 1)[1] if close in block else ""
    return "".join([*kept, rest]).lstrip()
