"""Train, validation and test prompts: near copies on one side only, the same whatever the order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from infalign.types import InputError, Prompt


@dataclass(frozen=True)
class Splits:
    """Three tuples of prompts that share no group (`types.group_key`).

    `removed_from_train` counts prompts of the train pool that went because a test prompt is theirs or a near copy;
    `left_out` those whose group was cut by a count that was asked for (its other prompts are in a split).
    """

    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    removed_from_train: int = 0
    left_out: int = 0

    def keys(self) -> dict[str, list[str]]:
        """The prompt keys per split, for the manifest."""
        return {name: [prompt.key for prompt in getattr(self, name)] for name in ("train", "validation", "test")}


Group = tuple[Prompt, ...]
"""Prompts of one normalised text, in the order of the data."""


def split_prompts(
    train_pool: Sequence[Prompt],
    test_pool: Sequence[Prompt] | None = None,
    *,
    num_train: int | None,
    num_validation: int,
    num_test: int,
    seed: int,
) -> Splits:
    """Choose prompts by the order of hash(seed, group).

    Test prompts come first in that order (from `test_pool`, or from the train pool when there is none) and their groups
    are taken out of the train pool; validation prompts follow; train prompts are taken from the other end, so that
    asking for more of one split leaves the prompts already in it where they are.

    Args:
        train_pool: P prompts.
        test_pool: prompts of another split or file, or None.
        num_train: how many; None takes all that are left.
        num_validation: how many, from the train pool.
        num_test: how many.
        seed: any integer.

    Raises:
        InputError: a negative number, no train prompts asked for, or too few prompts.
    """
    _check_counts(num_train, num_validation, num_test)
    train = _ordered(train_pool, seed)
    source = train if test_pool is None else _ordered(test_pool, seed)
    test, cut_test = _take(source, num_test)
    if len(test) < num_test:
        raise InputError(
            f"asked for {num_test} test prompts, the data for them has {len(test)}; lower num_test_prompts"
        )
    taken = {prompt.group for prompt in test}
    rest = [group for group in train if group[0].group not in taken]
    validation, cut_validation = _take(rest, num_validation)
    taken = {prompt.group for prompt in validation}
    others = [group for group in rest if group[0].group not in taken]
    left = sum(map(len, others))
    # of `others`, reversed: more train prompts are added behind those that are there
    chosen, cut_train = _take(others[::-1], left if num_train is None else num_train)
    total, kept = sum(map(len, train)), sum(map(len, rest))
    removed = 0 if test_pool is None else total - kept
    if len(validation) < num_validation or len(chosen) < max(num_train or 0, 1):
        raise InputError(_too_few(num_train, num_validation, num_test, train, removed))
    cut = (cut_test if test_pool is None else 0) + cut_validation + cut_train
    return Splits(chosen, validation, test, removed, cut)


def _take(groups: Sequence[Group], count: int) -> tuple[tuple[Prompt, ...], int]:
    """The first `count` prompts, and how many of the last one's group are left behind."""
    taken: list[Prompt] = []
    for group in groups:
        if len(taken) >= count:
            break
        taken += group
    return tuple(taken[:count]), max(0, len(taken) - count)


def _check_counts(num_train: int | None, num_validation: int, num_test: int) -> None:
    for name, count, least in (
        ("num_train", num_train, 1),
        ("num_validation", num_validation, 0),
        ("num_test", num_test, 0),
    ):
        if count is not None and count < least:
            raise InputError(f"{name} must be at least {least}, got {count}")


def _ordered(pool: Sequence[Prompt], seed: int) -> list[Group]:
    groups: dict[str, list[Prompt]] = {}
    for prompt in pool:
        groups.setdefault(prompt.group, []).append(prompt)
    ranks = {name: hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest() for name in groups}
    return [tuple(groups[name]) for name in sorted(groups, key=ranks.__getitem__)]


def _too_few(num_train: int | None, num_validation: int, num_test: int, groups: Sequence[Group], taken: int) -> str:
    numbers = {"train": num_train or "some", "validation": num_validation, "test": num_test}
    wanted = " + ".join(f"{number} {name}" for name, number in numbers.items() if number)
    total = sum(map(len, groups))
    copies = (
        f" (of {len(groups)} distinct texts: near copies stay on one side of a split)" if len(groups) < total else ""
    )
    where = f", {taken} of them test prompts or copies of one" if taken else ""
    return f"asked for {wanted} prompts, the data has {total}{copies}{where}; ask for fewer"
