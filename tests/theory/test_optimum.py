"""The optimal transformation: reference numbers, exact identities, an independent solver, and nobody beats it."""

from __future__ import annotations

import math
import pickle
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from infalign.theory import exponential, frontier, identity, log, normal_icdf, optimum, tilt
from infalign.theory.bvp import solve_general
from infalign.theory.optimum import optimal_transform, win_rate_limit
from infalign.theory.procedures import BestOfN, KthOfN, Procedure, RandomN, SoftBestOfN, WorstOfN
from infalign.types import InputError

GENERAL = [
    KthOfN(2, 3),
    KthOfN(2, 4),
    KthOfN(3, 4),
    KthOfN(8, 16),
    KthOfN(2, 32),
    RandomN([0.5, 0.5]),
    RandomN([0.1, 0.2, 0.3, 0.0, 0.4]),
    SoftBestOfN(8, 4.0),
    SoftBestOfN(8, -4.0),
    SoftBestOfN(32, 30.0),
]
EXTREMES = [make(n) for make in (BestOfN, WorstOfN) for n in (2, 3, 4, 8, 32, 128, 1024)]
U = np.linspace(0, 1, 401)


def test_reference_numbers() -> None:
    best, worst = optimal_transform(BestOfN(4), beta=0.2), optimal_transform(WorstOfN(4), beta=0.2)
    assert (best.kl, best.win_rate) == (pytest.approx(0.53516269, abs=6e-9), pytest.approx(0.88056945, abs=6e-9))
    assert (worst.kl, worst.win_rate) == (pytest.approx(0.51031426, abs=6e-9), pytest.approx(0.95, abs=6e-9))
    assert 1 / optimal_transform(BestOfN(2), kl=1.0).beta == pytest.approx(8.86829, abs=6e-6)
    assert 1 / optimal_transform(BestOfN(4), kl=1.0).beta == pytest.approx(12.04099, abs=6e-6)
    assert optimal_transform(BestOfN(2), kl=1.0).win_rate == pytest.approx(0.896946, abs=6e-7)
    assert optimal_transform(WorstOfN(2), kl=1.0).win_rate == pytest.approx(0.948620, abs=6e-7)
    assert optimal_transform(WorstOfN(4), kl=1.0).win_rate == pytest.approx(0.992948, abs=6e-7)


def scaled_solution(n: int, worst: bool, beta: float) -> Callable[[float], float]:
    """Q by R'' = +-(yR)^{N-1} R' and a root find in kappa, straight from the equation."""
    sign = -1.0 if worst else 1.0

    def rates(y: float, state: np.ndarray) -> list[float]:
        return [state[1], sign * (y * state[0]) ** (n - 1) * state[1]]

    def solve(kappa: float) -> Callable[[float], np.ndarray]:
        found = integrate.solve_ivp(
            rates, (0, kappa), [0.0, 1.0], method="Radau", rtol=1e-9, atol=1e-11, dense_output=True
        )
        return found.sol

    def excess(kappa: float) -> float:
        return math.log(kappa**n * solve(kappa)(kappa)[0] ** (n - 1) * beta / n**2)

    kappa = optimize.brentq(excess, 0.3, 1.9 if not worst else 4.0, xtol=1e-11)
    r = solve(kappa)
    if worst:
        return lambda u: 1 - float(r(kappa * (1 - u))[0] / r(kappa)[0])
    return lambda u: float(r(kappa * u)[0] / r(kappa)[0])


@pytest.mark.parametrize(("n", "worst", "beta"), [(2, False, 0.5), (4, False, 2.0), (2, True, 0.5), (4, True, 1.0)])
def test_policy_against_the_second_order_equation(n: int, worst: bool, beta: float) -> None:
    exact = scaled_solution(n, worst, beta)
    ours = optimal_transform((WorstOfN if worst else BestOfN)(n), beta=beta)
    np.testing.assert_allclose(ours.cdf(U), [exact(u) for u in U], atol=2e-7)


