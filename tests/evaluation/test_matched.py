"""Objectives at equal KL: interpolation along known curves, pairing, coverage of intervals, dashes outside."""

from __future__ import annotations

import numpy as np
import pytest

from infalign import BestOfN, tilt, transforms, win_rate_limit
from infalign.evaluation.matched import AtKL, Curve, at_equal_kl, interpolated
from infalign.types import InputError

PROCEDURE = BestOfN(4)


def identity_win(kl):
    return tilt(transforms.identity, kl=kl).win_rate(PROCEDURE)


@pytest.mark.parametrize("kl", [0.25, 0.4, 0.7, 1.0, 1.6, 2.0])
@pytest.mark.parametrize("law", [identity_win, lambda kl: float(win_rate_limit(PROCEDURE, kl))])
def test_it_follows_the_exact_curves(kl, law):
    """From four KLs of a sweep, within .002 of the curve between them."""
    kls = np.array([0.22, 0.5, 1.1, 2.2])
    wins = np.array([law(one) for one in kls])
    assert interpolated(kls, wins, np.array([kl]))[0] == pytest.approx(law(kl), abs=2e-3)


def test_order_and_repetition_of_cells_do_not_matter():
    kls, wins, at = np.array([1.0, 0.2, 0.5, 0.5]), np.array([0.9, 0.7, 0.82, 0.8]), np.array([0.3, 0.5, 0.8])
    found = interpolated(kls, wins, at)
    np.testing.assert_allclose(found, interpolated(np.array([0.2, 0.5, 1.0]), np.array([0.7, 0.81, 0.9]), at))
    assert found[1] == pytest.approx(0.81)


def test_between_rising_cells_it_rises():
    kls, wins = np.array([0.1, 0.5, 0.55, 2.0]), np.array([0.6, 0.61, 0.9, 0.91])
    grid = np.linspace(0.1, 2.0, 300)
    assert (np.diff(interpolated(kls, wins, grid)) >= -1e-12).all()


def test_nothing_is_said_outside():
    curves = {"one": {0: exactly([0.3, 1.0], [0.6, 0.7])}, "two": {0: exactly([0.5, 2.0], [0.6, 0.7])}}
    found = at_equal_kl(curves, "two", [0.2, 0.4, 0.5, 1.0, 1.5], resamples=50)
    assert [np.isnan(row.win) for row in found["one"]] == [True, False, False, False, True]
    assert [np.isnan(row.difference) for row in found["one"]] == [True, True, False, False, True]
    assert [np.isnan(row.difference_low) for row in found["one"]] == [True, True, False, False, True]
    one_cell = at_equal_kl({"one": {0: exactly([0.5], [0.6])}}, "one", [0.4, 0.5, 0.6], resamples=50)
    assert [np.isnan(row.win) for row in one_cell["one"]] == [True, False, True]


def curve(kls, wins, prompts=30, noise=0.0, rng=None, shared=None):
    """Cells of given means, with noise over prompts, part of which all cells share."""
    rng = rng or np.random.default_rng(0)
    shared = np.zeros(prompts) if shared is None else shared
    own = noise * rng.normal(size=(len(kls), prompts))
    return Curve(
        tuple(map(str, range(prompts))),
        np.array(kls)[:, None] * (1.0 + 0.3 * rng.normal(size=(len(kls), prompts))),
        np.array(wins)[:, None] + own + shared,
    )


def exactly(kls, wins, prompts=30):
    return Curve(tuple(map(str, range(prompts))), np.tile(kls, (prompts, 1)).T, np.tile(wins, (prompts, 1)).T)


def test_without_noise_differences_are_exact_and_have_no_width():
    """Cells of both lie at other KLs; what is reported is the difference of the curves at the KLs asked for."""
    ours, theirs = np.array([0.2, 0.6, 1.3]), np.array([0.25, 0.5, 1.1])
    curves = {
        "optimal": {7: exactly(ours, [float(win_rate_limit(PROCEDURE, one)) for one in ours])},
        "identity": {7: exactly(theirs, [identity_win(one) for one in theirs])},
    }
    found = at_equal_kl(curves, "identity", [0.5, 1.0], resamples=50)
    for row in found["optimal"]:
        assert row.difference == pytest.approx(win_rate_limit(PROCEDURE, row.kl) - identity_win(row.kl), abs=3e-3)
        assert row.difference_low == pytest.approx(row.difference) == row.difference_high
    assert [row.difference for row in found["identity"]] == [0.0, 0.0]
    assert found["optimal"][1].difference == pytest.approx(0.064, abs=3e-3)  # theory.md, section 5


