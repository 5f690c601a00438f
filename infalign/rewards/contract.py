"""The reward contract: TRL's, unchanged.

A reward is a callable `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async, called
with keywords. Lists have one entry per completion (B). With chat prompts a prompt is a list of messages and a
completion is `[{"role": "assistant", "content": text}]`; with text prompts both are strings. `columns` are the other
columns of the data, repeated likewise, and `trainer_state`, `log_extra`, `log_metric` (outside a trainer: None and two
functions that do nothing). `None` and NaN mean "no score": counted, never turned into a number. Numbers are finite. The
lists and all that is in them are the reward's own copies: it may change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from infalign.types import Messages, RewardError

TRAINERS = ("trainer_state", "log_extra", "log_metric")
"""What a trainer hands to a reward beside the data."""

Text = str | Messages
"""A prompt or completion: a string, or chat messages."""

_REASONING_KEYS = ("reasoning_content", "thinking")


@runtime_checkable
class RewardFunction(Protocol):
    """What every reward is to the rest of the package; an async one returns an awaitable of the same list."""

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any, **columns: Any
    ) -> Any:
        """One number or None per completion, in order."""


def shape_completions(prompts: Sequence[Text], texts: Sequence[str]) -> list[Text]:
    """Sampled texts in the form that goes with their prompts: an assistant message for chats, else the text.

    >>> shape_completions(["Hi"], ["there"])
    ['there']
    """
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def completion_text(completion: Text) -> str:
    """The text of a completion in either form; of several messages, those of the assistant, a line break between."""
    if isinstance(completion, str):
        return completion
    return "\n".join(turn.get("content") or "" for turn in completion if turn.get("role", "assistant") == "assistant")


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


def as_rewards(
    output: Any, expected_count: int, name: str, *, infinite: Literal["error", "keep"] = "error", kind: str = "reward"
) -> NDArray[np.float64]:
    """What a reward returned, as float64 of shape (B,), NaN for no score.

    Args:
        output: a sequence of numbers and None, a numpy array, or a torch tensor on any device. Booleans are 0 and 1.
        expected_count: B.
        name: the reward's name, for messages.
        infinite: `error` refuses infinities, `keep` leaves them to the caller.
        kind: what it is, the first word of every message.

    Raises:
        RewardError: not a sequence, a wrong count or shape, an entry that is no real number, or an infinity.

    >>> as_rewards([1, None, True], 3, "mine")
    array([ 1., nan,  1.])
    """
    subject = f"{kind} {name!r}"
    values = _entries(output, subject)
    if len(values) != expected_count:
        raise RewardError(
            f"{subject} returned {len(values)} values for {expected_count} completions; "
            f"return exactly one per completion, None for no score"
        )
    plain = set(map(type, values)) == {float}
    read = values if plain else [_number(value, i, subject) for i, value in enumerate(values)]
    rewards = np.array(read, dtype=np.float64)
    if infinite == "error" and np.isinf(rewards).any():
        index = int(np.isinf(rewards).argmax())
        raise RewardError(f"{subject} is not finite: {rewards[index]} at index {index}; return None for no score")
    return rewards


def _entries(output: Any, subject: str) -> list[Any]:
    if hasattr(output, "detach"):  # a torch tensor; cpu first, since not every device knows float64
        output = output.detach().cpu()
        output = output.double().numpy() if output.is_floating_point() else output.numpy()
    if isinstance(output, np.ndarray):
        if output.ndim != 1:
            raise RewardError(f"{subject} returned an array of shape {output.shape}; one number per completion")
        return list(output)
    if isinstance(output, (str, bytes, dict, set)) or not hasattr(output, "__len__") or not hasattr(output, "__iter__"):
        raise RewardError(f"{subject} returned {_described(output)}; return a list with a number per completion")
    return list(output)


def _number(value: Any, index: int, subject: str) -> float:
    if value is None:
        return np.nan
    if isinstance(value, (str, bytes, list, tuple, dict, complex, np.complexfloating, np.ndarray)):
        raise _no_number(value, index, subject)
    try:
        return float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_number(value, index, subject) from error


def _no_number(value: Any, index: int, subject: str) -> RewardError:
    return RewardError(f"{subject} returned {_described(value)} at index {index}; a number or None is wanted")


def _described(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