def check_claims(best: optimum.OptimalTransform, procedure: Procedure) -> None:
    """q = exp(Phi/beta)/Z, KL and W by independent quadrature on the curve."""
    edges = np.unique(
        np.concatenate([np.linspace(0, 1, 400), 10.0 ** -np.linspace(0, 9, 200), 1 - 10.0 ** -np.linspace(0, 9, 200)])
    )
    x, w = np.polynomial.legendre.leggauss(8)
    width = np.diff(edges)[:, None]
    u, weight = edges[:-1, None] + width * (1 + x) / 2, width * w / 2
    exponent = (best(u) - best(1.0)) / best.beta
    z = float((np.exp(exponent) * weight).sum())
    q = np.exp(exponent) / z
    seen = exponent > -30
    np.testing.assert_allclose(best.density(u)[seen], q[seen], rtol=2e-6)
    kl = float((q * (np.maximum(exponent, -1e6) - math.log(z)) * weight).sum())
    assert best.kl == pytest.approx(kl, rel=1e-6, abs=1e-7)
    win_rate = 1 - float((procedure.density(u) * procedure.cdf(best.cdf(u)) * weight).sum())
    assert best.win_rate == pytest.approx(win_rate, abs=1e-7)


@pytest.mark.parametrize("procedure", [BestOfN(2), BestOfN(8), WorstOfN(2), WorstOfN(8), *GENERAL], ids=repr)
@pytest.mark.parametrize("beta", [0.01, 0.2, 3.0])
def test_curve_density_kl_and_win_rate_agree(procedure: Procedure, beta: float) -> None:
    best = optimal_transform(procedure, beta=beta)
    check_claims(best, procedure)
    slope = procedure.density(U[1:-1]) * procedure.density(best.cdf(U[1:-1]))
    h = 1e-5
    numeric = (best(U[1:-1] + h) - best(U[1:-1] - h)) / (2 * h)
    np.testing.assert_allclose(numeric, slope, atol=1e-3 * slope.max())
    assert best(0.0) == pytest.approx(0, abs=1e-12) and np.all(np.diff(best(U)) >= -1e-13)
    np.testing.assert_allclose(best.cdf([0.0, 1.0]), [0, 1], atol=1e-12)


@pytest.mark.parametrize("procedure", [BestOfN(1), *EXTREMES], ids=repr)
@pytest.mark.parametrize("beta", [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])
def test_converges_over_all_beta(procedure: Procedure, beta: float) -> None:
    best = optimal_transform(procedure, beta=beta)
    n = procedure.n
    assert best.residual < 1e-7
    assert best.beta == pytest.approx(beta, rel=1e-12)
    if procedure == WorstOfN(n) and n > 1:
        q = float(best.density(0.0))
        assert best.win_rate == pytest.approx(1 - beta / n * (1 - q), abs=1e-9)
        if q > 1e-300:
            assert best.kl == pytest.approx(n * best.win_rate / beta + math.log(q), abs=1e-6, rel=1e-8)
    elif n > 1:
        q = float(best.density(1.0))
        assert best.win_rate == pytest.approx(beta / n * (q - 1), rel=1e-7)
        excess = n / beta * (1 - best.win_rate)
        assert best.kl == pytest.approx(math.log1p(n * best.win_rate / beta) - excess, abs=1e-7)


@pytest.mark.parametrize("procedure", [BestOfN(1), *EXTREMES], ids=repr)
@pytest.mark.parametrize("kl", [0.001, 0.01, 0.1, 1.0, 5.0])
def test_converges_over_all_kl(procedure: Procedure, kl: float) -> None:
    best = optimal_transform(procedure, kl=kl)
    assert best.residual < 1e-7
    assert best.kl == pytest.approx(kl, rel=1e-8)
    assert 0.5 < best.win_rate <= 1
    if best.log_beta > -15:
        again = optimal_transform(procedure, beta=best.beta)
        assert (again.kl, again.win_rate) == (pytest.approx(kl, rel=1e-7), pytest.approx(best.win_rate, abs=1e-10))


def test_worst_of_1024_at_five_nats_underflows_beta_but_not_the_policy() -> None:
    best = optimal_transform(WorstOfN(1024), kl=5.0)
    assert best.beta == 0.0 and best.log_beta < -5000
    assert best.win_rate == pytest.approx(1, abs=1e-12)
    grid = np.linspace(0, 1, 200_001)
    q = best.density(grid)
    assert np.trapezoid(q, grid) == pytest.approx(1, abs=1e-3)
    assert np.trapezoid(q * np.log(np.maximum(q, 1e-300)), grid) == pytest.approx(5, abs=0.02)


