"""The laws of a procedure, against brute force over subsets, numerical derivatives and simulation."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from infalign.theory.procedures import (
    BUILT_IN,
    BestOfN,
    BottomOfN,
    Component,
    KthOfN,
    PessimisticOfN,
    Procedure,
    RandomN,
    SoftBestOfN,
    TopOfN,
    WorstOfN,
    check_procedure,
)
from infalign.types import InputError

PROCEDURES = [
    BestOfN(1),
    BestOfN(4),
    WorstOfN(4),
    KthOfN(2, 4),
    KthOfN(3, 5),
    RandomN([0.2, 0.0, 0.5, 0.3]),
    RandomN([0.0, 1.0]),
    SoftBestOfN(5, 3.0),
    SoftBestOfN(5, -3.0),
    SoftBestOfN(5, 0.0),
    TopOfN(2, 4),
    TopOfN(5, 5),
    BottomOfN(3, 5),
    PessimisticOfN(5, 0.02),
    PessimisticOfN(5, 0.2),
    PessimisticOfN(4, 2.0),
    Procedure((Component(0.25, 2, ((1, 0.5), (2, 0.5))), Component(0.75, 3, ((2, 0.4), (1, 0.6))))),
]
GRID = np.concatenate([[0.0, 1e-9, 1e-3], np.linspace(0.05, 0.95, 19), [1 - 1e-3, 1 - 1e-9, 1.0]])


def rank_mixture_density(procedure: Procedure, p: np.ndarray) -> np.ndarray:
    """g by its definition: the mixture of Beta densities."""
    total = np.zeros_like(p)
    for component in procedure.components:
        for rank, weight in enumerate(component.weights, start=1):
            total += component.probability * weight * stats.beta(rank, component.n - rank + 1).pdf(p)
    return total


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_density_and_cdf_are_the_beta_mixture(procedure: Procedure) -> None:
    np.testing.assert_allclose(procedure.density(GRID), rank_mixture_density(procedure, GRID), rtol=1e-11, atol=1e-12)
    expected = np.zeros_like(GRID)
    for component in procedure.components:
        for rank, weight in enumerate(component.weights, start=1):
            expected += component.probability * weight * stats.beta(rank, component.n - rank + 1).cdf(GRID)
    np.testing.assert_allclose(procedure.cdf(GRID), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_slopes_are_derivatives(procedure: Procedure) -> None:
    p, h = np.linspace(0.02, 0.98, 49), 1e-5
    numeric = (procedure.cdf(p + h) - procedure.cdf(p - h)) / (2 * h)
    np.testing.assert_allclose(procedure.density(p), numeric, atol=1e-7)
    numeric = (procedure.density(p + h) - procedure.density(p - h)) / (2 * h)
    np.testing.assert_allclose(procedure.slope(p), numeric, atol=1e-6)


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_mirror_and_ends(procedure: Procedure) -> None:
    np.testing.assert_allclose(procedure.mirror.cdf(1 - GRID), 1 - procedure.cdf(GRID), atol=1e-13)
    np.testing.assert_allclose(procedure.mirror.density(1 - GRID), procedure.density(GRID), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(procedure.cdf([0.0, 1.0]), [0.0, 1.0], atol=1e-15)


def test_closed_forms() -> None:
    p = np.linspace(0, 1, 11)
    np.testing.assert_allclose(BestOfN(4).cdf(p), p**4, rtol=1e-14)
    np.testing.assert_allclose(WorstOfN(4).cdf(p), 1 - (1 - p) ** 4, rtol=1e-13, atol=1e-16)
    pmf = [0.2, 0.0, 0.5, 0.3]
    np.testing.assert_allclose(RandomN(pmf).cdf(p), sum(w * p ** (j + 1) for j, w in enumerate(pmf)), rtol=1e-14)
    s, n = 3.0, 5
    expected = ((1 + p * (np.exp(s / n) - 1)) ** n - 1) / (np.exp(s) - 1)
    np.testing.assert_allclose(SoftBestOfN(n, s).cdf(p), expected, rtol=1e-13, atol=1e-16)
    limit = (np.exp(s * p) - 1) / (np.exp(s) - 1)
    np.testing.assert_allclose(SoftBestOfN(100_000, s).cdf(p), limit, atol=3e-5)
    assert np.abs(SoftBestOfN(5, s).cdf(p) - limit).max() > 0.01


@pytest.mark.parametrize("n", [64, 1024])
def test_accuracy_at_large_n(n: int) -> None:
    p = [Fraction(1, 10**6), Fraction(1, 2), Fraction(n - 1, n), 1 - Fraction(1, 10**6)]
    for value in p:
        at = float(value)
        exact = Fraction(at)
        assert BestOfN(n).cdf(at) == pytest.approx(float(exact**n), rel=1e-11)
        assert WorstOfN(n).cdf(at) == pytest.approx(float(1 - (1 - exact) ** n), rel=1e-11)
        k = 20
        upper = sum(comb(n, j) * exact**j * (1 - exact) ** (n - j) for j in range(n - k + 1, n + 1))
        assert KthOfN(k, n).cdf(at) == pytest.approx(float(upper), rel=1e-9, abs=1e-300)
    assert WorstOfN(n).cdf(1e-20) == pytest.approx(n * 1e-20, rel=1e-12)


def brute_order_weights(procedure: Procedure, m: int) -> list[float]:
    """Exact chances over all subsets of m ranked samples."""
    chances = [Fraction(0)] * m
    for component in procedure.components:
        subsets = list(combinations(range(m), component.n))
        for subset in subsets:
            for rank, weight in component.picks:
                share = Fraction(component.probability) * Fraction(weight) / len(subsets)
                chances[subset[rank - 1]] += share
    total = sum(chances)
    return [float(chance / total) for chance in chances]


@pytest.mark.parametrize("m", [5, 6, 9])
@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_order_weights_by_brute_force(procedure: Procedure, m: int) -> None:
    weights_m = procedure.order_weights(m)
    np.testing.assert_allclose(weights_m, brute_order_weights(procedure, m), rtol=1e-12, atol=1e-15)
    assert weights_m.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("m", [5, 12])
@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_order_weights_are_unbiased(procedure: Procedure, m: int) -> None:
    betas = [stats.beta(i, m - i + 1).pdf(GRID) for i in range(1, m + 1)]
    estimate = sum(a * b for a, b in zip(procedure.order_weights(m), betas, strict=True))
    np.testing.assert_allclose(estimate, procedure.density(GRID), rtol=1e-10, atol=1e-11)


def test_order_weights_at_n_are_the_weights() -> None:
    for procedure in (BestOfN(7), WorstOfN(7), KthOfN(3, 7), SoftBestOfN(7, 2.5)):
        np.testing.assert_allclose(procedure.order_weights(7), procedure.components[0].weights, rtol=1e-12)


def test_order_weights_for_thousands() -> None:
    weights_m = BestOfN(1000).order_weights(4000)
    ratios = [Fraction(1000, 4000)]
    for i in range(4000, 3990, -1):  # a_{i-1}/a_i = (i - n)/(i - 1)
        ratios.append(ratios[-1] * Fraction(i - 1000, i - 1))
    np.testing.assert_allclose(weights_m[::-1][:11], [float(r) for r in ratios], rtol=1e-9)
    assert WorstOfN(3000).order_weights(5000).sum() == pytest.approx(1, abs=1e-12)


def test_equality_repr_and_names() -> None:
    assert KthOfN(1, 4) == BestOfN(4) and hash(KthOfN(1, 4)) == hash(BestOfN(4))
    assert KthOfN(4, 4) == WorstOfN(4) != BestOfN(4)
    assert WorstOfN(1) == BestOfN(1)
    assert repr(BestOfN(4)) == "BestOfN(4)" and BestOfN(4).name == "best_of_n"
    assert repr(KthOfN(2, 4)) == "KthOfN(2, 4)" and repr(RandomN([0.5, 0.5])) == "RandomN([0.5, 0.5])"
    assert set(BUILT_IN) == {"best_of_n", "worst_of_n", "kth_of_n", "random_n", "soft_best_of_n"} | {
        "top_of_n", "bottom_of_n", "pessimistic_of_n",
    }  # fmt: skip
    assert BUILT_IN["soft_best_of_n"](n=3, tilt=1.0) == SoftBestOfN(3, 1.0)
    assert all(BUILT_IN[p.name] for p in PROCEDURES[:-1])
    assert pickle.loads(pickle.dumps(KthOfN(2, 4))) == KthOfN(2, 4)
    assert RandomN([0.2, 0.0, 0.8]).n == 3
    assert TopOfN(1, 4) == BestOfN(4) and BottomOfN(1, 4) == WorstOfN(4) and not TopOfN(1, 4).is_random
    assert PessimisticOfN(4, 0.03) == BestOfN(4) != PessimisticOfN(4, 0.04)  # from sqrt(2 beta) = 1/4 down
    assert PessimisticOfN(1, 0.2) == PessimisticOfN(1, 7) == BestOfN(1) and PessimisticOfN(2, 1e-300) == BestOfN(2)
    assert repr(TopOfN(2, 4)) == "TopOfN(2, 4)" and repr(PessimisticOfN(4, 0.1)) == "PessimisticOfN(4, 0.1)"
    assert BUILT_IN["top_of_n"](n=4, k=2) == BottomOfN(2, 4).mirror == TopOfN(2, 4).mirror.mirror


@pytest.mark.parametrize(
    ("procedure", "expected"),
    [
        (BestOfN(1), "constant"),
        (SoftBestOfN(6, 0.0), "constant"),
        (BestOfN(4), "increasing"),
        (RandomN([0.5, 0.5]), "increasing"),
        (SoftBestOfN(6, 2.0), "increasing"),
        (WorstOfN(1024), "decreasing"),
        (SoftBestOfN(6, -2.0), "decreasing"),
        (KthOfN(2, 4), "neither"),
        (TopOfN(2, 4), "increasing"),
        (TopOfN(300, 300), "constant"),
        (BottomOfN(512, 1024), "decreasing"),
        (PessimisticOfN(1024, 0.3), "increasing"),
        (PessimisticOfN(1024, 300.0), "increasing"),
    ],
    ids=repr,
)
def test_monotone(procedure: Procedure, expected: str) -> None:
    assert procedure.monotone == expected


def test_select_without_ties() -> None:
    scores_PN = [[0.3, 0.1, 0.9, 0.5], [4.0, 3.0, 2.0, 1.0]]
    assert BestOfN(4).select(scores_PN).tolist() == [2, 0]
    assert WorstOfN(4).select(scores_PN).tolist() == [1, 3]
    assert KthOfN(2, 4).select(scores_PN).tolist() == [3, 1]
    assert BestOfN(2).select([[-np.inf, np.inf], [np.inf, -np.inf]]).tolist() == [1, 0]


def test_select_breaks_ties_by_first_index_or_uniformly() -> None:
    scores_PN = np.tile([1.0, 2.0, 2.0, 0.0], (30_000, 1))
    assert BestOfN(4).select(scores_PN[:1]).tolist() == [1]
    counts = np.bincount(BestOfN(4).select(scores_PN, np.random.default_rng(0)), minlength=4) / 30_000
    np.testing.assert_allclose(counts, [0, 0.5, 0.5, 0], atol=0.012)


def test_select_never_chooses_nan() -> None:
    nan = np.nan
    scores_PN = [[nan, 3.0, nan, 1.0], [2.0, nan, nan, nan]]
    assert BestOfN(4).select(scores_PN).tolist() == [1, 0]
    assert WorstOfN(4).select(scores_PN).tolist() == [3, 0]
    # second best of 4 is rank 3 of 4: of two scored ones rank ceil(3 * 2 / 4) = 2, of one rank 1
    assert KthOfN(2, 4).select(scores_PN).tolist() == [1, 0]
    assert KthOfN(3, 4).select(scores_PN).tolist() == [3, 0]


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_select_frequencies_are_the_weights(procedure: Procedure) -> None:
    rows, n, rng = 60_000, procedure.n, np.random.default_rng(1)
    scores_PN = rng.random((rows, n))
    chosen_P = procedure.select(scores_PN, rng)
    rank_P = (scores_PN < scores_PN[np.arange(rows), chosen_P][:, None]).sum(1)
    counts = np.bincount(rank_P, minlength=n) / rows
    np.testing.assert_allclose(counts, procedure.order_weights(n), atol=0.009)


def test_random_n_uses_the_first_candidates() -> None:
    procedure, rng = RandomN([0.5, 0.0, 0.5]), np.random.default_rng(2)
    chosen_P = procedure.select(np.tile([1.0, 5.0, 2.0], (20_000, 1)), rng)
    np.testing.assert_allclose(np.bincount(chosen_P, minlength=3) / 20_000, [0.5, 0.5, 0], atol=0.015)
    nan_row = np.tile([np.nan, 5.0, 2.0], (100, 1))
    assert not np.any(procedure.select(nan_row, rng) == 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestOfN(0), "n must be a whole number >= 1; got 0"),
        (lambda: BestOfN(True), "n must be a whole number"),
        (lambda: WorstOfN(2.5), "n must be a whole number"),
        (lambda: KthOfN(5, 4), "k must be at most n"),
        (lambda: KthOfN(0, 4), "k must be a whole number"),
        (lambda: TopOfN(5, 4), "k must be at most n, the number of candidates; got k=5, n=4"),
        (lambda: BottomOfN(5, 4), "k must be at most n"),
        (lambda: TopOfN(1.5, 4), "k must be a whole number >= 1; got 1.5"),
        (lambda: BottomOfN(2, 0), "n must be a whole number"),
        (lambda: PessimisticOfN(4, 0.0), r"beta must be a finite number > 0 \(small: BestOfN.*; got 0.0"),
        (lambda: PessimisticOfN(4, float("inf")), "beta must be a finite number > 0"),
        (lambda: PessimisticOfN(4, float("nan")), "beta must be a finite number > 0"),
        (lambda: PessimisticOfN(4, "0.1"), "beta must be a finite number > 0 .*; got '0.1'"),
        (lambda: PessimisticOfN(0, 0.1), "n must be a whole number"),
        (lambda: RandomN([]), "pmf must be probabilities"),
        (lambda: RandomN([0.5, 0.6]), "pmf must be probabilities"),
        (lambda: RandomN([1.5, -0.5]), "pmf must be probabilities"),
        (lambda: RandomN([float("nan"), 1.0]), "pmf must be probabilities"),
        (lambda: SoftBestOfN(4, float("inf")), "tilt must be a number within"),
        (lambda: SoftBestOfN(4, float("nan")), "tilt must be a number within"),
        (lambda: Procedure(()), "must sum to 1"),
        (lambda: Procedure((Component(0.5, 2, ((1, 1.0),)),)), "must sum to 1"),
        (lambda: Procedure((Component(1.0, 2, ((3, 1.0),)),)), "ranks in 1..n"),
        (lambda: Procedure((Component(1.0, 2, ((1, 0.4),)),)), "weights must sum to 1"),
        (lambda: Procedure((Component(1.0, 2, ((1, 0.4), (1, 0.6))),)), "lists a rank twice"),
        (lambda: check_procedure("best_of_n"), "procedure must be a Procedure"),
        (lambda: BestOfN(4).order_weights(3), "needs at least 4 samples"),
        (lambda: BestOfN(4).order_weights(4.0), "m must be a whole number"),
        (lambda: BestOfN(4).density(1.1), r"p must lie in \[0, 1\]"),
        (lambda: BestOfN(4).cdf([0.5, float("nan")]), r"p must lie in \[0, 1\]"),
        (lambda: BestOfN(4).select([[1.0, 2.0]]), r"selects among \(P, 4\) scores"),
        (lambda: BestOfN(2).select([1.0, 2.0]), r"selects among \(P, 2\) scores"),
        (lambda: BestOfN(2).select([[1.0, 2.0], [np.nan, np.nan]]), "row 1 has no scored candidate"),
        (lambda: SoftBestOfN(2, 1.0).select([[1.0, 2.0]]), "select needs rng"),
        (lambda: RandomN([0.5, 0.5]).select([[1.0, 2.0]]), "select needs rng"),
    ],
)
def test_mistakes(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=message):
        make()


def test_limits() -> None:
    p = np.linspace(0, 1, 21)
    plains = [BestOfN(1), WorstOfN(1), SoftBestOfN(6, 0.0), SoftBestOfN(1, 3.0), TopOfN(6, 6), BottomOfN(6, 6)]
    for plain in [*plains, PessimisticOfN(6, 1e300), PessimisticOfN(1, 0.3)]:
        np.testing.assert_allclose(plain.cdf(p), p, atol=1e-15)
    np.testing.assert_allclose(SoftBestOfN(6, 1e-9).cdf(p), p, atol=1e-9)
    np.testing.assert_allclose(SoftBestOfN(4, 400.0).cdf(p), p**4, atol=1e-14)
    np.testing.assert_allclose(SoftBestOfN(4, -400.0).cdf(p), 1 - (1 - p) ** 4, atol=1e-14)


@pytest.mark.parametrize(("k", "n"), [(2, 3), (3, 8), (8, 8), (40, 64), (100, 1024), (1000, 1024)])
def test_one_of_k_is_the_mean_of_its_ranks(k: int, n: int) -> None:
    """What the closed form sums up, term by term: the k-th bests of n, all as likely."""
    for procedure, ranks in ((TopOfN(k, n), range(1, k + 1)), (BottomOfN(k, n), range(n - k + 1, n + 1))):
        singles = [KthOfN(one, n) for one in ranks]
        for law, scale in (("cdf", 1.0), ("density", n / k)):
            expected = sum(getattr(one, law)(GRID) for one in singles) / k
            np.testing.assert_allclose(getattr(procedure, law)(GRID), expected, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("n", [3, 64])
@pytest.mark.parametrize("make", [lambda n: TopOfN(2, n), lambda n: PessimisticOfN(n, 0.1)])
def test_straight_lines_of_ranks_are_exact_in_the_tails(n: int, make: Callable[[int], Procedure]) -> None:
    """G by its definition in rational numbers, from either side: relative to itself where it is small."""
    procedure = make(n)
    for p in (1e-9, 1e-3, 0.3, 0.7, 0.999):
        exact, rising, falling = Fraction(p), Fraction(0), Fraction(0)
        weights = [Fraction(float(w)) for w in procedure.components[0].weights]
        for drawn in range(1, n + 1):
            chance = comb(n, drawn) * exact**drawn * (1 - exact) ** (n - drawn)
            rising += chance * sum(weights[:drawn])
            falling += chance * sum(weights[::-1][:drawn])
        assert procedure.cdf(p) == pytest.approx(float(rising), rel=1e-11, abs=1e-300)
        assert procedure.mirror.cdf(p) == pytest.approx(float(falling), rel=1e-11)


def pessimistic_limit(beta: float) -> Callable[[float], float]:
    """f(u) = relu((u - lam)/beta) with the lam that makes its integral one, by a root find."""

    def excess(lam: float) -> float:
        top, start = (1 - lam) / beta, max(-lam / beta, 0.0)
        return (top + start) / 2 * (1 - max(lam, 0.0)) - 1  # a triangle or a trapezium

    lam = optimize.brentq(excess, -1e4, 1.0, xtol=1e-15)
    return lambda u: max((u - lam) / beta, 0.0)


@pytest.mark.parametrize("beta", [1e-4, 0.05, 0.3, 0.5, 0.7, 20.0])
def test_pessimistic_weights_are_the_mass_in_their_cells(beta: float) -> None:
    limit = pessimistic_limit(beta)
    for n in (1, 2, 7):
        cells = [integrate.quad(limit, r / n, (r + 1) / n, limit=500)[0] for r in range(n)]
        np.testing.assert_allclose(PessimisticOfN(n, beta).components[0].weights, cells, atol=1e-9)


@pytest.mark.parametrize("beta", [0.02, 0.3, 0.5, 3.0])
def test_pessimistic_tends_to_its_law(beta: float) -> None:
    """f rises by at most 1/beta: its Kantorovich polynomial errs by E|cell - u|/beta < (1/sqrt(n) + 1/n)/beta."""
    u = np.linspace(0, 1, 101)
    limit = np.vectorize(pessimistic_limit(beta))(u)
    errors = []
    for n in (64, 1024, 16384):
        errors.append(np.abs(PessimisticOfN(n, beta).density(u) - limit).max())
        assert errors[-1] <= (1 / np.sqrt(n) + 1 / n) / beta
    assert errors[2] < errors[1] / 3 < errors[0] / 9


def test_pessimistic_lies_between_its_limits() -> None:
    p = np.linspace(0, 1, 21)
    np.testing.assert_allclose(PessimisticOfN(6, 1e6).cdf(p), p, atol=1e-6)
    np.testing.assert_array_equal(PessimisticOfN(6, 1e-9).cdf(p), BestOfN(6).cdf(p))
    by_beta = np.array([PessimisticOfN(6, beta).cdf(p) for beta in np.geomspace(1e-3, 1e3, 40)])
    assert np.all(np.diff(by_beta, axis=0) >= -1e-15)  # the less pessimistic, the nearer to the best
    around = [PessimisticOfN(6, 0.5 + step).cdf(p) for step in (-1e-12, 0.0, 1e-12)]
    np.testing.assert_allclose(around, [around[1]] * 3, atol=1e-11)
