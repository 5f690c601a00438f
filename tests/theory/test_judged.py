"""The optimum where another reward judges: numbers known from elsewhere, limits, a general optimiser, many starts."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from scipy import integrate, optimize

from infalign.theory import optimal_transform, tied_optimum, tilt
from infalign.theory.judged import gold_optimal, gold_win_rate, gold_win_rates
from infalign.theory.levels import tied_win_rate
from infalign.theory.objective import objective
from infalign.theory.procedures import BestOfN, KthOfN, PessimisticOfN, Procedure, SoftBestOfN, TopOfN, WorstOfN
from infalign.types import InputError

PROCEDURES = [
    BestOfN(1),
    BestOfN(4),
    WorstOfN(3),
    KthOfN(2, 4),
    SoftBestOfN(4, -3.0),
    TopOfN(2, 4),
    PessimisticOfN(4, 0.1),
]
U = (np.arange(2000) + 0.5) / 2000


def ordinary(procedure: Procedure, base_J: np.ndarray) -> np.ndarray:
    """h of gold = proxy: the decoded base loses to level j with the mean of G at its edges."""
    decoded = procedure.cdf(np.minimum(np.concatenate([[0.0], np.cumsum(base_J)]), 1.0))
    return (decoded[1:] + decoded[:-1]) / 2


def kl_of(policy_J: np.ndarray, base_J: np.ndarray) -> float:
    return float(policy_J @ np.log(np.maximum(policy_J, 1e-300) / base_J))


HACKED = 0.5 + 0.6 * (np.where(U < 0.9, U, 0.9 - 4 * (U - 0.9)) - 0.6)
SLOPING = 0.5 + 0.6 * (U - 0.8)


@pytest.mark.parametrize(
    ("h_J", "base", "at_low", "at_one"),
    [
        (ordinary(BestOfN(4), np.full(2000, 1 / 2000)), 0.5, 0.81686, 0.94111),
        (SLOPING, 0.5, 0.58376, 0.60956),
        (HACKED, 0.56571, 0.64405, 0.66991),
    ],
    ids=["gold is the proxy", "a line", "a hacked top"],
)
def test_reference_numbers(h_J: np.ndarray, base: float, at_low: float, at_one: float) -> None:
    """From another program, on this grid; five digits are known."""
    assert gold_win_rates(h_J, [BestOfN(4)])[0] == pytest.approx(base, abs=6e-6)
    for kl, expected in ((0.3, at_low), (1.0, at_one)):
        found = gold_optimal(BestOfN(4), h_J, kl=kl)
        assert found.win_rate == pytest.approx(expected, abs=6e-6)
        assert found.kl == pytest.approx(kl, rel=1e-9) and found.residual < 1e-6


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_a_proxy_that_is_gold_has_the_ordinary_optimum(procedure: Procedure) -> None:
    base_J = np.array([0.15, 0.2, 0.05, 0.3, 0.2, 0.1])
    h_J = ordinary(procedure, base_J)
    for given in ({"beta": 0.1}, {"kl": 0.4}):
        ours, exact = gold_optimal(procedure, h_J, base_J, **given), tied_optimum(procedure, base_J, **given)
        np.testing.assert_allclose(ours.policy_masses_J, exact.policy_masses_J, atol=1e-9)
        assert (ours.beta, ours.kl) == (pytest.approx(exact.beta, rel=1e-7), pytest.approx(exact.kl, rel=1e-7))
        assert ours.win_rate == pytest.approx(exact.win_rate, abs=1e-12)
        assert ours.win_rate == pytest.approx(tied_win_rate(procedure, base_J, ours.policy_masses_J), abs=1e-12)


def test_without_a_procedure_phi_is_h() -> None:
    """n = 1: p ~ b e^{h/beta}, and the gold win rate is the mean of h."""
    rng = np.random.default_rng(0)
    base_J, h_J = rng.dirichlet(np.ones(12)), rng.random(12)
    found = gold_optimal(BestOfN(1), h_J, base_J, beta=0.2)
    expected = base_J * np.exp(h_J / 0.2)
    np.testing.assert_allclose(found.policy_masses_J, expected / expected.sum(), rtol=1e-7)
    np.testing.assert_allclose(found.phi_J, h_J - h_J[0], atol=1e-14)
    assert found.win_rate == pytest.approx(found.policy_masses_J @ h_J, abs=1e-14)


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_a_constant_h_trains_nothing(procedure: Procedure) -> None:
    found = gold_optimal(procedure, [0.3] * 5, beta=0.01)
    assert found.kl == pytest.approx(0, abs=1e-12) and found.win_rate == pytest.approx(0.3, abs=1e-12)
    assert np.ptp(found(np.linspace(0, 1, 9))) == 0
    with pytest.raises(InputError, match="h_J is constant: the proxy tells nothing of the gold reward"):
        gold_optimal(procedure, [0.3] * 5, kl=0.1)


def by_general_optimiser(procedure: Procedure, h_J: np.ndarray, base_J: np.ndarray, beta: float) -> float:
    """max W - beta KL over softmax parameters, from many starts, W by its definition in sums."""

    def loss(x: np.ndarray) -> float:
        policy_J = np.exp(x - x.max())
        policy_J /= policy_J.sum()
        decoded = procedure.cdf(np.minimum(np.concatenate([[0.0], np.cumsum(policy_J)]), 1.0))
        return beta * kl_of(policy_J, base_J) - float(h_J @ (decoded[1:] - decoded[:-1]))

    rng = np.random.default_rng(1)
    starts = [np.log(base_J) + rng.normal(0, size, len(base_J)) for size in (0.1, 1.0, 3.0)]
    starts += [np.log(base_J) + 4 * np.eye(len(base_J))[j] for j in range(len(base_J))]
    return max(-optimize.minimize(loss, x, method="BFGS", options={"gtol": 1e-8}).fun for x in starts)


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
@pytest.mark.parametrize(
    "h_J", [[0.1, 0.3, 0.5, 0.7, 0.2], [0.6, 0.2, 0.1, 0.5, 0.4], [0.2, 0.4, 0.4, 0.5, 0.9]], ids=str
)
def test_against_a_general_optimiser(procedure: Procedure, h_J: list[float]) -> None:
    base_J = np.array([0.3, 0.2, 0.2, 0.2, 0.1])
    for beta in (0.03, 0.3):
        found = gold_optimal(procedure, h_J, base_J, beta=beta)
        value = found.win_rate - beta * found.kl
        assert value == pytest.approx(by_general_optimiser(procedure, np.array(h_J), base_J, beta), abs=1e-7)
        assert found.residual < 1e-6


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_perturbations_at_equal_kl_never_gain(procedure: Procedure) -> None:
    """Any direction, rescaled by powers until the KL is the same."""
    rng = np.random.default_rng(2)
    base_J, u = np.full(40, 1 / 40), (np.arange(40) + 0.5) / 40
    h_J = 0.5 + 0.6 * (np.where(u < 0.8, u, 0.8 - 3 * (u - 0.8)) - 0.6)
    found = gold_optimal(procedure, h_J, base_J, kl=0.5)
    x_J = np.log(found.policy_masses_J / base_J)

    def tilted(shape_J: np.ndarray, power: float) -> np.ndarray:
        raw_J = base_J * np.exp(power * (shape_J - shape_J.max()))
        return raw_J / raw_J.sum()

    for _ in range(300):
        shape_J = x_J + rng.normal(0, rng.choice([0.01, 0.1, 0.5])) * rng.normal(0, 1, 40)
        power = optimize.brentq(lambda s, y=shape_J: kl_of(tilted(y, s), base_J) - 0.5, 1e-6, 50.0, xtol=1e-13)
        assert gold_win_rate(procedure, h_J, tilted(shape_J, power)) <= found.win_rate + 1e-9


def test_a_hacked_top_has_several_local_optima() -> None:
    """Most of h lies low, a narrow rise at the very top: the gradient at the base sees the top alone."""
    u = (np.arange(60) + 0.5) / 60
    h_J = 0.05 + 0.9 * np.exp(-(((u - 0.35) / 0.12) ** 2)) + 0.25 * np.exp(-(((u - 0.99) / 0.03) ** 2))
    found = gold_optimal(BestOfN(16), h_J, kl=2.0)
    # what climbing from the base alone finds: damped tilts of the gradient, as a check that this is a case at all
    base_J, x_J = np.full(60, 1 / 60), np.zeros(60)
    for _ in range(4000):
        policy_J = base_J * np.exp(x_J - x_J.max())
        policy_J /= policy_J.sum()
        decoded = BestOfN(16).density(np.minimum(np.cumsum(policy_J)[:-1], 1.0))
        reward_J = np.concatenate([[0.0], np.cumsum(np.diff(h_J) * decoded)])
        x_J += 0.02 * (reward_J / found.beta - x_J)
    climbed = gold_win_rate(BestOfN(16), h_J, policy_J) - found.beta * kl_of(policy_J, base_J)
    assert climbed < found.win_rate - found.beta * found.kl - 0.05
    assert found.residual < 1e-6
    assert found.policy_masses_J[u < 0.6].sum() > 0.9


@pytest.mark.parametrize("kl", [0.1, 0.5, 1.0])
def test_slope_of_the_frontier_is_beta(kl: float) -> None:
    for h_J in (HACKED[::10], SLOPING[::10]):
        above, below = (gold_optimal(BestOfN(4), h_J, kl=kl * (1 + step)).win_rate for step in (1e-4, -1e-4))
        found = gold_optimal(BestOfN(4), h_J, kl=kl)
        assert (above - below) / (2e-4 * kl) == pytest.approx(found.beta, rel=1e-4)
        again = gold_optimal(BestOfN(4), h_J, beta=found.beta)
        assert (again.kl, again.win_rate) == (pytest.approx(kl, rel=1e-6), pytest.approx(found.win_rate, abs=1e-9))


def test_levels_tend_to_the_continuous_optimum() -> None:
    exact = optimal_transform(BestOfN(4), kl=0.5)
    errors = []
    for count in (100, 200, 400):
        found = gold_optimal(BestOfN(4), ordinary(BestOfN(4), np.full(count, 1 / count)), kl=0.5)
        errors.append(exact.win_rate - found.win_rate)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05) and errors[1] / errors[2] == pytest.approx(4, rel=0.05)
    probe = np.linspace(0, 1, 11)
    np.testing.assert_allclose(found.cdf(probe), exact.cdf(probe), atol=2e-4)
    np.testing.assert_allclose((found(probe) - found(0.0)) / exact(1.0), exact(probe) / exact(1.0), atol=5e-3)


@pytest.mark.parametrize("h_J", [SLOPING, HACKED], ids=["line", "hacked"])
def test_it_is_a_transform_like_any(h_J: np.ndarray) -> None:
    found = gold_optimal(BestOfN(4), h_J, kl=0.5)
    tilted = tilt(found, beta=found.beta)
    assert tilted.kl == pytest.approx(0.5, rel=1e-3)
    assert tilted.win_rate(BestOfN(4)) == pytest.approx(found.proxy_win_rate(), abs=1e-3)
    probe = np.linspace(0, 1, 401)
    np.testing.assert_allclose(found.cdf(probe), tilted.cdf(probe), atol=1e-3)
    assert integrate.trapezoid(found.density(U), U) == pytest.approx(1, abs=1e-2)
    assert np.isnan(found([0.5, np.nan])).tolist() == [False, True] and found(probe.reshape(-1, 1)).shape == (401, 1)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found))(probe), found(probe))
    aimed = objective(BestOfN(4), found, beta=found.beta)
    assert (aimed.policy, aimed.kl) == (found, found.kl)
    assert aimed.win_rate == pytest.approx(float(found.win_rate), abs=1e-12)
    assert aimed.label == found.label == gold_optimal(BestOfN(4), h_J, kl=0.7).label
    assert found.label != gold_optimal(BestOfN(4), h_J * 0.9, kl=0.5).label
    # at another beta it is a tilt as any, of which only the proxy's win rate is known
    assert objective(BestOfN(4), found, beta=1.0).win_rate == tilt(found, beta=1.0).win_rate(BestOfN(4))


def test_the_policy_decoded_otherwise() -> None:
    """The opponent stays: int h dG(Q) with another G."""
    found = gold_optimal(BestOfN(4), HACKED, kl=0.5)
    assert found.win_rate(BestOfN(4)) == pytest.approx(found.win_rate, abs=1e-12)
    for other in (BestOfN(1), BestOfN(8), WorstOfN(2)):
        decoded = [other.cdf(p) for p in np.minimum(np.concatenate([[0.0], np.cumsum(found.policy_masses_J)]), 1.0)]
        expected = sum(h * (high - low) for h, low, high in zip(HACKED, decoded[:-1], decoded[1:], strict=True))
        assert found.win_rate(other) == pytest.approx(expected, abs=1e-12)


def test_which_n_to_deploy() -> None:
    """int h N u^{N-1} du of the hacked h by quadrature; the best N is neither the least nor the most."""
    counts = (1, 2, 4, 8, 16, 64)
    found = gold_win_rates(HACKED, [BestOfN(n) for n in counts])

    def h(u: float) -> float:
        return 0.5 + 0.6 * ((u if u < 0.9 else 0.9 - 4 * (u - 0.9)) - 0.6)

    expected = [integrate.quad(lambda u, n=n: h(u) * n * u ** (n - 1), 0, 1, points=[0.9])[0] for n in counts]
    np.testing.assert_allclose(found, expected, atol=2e-6 * 64)
    assert 0 < int(np.argmax(found)) < len(counts) - 1
    rising = gold_win_rates(SLOPING, [BestOfN(n) for n in counts])
    assert np.all(np.diff(rising) > 0)


def test_levels_without_base_mass_play_no_part() -> None:
    padded = gold_optimal(BestOfN(4), [0.2, 0.9, 0.4, 0.6], [0.5, 0.0, 0.3, 0.2], kl=0.2)
    plain = gold_optimal(BestOfN(4), [0.2, 0.4, 0.6], [0.5, 0.3, 0.2], kl=0.2)
    assert padded.win_rate == plain.win_rate and padded == plain
    np.testing.assert_allclose(plain([0.25, 0.65, 0.9]), plain.phi_J, atol=1e-15)  # rewards that tie: mid-ranks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2]), "give exactly one of beta and kl; got neither"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2], None, 0.1, 0.1), "give exactly one of beta and kl; got both"),
        (lambda: gold_optimal("best", [0.1, 0.2], beta=0.1), "procedure must be a Procedure"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 1.2], beta=0.1), r"h_J must be a list of chances in \[0, 1\]"),
        (lambda: gold_optimal(BestOfN(4), [0.1, float("nan")], beta=0.1), "h_J must be a list of chances"),
        (lambda: gold_optimal(BestOfN(4), [], beta=0.1), "h_J must be a list of chances"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2], [0.5, 0.6], beta=0.1), "base_masses_J must be 2 masses >= 0"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2], [1.0], beta=0.1), "base_masses_J must be 2 masses >= 0"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2], beta=1e-9), r"beta must lie in \[1e-08, 1e\+08\]"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2], kl=21.0), "kl must be at most 20 nats"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2], beta=0.1, starts=-1), "starts must be a whole number >= 0"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2], kl=0.7), "where h_J is highest KL is 0.693147"),
        (lambda: gold_optimal(BestOfN(4), [0.1, 0.2], beta=0.1)(1.5), r"u must lie in \[0, 1\]"),
        (lambda: gold_win_rate(BestOfN(4), [0.1, 0.2], [0.5]), "policy_masses_J must be 2 masses >= 0"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_kl_near_the_most_is_an_optimum_or_told() -> None:
    """-log of the base mass where h is highest: just below it beta is tiny."""
    most = -math.log(0.25)
    h_J = [0.1, 0.6, 0.4, 0.2]
    assert gold_optimal(BestOfN(2), h_J, kl=0.9 * most).win_rate < 0.6
    with pytest.raises(InputError, match=r"no gold optimum of BestOfN\(2\) at kl 1.38629 was found with a beta"):
        gold_optimal(BestOfN(2), h_J, kl=most - 2e-9)
