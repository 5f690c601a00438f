"""The expected gain against Monte Carlo and quadrature; where the rule stops, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, special, stats

from infalign.decoding.adaptive import Adaptive, expected_gain
from infalign.generation.plan import Request
from infalign.runtime.seeds import uniforms
from infalign.types import InputError
from tests.decoding.toys import Levels, prompts, run

NORMAL = Levels((1.0,))


def reward(_, samples):
    """A normal reward from each sample's own stream."""
    return np.array([stats.norm.ppf(uniforms("reward", one.key, one.index, 1)[0]) for one in samples])


def by_quadrature(rewards):
    """The gain as the integral of the chance to exceed x over all x above the best."""
    m, spread = len(rewards), np.std(rewards, ddof=1) * np.sqrt(1 + 1 / len(rewards))
    beyond = integrate.quad(lambda z: special.stdtr(m - 1, -z), (max(rewards) - np.mean(rewards)) / spread, np.inf)
    return spread * beyond[0]


@pytest.mark.parametrize("rewards", [[0.0, 1.0, 2.0], [5.0, 5.0, 5.1, 9.0], list(np.sin(np.arange(40.0)))])
def test_the_gain_by_quadrature(rewards):
    assert expected_gain(np.array(rewards)) == pytest.approx(by_quadrature(rewards), rel=1e-6)


def test_the_gain_by_simulating_the_model():
    """Variance, mean and next reward drawn from the posterior of a normal model under the prior 1/variance."""
    rewards, rng, draws = np.array([0.3, -1.0, 0.8, 0.1, 1.1, 0.4, -0.2]), np.random.default_rng(0), 2_000_000
    m = rewards.size
    variance = (m - 1) * rewards.var(ddof=1) / rng.chisquare(m - 1, draws)
    mean = rng.normal(rewards.mean(), np.sqrt(variance / m))
    gains = np.maximum(rng.normal(mean, np.sqrt(variance)) - rewards.max(), 0)
    assert expected_gain(rewards) == pytest.approx(gains.mean(), abs=5 * gains.std() / np.sqrt(draws))


def test_the_gain_scales_with_the_reward_and_not_with_its_origin():
    rewards = np.array([0.2, 0.5, 0.9, 0.4])
    assert expected_gain(3 * rewards + 7) == pytest.approx(3 * expected_gain(rewards))
    assert expected_gain(np.full(5, 0.3)) == 0.0
    assert 0 <= expected_gain(np.array([0.0] * 500 + [1e6])) < 1e-1


def test_limits():
    for one in run(Adaptive(9, cost=0.0), NORMAL, reward):
        assert one.spent.candidates == 9 and one.chosen == int(np.argmax(one.rewards_N))
    for one in run(Adaptive(9, cost=1e9, n_min=4), NORMAL, reward):
        assert one.spent.candidates == 4 and one.chosen == int(np.argmax(one.rewards_N))
    for one in run(Adaptive(9, cost=0.0), Levels((1.0,))):  # all rewards equal: nothing is free enough to stop for
        assert one.spent.candidates == 9
    for one in run(Adaptive(9, cost=1e-9), Levels((1.0,))):
        assert one.spent.candidates == 3


@pytest.mark.parametrize("unit", ["reward", "spread"])
def test_it_stops_where_the_next_candidate_does_not_pay(unit):
    stops = set()
    for one in run(Adaptive(16, cost=0.15, unit=unit), NORMAL, reward, given=prompts(60)):
        everything = reward(None, NORMAL.sample([Request(one.prompt.key, index, (1,)) for index in range(16)]))

        def pays(m, rewards=everything):
            return by_quadrature(rewards[:m]) >= 0.15 * (np.std(rewards[:m], ddof=1) if unit == "spread" else 1.0)

        stop = next((m for m in range(3, 16) if not pays(m)), 16)
        assert one.spent.candidates == stop
        assert one.chosen == int(np.argmax(everything[:stop]))
        stops.add(stop)
    assert len(stops) > 3


def test_in_units_of_the_spread_the_scale_does_not_matter():
    strategy = Adaptive(16, cost=0.2, unit="spread")
    plain = run(strategy, NORMAL, reward, given=prompts(30))
    scaled = run(strategy, NORMAL, lambda p, s: 50 * reward(p, s) - 8, given=prompts(30))
    assert [one.spent for one in plain] == [one.spent for one in scaled]
    assert [one.chosen for one in plain] == [one.chosen for one in scaled]


def test_unscored_candidates_do_not_count():
    def partly(_, samples):
        return np.array([np.nan if one.index < 4 else float(one.index) for one in samples])

    (one,) = run(Adaptive(20, cost=1e9), NORMAL, partly, given=prompts(1))
    assert one.spent.candidates == 7 and one.chosen == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2, "cost": 0.1}, "n must be a whole number >= 3; got 2"),
        ({"n": 8, "cost": 0.1, "n_min": 2}, "n_min must be a whole number >= 3; got 2"),
        ({"n": 8, "cost": -0.1}, "cost must be a finite number >= 0; got -0.1"),
        ({"n": 8, "cost": float("nan")}, "cost must be"),
        ({"n": 8, "cost": "0.1"}, "cost must be"),
        ({"n": 8, "cost": 0.1, "unit": "sd"}, "unit must be reward or spread; got 'sd'"),
        ({"n": 8, "cost": 0.1, "at_once": 0}, "at_once must be"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        Adaptive(**arguments)
