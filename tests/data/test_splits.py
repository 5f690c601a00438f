"""Splits: disjoint, deterministic, stable under more prompts."""

from __future__ import annotations

import random

import pytest

from infalign.data.prompts import numbered
from infalign.data.splits import split_prompts
from infalign.types import InputError, Prompt


def pool(*texts: str) -> list[Prompt]:
    return list(numbered((text, {}) for text in texts))


POOL = pool(*(f"prompt {i}" for i in range(30)))


def split(train=POOL, test=None, num_train=10, num_validation=4, num_test=5, seed=0):
    return split_prompts(train, test, num_train=num_train, num_validation=num_validation, num_test=num_test, seed=seed)


def test_sizes_and_disjointness():
    keys = split().keys()
    assert {name: len(found) for name, found in keys.items()} == {"train": 10, "validation": 4, "test": 5}
    assert len({key for found in keys.values() for key in found}) == 19


def test_row_order_does_not_matter_the_seed_does():
    shuffled = random.Random(1).sample(POOL, len(POOL))
    assert split(shuffled).keys() == split().keys()
    assert split(seed=1).keys() != split().keys()


def test_asking_for_more_keeps_what_was_there():
    small, more = split().keys(), split(num_train=14, num_test=5).keys()
    assert more["train"][:10] == small["train"] and more["test"] == small["test"]
    assert split(num_test=9).keys()["test"][:5] == small["test"]
    assert split(num_test=9).keys()["train"] == small["train"]


def test_none_takes_all_the_rest():
    assert len(split(num_train=None).train) == 30 - 4 - 5


def test_test_prompts_leave_train_and_are_counted():
    test = pool("PROMPT  1", "prompt 2", "other")
    found = split(test=test, num_train=None, num_validation=0, num_test=3)
    assert {prompt.key for prompt in found.test} == {prompt.key for prompt in test}
    assert len(found.train) == 28 and found.removed_from_train == 2
    assert not {p.group for p in found.train} & {p.group for p in found.test}


def test_near_copies_stay_on_one_side_and_count_as_rows():
    texts = [variant for i in range(12) for variant in (f"Prompt {i}", f"prompt  {i}", f"prompt {i}")]
    found = split(pool(*texts), num_train=9, num_validation=6, num_test=6)
    sides = [{prompt.group for prompt in part} for part in (found.train, found.validation, found.test)]
    assert [len(part) for part in (found.train, found.validation, found.test)] == [9, 6, 6] and found.left_out == 0
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    everything = split(pool(*texts), num_train=None, num_validation=6, num_test=6)
    assert len(everything.train) == 36 - 12  # every row is in a split


def test_a_count_that_cuts_a_group_leaves_its_rest_out():
    texts = [variant for i in range(12) for variant in (f"Prompt {i}", f"prompt {i}")]
    found = split(pool(*texts), num_train=7, num_validation=0, num_test=3)
    assert (len(found.train), len(found.test), found.left_out) == (7, 3, 2)
    more = split(pool(*texts), num_train=8, num_validation=0, num_test=4)
    assert more.test[:3] == found.test and more.train[:7] == found.train and more.left_out == 0


def test_the_same_pool_twice_is_like_one_pool():
    assert split(test=POOL).keys() == split().keys()
    assert split().removed_from_train == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": POOL[:12], "num_validation": 0},
            r"asked for 10 train \+ 5 test prompts, the data has 12; ask",
        ),
        ({"train": POOL[:5], "num_train": None}, r"asked for some train \+ 4 validation \+ 5 test prompts"),
        ({"test": POOL[:2]}, "asked for 5 test prompts, the data for them has 2"),
        ({"train": POOL[:12], "test": POOL[:5]}, "the data has 12, 5 of them test prompts"),
        (
            {"train": pool(*["a", "A", "a "] * 10)},
            r"the data has 30 \(of 1 distinct texts: near copies stay on one side",
        ),
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
        ({"num_validation": -1}, "num_validation must be at least 0, got -1"),
    ],
)
def test_too_few(options, message):
    with pytest.raises(InputError, match=message):
        split(**options)
