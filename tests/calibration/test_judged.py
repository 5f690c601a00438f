"""h from samples with both rewards: unbiased by enumeration, right where it is known, and honest about its error."""

from __future__ import annotations

from itertools import pairwise, permutations, product

import numpy as np
import pytest
from scipy import integrate, stats

from infalign import BestOfN, KthOfN, RandomN, TopOfN, WorstOfN
from infalign.calibration.judged import estimate_h, judged_values, rank_means
from infalign.theory import gold_optimal
from infalign.types import InputError

ATOMS = [(0.0, 2.0, 0.3), (1.0, 0.0, 0.2), (1.0, 3.0, 0.1), (2.0, 1.0, 0.4)]  # proxy, gold, chance: two of them tie


def worth(gold, procedure):
    """P(a sample with that gold beats the base's decoded one), by the definition of decoding: ties at random."""
    total = 0.0
    for component in procedure.components:
        for drawn in product(ATOMS, repeat=component.n):
            chance = component.probability * np.prod([one[2] for one in drawn])
            for order in (sorted_orders := list(permutations(drawn))):
                if all(low[0] <= high[0] for low, high in pairwise(order)):
                    tied = sum(all(low[0] <= high[0] for low, high in pairwise(other)) for other in sorted_orders)
                    for rank, weight in component.picks:
                        rival = order[rank - 1][1]
                        total += chance * weight / tied * ((gold > rival) + 0.5 * (gold == rival))
    return total


PROCEDURES = [BestOfN(1), BestOfN(2), WorstOfN(2), KthOfN(2, 3), RandomN([0.3, 0.7]), TopOfN(2, 3)]


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_a_judged_value_is_unbiased(procedure):
    """The mean over all rivals that can be drawn, one more than the procedure needs, ties of the proxy included."""
    gold_A = np.array([one[1] for one in ATOMS])
    mean_A = np.zeros(len(ATOMS))
    for rivals in product(ATOMS, repeat=procedure.n + 1):
        proxy_B, gold_B, chances = (np.array(column) for column in zip(*rivals, strict=True))
        mean_A += chances.prod() * judged_values(gold_A, proxy_B, gold_B, procedure)
    np.testing.assert_allclose(mean_A, [worth(gold, procedure) for gold in gold_A], atol=1e-12)


class AllOrders:
    """In place of a generator: every permutation in turn."""

    def permutation(self, count):
        if not hasattr(self, "orders"):
            self.orders = iter(list(permutations(range(count))))
        return np.array(next(self.orders))


def test_the_mean_by_rank_is_unbiased():
    """Two of four are ranked: E[value | rank k] = E[h of the k-th of two], a tie's values shared; over all tables."""
    procedure, found = BestOfN(2), np.zeros(2)
    for table in product(ATOMS, repeat=4):
        proxy_K, gold_K, chances = (np.array(column) for column in zip(*table, strict=True))
        found += chances.prod() * rank_means(proxy_K, gold_K, procedure, 24, AllOrders())[2]
    expected = np.zeros(2)
    for one, other in product(ATOMS, repeat=2):
        low, high = sorted((one, other), key=lambda atom: atom[0])
        values = np.array([worth(low[1], procedure), worth(high[1], procedure)])
        expected += one[2] * other[2] * (values.mean() if low[0] == high[0] else values)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def half_blind(rng, prompts, count):
    """Gold is the proxy's quantile in half of the samples and noise in the others."""
    proxy, noise = rng.random((prompts, count)), rng.random((prompts, count))
    return proxy, np.where(rng.random((prompts, count)) < 0.5, proxy, noise)


def half_blind_h(u, n):
    """Best-of-n: gold of the decoded is V ~ Beta(n, 1) or uniform, and so is ours u or uniform, with even odds."""
    return 0.5 * (0.5 * u**n + 0.5 * u) + 0.5 * (0.5 / (n + 1) + 0.5 / 2)