@pytest.mark.parametrize("procedure", GENERAL, ids=repr)
@pytest.mark.parametrize(
    "given", [{"beta": 1e-3}, {"beta": 0.1}, {"beta": 100.0}, {"kl": 0.001}, {"kl": 1.0}, {"kl": 5.0}]
)
def test_general_solver_converges(procedure: Procedure, given: dict[str, float]) -> None:
    best = optimal_transform(procedure, **given)
    assert best.residual < 1e-7
    if "kl" in given:
        assert best.kl == pytest.approx(given["kl"], rel=1e-7)


@pytest.mark.parametrize("procedure", [BestOfN(2), BestOfN(8), BestOfN(32), WorstOfN(2), WorstOfN(8)], ids=repr)
@pytest.mark.parametrize(("beta", "kl"), [(0.2, None), (1e-2, None), (None, 0.01), (None, 1.0)])
def test_the_two_solvers_agree(procedure: Procedure, beta: float | None, kl: float | None) -> None:
    exact = optimal_transform(procedure, beta, kl)
    general = solve_general(procedure, None if beta is None else math.log(beta), kl)
    assert general.win_rate == pytest.approx(exact.win_rate, abs=1e-9)
    assert general.kl == pytest.approx(exact.kl, rel=1e-8)
    np.testing.assert_allclose(general.cdf(U), exact.cdf(U), atol=3e-9)
    np.testing.assert_allclose(general.phi(U), exact(U), atol=5e-9 * float(exact(1.0)))


@pytest.mark.parametrize(
    "procedure", [BestOfN(1), BestOfN(4), WorstOfN(4), KthOfN(2, 4), RandomN([0.5, 0.5])], ids=repr
)
@pytest.mark.parametrize("kl", [0.05, 0.5, 2.0])
def test_slope_of_the_frontier_is_beta(procedure: Procedure, kl: float) -> None:
    h = 1e-4 * kl
    numeric = (win_rate_limit(procedure, kl + h) - win_rate_limit(procedure, kl - h)) / (2 * h)
    assert numeric == pytest.approx(optimal_transform(procedure, kl=kl).beta, rel=1e-4)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_small_kl_limit(n: int) -> None:
    for procedure, shape in ((BestOfN(n), U ** (2 * n - 1)), (WorstOfN(n), 1 - (1 - U) ** (2 * n - 1))):
        best = optimal_transform(procedure, kl=1e-9)
        np.testing.assert_allclose(best(U) / best(1.0), shape, atol=1e-3)


@pytest.mark.parametrize(
    "procedure", [BestOfN(1), BestOfN(2), BestOfN(4), BestOfN(32), WorstOfN(2), WorstOfN(8), *GENERAL], ids=repr
)
@pytest.mark.parametrize("kl", [0.05, 1.0, 3.0])
def test_never_beaten_at_equal_kl(procedure: Procedure, kl: float) -> None:
    limit = win_rate_limit(procedure, kl)
    rivals = [identity, log, normal_icdf, *(exponential(t) for t in (5, 10, 17, -5, -10))]
    for rival in rivals:
        assert tilt(rival, kl=kl).win_rate(procedure) <= limit + 1e-9
    best = optimal_transform(procedure, kl=kl)
    if best.beta > 1e-6:
        again = tilt(best, kl=kl)
        assert again.win_rate(procedure) == pytest.approx(limit, abs=1e-8)
        assert again.beta == pytest.approx(best.beta, rel=1e-5)


@pytest.mark.parametrize("procedure", [BestOfN(3), WorstOfN(3), KthOfN(2, 3), SoftBestOfN(4, -2.0)], ids=repr)
def test_perturbations_never_gain(procedure: Procedure) -> None:
    best = optimal_transform(procedure, beta=0.1)
    value = best.win_rate - best.beta * best.kl
    for shape in (np.square, np.sin, lambda u: u > 0.7, lambda u: -u, lambda u: np.cos(9 * u)):
        for size in (0.01, 0.3):
            other = tilt(lambda u, f=shape, s=size: best(u) + s * f(u), beta=0.1)
            assert other.win_rate(procedure) - 0.1 * other.kl <= value + 1e-9


