"""Win rates against brute force over all subsets, and intervals against simulation."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from infalign import BestOfN, BottomOfN, KthOfN, PessimisticOfN, RandomN, SoftBestOfN, TopOfN, WorstOfN, win_rate
from infalign.evaluation.winrate import bootstrap_interval, difference, judged_win_rate, summarise
from infalign.types import InputError

PROCEDURES = [BestOfN(1), BestOfN(3), WorstOfN(2), KthOfN(2, 3), RandomN([0.5, 0.0, 0.5]), SoftBestOfN(3, 2.0)]
PROCEDURES += [TopOfN(2, 3), BottomOfN(2, 4), PessimisticOfN(4, 0.1)]


def by_subsets(ours, theirs, procedure):
    """Average over all subsets of both sides of the decoded comparison."""

    def decoded(values):
        found = []
        for component in procedure.components:
            subsets = list(combinations(sorted(values), component.n))
            for subset in subsets:
                for rank, weight in component.picks:
                    found.append((subset[rank - 1], component.probability * weight / len(subsets)))
        return found

    return sum(a * b * ((y > z) + 0.5 * (y == z)) for (y, a), (z, b) in product(decoded(ours), decoded(theirs)))


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_it_equals_all_subsets_ties_included(procedure):
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 5, (4, 6)).astype(float), rng.integers(0, 4, (4, 5)).astype(float)
    expected = [by_subsets(a, b, procedure) for a, b in zip(ours, theirs, strict=True)]
    found = win_rate(ours, theirs, procedure)
    np.testing.assert_allclose(found.per_prompt, expected, atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_sides_swap_to_one(procedure):
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 5, (3, 6)), rng.integers(0, 5, (3, 6))
    assert win_rate(ours, theirs, procedure).mean + win_rate(theirs, ours, procedure).mean == pytest.approx(1.0)
    assert win_rate(ours, ours, procedure).mean == pytest.approx(0.5)


def test_it_is_unbiased():
    """Best-of-3 of a normal shifted by 1: the mean over many small tables is the integral."""
    rng = np.random.default_rng(2)
    found = win_rate(rng.normal(1, 1, (20000, 4)), rng.normal(0, 1, (20000, 5)), BestOfN(3))
    grid = np.linspace(-8, 9, 200001)
    density = 3 * stats.norm.cdf(grid, 1) ** 2 * stats.norm.pdf(grid, 1)
    exact = np.trapezoid(density * stats.norm.cdf(grid) ** 3, grid)
    assert found.mean == pytest.approx(exact, abs=4 * found.per_prompt.std() / np.sqrt(20000))


def test_order_of_samples_and_scale_do_not_matter():
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(size=(5, 8)), rng.normal(size=(5, 8))
    found = win_rate(ours, theirs, BestOfN(4)).per_prompt
    np.testing.assert_allclose(win_rate(ours[:, ::-1], theirs[:, ::-1], BestOfN(4)).per_prompt, found)
    np.testing.assert_allclose(win_rate(np.exp(ours), np.exp(theirs), BestOfN(4)).per_prompt, found)


def test_ragged_and_unscored():
    with_gaps = win_rate([[1.0, np.nan, 3.0], [2.0, 1.0]], [[0.0, 2.0], [1.0, np.nan, 1.0, 5.0]], BestOfN(2))
    without = win_rate([[1.0, 3.0], [2.0, 1.0]], [[0.0, 2.0], [1.0, 1.0, 5.0]], BestOfN(2))
    np.testing.assert_array_equal(with_gaps.per_prompt, without.per_prompt)


class TestJudged:
    def test_gold_equal_to_proxy_is_the_plain_win_rate(self):
        rng = np.random.default_rng(4)
        ours, theirs = rng.integers(0, 4, (5, 7)).astype(float), rng.integers(0, 4, (5, 6)).astype(float)
        plain = win_rate(ours, theirs, BestOfN(3))
        np.testing.assert_allclose(
            judged_win_rate((ours, ours), (theirs, theirs), BestOfN(3)).per_prompt, plain.per_prompt
        )

    def test_it_equals_decoding_all_subsets_by_the_proxy(self):
        proxy, gold = np.array([1.0, 2.0, 2.0, 0.0]), np.array([5.0, 1.0, 3.0, 9.0])
        base_proxy, base_gold = np.array([0.0, 1.0, 1.0]), np.array([2.0, 4.0, 3.0])

        def decoded(scores, judged):
            found = []
            for pair in combinations(range(len(scores)), 2):
                best = max(scores[i] for i in pair)
                tied = [judged[i] for i in pair if scores[i] == best]
                found += [(value, 1 / len(tied)) for value in tied]
            total = sum(weight for _, weight in found)
            return [(value, weight / total) for value, weight in found]

        expected = sum(
            a * b * ((y > z) + 0.5 * (y == z))
            for (y, a), (z, b) in product(decoded(proxy, gold), decoded(base_proxy, base_gold))
        )
        found = judged_win_rate(([proxy], [gold]), ([base_proxy], [base_gold]), BestOfN(2))
        assert found.mean == pytest.approx(expected)


class TestIntervals:
    def test_coverage(self):
        """95 % +- 2 over 2,000 simulated evaluations: 100 prompts of unequal difficulty, M = 8, Best-of-4."""
        rng = np.random.default_rng(5)
        shifts = rng.normal(0.4, 0.5, 200_000)
        weights = BestOfN(4).order_weights(8)

        def values(shift):
            ours = np.sort(rng.normal(shift[:, None], 1, (shift.size, 8)), 1)
            theirs = np.sort(rng.normal(0, 1, (shift.size, 8)), 1)
            return np.einsum("i,j,pij->p", weights, weights, (ours[:, :, None] > theirs[:, None, :]).astype(float))

        per_prompt = values(shifts)
        truth = np.concatenate([per_prompt, values(rng.normal(0.4, 0.5, 400_000))]).mean()
        intervals = [bootstrap_interval(row, seed=number) for number, row in enumerate(per_prompt.reshape(2000, 100))]
        coverage = np.mean([low <= truth <= high for low, high in intervals])
        print(f"coverage {coverage:.4f}")
        assert abs(coverage - 0.95) <= 0.02

    def test_the_simulated_values_are_win_rates(self):
        rng = np.random.default_rng(6)
        ours, theirs = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
        weights = BestOfN(4).order_weights(8)
        expected = [
            sum(weights[i] * weights[j] * (a[i] > b[j]) for i in range(8) for j in range(8))
            for a, b in zip(np.sort(ours, 1), np.sort(theirs, 1), strict=True)
        ]
        np.testing.assert_allclose(win_rate(ours, theirs, BestOfN(4)).per_prompt, expected)

    def test_wider_confidence_is_wider(self):
        values = np.random.default_rng(7).beta(2, 1, 40)
        (a, b), (c, d) = bootstrap_interval(values, 0.99), bootstrap_interval(values, 0.8)
        assert a < c < values.mean() < d < b

    def test_degenerate(self):
        assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)
        assert np.isnan(bootstrap_interval(np.array([0.3]))).all()
        assert summarise(np.array([1.0, 1.0, 0.9])).high <= 1.0

    def test_paired_difference(self):
        rng = np.random.default_rng(8)
        shared = rng.beta(3, 2, 60)
        first, second = summarise(np.clip(shared + 0.05, 0, 1)), summarise(shared)
        gap, low, high = difference(first, second)
        assert gap == pytest.approx(first.mean - second.mean) and low > 0 and high - low < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], [[1.0, 2.0]], BestOfN(2)), "needs 2 scored samples a prompt; policy prompt 0 has 1"),
        (([[1.0, 2.0]], [[1.0, np.nan]], BestOfN(2)), "base prompt 0 has 1: draw more samples"),
        (([[1.0]], [[1.0], [1.0]], BestOfN(1)), "must have the same prompts, got 1 and 2"),
        (([[np.inf]], [[1.0]], BestOfN(1)), "policy prompt 0 has an infinite reward"),
        (([], [], BestOfN(1)), "there are no prompts"),
        (([[1.0]], [[1.0]], BestOfN(1), 1.5), "confidence must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        win_rate(*arguments)
