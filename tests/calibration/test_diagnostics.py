"""Diagnostics by simulation and against the numbers of the theory notes."""

from __future__ import annotations

import numpy as np
import pytest

from infalign import BestOfN, transforms
from infalign.calibration.diagnostics import Diagnostics, duplicate_rate, tie_rate, uniformity
from infalign.calibration.few_samples import expected_cost


@pytest.mark.parametrize(("count", "loss"), [(8, 0.066), (16, 0.039), (32, 0.021), (64, 0.011), (100, 0.007)])
def test_expected_cost_of_best_of_4(count, loss):
    """infalign/theory/README.md, equation 12: N=4, t=10, KL 1."""
    found = expected_cost(transforms.exponential(10.0), BestOfN(4), count, 1.0, draws=600)
    assert found == pytest.approx(loss, abs=max(0.0025, 0.12 * loss))


@pytest.mark.parametrize(("count", "loss"), [(8, 0.021), (32, 0.006), (100, 0.002)])
def test_expected_cost_of_plain_sampling(count, loss):
    assert expected_cost(transforms.identity, BestOfN(1), count, 1.0, draws=600) == pytest.approx(loss, abs=0.0015)


def test_more_samples_cost_less():
    costs = [expected_cost(transforms.exponential(5.0), BestOfN(2), count, 0.5) for count in (4, 16, 64, 256)]
    assert costs == sorted(costs, reverse=True) and costs[-1] > -0.002


def test_uniformity_is_a_p_value():
    rng = np.random.default_rng(0)
    found = np.array(
        [uniformity([rng.integers(0, 4, 10).astype(float) for _ in range(20)], 39, seed) for seed in range(200)]
    )
    assert 0.01 <= np.mean(found <= 0.05) <= 0.11
    assert found.min() >= 1 / 40


def test_uniformity_sees_a_drift():
    rng = np.random.default_rng(1)
    rows = [np.concatenate([rng.normal(0, 1, 8), rng.normal(1, 1, 8)]) for _ in range(40)]
    assert uniformity(rows) < 0.01


def test_rates():
    assert duplicate_rate([["a", "b"], ["c", "c", "c"]]) == pytest.approx(2 / 5)
    assert tie_rate([np.array([0.0, 0.0, 0.0, 1.0])]) == pytest.approx(3 / 6)
    assert tie_rate([np.array([np.nan, 1.0])]) == 0.0


def test_warnings_name_the_way_out():
    sick = Diagnostics(10, 100, duplicates=0.9, ties=0.8, clipped=0.0, unscored=0.3, uniformity=1e-4)
    assert [line.split(":")[-1].strip() for line in sick.warnings()] == [
        "raise temperature or the length limit",
        "a finer reward leaves more to gain",
        "look at the reward",
        "recalibrate",
    ]
    assert Diagnostics(10, 100, 0.0, 0.1, 1.0, 0.0, 0.5).warnings() == []
