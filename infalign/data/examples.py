"""Texts to predict, in tokens: what DAM's parents are heard on, and what shows that a policy has forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from infalign.data.completions import read_completions
from infalign.data.sources import iter_rows
from infalign.data.templates import render
from infalign.types import InputError


@dataclass(frozen=True)
class Example:
    """Tokens of a text, of which those from `start` on are to be predicted."""

    ids: tuple[int, ...]
    start: int = 1


def read_examples(path: str, tokenizer: Any, max_length: int, count: int, rng: np.random.Generator) -> list[Example]:
    """Examples from a file of prompts with completions (any form that `infalign compare` reads), or of texts.

    Args:
        path: the file.
        tokenizer: of the models that read them.
        max_length: tokens of an example; longer ones are cut at their end.
        count: examples at most.
        rng: draws them.

    Raises:
        InputError: nothing there to predict.
    """
    first = next(iter_rows(path), None)
    pairs: list[tuple[list[int], list[int]]] = []
    if first is not None and set(first) & {"text"} and not set(first) & {"prompt", "messages", "question"}:
        for row in iter_rows(path, text_column="text"):
            ids = tokenizer(str(row["text"]))["input_ids"]
            pairs.append((ids[:1], ids[1:]))
    else:
        for row in read_completions(path).rows:
            prompt = render(tokenizer, row.prompt.content)
            pairs += [(prompt, tokenizer(one, add_special_tokens=False)["input_ids"]) for one in row.texts or ()]
    fitting = [(prompt, text) for prompt, text in pairs if text and len(prompt) < max_length]
    if not fitting:
        raise InputError(f"{path}: no row leaves a token to predict within max_length {max_length}")
    order = rng.permutation(len(fitting))[:count]
    return [
        Example(tuple([*prompt, *text][:max_length]), start=len(prompt))
        for prompt, text in (fitting[int(row)] for row in order)
    ]
