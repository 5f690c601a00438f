"""The vote, counted by hand; and answers that mean the same."""

from __future__ import annotations

import numpy as np
import pytest

from infalign.decoding.answers import extractor, normal_form
from infalign.decoding.majority_vote import MajorityVote
from infalign.types import InputError
from tests.decoding.toys import Told, prompts, run

TEXTS = ["7", r"so \boxed{12}", "the answer is 12.0", "3 + 4 = 7", "seven", "#### 1,000", "1000 cows"]


def chosen(texts, rewards, **options):
    def score(_, samples):
        return np.array([rewards[sample.index] for sample in samples], dtype=float)

    return run(MajorityVote(len(texts), **options), Told(texts), score, given=prompts(1))[0].chosen


@pytest.mark.parametrize(
    ("rewards", "place", "why"),
    [
        ([0, 0, 0, 0, 9, 0, 0], 0, "7, 12 and 1000 have two votes each and equal means: the first answer, first voter"),
        ([0, 0, 0, 0, 9, 1, 0], 5, "1000 has the higher mean, its best voter is place 5"),
        ([0, 2, 3, 4, 9, 0, 0], 2, "12 has mean 2.5 and 7 has 2"),
        ([0, np.nan, 3, 4, 9, 0, 0], 2, "a vote without a score counts as a vote; 12's mean is 3"),
    ],
)
def test_equal_votes_go_to_the_higher_mean_reward(rewards, place, why):
    assert chosen(TEXTS, rewards) == place, why


def test_the_majority_wins_against_every_reward():
    assert chosen(["5", "6", "5", "6", "5"], [0, 9, 1, 9, 0.5]) == 2
    assert chosen(["5", "6", "5", "6", "5"], [np.nan] * 5) == 0


def test_weights_are_rewards():
    """6 has 1.8 in two votes, 5 has 1.2 in three; unscored candidates have no vote."""
    texts, rewards = ["5", "6", "5", "6", "5"], [0.4, 0.9, 0.5, 0.9, 0.3]
    assert chosen(texts, rewards) == 2
    assert chosen(texts, rewards, weighted=True) == 1
    assert chosen(texts, [0.4, np.nan, 0.5, 0.8, np.nan], weighted=True) == 2


def test_without_any_answer_the_best_reward_decides():
    assert chosen(["none", "no", "nothing"], [0, 2, 1]) == 1
    assert chosen(["none", "no"], [np.nan, np.nan]) is None
    assert chosen(["1", "2"], [np.nan, np.nan], weighted=True) is None


def test_ones_own_extractor_votes():
    given = MajorityVote(3, "mine", extract=lambda text: text[0] if text else None)
    assert run(given, Told(["b1", "a1", "a2"]), lambda _, s: np.arange(3.0), given=prompts(1))[0].text == "a2"


@pytest.mark.parametrize(
    ("spec", "text", "answer"),
    [
        ("boxed", r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{3} and an open \boxed{4", "3"),
        ("boxed", "3", None),
        ("hashes", "work\n#### 42 ", "42"),
        ("hashes", "42", None),
        ("number", "3 of 1,234.5 and -.5", "-.5"),
        ("number", "none", None),
        ("marked", "12 #### 13", "13"),
        ("marked", r"#### 13 \boxed{14} 15", "14"),
        ("marked", "12 and 13", "13"),
        ("text", " Yes ", " Yes "),
        ("text", "  ", None),
        (r"answer: (\w+)", "answer: a, answer: b", "b"),
        (r"[abc]\)", "a) or b)", "b)"),
    ],
)
def test_extraction(spec, text, answer):
    assert extractor(spec)(text) == answer


@pytest.mark.parametrize(
    "same",
    [
        ("1000", "1,000", "1000.00", " $1000 ", "1e3", "+1000."),
        ("0", "-0.0", "0.000"),
        ("New York", " new  YORK."),
        ("0.5", ".5", "5e-1"),
    ],
)
def test_answers_that_mean_the_same(same):
    assert len({normal_form(one) for one in same}) == 1


def test_answers_that_do_not():
    different = ["1", "-1", "10", "1.01", "one", "1 1", "1e999", "1e998"]
    assert len({normal_form(one) for one in different}) == len(different)


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"answer '\(' is neither one of marked, boxed"):
        MajorityVote(4, "(")
    with pytest.raises(InputError, match="n must be a whole number >= 1"):
        MajorityVote(0)
    with pytest.raises(InputError, match="weighted must be true or false; got 1"):
        MajorityVote(4, weighted=1)
    with pytest.raises(InputError, match=r"needs rewards >= 0 .*; got -2"):
        chosen(["1", "1"], [1, -2], weighted=True)
