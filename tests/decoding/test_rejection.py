"""Rejection sampling has the law and the cost of its formula, and its threshold is in the base's quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from infalign import calibrate
from infalign.decoding.rejection import Rejection
from infalign.types import InputError
from tests.decoding.toys import Levels, prompts, run

BASE = [0] * 4 + [1] * 3 + [2] * 2 + [3]
"""Rewards of the base: levels 0 to 3 have the mid-rank quantiles .2, .55, .8 and .95."""
POLICY = (0.3, 0.3, 0.25, 0.15)
MANY = prompts(1500)


def test_the_decoded_law_is_the_formulas():
    """q 1[u >= phi]/(1 - Q(phi)) if one of n = 3 is accepted (a = .4), else the best of 3 among levels 0 and 1."""
    strategy = Rejection(3, 0.7, references={one.key: BASE for one in MANY})
    found = run(strategy, Levels(POLICY), given=MANY)
    counts = np.bincount([int(one.text) for one in found], minlength=4)
    none = 0.6**3
    expected = np.array([none / 8, none * 7 / 8, (1 - none) * 0.25 / 0.4, (1 - none) * 0.15 / 0.4])
    assert stats.chisquare(counts, expected * len(MANY)).pvalue > 1e-3
    drawn = np.array([one.spent.candidates for one in found])
    assert drawn.mean() == pytest.approx(1 + 0.6 + 0.36, abs=4 * drawn.std() / np.sqrt(len(MANY)))


def test_a_long_search_is_the_unbounded_law():
    strategy = Rejection(60, 0.7, references={one.key: BASE for one in MANY})
    counts = np.bincount([int(one.text) for one in run(strategy, Levels(POLICY), given=MANY, tokens=4000)])
    assert counts[:2].sum() == 0
    assert stats.chisquare(counts[2:], np.array([0.625, 0.375]) * len(MANY)).pvalue > 1e-3


def test_drawing_several_at_once_changes_the_cost_and_not_the_choice():
    given, references = prompts(200), {one.key: BASE for one in prompts(200)}
    one_by_one = run(Rejection(7, 0.7, references=references), Levels(POLICY), given=given)
    in_threes = run(Rejection(7, 0.7, at_once=3, references=references), Levels(POLICY), given=given)
    for single, triple in zip(one_by_one, in_threes, strict=True):
        assert single.chosen == triple.chosen and single.text == triple.text
        assert triple.spent.candidates == min(7, 3 * -(-single.spent.candidates // 3))


def test_references_of_a_new_prompt_are_drawn_from_the_base():
    """By hand from the two streams: quantiles among the base's five samples, never the policy's."""
    base, policy, given = Levels((0.6, 0.3, 0.1, 0.0), "base"), Levels(POLICY), prompts(60)
    found = run(Rejection(4, 0.9, num_references=5), policy, given=given, reference=base)
    for one in found:
        references = [base.level(one.prompt.key, index) for index in range(5)]
        levels = [policy.level(one.prompt.key, index) for index in range(4)]
        reached = [sum(r < x for r in references) + sum(r == x for r in references) / 2 >= 4.5 for x in levels]
        drawn = reached.index(True) + 1 if any(reached) else 4
        assert one.spent.candidates == len(one.candidates) == drawn
        assert float(one.text) == (levels[drawn - 1] if any(reached) else max(levels))
        assert one.spent.references == 5 and one.spent.reward_calls == 5 + drawn
        assert one.spent.tokens == one.spent.scored_tokens == 15 + drawn * (drawn + 1) // 2  # sample i has i + 1 tokens


def test_unscored_candidates_are_drawn_over():
    def partly(_, samples):
        return np.array([np.nan if sample.index < 2 else float(sample.text) for sample in samples])

    (one,) = run(Rejection(3, 0.01, references={prompts(1)[0].key: BASE}), Levels(POLICY), partly, given=prompts(1))
    assert one.chosen == 2
    (none,) = run(Rejection(2, 0.01, references={prompts(1)[0].key: BASE}), Levels(POLICY), partly, given=prompts(1))
    assert none.chosen is None and none.text is None


def test_the_threshold_is_the_calibrated_reward():
    assert calibrate([[0, 1, 2, 3]], [BASE])[0].tolist() == pytest.approx([0.2, 0.55, 0.8, 0.95])
    accepted = Rejection(1, 0.55, references={one.key: BASE for one in MANY[:50]})
    higher = Rejection(2, 0.56, references={one.key: BASE for one in MANY[:50]})
    for low, high in zip(
        run(accepted, Levels(POLICY), given=MANY[:50]), run(higher, Levels(POLICY), given=MANY[:50]), strict=True
    ):
        assert high.spent.candidates == (1 if float(low.text) >= 2 else 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5), "n must be a whole number >= 1; got 0"),
        ((4, 0.0), "threshold must be a number above 0 and at most 1; got 0"),
        ((4, 1.5), "threshold must be"),
        ((4, True), "threshold must be"),
        ((4, 0.5, -1), "num_references must be a whole number >= 0"),
        ((4, 0.5, 8, 0), "at_once must be a whole number >= 1"),
        ((2.5, 0.5), "n must be a whole number"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        Rejection(*arguments)


def test_a_prompt_without_base_rewards_is_refused():
    with pytest.raises(InputError, match=r"needs base rewards, and the prompt 'prompt \d+' has none"):
        run(Rejection(2, 0.5, num_references=0), Levels(POLICY))
    with pytest.raises(InputError, match="decode needs reference, a sampler of the base"):
        run(Rejection(2, 0.5), Levels(POLICY))
    with pytest.raises(InputError, match="look at the reward"):
        run(Rejection(2, 0.5), Levels(POLICY), lambda _, s: np.full(len(s), np.nan), reference=Levels(POLICY))
