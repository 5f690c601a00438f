"""Log-likelihoods of both answers of a question, tokenized and summed as lm-evaluation-harness does.

A context is encoded once for its two answers: batches are sorted by length and rows of one context share its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.forgetting.tasks import Question
from infalign.generation.likelihood import completion_logps
from infalign.types import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a context and of an answer after it."""

    context: tuple[int, ...]
    answer: tuple[int, ...]


def encode(tokenizer: Any, context: str, continuation: str, max_length: int | None = None) -> Encoded:
    """A context and its continuation in tokens, the way lm-evaluation-harness takes them apart.

    White space at the end of the context goes to the continuation; both are tokenized together, and the continuation is
    what stands behind as many tokens as the context alone has. An empty context is the first token of any text (BOS,
    or EOS where there is none). What is longer than `max_length` loses tokens at its left.

    Raises:
        InputError: the continuation leaves no token of its own, or there is neither a context nor a first token.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if context:
        own = _ids(tokenizer, context)
        answer = _ids(tokenizer, context + continuation)[len(own) :]
    else:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        own = [] if first is None else [int(first)]
        answer = list(tokenizer.encode(continuation, add_special_tokens=False))
        answer = answer[1:] if answer[:1] == own and len(answer) > 1 else answer
    if not answer or not own:
        raise InputError(f"the answer {continuation!r} has no token of its own after {context[-40:]!r}")
    if max_length is not None:
        answer = answer[-(max_length - 1) :]
        own = own[-(max_length - len(answer)) :]
    return Encoded(tuple(own), tuple(answer))


def _ids(tokenizer: Any, text: str) -> list[int]:
    """With the special tokens that the tokenizer adds by itself, but no second BOS where the text begins with one."""
    bos = tokenizer.bos_token
    return list(
        tokenizer.encode(text, add_special_tokens=False) if bos and text.startswith(bos) else tokenizer.encode(text)
    )


def encoded_answers(
    tokenizer: Any, questions: Sequence[Question], delimiter: str, max_length: int | None
) -> list[tuple[Encoded, Encoded]]:
    """Both answers of every question, each behind the delimiter."""
    return [
        (
            encode(tokenizer, question.context, delimiter + question.answers[0], max_length),
            encode(tokenizer, question.context, delimiter + question.answers[1], max_length),
        )
        for question in questions
    ]


def answer_logps(model: Any, rows: Sequence[tuple[Encoded, Encoded]], tokens_per_batch: int) -> Array:
    """(I, 2) summed log-probabilities, in nats, of the two answers of I questions.

    Args:
        model: a causal language model.
        rows: from `encoded_answers`.
        tokens_per_batch: tokens of a forward pass, padding included.
    """
    flat = [answer for pair in rows for answer in pair]
    logps = completion_logps(
        model, [one.context for one in flat], [one.answer for one in flat], tokens_per_batch=tokens_per_batch
    )
    return logps.numpy().reshape(len(rows), 2)


def labels_of(questions: Sequence[Question]) -> NDArray[np.int64]:
    """(I,) numbers of the answers that are held to be right."""
    return np.array([question.label for question in questions], dtype=np.int64)


def correct(logps_I2: Array, questions: Sequence[Question], *, per_character: bool = False) -> Array:
    """(I,) 1 where the right answer is the likelier one, else 0; a tie goes to the first, as numpy's argmax has it.

    `per_character` divides by an answer's length in characters first (the harness's acc_norm).
    """
    if per_character:
        logps_I2 = logps_I2 / np.array([[len(one) for one in question.answers] for question in questions])
    return (logps_I2.argmax(axis=1) == labels_of(questions)).astype(np.float64)


def right_probability(logps_I2: Array, questions: Sequence[Question]) -> Array:
    """(I,) probability of the right one of both answers, p_right / (p_right + p_wrong)."""
    labels = labels_of(questions)
    rows = np.arange(len(labels))
    gap = logps_I2[rows, labels] - logps_I2[rows, 1 - labels]
    return np.exp(-np.logaddexp(0.0, -gap))
