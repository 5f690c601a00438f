"""What travels between rooms: small frozen dataclasses, and the errors that are told in one line.

Dimension key (whole package): see `infalign/__init__.py`.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Messages = list[dict[str, str]]
"""A chat: `[{"role": "user", "content": "..."}, ...]`, as in transformers and TRL."""


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
    """One prompt, `content` as the data has it (plain text, or chat messages ending with the user's turn).

    `key` is the hash of the normalised text: splits, streams and tables know a prompt by it.
    `columns` are the data's other columns (e.g. `solution`), handed to rewards unchanged.
    """

    content: str | Messages
    key: str
    columns: Mapping[str, Any] = field(default_factory=dict)


def prompt_key(content: str | Messages) -> str:
    """The key of a prompt: 16 hex digits (64 bits) of blake2b over its normalised text.

    Normalised: NFKC, case-folded, white space collapsed; of a chat, role and content of every turn.

    >>> prompt_key("Hello  world") == prompt_key("hello WORLD ")
    True
    """
    if isinstance(content, str):
        text = _normalised(content)
    else:  # the separators are white space to `split`, so no content can contain them
        text = "\x1e".join(f"{turn['role']}\x1f{_normalised(turn['content'])}" for turn in content) + "\x1e"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


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
