"""Train, validation and test prompts: disjoint by key, the same whatever the order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from infalign.types import InputError, Prompt


@dataclass(frozen=True)
class Splits:
    """Three disjoint tuples of prompts; `removed_from_train` counts test prompts that the train pool had too."""

    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    removed_from_train: int = 0

    def keys(self) -> dict[str, list[str]]:
        """The prompt keys per split, for the manifest."""
        return {name: [prompt.key for prompt in getattr(self, name)] for name in ("train", "validation", "test")}


def split_prompts(
    train_pool: Sequence[Prompt],
    test_pool: Sequence[Prompt] | None = None,
    *,
    num_train: int | None,
    num_validation: int,
    num_test: int,
    seed: int,
) -> Splits:
    """Choose prompts by the order of hash(seed, key).

    Test prompts come first in that order (from `test_pool`, or from the train pool when there is none) and are taken
    out of the train pool; validation prompts follow; train prompts are taken from the other end, so that asking for
    more of one split leaves the prompts already in it where they are.

    Args:
        train_pool: P prompts, repeated keys allowed (the first counts).
        test_pool: prompts of another split or file, or None.
        num_train: how many; None takes all that are left.
        num_validation: how many, from the train pool.
        num_test: how many.
        seed: any integer.

    Raises:
        InputError: a negative number, no train prompts asked for, or too few distinct prompts.
    """
    _check_counts(num_train, num_validation, num_test)
    train = _ordered(train_pool, seed)
    source = train if test_pool is None else _ordered(test_pool, seed)
    if len(source) < num_test:
        raise InputError(
            f"asked for {num_test} test prompts, the data for them has {len(source)} distinct; lower num_test_prompts"
        )
    test = source[:num_test]
    taken = {prompt.key for prompt in test}
    rest = [prompt for prompt in train if prompt.key not in taken]
    wanted = max(num_train or 0, 1) + num_validation
    removed = 0 if test_pool is None else len(train) - len(rest)
    if len(rest) < wanted:
        raise InputError(_too_few(num_train, num_validation, num_test, len(train), removed))
    end = num_validation if num_train is None else len(rest) - num_train
    return Splits(tuple(rest[end:][::-1]), tuple(rest[:num_validation]), tuple(test), removed)


def _check_counts(num_train: int | None, num_validation: int, num_test: int) -> None:
    for name, count, least in (
        ("num_train", num_train, 1),
        ("num_validation", num_validation, 0),
        ("num_test", num_test, 0),
    ):
        if count is not None and count < least:
            raise InputError(f"{name} must be at least {least}, got {count}")


def _ordered(pool: Sequence[Prompt], seed: int) -> list[Prompt]:
    first: dict[str, Prompt] = {}
    for prompt in pool:
        first.setdefault(prompt.key, prompt)
    ranks = {key: hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest() for key in first}
    return [first[key] for key in sorted(first, key=ranks.__getitem__)]


def _too_few(num_train: int | None, num_validation: int, num_test: int, distinct: int, taken: int) -> str:
    numbers = {"train": num_train or "some", "validation": num_validation, "test": num_test}
    asked = " + ".join(f"{number} {name}" for name, number in numbers.items() if number)
    where = f", {taken} of them test prompts" if taken else ""
    return f"asked for {asked} prompts, the data has {distinct} distinct{where}; ask for fewer"