@pytest.mark.parametrize(("soft", "limit"), [(-500.0, WorstOfN(32)), (500.0, BestOfN(32))], ids=repr)
@pytest.mark.parametrize("kl", [0.5, 1.0, 3.0, 5.0])
def test_a_strong_tilt_is_nearly_the_exact_extreme(soft: float, limit: Procedure, kl: float) -> None:
    near, exact = optimal_transform(SoftBestOfN(32, soft), kl=kl), optimal_transform(limit, kl=kl)
    np.testing.assert_allclose(near.cdf(U), exact.cdf(U), atol=1e-6)
    assert near.log_beta == pytest.approx(exact.log_beta, abs=2e-3)
    assert near.residual < 1e-7


def test_a_large_kl_where_newton_may_lose_beta() -> None:
    near, exact = optimal_transform(SoftBestOfN(12, 500.0), kl=12.0), optimal_transform(BestOfN(12), kl=12.0)
    assert near.residual < 1e-7 and near.log_beta == pytest.approx(exact.log_beta, abs=1e-3)


def test_identity_for_plain_sampling() -> None:
    for procedure in (BestOfN(1), WorstOfN(1), RandomN([1.0]), SoftBestOfN(5, 0.0)):
        for beta in (1e-3, 0.2, 100.0):
            best, exact = optimal_transform(procedure, beta=beta), tilt(identity, beta=beta)
            np.testing.assert_allclose(best(U), U, atol=1e-12)
            assert (best.kl, best.win_rate) == (pytest.approx(exact.kl), pytest.approx(exact.win_rate(procedure)))
            np.testing.assert_allclose(best.cdf(U), exact.cdf(U), atol=1e-10)
    nearly, plain = optimal_transform(SoftBestOfN(5, 1e-6), kl=0.5), optimal_transform(BestOfN(1), kl=0.5)
    assert nearly.win_rate == pytest.approx(plain.win_rate, abs=1e-6)