@pytest.mark.parametrize(("shape", "tolerance"), [("smooth", 0.04), ("monotone", 0.06)])
@pytest.mark.parametrize("count", [11, 16, 64])
def test_it_finds_a_known_curve(shape, tolerance, count):
    found = estimate_h(*half_blind(np.random.default_rng(0), 8000 // count, count), BestOfN(4), shape=shape, levels=50)
    middle = (np.arange(50) + 0.5) / 50
    error = np.abs(found.h_J - half_blind_h(middle, 4))
    assert np.all(error < 5 * found.error_J + 0.01) and error.max() < tolerance
    assert found.prompts == 8000 // count and found.samples == found.prompts * count
    assert (shape == "smooth") == (found.degree is not None)
    if shape == "monotone":
        assert np.all(np.diff(found.h_J) >= 0)


def test_free_is_the_blurred_curve():
    """Rank k of 8 says Beta(k, 9 - k): the mean of h over that, not h at the rank."""
    found = estimate_h(*half_blind(np.random.default_rng(1), 800, 16), BestOfN(4), shape="free", levels=8)
    blurred = [
        integrate.quad(lambda u, k=k: half_blind_h(u, 4) * stats.beta(k, 9 - k).pdf(u), 0, 1)[0] for k in range(1, 9)
    ]
    assert np.all(np.abs(found.h_J - blurred) < 5 * found.error_J)
    assert found.h_J[-1] < half_blind_h(15 / 16, 4) - 5 * found.error_J[-1]


def test_a_hacked_top_and_noise():
    rng = np.random.default_rng(2)
    proxy = rng.random((300, 32))
    # above .85 the better by the proxy, the worse by gold: h is u^4 + 1 - .85^4 below (.89 at .8), and 1 - u^4 above
    found = estimate_h(proxy, np.where(proxy < 0.85, proxy, -proxy), BestOfN(4), levels=100)
    assert found.h_J[80] > 0.7 and found.h_J[-1] < 0.2 and found.degree > 2
    best = gold_optimal(BestOfN(4), found.h_J, kl=0.5)
    assert best(0.8) > best(0.99) and best.win_rate > gold_optimal(BestOfN(4), found.h_J, beta=1e6).win_rate
    noise = estimate_h(proxy, rng.random((300, 32)), BestOfN(4), levels=100)
    assert noise.degree == 0 and np.abs(noise.h_J - 0.5).max() < 5 * noise.error_J.max()


def test_increasing_maps_change_nothing_and_missing_scores_are_left_out():
    rng = np.random.default_rng(3)
    proxy, gold = half_blind(rng, 40, 12)
    plain = estimate_h(proxy, gold, BestOfN(3), levels=10)
    mapped = estimate_h(np.exp(3 * proxy), gold**3 - 7, BestOfN(3), levels=10)
    np.testing.assert_array_equal(plain.h_J, mapped.h_J)
    np.testing.assert_array_equal(plain.error_J, mapped.error_J)
    padded = [np.append(row, [np.nan, 9.0]) for row in proxy], [np.append(row, [9.0, np.nan]) for row in gold]
    np.testing.assert_array_equal(plain.h_J, estimate_h(*padded, BestOfN(3), levels=10).h_J)


@pytest.mark.parametrize("shape", ["smooth", "monotone", "free"])
def test_few_samples_and_ragged_rows(shape):
    rng = np.random.default_rng(4)
    rows = [rng.random(count) for count in (5, 6, 8, 9, 5, 17)]
    found = estimate_h(rows, rows, BestOfN(4), shape=shape)
    assert np.isfinite(found.h_J).all() and np.isfinite(found.error_J).all() and found.samples == 50
    least = estimate_h([rng.random(5)] * 30, [rng.random(5)] * 30, BestOfN(4), shape=shape)
    assert np.ptp(least.h_J) == pytest.approx(0, abs=1e-12)  # one is ranked, among itself
    single = estimate_h([rng.random(16)], [rng.random(16)], BestOfN(4), shape=shape)
    assert np.isfinite(single.h_J).all() and np.isnan(single.error_J).all()
    tied = estimate_h(np.ones((5, 8)), rng.random((5, 8)), BestOfN(2), shape=shape)
    assert np.ptp(tied.h_J) == pytest.approx(0, abs=1e-9)


def test_the_error_is_that_of_repetition():
    """Against the spread over 60 tables; of the free shape, which chooses no degree."""
    rng, runs = np.random.default_rng(5), []
    for _ in range(60):
        runs.append(estimate_h(*half_blind(rng, 40, 16), BestOfN(2), shape="free", levels=8, splits=2))
    spread_J = np.std([one.h_J for one in runs], axis=0, ddof=1)
    told_J = np.mean([one.error_J for one in runs], axis=0)
    # a standard deviation of 60 is known to 1/sqrt(120) = 9 %
    np.testing.assert_allclose(told_J / spread_J, 1, atol=0.4)
    assert (told_J / spread_J).mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("proxy", "gold", "changes", "message"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], {}, r"BestOfN\(2\) needs 3 samples a prompt with both rewards; prompt 0 has 2"),
        ([[1, 2, 3]], [[1, 2, np.nan]], {}, "prompt 0 has 2: draw more samples or use a smaller n"),
        ([[1, 2, 3]], [[1, 2]], {}, "prompt 0 has 3 proxy and 2 gold rewards"),
        ([[1, 2, 3]], [], {}, "give both rewards of one prompt or more; got 1 and 0 prompts"),
        ([], [], {}, "give both rewards of one prompt or more; got 0 and 0 prompts"),
        ([[1, 2, np.inf]], [[1, 2, 3]], {}, "prompt 0 has an infinite reward"),
        ([[1, 2, 3]], [[1, 2, 3]], {"shape": "round"}, "shape must be one of smooth, monotone, free; got 'round'"),
        ([[1, 2, 3]], [[1, 2, 3]], {"levels": 0}, "levels must be a whole number >= 1; got 0"),
        ([[1, 2, 3]], [[1, 2, 3]], {"splits": 1.5}, "splits must be a whole number >= 1; got 1.5"),
    ],
)
def test_mistakes(proxy, gold, changes, message):
    with pytest.raises(InputError, match=message):
        estimate_h(proxy, gold, BestOfN(2), **changes)