def test_pairing_takes_out_what_prompts_share():
    rng = np.random.default_rng(1)
    shared = 0.1 * rng.normal(size=200)
    curves = {
        name: {0: curve([0.3, 1.0], [0.6 + gap, 0.7 + gap], 200, 0.02, rng, shared)}
        for name, gap in (("better", 0.05), ("plain", 0.0))
    }
    row = at_equal_kl(curves, "plain", [0.6])["better"][0]
    assert row.difference == pytest.approx(0.05, abs=0.02)
    assert row.difference_high - row.difference_low < 0.6 * (row.high - row.low)


@pytest.mark.slow
def test_intervals_cover():
    """A true difference of .03 at 90 %: inside in 83 to 96 of 100 data sets of 60 prompts."""
    inside = 0
    for number in range(100):
        rng = np.random.default_rng(number)
        curves = {
            name: {0: curve([0.3, 1.0], [0.6 + gap, 0.7 + gap], 60, 0.1, rng)}
            for name, gap in (("better", 0.03), ("plain", 0.0))
        }
        row = at_equal_kl(curves, "plain", [0.6], confidence=0.9, seed=number, resamples=400)["better"][0]
        inside += row.difference_low <= 0.03 <= row.difference_high
    assert 83 <= inside <= 97


def test_seeds_are_averaged_and_told():
    curves = {
        "a": {1: exactly([0.2, 1.0], [0.6, 0.8]), 2: exactly([0.2, 1.0], [0.62, 0.84]), 3: exactly([0.2, 1.0], [0, 0])},
        "b": {1: exactly([0.2, 1.0], [0.6, 0.7]), 2: exactly([0.2, 1.0], [0.6, 0.7])},
    }
    row = at_equal_kl(curves, "b", [1.0], resamples=20)["a"][0]
    assert row.by_seed == pytest.approx((0.1, 0.14)) and row.difference == pytest.approx(0.12)
    assert row.win == pytest.approx(0.82) and row.seeds == (1, 2)  # the third seed is not all objectives'


def test_a_single_prompt_has_no_interval():
    curves = {name: {0: exactly([0.2, 1.0], [0.6, 0.7 + gap], prompts=1)} for name, gap in (("a", 0.1), ("b", 0.0))}
    row = at_equal_kl(curves, "b", [0.5], resamples=20)["a"][0]
    assert row.difference > 0 and np.isnan([row.low, row.high, row.difference_low, row.difference_high]).all()


def test_a_resample_with_other_kls_is_not_extrapolated():
    """Three prompts of very uneven KL: intervals stay within what was measured."""
    kl_CP = np.array([[0.01, 0.02, 0.5], [0.02, 0.05, 2.4]])
    curves = {name: {0: Curve(("a", "b", "c"), kl_CP, np.array([[0.5, 0.6, 0.7], [0.6, 0.8, 1.0]]))} for name in "xy"}
    row = at_equal_kl(curves, "y", [0.5])["x"][0]
    assert 0.4 <= row.low <= row.high <= 1.0


def test_a_kl_at_the_end_is_measured():
    """The mean of twelve 0.2 is a rounding below."""
    assert not np.isnan(interpolated(np.array([np.mean([0.2] * 12), 1.0]), np.array([0.6, 0.7]), np.array([0.2])))[0]


def test_an_objective_of_other_seeds_has_no_difference():
    curves = {"a": {1: exactly([0.2, 1.0], [0.6, 0.8])}, "b": {2: exactly([0.2, 1.0], [0.6, 0.7])}}
    row = at_equal_kl(curves, "b", [0.5], resamples=20)["a"][0]
    assert np.isnan(row.difference) and row.by_seed == () and not np.isnan(row.win)


def test_mistakes():
    curves = {"a": {0: exactly([0.2], [0.6])}, "b": {0: exactly([0.2], [0.6], prompts=3)}}
    with pytest.raises(InputError, match="reference 'c' is none of the objectives: a, b"):
        at_equal_kl(curves, "c", [0.2])
    with pytest.raises(InputError, match="'b' was measured on other prompts than the others"):
        at_equal_kl(curves, "a", [0.2])
    assert isinstance(at_equal_kl({"a": curves["a"]}, "a", [0.2], resamples=5)["a"][0], AtKL)


@pytest.mark.parametrize("beside", [0.0, 1e-17, 1e-13])
def test_cells_that_end_at_one_kl_count_as_one(beside):
    """Two cells at the same KL, or a rounding beside it, also at 0 nats: the mean of their win rates, and no error."""
    found = interpolated(np.array([0.3 + beside, 1.0, 0.3]), np.array([0.6, 0.8, 0.7]), np.array([0.3, 1.0]))
    assert found == pytest.approx([0.65, 0.8], abs=1e-6)
    assert interpolated(np.array([beside, 0.0]), np.array([0.5, 0.52]), np.array([0.0])) == pytest.approx([0.51])