def test_interface() -> None:
    best = optimal_transform(BestOfN(4), kl=1.0)
    assert best.name == "optimal" and best.procedure == BestOfN(4)
    assert best(U.reshape(-1, 1)).shape == (401, 1)
    assert np.isnan(best([0.5, np.nan])).tolist() == [False, True]
    assert optimal_transform(KthOfN(1, 4), kl=1.0).win_rate == best.win_rate
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(best))(U), best(U))
    assert win_rate_limit(KthOfN(1023, 1024), 5.0) == 1.0
    limits = win_rate_limit(BestOfN(4), [[0.0, 0.1], [1.0, 2.0]])
    assert limits.shape == (2, 2) and limits[0, 0] == 0.5 and limits[1, 0] == best.win_rate
    assert win_rate_limit(BestOfN(4), 0.0) == 0.5 and isinstance(win_rate_limit(BestOfN(4), 1.0), float)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimal_transform(BestOfN(4)), "give exactly one of beta and kl; got neither"),
        (lambda: optimal_transform(BestOfN(4), 0.1, 0.1), "give exactly one of beta and kl; got both"),
        (lambda: optimal_transform("best_of_n", beta=0.1), "procedure must be a Procedure"),
        (lambda: optimal_transform(BestOfN(4), beta=-1.0), "beta must be a finite number > 0"),
        (lambda: optimal_transform(BestOfN(4), beta=1e-12), "beta must lie in"),
        (lambda: optimal_transform(BestOfN(4), kl=21.0), "kl must be at most 20 nats"),
        (lambda: win_rate_limit(BestOfN(4), [-0.1]), "kl must lie in"),
        (lambda: optimal_transform(BestOfN(4), kl=1.0)(1.1), r"u must lie in \[0, 1\]"),
        (lambda: optimal_transform(BestOfN(4), kl=1.0).cdf(-0.1), r"u must lie in \[0, 1\]"),
        (lambda: optimal_transform(BestOfN(4), kl=1.0).density(np.nan), r"u must lie in \[0, 1\]"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


GEOMETRIC = (0.9 ** np.arange(64) / (0.9 ** np.arange(64)).sum()).tolist()
WIDE = [
    *(KthOfN(k, n) for n in (4, 8, 32) for k in sorted({2, n // 4, n // 2, 3 * n // 4, n - 1} - {1})),
    *(SoftBestOfN(n, tilt) for n in (2, 32) for tilt in (-50.0, -8.0, -1.0, 1.0, 8.0, 50.0)),
    *(SoftBestOfN(32, tilt) for tilt in (-400.0, -100.0, 400.0)),
    RandomN([0.01, *[0.0] * 30, 0.99]).mirror,
    RandomN([0.5, *[0.0] * 30, 0.5]),
    RandomN([0.01, *[0.0] * 30, 0.99]),
    RandomN([0.99, *[0.0] * 30, 0.01]),
    RandomN([1 / 32] * 32),
    RandomN(GEOMETRIC),
]
LARGE = [KthOfN(k, n) for n in (128, 1024) for k in (2, n // 4, n // 2, 3 * n // 4, n - 1)]
LARGE.append(RandomN([0.5, *[0.0] * 1022, 0.5]))
NEAR_WORST = [KthOfN(n + 1 - rank, n) for n in (128, 256, 512, 1024) for rank in (2, 3, 4, 7, 12, 15, 25, n // 8)]


def check_converged(procedure: Procedure, beta: float | None, kl: float | None) -> None:
    best = optimal_transform(procedure, beta, kl)
    assert best.residual < 2e-6 and 0.5 < best.win_rate <= 1
    if kl is not None:
        assert best.kl == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize("procedure", WIDE, ids=repr)
def test_general_solver_converges_over_the_whole_range(procedure: Procedure) -> None:
    check_general(procedure)


def check_general(procedure: Procedure) -> None:
    for beta in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0):
        check_converged(procedure, beta, None)
    for kl in (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0):
        check_converged(procedure, None, kl)


@pytest.mark.slow
@pytest.mark.parametrize("procedure", LARGE, ids=lambda procedure: repr(procedure)[:24])
def test_general_solver_converges_for_large_n(procedure: Procedure) -> None:
    check_general(procedure)


@pytest.mark.slow
@pytest.mark.parametrize("procedure", NEAR_WORST, ids=repr)
def test_near_worst_of_many_converges(procedure: Procedure) -> None:
    check_general(procedure)


@pytest.mark.slow
@pytest.mark.parametrize("procedure", [SoftBestOfN(n, -500.0) for n in (256, 512, 1024)], ids=repr)
@pytest.mark.parametrize("kl", [0.5, 1.5, 2.0, 2.5, 3.5, 5.0])
def test_strong_negative_tilt_of_many_converges(procedure: Procedure, kl: float) -> None:
    check_converged(procedure, None, kl)


@pytest.mark.parametrize(("n", "soft"), [(32, 20.0), (512, 500.0), (1024, 500.0)])
@pytest.mark.parametrize("kl", [1.0, 2.5])
def test_negative_tilt_against_its_own_second_order_equation(n: int, soft: float, kl: float) -> None:
    """With y = 1 + b (1-u) and S = 1 + b (1-Q), S'' = -K (yS)^{n-1} S': shot from u = 1, in log y.

    lam = log(y S'/S) + w/n, w = K y^n S^{n-1}. By parts KL = [(1+b)(lam_1 + q(0) - 1) - (lam_0 + q(1) - 1)]/b.
    """
    best = optimal_transform(SoftBestOfN(n, -soft), kl=kl)
    b, end = math.expm1(soft / n), soft / n
    log_k = 2 * (math.log(n * b) - soft - math.log1p(-math.exp(-soft))) - math.log(b) - best.log_beta
    first, last = float(best.density(1.0)), float(best.density(0.0))

    def rates(x: float, state: np.ndarray) -> list[float]:
        w = math.exp(min(log_k + n * x + (n - 1) * state[0], 600.0))
        v = math.exp(state[1] - w / n)
        return [v, 1 - v + (n - 1) / n * w * v]

    start = [0.0, math.log(first) + math.exp(log_k) / n]
    flow = integrate.solve_ivp(rates, (0, end), start, method="LSODA", rtol=1e-12, atol=1e-13, max_step=end / 500)
    assert flow.y[0, -1] == pytest.approx(end, rel=1e-7)
    by_parts = ((1 + b) * (flow.y[1, -1] + last - 1) - (start[1] + first - 1)) / b
    assert by_parts == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("procedure", [KthOfN(1023, 1024), KthOfN(1000, 1024), KthOfN(510, 512)], ids=repr)
def test_frontier_where_q_underflows(procedure: Procedure) -> None:
    """d log(1-W)/dKL = -beta/(1-W), by differences of the curve's own integrals; beta falls by about n-k+1 per nat."""
    for kl in (1.0, 3.0):
        low, best, high = (optimal_transform(procedure, kl=kl + h) for h in (-1e-3, 0.0, 1e-3))
        lost = [log_lost(found) for found in (low, best, high)]
        assert (lost[2] - lost[0]) / 2e-3 == pytest.approx(-math.exp(best.log_beta - lost[1]), rel=2e-3)
        assert best.win_rate == 1.0 and best.kl == pytest.approx(kl, rel=1e-9)
        assert best.residual < 2e-6


def log_lost(best: optimum.OptimalTransform) -> float:
    """log of int g(u) G(Q(u)) du for one rank r of n, on the layer where Q is representable, by the trapezoid rule."""
    (component,) = best.procedure.components
    rank, n = component.picks[0][0], component.n
    u = -np.expm1(-np.linspace(0.0, best.kl + 1.0, 100_001))
    q, density = best.cdf(u), best.density(u)
    seen = (q > 1e-280) & (u > 0)
    log_decoded = stats.beta.logcdf(q[seen], rank, n - rank + 1)
    terms = stats.beta.logpdf(u[seen], rank, n - rank + 1) + log_decoded + np.log1p(-u[seen])
    assert density.max() < 1e6
    return float(np.logaddexp.reduce(terms)) + math.log((best.kl + 1.0) / 100_000)


def test_near_worst_of_n_finds_one_optimum_from_either_side() -> None:
    for beta in (0.1, 0.01):
        by_beta = optimal_transform(KthOfN(31, 32), beta=beta)
        by_kl = optimal_transform(KthOfN(31, 32), kl=by_beta.kl)
        assert by_kl.win_rate == pytest.approx(by_beta.win_rate, abs=1e-9)
        assert by_kl.beta == pytest.approx(beta, rel=1e-6)


FAST = [
    BestOfN(4),
    BestOfN(32),
    WorstOfN(4),
    WorstOfN(32),
    KthOfN(2, 4),
    KthOfN(16, 32),
    KthOfN(31, 32),
    RandomN([0.5, 0.5]),
    RandomN([1 / 32] * 32),
    SoftBestOfN(8, 4.0),
    SoftBestOfN(32, -50.0),
    SoftBestOfN(32, -100.0),
    SoftBestOfN(32, -400.0),
    SoftBestOfN(32, 400.0),
]


YARDSTICK_SECONDS = 0.0059  # what `yardstick` takes on the machine whose seconds the targets are in


def yardstick() -> float:
    """CPU seconds of a fixed piece of small-array numpy work, as the solver's is: how fast is this machine just now?"""
    x = np.linspace(0.01, 0.99, 400)
    start = time.process_time()
    for _ in range(400):
        y = np.exp(-3.0 * x)
        z = np.cumsum(y) / y.sum()
        np.interp(x, z, x)
        np.log(z + 1e-9)
        np.diff(z)
    return time.process_time() - start


@pytest.mark.parametrize("procedure", FAST, ids=repr)
@pytest.mark.parametrize(
    ("given", "seconds"),
    [({"beta": 0.1}, 0.05), ({"beta": 1e-3}, 0.05), ({"kl": 1.0}, 0.25), ({"kl": 3.0}, 0.25), ({"kl": 5.0}, 0.25)],
    ids=str,
)
def test_is_fast(procedure: Procedure, given: dict[str, float], seconds: float) -> None:
    """Interleaved with a yardstick, because a shared machine's CPU seconds vary by a factor of two."""
    ratios = []
    for _ in range(7):
        optimum._solved.cache_clear()
        frontier._frontier.cache_clear()
        before = yardstick()
        start = time.process_time()
        optimal_transform(procedure, **given)
        taken = time.process_time() - start
        ratios.append(taken / ((before + yardstick()) / 2.0))
    assert statistics.median(ratios) * YARDSTICK_SECONDS < seconds
