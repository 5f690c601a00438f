"""Multiple-choice tasks with two answers each: read, made binary, without overlap, capped, and their labels changed.

A task of any number of choices is made binary with one seeded distractor a question (arXiv:2409.02228, section 3), so
that chance is 1/2 everywhere. Test questions that the training part has too are removed and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infalign.runtime.seeds import stream
from infalign.types import InputError

RANDOM, FLIPPED, TRUE = "random", "flipped", "true"
LABELS = (RANDOM, FLIPPED)
"""What a task can be forgotten with: a coin's labels, or the wrong ones."""

_SHOWN = 60


@dataclass(frozen=True)
class Item:
    """A question as it is read: any number of wrong answers."""

    context: str
    correct: str
    distractors: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question with two answers; `answers[label]` is held to be right."""

    context: str
    answers: tuple[str, str]
    label: int

    @property
    def key(self) -> str:
        """The same for contexts that differ in case, white space or punctuation only."""
        return _key(self.context, self.answers)


@dataclass(frozen=True)
class Task:
    """Questions to train on and to test with.

    Attributes:
        name, family: as the recipe calls them; tasks of one family stand together in tables.
        train, test: no question of one is in the other.
        overlap: test questions that were removed because the training part has them.
        repeated: test questions that were removed because the test part has them already.
        delimiter: what stands between a context and an answer, as in lm-evaluation-harness.
    """

    name: str
    family: str
    train: tuple[Question, ...]
    test: tuple[Question, ...]
    overlap: int = 0
    repeated: int = 0
    delimiter: str = " "


_WORDS = re.compile(r"\w+|[+*/=<>%^&|~$#@\\]|(?<!\S)-(?!\S)|-(?=\d)")


def normalised(context: str) -> str:
    """A context without what does not tell questions apart; signs of arithmetic and of code do.

    >>> normalised("Is  water wet?") == normalised("is WATER wet"), normalised("3 + 4") == normalised("3 - 4")
    (True, False)
    """
    return " ".join(_WORDS.findall(context.casefold()))


def _key(context: str, answers: Iterable[str]) -> str:
    """What tells questions apart: the context, or where there is none the answers."""
    return normalised(context) or " | ".join(sorted(map(normalised, answers)))


def read_items(rows: Sequence[Mapping[str, Any]], name: str) -> list[Item]:
    """Questions of rows with `context`, `correct` and `distractors` (a text or a list of them).

    Raises:
        InputError: a row lacks one of them, or its correct answer is among its distractors; the row is named.
    """
    if not rows:
        raise InputError(f"{name}: no question in it")
    return [_item(row, f"{name}, row {number}") for number, row in enumerate(rows, 1)]


def _item(row: Mapping[str, Any], where: str) -> Item:
    lacking = [one for one in ("context", "correct", "distractors") if row.get(one) is None]
    if lacking:
        has = ", ".join(map(str, row)) or "nothing"
        raise InputError(
            f"{where}: no {' and no '.join(lacking)} (it has {has}); a question has context, correct, distractors"
        )
    given = row["distractors"]
    wrong = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else given
    if not isinstance(wrong, list) or not all(isinstance(one, (str, int, float)) for one in [row["correct"], *wrong]):
        shown = json.dumps([row["correct"], given], default=str)[:_SHOWN]
        raise InputError(f"{where}: correct is a text, distractors a list of texts, got {shown}")
    if not isinstance(row["context"], str):
        raise InputError(f"{where}: context is a text, got {json.dumps(row['context'], default=str)[:_SHOWN]}")
    correct, texts = str(row["correct"]).strip(), [str(one).strip() for one in wrong]
    if not texts or not all([correct, *texts]):
        raise InputError(f"{where}: no distractor, or an empty answer: a question needs one wrong answer at least")
    if correct in texts:
        raise InputError(f"{where}: the correct answer {correct[:_SHOWN]!r} is among its distractors")
    return Item(row["context"], correct, tuple(texts))


def binarised(item: Item, seed: int, task: str) -> Question:
    """A question with one of its distractors, in one of the two orders; both follow from the seed and the context."""
    rng = stream(seed, "distractor", task, item.context, item.correct)
    wrong = item.distractors[int(rng.integers(len(item.distractors)))]
    label = int(rng.integers(2))
    return Question(item.context, (item.correct, wrong) if label == 0 else (wrong, item.correct), label)


def build_task(
    name: str,
    family: str,
    train: Sequence[Item],
    test: Sequence[Item] | None,
    *,
    num_train: int,
    num_test: int,
    seed: int,
    delimiter: str = " ",
) -> Task:
    """A task of at most so many questions.

    Args:
        name, family: what it is called.
        train: its training questions, or all its questions where `test` is None.
        test: its test questions; None: `num_test` questions are held out, but no more than half.
        num_train, num_test: the most questions of each part, drawn with the seed.
        seed: of distractors, orders, the split and the draw.
        delimiter: see `Task`.

    Raises:
        InputError: no training questions, no test question that the training part lacks, or one class only.
    """
    if test is None:
        train, test = _split(train, num_test, seed, name)
    if not train:
        raise InputError(f"{name}: no training question is left: give more questions, or a smaller num_test")
    # the draw comes first: what is not trained on may be tested
    chosen = [binarised(item, seed, name) for item in _drawn(train, num_train, seed, name, "train")]
    known = {question.key for question in chosen}
    fresh: dict[str, Question] = {}
    overlap = 0
    for item in test:
        question = binarised(item, seed, name)
        overlap += question.key in known
        if question.key not in known:
            fresh.setdefault(question.key, question)
    if not fresh:
        raise InputError(
            f"{name}: all {len(test)} test questions are in the training part, too: give others, or a smaller num_train"
        )
    kept = _drawn(list(fresh.values()), num_test, seed, name, "test")
    for part, questions in (("training", chosen), ("test", kept)):
        _check_classes(name, part, questions)
    return Task(name, family, tuple(chosen), tuple(kept), overlap, len(test) - overlap - len(fresh), delimiter)


def _split(items: Sequence[Item], num_test: int, seed: int, name: str) -> tuple[list[Item], list[Item]]:
    """Questions of one context stay together."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(_key(item.context, (item.correct, *item.distractors)), []).append(item)
    order = stream(seed, "split", name).permutation(len(groups))
    keys = list(groups)
    held_out = [keys[int(at)] for at in order[: min(num_test, len(groups) // 2)]]
    out = set(held_out)
    return [one for key, group in groups.items() if key not in out for one in group], [
        one for key in held_out for one in groups[key]
    ]


def _drawn(items: Sequence[Any], count: int, seed: int, name: str, part: str) -> list[Any]:
    if len(items) <= count:
        return list(items)
    order = stream(seed, "draw", name, part).permutation(len(items))[:count]
    return [items[int(at)] for at in sorted(order)]


def _check_classes(name: str, part: str, questions: Sequence[Question]) -> None:
    """A task that one fixed answer solves measures nothing."""
    right = {question.answers[question.label] for question in questions}
    if len(right) == 1 and len(questions) > 1:
        raise InputError(
            f"{name}: the correct answer of all {len(questions)} {part} questions is {right.pop()[:_SHOWN]!r}: one "
            "class only, which can be neither learned nor forgotten"
        )


def shared_questions(tasks: Mapping[str, Task]) -> dict[tuple[str, str], int]:
    """How many test questions of a task another one trains on, by (task, other), where there are any."""
    trained = {name: {question.key for question in task.train} for name, task in tasks.items()}
    counts = {
        (name, other): sum(question.key in trained[other] for question in task.test)
        for name, task in tasks.items()
        for other in tasks
        if other != name
    }
    return {pair: count for pair, count in counts.items() if count}


def relabelled(questions: Sequence[Question], labels: str, count: int, seed: int, task: str) -> list[Question]:
    """`count` of the questions (all, where there are fewer) with other labels.

    Args:
        questions: with their true labels.
        labels: "random": a fair coin for each question; "flipped": the wrong answer of each; "true".
        count: drawn with the seed.
        seed: of the draw and of the coin.
        task: its name, a part of the seed.
    """
    chosen = _drawn(questions, count, seed, task, f"labels {count}")
    if labels == TRUE:
        return chosen
    if labels == FLIPPED:
        return [replace(question, label=1 - question.label) for question in chosen]
    coins = stream(seed, "labels", task, count).integers(2, size=len(chosen))
    return [replace(question, label=int(coin)) for question, coin in zip(chosen, coins, strict=True)]
