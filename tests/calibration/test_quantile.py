"""The calibrated reward by its definition, and the laws that make it useful."""

from __future__ import annotations

import numpy as np
import pytest

from infalign.calibration.quantile import calibrate, clip_to_open
from infalign.types import InputError


def by_definition(rewards, references):
    """P(z < y) + 1/2 P(z = y), counted."""
    return [
        [sum((z < y) + 0.5 * (z == y) for z in row) / len(row) for y in ours]
        for ours, row in zip(rewards, references, strict=True)
    ]


@pytest.fixture
def tied():
    rng = np.random.default_rng(0)
    return rng.integers(0, 6, (7, 5)).astype(float), rng.integers(0, 6, (7, 12)).astype(float)


def test_midrank_is_the_definition(tied):
    np.testing.assert_allclose(calibrate(*tied), by_definition(*tied), atol=1e-15)


def test_mean_over_the_reference_itself_is_one_half(tied):
    _, references = tied
    assert calibrate(references, references).mean(1) == pytest.approx(np.full(7, 0.5), abs=1e-12)


@pytest.mark.parametrize("increasing", [np.exp, lambda r: 3 * r - 100, lambda r: r**3, np.arctan])
def test_increasing_maps_change_nothing(tied, increasing):
    rewards, references = tied
    np.testing.assert_array_equal(calibrate(increasing(rewards), increasing(references)), calibrate(*tied))


def test_it_is_uniform_under_the_reference():
    rng = np.random.default_rng(1)
    values = calibrate(rng.normal(size=(2000, 4)), rng.normal(size=(2000, 400))).ravel()
    assert np.abs(np.sort(values) - (np.arange(8000) + 0.5) / 8000).max() < 0.02


def test_its_mean_over_a_policy_is_the_standard_win_rate():
    rng = np.random.default_rng(2)
    policy, base = rng.normal(0.5, 1, (3, 50)).round(1), rng.normal(0, 1, (3, 60)).round(1)
    wins = [
        np.mean([(y > z) + 0.5 * (y == z) for y in ours for z in theirs])
        for ours, theirs in zip(policy, base, strict=True)
    ]
    np.testing.assert_allclose(calibrate(policy, base).mean(1), wins, atol=1e-12)


def test_limits():
    assert calibrate([[1.0, 2.0, 3.0]], [[2.0]]).tolist() == [[0.0, 0.5, 1.0]]
    assert calibrate([[5.0]], [[5.0] * 9]).tolist() == [[0.5]]


def test_nan_is_no_score():
    found = calibrate([[np.nan, 1.0]], [[0.0, np.nan, 2.0, np.nan]])
    assert np.isnan(found[0, 0]) and found[0, 1] == 0.5


def test_ragged_references():
    np.testing.assert_allclose(calibrate([[1.0], [1.0]], [[0.0], [0.0, 2.0, 3.0]]), [[1.0], [1 / 3]])


class TestInterpolated:
    def test_it_meets_midranks_at_the_references(self, tied):
        _, references = tied
        np.testing.assert_allclose(calibrate(references, references, "interpolated"), calibrate(references, references))

    def test_it_is_monotone_and_inside(self):
        rng = np.random.default_rng(3)
        grid = np.linspace(-9, 9, 500)
        values = calibrate([grid], [rng.normal(size=8)], "interpolated")[0]
        assert (np.diff(values) >= 0).all() and values.min() > 0 and values.max() < 1

    def test_constant_references_are_a_step(self):
        assert calibrate([[1.0, 2.0, 3.0]], [[2.0, 2.0]], "interpolated").tolist() == [[0.0, 0.5, 1.0]]

    def test_it_is_less_noisy_for_few_references(self):
        """Against the exact quantile of a normal reward, averaged over references."""
        from scipy.stats import norm  # noqa: PLC0415

        rng = np.random.default_rng(4)
        rewards, references = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 8))
        exact = norm.cdf(rewards)
        errors = {m: np.mean((calibrate(rewards, references, m) - exact) ** 2) for m in ("midrank", "interpolated")}
        assert errors["interpolated"] < 0.93 * errors["midrank"]


def test_clip_to_open():
    np.testing.assert_allclose(clip_to_open(np.array([0.0, 0.5, 1.0]), 4), [0.1, 0.5, 0.9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], [[1.0], [2.0]]), "rewards are for 1 prompts, reference rewards for 2"),
        (([[1.0]], [[]]), "prompt 0 has no reference reward"),
        (([[1.0]], [[np.nan]]), "prompt 0 has no reference reward"),
        (([[1.0]], [[np.inf]]), "prompt 0 has an infinite reference reward"),
        (([[-np.inf]], [[1.0]]), "a reward is infinite"),
        (([[1.0]], [[1.0]], "rank"), "method 'rank' is unknown: use one of midrank, interpolated"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        calibrate(*arguments)
