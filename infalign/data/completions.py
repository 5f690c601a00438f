"""Completions made elsewhere: rows of a prompt with its samples, and their rewards where they are known.

A row is `{"prompt": ..., "completions": [...], "rewards": [...], "gold_rewards": [...]}`, the last two optional. Other
tools' names are read as well: `responses` for completions (vBoN), and the rows that `infalign generate` writes
(`candidates`, each with its completion and reward). Rows of one prompt are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.data.prompts import from_prompt, read_checked
from infalign.data.sources import Row, read_rows
from infalign.types import InputError, Messages, Prompt, prompt_key

Floats = NDArray[np.float64]
_SAMPLES = ("completions", "responses", "candidates", "rewards", "gold_rewards")
_OURS = ("prompt", *_SAMPLES, "completion", "reward", "chosen", "spent")


@dataclass(frozen=True)
class Completions:
    """M samples of one prompt: texts, rewards and gold rewards (M,), NaN for no score, None where no row had any."""

    prompt: Prompt
    texts: tuple[str, ...]
    rewards_M: Floats | None
    gold_M: Floats | None


def read_completions(name: str) -> dict[str, Completions]:
    """The samples of every prompt in a file, by prompt key.

    Args:
        name: a file or folder that `read_rows` reads (.jsonl, .json, .parquet, also .gz).

    Raises:
        InputError: nothing there, or rows that cannot be read (counted, the first five shown).
    """
    if not Path(name).exists():
        raise InputError(f"{name}: no such file of samples")
    rows = read_rows(name, base_dir=Path())
    if not rows:
        raise InputError(f"{name}: no rows")
    found: dict[str, list[Completions]] = {}
    for one in read_checked(rows, name, _completions):
        found.setdefault(one.prompt.key, []).append(one)
    return {key: _joined(parts) for key, parts in found.items()}


def _completions(row: Row) -> Completions:
    if "prompt" not in row:
        raise InputError(f"no prompt; the row has {', '.join(map(repr, row)) or 'nothing'}")
    content: str | Messages = from_prompt(row["prompt"])
    texts, rewards = _samples(row)
    if not texts:
        raise InputError("no completions")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"completion {number} is {text!r:.40}, no text")
    columns = {name: value for name, value in row.items() if name not in _OURS}
    return Completions(
        Prompt(content, prompt_key(content), columns),
        tuple(texts),
        _scores(rewards, len(texts), "rewards"),
        _scores(row.get("gold_rewards"), len(texts), "gold_rewards"),
    )


def _samples(row: Row) -> tuple[list[Any], Any]:
    """The texts and the rewards, under whichever names they stand."""
    candidates = row.get("candidates")
    if isinstance(candidates, list) and all(isinstance(one, dict) for one in candidates):
        rewards = [one.get("reward") for one in candidates]
        return [one.get("completion") for one in candidates], rewards
    texts = row.get("completions", row.get("responses"))
    if not isinstance(texts, list):
        raise InputError(f"completions is a list of texts, got {texts!r:.40}")
    return [_text(one) for one in texts], row.get("rewards")


def _text(completion: Any) -> Any:
    """The text of a completion, also of TRL's chat form `[{"role": "assistant", "content": ...}]`."""
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        return completion[-1].get("content")
    return completion


def _scores(values: Any, count: int, name: str) -> Floats | None:
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count:
        raise InputError(f"{name} must be a list of {count} numbers, one for each completion")
    scores = np.full(count, np.nan)
    for number, value in enumerate(values):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or np.isinf(value):
            raise InputError(f"{name}[{number}] is {value!r}; a finite number or null is wanted")
        scores[number] = value
    return scores


def _joined(parts: Sequence[Completions]) -> Completions:
    if len(parts) == 1:
        return parts[0]
    texts = tuple(text for part in parts for text in part.texts)
    rewards, gold = ([getattr(part, side) for part in parts] for side in ("rewards_M", "gold_M"))
    return Completions(parts[0].prompt, texts, _concatenated(rewards, parts), _concatenated(gold, parts))


def _concatenated(scores: Sequence[Floats | None], parts: Sequence[Completions]) -> Floats | None:
    if all(one is None for one in scores):
        return None
    filled = [np.full(len(p.texts), np.nan) if s is None else s for s, p in zip(scores, parts, strict=True)]
    return np.concatenate(filled)
