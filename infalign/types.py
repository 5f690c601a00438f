"""What travels between rooms: small frozen dataclasses, and the errors that are told in one line.

Dimension key (whole package): see `infalign/__init__.py`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Messages = list[dict[str, Any]]
"""A chat, `[{"role": "user", "content": "..."}, ...]`, as in transformers and TRL; turns may hold more (tool calls)."""


class InputError(ValueError):
    """A mistake in what the user gave: the message says what, the value got, what is allowed, what to do.

    The command line prints it as one line and exits with code 2; no traceback unless `--debug`.
    """


class RewardError(RuntimeError):
    """A reward failed or returned something that is no reward, after all retries. Exit code 2 as well."""


class TrainingError(RuntimeError):
    """Training can't go on as it is (gradients or weights that are not finite). Told in one line, exit code 1."""


class Interrupted(Exception):
    """A SIGTERM was answered with a checkpoint; the message says how to go on. Exit code 143."""


@dataclass(frozen=True)
class Prompt:
    """One row of the data: `content` as the data has it (plain text, or a chat that ends with the user's turn).

    `key` is the row's identity, see `prompt_key`: random streams and tables know a prompt by it. `columns` are the
    row's other columns (e.g. `solution`), handed to rewards unchanged.
    """

    content: str | Messages
    key: str
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What the prompts share that splits keep together, see `group_key`."""
        return group_key(self.content)

    @property
    def template(self) -> dict[str, Any]:
        """What the row hands to the chat template: `tools`, and the variables in `chat_template_kwargs`."""
        return {} if isinstance(self.content, str) else template_variables(self.columns)


TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns of a chat that its template reads, as in TRL."""


def template_variables(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template's variables in a row's columns; tools may be JSON text, as in TRL.

    >>> template_variables({"chat_template_kwargs": {"enable_thinking": False}, "answer": 4, "tools": None})
    {'enable_thinking': False}
    """
    found, tools = dict(columns.get("chat_template_kwargs") or {}), columns.get("tools")
    return found | {"tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else found


def prompt_key(content: str | Messages, template: Mapping[str, Any] | None = None, occurrence: int = 0) -> str:
    """The identity of a prompt: 16 hex digits (64 bits) of blake2b over its exact content.

    Args:
        content: text or chat; entries of a turn that are None don't count (Arrow adds them).
        template: the row's variables of the chat template, which shape its tokens.
        occurrence: how many rows before this one have the same content: each has samples of its own.

    >>> prompt_key("Hello") == prompt_key("hello"), prompt_key("Hello") == prompt_key("Hello", occurrence=1)
    (False, False)
    """
    parts: list[Any] = [content if isinstance(content, str) else [_without_none(turn) for turn in content]]
    parts += [_without_none(template)] if template else []
    parts += [occurrence] if occurrence else []
    return _hash(json.dumps(parts, sort_keys=True, default=repr))


def row_keys(rows: Iterable[tuple[str | Messages, Mapping[str, Any]]]) -> Iterator[str]:
    """The keys of rows of (content, columns), in order: the n-th of equal content is occurrence n.

    >>> len(set(row_keys([("hi", {"answer": 1}), ("hi", {"answer": 2})])))
    2
    """
    seen: Counter[str] = Counter()
    for content, columns in rows:
        template = {} if isinstance(content, str) else template_variables(columns)
        plain = prompt_key(content, template)
        yield prompt_key(content, template, seen[plain]) if seen[plain] else plain
        seen[plain] += 1


def group_key(content: str | Messages) -> str:
    """16 hex digits over a prompt's normalised text: near copies never sit in train and test at the same time.

    Normalised: NFKC, case-folded, white space collapsed; of a chat, role and content of every turn.

    >>> group_key("Hello  world") == group_key("hello WORLD ")
    True
    """
    if isinstance(content, str):
        return _hash(_normalised(content))
    # the separators are white space to `split`, so no content can contain them
    turns = [f"{turn['role']}\x1f{_normalised(turn.get('content') or '')}{_calls(turn)}" for turn in content]
    return _hash("\x1e".join(turns) + "\x1e")


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _calls(turn: Mapping[str, Any]) -> str:
    """A turn's tool calls as text, empty where it has none."""
    return f"\x1f{json.dumps(turn['tool_calls'], sort_keys=True, default=repr)}" if turn.get("tool_calls") else ""


def _without_none(value: Any) -> Any:
    """`value` without the entries of mappings that are None, at any depth."""
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class SamplingSettings:
    """Every field that shapes the sampling distribution, all explicit: a model's own generation config is ignored.

    `max_tokens` in tokens, end token included; `top_k=0`, `top_p=1`, `min_p=None` are the model's own distribution.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, for fingerprints and manifests."""
        return asdict(self)

    @property
    def is_plain(self) -> bool:
        """True when samples follow the model's own (tempered) distribution, so that log-probabilities are exact."""
        return self.top_p == 1.0 and self.top_k == 0 and not self.min_p and self.repetition_penalty == 1.0


@dataclass(frozen=True)
class Sample:
    """One completion: sample `index` of the prompt `key`.

    `token_ids` include the end token when `finished`; `token_logps` (T,) are log-probabilities in nats under the
    model and temperature that drew it; `text` is decoded without special tokens.
    """

    key: str
    index: int
    token_ids: tuple[int, ...]
    token_logps: NDArray[np.float32]
    text: str
    finished: bool
