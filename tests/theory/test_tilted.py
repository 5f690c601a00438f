"""Tilted policies against the reference table and independent quadrature; tie blocks against brute force."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from scipy import integrate, optimize

from infalign.theory import exponential, identity, log, log_mirror, normal_icdf, optimal_transform, tilt, win_rate_limit
from infalign.theory.levels import tied_limit, tied_optimum, tied_win_rate
from infalign.theory.procedures import (
    BestOfN,
    BottomOfN,
    KthOfN,
    PessimisticOfN,
    Procedure,
    RandomN,
    SoftBestOfN,
    TopOfN,
    WorstOfN,
)
from infalign.types import InputError

# Known to six digits: 1/beta and W_1, W_2, W_4, W_8, W_32 of Best-of-N at KL = 1 nat
BEST_TABLE = [
    (identity, 7.34947, [0.864579, 0.873332, 0.877000, 0.878692, 0.879905]),
    (log, 5.30540, [0.863115] * 5),
    (exponential(5), 4.33984, [0.838972, 0.896397, 0.919217, 0.926796, 0.931068]),
    (exponential(10), 4.14401, [0.801017, 0.890492, 0.935097, 0.948226, 0.953647]),
    (optimal_transform(BestOfN(2), kl=1.0), 8.86829, [0.834537, 0.896946, 0.925183, 0.935916, 0.942302]),
    (optimal_transform(BestOfN(4), kl=1.0), 12.04099, [0.773659, 0.875864, 0.941123, 0.966239, 0.976647]),
]
WORST_TABLE = [
    (identity, [0.936805, 0.974457]),
    (log, [0.944131, 0.985875]),
    (exponential(-5), [0.948194, 0.991215]),
    (exponential(-10), [0.947519, 0.992672]),
    (exponential(5), [0.858499, 0.857192]),
    (optimal_transform(WorstOfN(2), kl=1.0), [0.948620, 0.991488]),
    (optimal_transform(WorstOfN(4), kl=1.0), [0.945227, 0.992948]),
]


@pytest.mark.parametrize(("transform", "inverse_beta", "win_rates"), BEST_TABLE, ids=lambda v: str(v)[:24])
def test_best_of_n_table(transform: Callable[..., np.ndarray], inverse_beta: float, win_rates: list[float]) -> None:
    policy = tilt(transform, kl=1.0)
    assert policy.kl == pytest.approx(1.0, abs=1e-10)
    assert 1 / policy.beta == pytest.approx(inverse_beta, abs=6e-6)
    measured = [policy.win_rate(BestOfN(n)) for n in (1, 2, 4, 8, 32)]
    np.testing.assert_allclose(measured, win_rates, atol=6e-7)


@pytest.mark.parametrize(("transform", "win_rates"), WORST_TABLE, ids=lambda v: str(v)[:24])
def test_worst_of_n_table(transform: Callable[..., np.ndarray], win_rates: list[float]) -> None:
    policy = tilt(transform, kl=1.0)
    np.testing.assert_allclose([policy.win_rate(WorstOfN(n)) for n in (2, 4)], win_rates, atol=6e-7)


def test_numbers_at_inverse_beta_five() -> None:
    policy = tilt(identity, beta=0.2)
    assert policy.kl == pytest.approx(0.65011694, abs=6e-9)
    assert policy.win_rate(BestOfN(1)) == pytest.approx(0.80678365, abs=6e-9)
    assert policy.win_rate(BestOfN(4)) == pytest.approx(0.82841913, abs=6e-9)
    assert tilt(log, beta=1 / 3).kl == pytest.approx(0.636294, abs=6e-7)
    assert tilt(log, beta=1 / 3).win_rate(BestOfN(1)) == pytest.approx(0.8, abs=1e-10)


def test_log_partition_of_the_identity_is_not_log_beta_plus_inverse() -> None:
    wrong = math.log(1.0) + 1.0
    assert wrong - tilt(identity, beta=1.0).log_partition == pytest.approx(0.459, abs=6e-4)


def test_log_is_the_same_for_every_n_and_so_is_its_mirror() -> None:
    m = 1 + 1 / 0.3
    for n in (1, 2, 7, 64, 1024):
        assert tilt(log, beta=0.3).win_rate(BestOfN(n)) == pytest.approx(m / (m + 1), abs=1e-10)
        assert tilt(log_mirror, beta=1.25).win_rate(WorstOfN(n)) == pytest.approx(1 / 1.2, abs=1e-9)
    assert tilt(log_mirror, beta=1.25).kl == pytest.approx(math.log(0.2) + 5 - 1, abs=1e-12)
    assert tilt(log_mirror, kl=5.0).kl == pytest.approx(5.0, abs=1e-9)


@pytest.mark.parametrize("t", [5, 10, -5, -10, 0.01, 100, -100, 1e-6])
@pytest.mark.parametrize("beta", [1e-3, 0.03, 1.0, 100.0])
def test_exponential_against_direct_quadrature(t: float, beta: float) -> None:
    policy, peak = tilt(exponential(t), beta=beta), float(exponential(t)(1.0)) / beta
    points = sorted({1 - 10.0**-k for k in range(1, 8)} | {10.0**-k for k in range(1, 5)})

    def weighted(f: Callable[[float], float], end: float = 1.0) -> float:
        edges = [0.0, *[p for p in points if p < end], end]
        parts = [integrate.quad(f, a, b, epsabs=1e-16, epsrel=1e-12)[0] for a, b in itertools.pairwise(edges)]
        return sum(parts)

    def exponent(u: float) -> float:
        return (math.exp(t * (u - 1)) if t > 0 else -math.exp(t * u)) / beta - peak

    z = weighted(lambda u: math.exp(exponent(u)))
    kl = weighted(lambda u: exponent(u) * math.exp(exponent(u))) / z - math.log(z)
    assert policy.log_partition == pytest.approx(peak + math.log(z), rel=1e-10, abs=1e-10)
    assert policy.kl == pytest.approx(kl, rel=1e-8, abs=1e-10)
    for u in (0.2, 0.9, 0.999):
        expected = weighted(lambda v: math.exp(exponent(v)), u) / z
        assert float(policy.cdf(u)) == pytest.approx(expected, abs=1e-9)
        assert float(policy.density(u)) == pytest.approx(math.exp(exponent(u)) / z, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 100.0])
def test_closed_forms_agree_with_quadrature_of_a_plain_callable(beta: float) -> None:
    for transform in (identity, log, exponential(10), exponential(-10)):
        closed, plain = tilt(transform, beta=beta), tilt(lambda u, f=transform: f(u), beta=beta)
        assert plain.kl == pytest.approx(closed.kl, rel=1e-9, abs=1e-12)
        assert plain.log_partition == pytest.approx(closed.log_partition, rel=1e-12, abs=1e-12)
        u = np.linspace(0, 1, 41)
        np.testing.assert_allclose(plain.cdf(u), closed.cdf(u), atol=1e-10)
        assert plain.win_rate(BestOfN(4)) == pytest.approx(closed.win_rate(BestOfN(4)), abs=1e-9)


def test_arbitrary_callables() -> None:
    singular = tilt(lambda u: -np.log(u), beta=2.0)  # q = u^{-1/2}/2
    assert singular.kl == pytest.approx(-math.log(2) + 1, abs=1e-8)
    assert float(singular.cdf(0.25)) == pytest.approx(0.5, abs=1e-8)
    peak = tilt(lambda u: -((u - 0.3) ** 2), beta=1e-3)  # a normal with variance beta/2
    assert peak.kl == pytest.approx(-0.5 * math.log(2 * math.pi * math.e * 5e-4), abs=1e-8)
    step = tilt(lambda u: (u > 0.9) * 1.0, kl=1.0)
    q, mass = step.density([0.2, 0.95]), float(1 - step.cdf(0.9))
    assert q[0] * 0.9 + q[1] * 0.1 == pytest.approx(1, abs=1e-9)
    assert mass * math.log(mass / 0.1) + (1 - mass) * math.log((1 - mass) / 0.9) == pytest.approx(1, abs=1e-8)
    gaussian = tilt(lambda u: normal_icdf(u), kl=1.0)
    assert 1 / gaussian.beta == pytest.approx(math.sqrt(2), abs=1e-8)


def test_normal_icdf_is_a_shift() -> None:
    policy = tilt(normal_icdf, kl=1.0)
    assert policy.win_rate(BestOfN(1)) == pytest.approx(0.5 * (1 + math.erf(math.sqrt(2) / 2)), abs=1e-10)
    assert policy.beta == pytest.approx(1 / math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("procedure", [BestOfN(4), WorstOfN(3), KthOfN(2, 5), RandomN([0.3, 0.7])], ids=repr)
def test_win_rate_by_simulation(procedure: Procedure) -> None:
    rng, rows = np.random.default_rng(3), 120_000
    policy = tilt(exponential(5), beta=0.3)
    grid = np.linspace(0, 1, 4001)
    ours = np.interp(rng.random((rows, procedure.n)), policy.cdf(grid), grid)
    theirs = rng.random((rows, procedure.n))
    at = np.arange(rows)
    wins = ours[at, procedure.select(ours, rng)] > theirs[at, procedure.select(theirs, rng)]
    assert policy.win_rate(procedure) == pytest.approx(wins.mean(), abs=0.005)


@pytest.mark.parametrize("kl", [1e-4, 0.1, 2.0, 5.0])
def test_kl_is_reached(kl: float) -> None:
    for transform in (identity, log, log_mirror, normal_icdf, exponential(10), exponential(-10), exponential(1e-6)):
        policy = tilt(transform, kl=kl)
        assert policy.kl == pytest.approx(kl, rel=1e-7)
        assert tilt(transform, beta=policy.beta).kl == pytest.approx(kl, rel=1e-6)


def best_t(n: int, kl: float) -> float:
    """The t of e^{t(u-1)} with the highest Best-of-n win rate at a KL."""
    found = optimize.minimize_scalar(
        lambda t: -tilt(exponential(t), kl=kl).win_rate(BestOfN(n)), bounds=(1, 60), method="bounded",
        options={"xatol": 1e-3},
    )  # fmt: skip
    return float(found.x)


@pytest.mark.parametrize(("kl", "t"), [(0.1, 9.3), (0.5, 12.6), (1.0, 17.3), (2.0, 31.8)])
def test_best_exponent_for_four(kl: float, t: float) -> None:
    assert best_t(4, kl) == pytest.approx(t, abs=0.06)


def test_usual_exponents_are_best_at_moderate_kl() -> None:
    assert best_t(2, 0.7) == pytest.approx(5, abs=0.3)
    assert best_t(4, 0.2) == pytest.approx(10, abs=0.5)


def test_points_gained_by_the_right_transform() -> None:
    best = optimal_transform(BestOfN(4), kl=1.0).win_rate
    assert best - tilt(identity, kl=1.0).win_rate(BestOfN(4)) == pytest.approx(0.064, abs=5e-4)
    assert best - tilt(log, kl=1.0).win_rate(BestOfN(4)) == pytest.approx(0.078, abs=5e-4)


@pytest.mark.parametrize(("trained", "decoded", "points"), [(2, 8, 0.040), (8, 2, 0.073), (4, 32, 0.023)])
def test_decoding_with_another_n_costs(trained: int, decoded: int, points: float) -> None:
    policy = tilt(optimal_transform(BestOfN(trained), kl=1.0), kl=1.0)
    loss = optimal_transform(BestOfN(decoded), kl=1.0).win_rate - policy.win_rate(BestOfN(decoded))
    assert loss == pytest.approx(points, abs=5.1e-4)


@pytest.mark.parametrize(("k", "error"), [(1, 0.161), (6, 0.057), (100, 0.004)])
def test_finite_sample_partition_function(k: int, error: float) -> None:
    mean_z = sum(math.exp(10 * j / k) for j in range(k + 1)) / (k + 1)
    assert 0.1 * (math.log(mean_z) - tilt(identity, beta=0.1).log_partition) == pytest.approx(error, abs=5.1e-4)


def finite_sample_loss(n: int, transform: Callable[..., np.ndarray], k: int, prompts: int) -> float:
    """W lost at mean KL 1 with rank/K calibration: a policy is constant on K+1 uniform spacings per prompt."""
    spacing = np.random.default_rng(4).dirichlet(np.ones(k + 1), prompts)
    phi = transform(np.arange(k + 1) / k)

    def masses(log_inverse: float) -> np.ndarray:
        raw = spacing * np.exp(math.exp(log_inverse) * (phi - phi.max()))
        return raw / raw.sum(1, keepdims=True)

    def mean_kl(log_inverse: float) -> float:
        mass = masses(log_inverse)
        return float((mass * np.log(np.maximum(mass, 1e-300) / np.maximum(spacing, 1e-300))).sum(1).mean())

    mass = masses(optimize.brentq(lambda x: mean_kl(x) - 1, 0.0, 4.0, xtol=1e-6))
    below_u, below_q = np.cumsum(spacing, 1) - spacing, np.cumsum(mass, 1) - mass
    nodes, weights = np.polynomial.legendre.leggauss(6)
    lost = 0.0
    for x, w in zip((1 + nodes) / 2, weights / 2, strict=True):
        u, q = below_u + x * spacing, below_q + x * mass
        lost += w * float((n * u ** (n - 1) * q**n * spacing).sum(1).mean())
    return tilt(transform, kl=1.0).win_rate(BestOfN(n)) - (1 - lost)


FINITE = [(4, 8, 0.066), (4, 16, 0.039), (4, 32, 0.021), (1, 8, 0.021), (1, 32, 0.006)]
FINITE_SLOW = [(4, 64, 0.011), (4, 100, 0.007), (4, 256, 0.003), (1, 100, 0.002)]


@pytest.mark.parametrize(
    ("n", "k", "loss"), [*FINITE, *(pytest.param(*row, marks=pytest.mark.slow) for row in FINITE_SLOW)]
)
def test_finite_sample_losses(n: int, k: int, loss: float) -> None:
    transform = exponential(10) if n == 4 else identity
    assert finite_sample_loss(n, transform, k, 10_000) == pytest.approx(loss, abs=1.2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tilt(identity), "give exactly one of beta and kl; got neither"),
        (lambda: tilt(identity, beta=1.0, kl=1.0), "give exactly one of beta and kl; got both"),
        (lambda: tilt(identity, beta=0.0), "beta must be a finite number > 0"),
        (lambda: tilt(identity, beta=float("nan")), "beta must be a finite number > 0"),
        (lambda: tilt(identity, kl=0.0), "kl must lie in"),
        (lambda: tilt(identity, kl=float("inf")), "kl must lie in"),
        (lambda: tilt(log_mirror, beta=1.0), "log_mirror needs beta > 1"),
        (lambda: tilt(lambda u: (u > 0.9) * 1.0, kl=3.0), "reaches no KL of 3 nats: its KL stays near 2.30"),
        (lambda: tilt(lambda u: 0 * u, kl=0.1), "reaches no KL of 0.1 nats"),
        (lambda: tilt(lambda u: u + np.nan, beta=1.0), "none NaN"),
        (lambda: tilt(lambda u: 1.0, beta=1.0), "must map an array to as many numbers"),
        (lambda: tilt(lambda u: u - np.inf, beta=1.0), "must be finite somewhere"),
        (lambda: tilt(lambda u: -np.log1p(-u), beta=0.5), "piles up at an end, or diverges"),
        (lambda: tilt(identity, beta=1.0).cdf(1.5), r"u must lie in \[0, 1\]"),
        (lambda: tilt(identity, beta=1.0).density(-0.5), r"u must lie in \[0, 1\]"),
        (lambda: tilt(identity, beta=1.0).win_rate("best_of_n"), "procedure must be a Procedure"),
        (lambda: tied_win_rate(BestOfN(2), [0.5, 0.6], [0.5, 0.5]), "base_masses_J must be non-negative and sum to 1"),
        (lambda: tied_win_rate(BestOfN(2), [0.5, 0.5], [1.5, -0.5]), "policy_masses_J must be non-negative"),
        (lambda: tied_win_rate(BestOfN(2), [0.5, 0.5], [1.0]), "must be of the same levels; got 2 and 1"),
        (lambda: tied_optimum(BestOfN(2), [0.5, 0.5]), "got neither"),
        (lambda: tied_limit(BestOfN(2), [], 0.0), "base_masses_J must be non-negative"),
        (lambda: tied_limit(BestOfN(2), [0.5, 0.5], -1.0), "kl must lie in"),
        (lambda: tied_limit("best", [0.5, 0.5], 1.0), "procedure must be a Procedure"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match=message):
        make()


TIE_PROCEDURES = [
    BestOfN(1),
    BestOfN(4),
    WorstOfN(4),
    KthOfN(2, 4),
    KthOfN(3, 4),
    RandomN([0.3, 0.3, 0.4]),
    SoftBestOfN(6, 3.0),
    SoftBestOfN(6, -3.0),
    TopOfN(2, 4),
    BottomOfN(3, 4),
    PessimisticOfN(5, 0.1),
]


@pytest.mark.parametrize("procedure", TIE_PROCEDURES, ids=repr)
def test_tied_win_rate_by_simulation(procedure: Procedure) -> None:
    rng, rows = np.random.default_rng(5), 100_000
    base, policy = np.array([0.2, 0.5, 0.3]), np.array([0.1, 0.3, 0.6])
    ours = rng.choice(3, (rows, procedure.n), p=policy).astype(float)
    theirs = rng.choice(3, (rows, procedure.n), p=base).astype(float)
    at = np.arange(rows)
    r, s = ours[at, procedure.select(ours, rng)], theirs[at, procedure.select(theirs, rng)]
    wins = np.mean((r > s) + 0.5 * (r == s))
    assert tied_win_rate(procedure, base, policy) == pytest.approx(wins, abs=0.006)
    assert tied_win_rate(procedure, base, base) == pytest.approx(0.5, abs=1e-14)


def brute_force(procedure: Procedure, base: np.ndarray, kl: float) -> float:
    """The best W within a KL by a general optimiser over softmax parameters, from many starts."""

    def masses(x: np.ndarray) -> np.ndarray:
        raw = np.exp(x - x.max())
        return raw / raw.sum()

    def used(x: np.ndarray) -> float:
        p = masses(x)
        return float(p @ np.log(np.maximum(p, 1e-300) / base))

    rng, best = np.random.default_rng(6), 0.0
    for _ in range(12):
        start = np.log(base) + rng.normal(0, 1, len(base)) + np.linspace(0, rng.uniform(0, 3), len(base))
        found = optimize.minimize(
            lambda x: -tied_win_rate(procedure, base, masses(x)), start, method="SLSQP",
            constraints={"type": "ineq", "fun": lambda x: kl - used(x)}, options={"ftol": 1e-13, "maxiter": 300},
        )  # fmt: skip
        if used(found.x) <= kl + 1e-8:
            best = max(best, -float(found.fun))
    return best


@pytest.mark.parametrize("procedure", TIE_PROCEDURES, ids=repr)
@pytest.mark.parametrize("base", [[0.5, 0.5], [0.2, 0.5, 0.3], [0.4, 0.1, 0.3, 0.2]], ids=str)
def test_tied_optimum_against_a_general_optimiser(procedure: Procedure, base: list[float]) -> None:
    base_J = np.array(base)
    for kl in (0.05, 0.4):
        ours = tied_optimum(procedure, base_J, kl=kl)
        assert ours.kl == pytest.approx(kl, abs=1e-9)
        assert ours.policy_masses_J.sum() == pytest.approx(1, abs=1e-12)
        assert ours.win_rate == pytest.approx(tied_win_rate(procedure, base_J, ours.policy_masses_J), abs=1e-12)
        assert ours.win_rate == pytest.approx(brute_force(procedure, base_J, kl), abs=2e-6)


@pytest.mark.parametrize("procedure", TIE_PROCEDURES, ids=repr)
def test_tied_optimum_at_beta(procedure: Procedure) -> None:
    base_J, rng = np.array([0.3, 0.3, 0.25, 0.15]), np.random.default_rng(7)
    for beta in (0.05, 0.5):
        ours = tied_optimum(procedure, base_J, beta=beta)
        value = ours.win_rate - beta * ours.kl
        for _ in range(300):
            other = ours.policy_masses_J * np.exp(rng.normal(0, rng.choice([0.01, 0.3, 2.0]), 4))
            other /= other.sum()
            kl = float(other @ np.log(np.maximum(other, 1e-300) / base_J))
            assert tied_win_rate(procedure, base_J, other) - beta * kl <= value + 1e-10
        assert tied_optimum(procedure, base_J, kl=max(ours.kl, 1e-6)).win_rate >= ours.win_rate - 1e-9


def test_binary_reward_hardly_needs_best_of_four() -> None:
    for kl in (0.1, 0.5, math.log(2), 3.0):
        assert tied_limit(BestOfN(4), [0.5, 0.5], kl) <= 0.5313
    assert tied_limit(BestOfN(4), [0.5, 0.5], 3.0) == pytest.approx(0.53125, abs=1e-12)
    top = tied_optimum(BestOfN(4), [0.5, 0.5], kl=3.0)
    assert (top.kl, top.beta, top.policy_masses_J.tolist()) == (pytest.approx(math.log(2)), 0.0, [0.0, 1.0])


@pytest.mark.parametrize(
    "procedure", [BestOfN(4), WorstOfN(4), KthOfN(2, 4), SoftBestOfN(6, 3.0), TopOfN(2, 6)], ids=repr
)
def test_many_levels_approach_the_continuous_limit(procedure: Procedure) -> None:
    limit = optimal_transform(procedure, kl=1.0).win_rate
    coarse, fine = (tied_limit(procedure, np.full(j, 1 / j), 1.0) for j in (50, 1000))
    assert fine == pytest.approx(limit, abs=6e-5)
    assert coarse <= limit + 1e-12 and fine <= limit + 1e-12


@pytest.mark.parametrize("procedure", [BestOfN(4), BestOfN(32), WorstOfN(32), KthOfN(2, 4)], ids=repr)
def test_tied_limit_grows_with_kl_and_stays_below_the_continuous_one(procedure: Procedure) -> None:
    base_J = np.random.default_rng(8).dirichlet(np.ones(20))
    kls = [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0]
    limits = [tied_limit(procedure, base_J, kl) for kl in kls]
    assert limits[0] == 0.5 and np.all(np.diff(limits) >= -1e-12)
    for kl, limit in zip(kls[1:-1], limits[1:-1], strict=True):
        assert limit <= win_rate_limit(procedure, kl) + 1e-10


def test_levels_without_base_mass_and_single_levels() -> None:
    padded = tied_optimum(BestOfN(4), [0.5, 0.0, 0.5, 0.0], kl=0.2)
    plain = tied_optimum(BestOfN(4), [0.5, 0.5], kl=0.2)
    assert padded.win_rate == pytest.approx(plain.win_rate, abs=1e-12)
    np.testing.assert_allclose(padded.policy_masses_J[[0, 2]], plain.policy_masses_J, atol=1e-12)
    for alone in (tied_optimum(BestOfN(4), [1.0], kl=0.5), tied_optimum(WorstOfN(3), [1.0], beta=0.5)):
        assert (alone.win_rate, alone.kl) == (pytest.approx(0.5), pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("procedure", [BestOfN(4), BestOfN(32), WorstOfN(4), KthOfN(2, 4)], ids=repr)
def test_tied_limit_is_fast(procedure: Procedure) -> None:
    """Some milliseconds; the limit is ten times that, since machines differ and others work on them."""
    base_J, times = np.random.default_rng(9).dirichlet(np.ones(64)), []
    for kl in (0.1, 0.5, 1.0, 0.1, 0.5, 1.0):
        start = time.process_time()
        tied_limit(procedure, base_J, kl)
        times.append(time.process_time() - start)
    assert min(times) < 0.05
