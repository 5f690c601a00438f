"""The simulation of many GPUs: its parts against arithmetic by hand, laws, and what was measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infalign.training.memory import cache_bytes_per_token

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import scale

PLAIN = scale.Engine("plain", per_layer=1e-4, per_row=1e-5)
JOB = scale.Job(groups=32, steps=10)

# `python recipes/scale.py --measure` on two idle cores of an AMD EPYC with AVX-512, one thread: the points that
# constants are fitted to with their seconds, those of a pass of the last one (from the printed prediction, two digits),
# and what the deeper model took: decoding 16 and 64 rows, a reference pass, forward and backward
RECORDED_POINTS = [(2, 8, 2_499_840), (2, 32, 7_948_800), (4, 16, 3_975_424), (4, 64, 13_849_088)]
RECORDED_SMALL = [0.265, 0.813, 0.490, 3.983]
RECORDED_PASS = 0.926
RECORDED_LARGE_POINTS = [(6, 16, 19_749_376), (6, 64, 19_749_376)]
RECORDED_LARGE = [1.99, 7.75, 1.30, 4.38]


def test_formula_is_near_what_was_measured():
    for *_, ratio in scale.checked().rows:
        assert 0.8 < float(ratio) < 1.25


def by_the_token(lengths, slots, prompt):
    """The same simulation, one token at a time and row by row."""
    waiting, rows, seconds = list(lengths), [], 0.0
    while waiting or rows:
        while waiting and len(rows) < slots:
            rows.append([waiting.pop(0), 0])
        cached = sum(done + 0.5 + prompt for _, done in rows)
        read = 2 * scale.ONE_B.parameters + cached * cache_bytes_per_token(scale.ONE_B, 2)
        seconds += 16 * 1e-4 + len(rows) * 1e-5 + read / (3.35e12 * 0.6)
        rows = [[left - 1, done + 1] for left, done in rows if left > 1]
    return seconds


def test_decoding_is_the_sum_of_its_tokens():
    lengths, engine = np.array([3, 9, 1, 4, 4, 7]), replace(PLAIN, refills=True)
    found = scale.decoding(scale.ONE_B, scale.H100, engine, lengths, 5.0, slots=3)
    assert found == pytest.approx(by_the_token(lengths, 3, 5.0), rel=1e-12)


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_refilled_batches_are_not_slower(slots):
    lengths = JOB.lengths(64)
    waits = scale.decoding(scale.SEVEN_B, scale.H100, PLAIN, lengths, 64, slots)
    refills = scale.decoding(scale.SEVEN_B, scale.H100, replace(PLAIN, refills=True), lengths, 64, slots)
    longest = scale.decoding(scale.SEVEN_B, scale.H100, PLAIN, lengths[[lengths.argmax()]], 64, 1)
    assert longest <= refills <= waits
    assert (refills == waits) == (slots == 1 or slots >= 64)


def test_more_gpus_never_draw_faster_than_the_longest_completion():
    found = [scale.step(scale.SEVEN_B, gpus, PLAIN, JOB) for gpus in (8, 32, 256)]
    longest = JOB.lengths(JOB.groups * JOB.group).max()
    alone = scale.decoding(scale.SEVEN_B, scale.H100, PLAIN, np.array([longest]), JOB.prompt / JOB.group, 1)
    assert found[0].rollouts > found[1].rollouts > found[2].rollouts > alone
    assert found[0].policy == pytest.approx(32 * found[2].policy)


def test_weights_that_do_not_fit_are_told():
    whole = scale.step(scale.SEVENTY_B, 512, PLAIN, JOB)
    split = scale.step(scale.SEVENTY_B, 512, replace(PLAIN, split=4), JOB)
    assert not whole.fits and split.fits and np.isinf(whole.rollouts) and np.isfinite(split.seconds)
    shown = scale.table(JOB, 3).rows
    assert {len(row) for row in shown} == {len(scale.table(JOB, 3).heads)}
    assert [row[4] for row in shown if row[0] == "70B"].count("does not fit") >= 3


def test_constants_come_back_from_timings():
    """Whatever a layer, a row and a row's parameter cost: timings by the formula give them back, in any unit."""
    points = [(2, 8, 2_000_000), (2, 32, 6_000_000), (4, 16, 3_000_000), (4, 64, 12_000_000)]
    wanted = [(6, 16, 20_000_000), (80, 1, 70_000_000), (1, 512, 1000)]

    def cost(layers, rows, size):
        return layers * 3e-4 + rows * 2e-5 + rows * size * 4e-11

    found = scale.extrapolated(points, [cost(*one) for one in points], wanted)
    np.testing.assert_allclose(found, [cost(*one) for one in wanted], rtol=1e-9)
    tenfold = scale.extrapolated(points, [10 * cost(*one) for one in points], wanted)
    np.testing.assert_allclose(tenfold, 10 * np.array(found), rtol=1e-9)


def test_recorded_timings_predict_the_deeper_model():
    """Within a factor of two, from CPU seconds taken once on two idle cores: a clock would depend on its neighbours."""
    decoded = scale.extrapolated(RECORDED_POINTS, RECORDED_SMALL, RECORDED_LARGE_POINTS)
    passes = scale.scaled_pass(RECORDED_PASS, RECORDED_POINTS[-1][2], RECORDED_LARGE_POINTS[0][2])
    for said, found in zip([*decoded, *passes], RECORDED_LARGE, strict=True):
        assert 0.5 < said / found < 2.0


@pytest.mark.slow
def test_measuring_fills_its_table():
    rows = scale.measure(repeats=1).rows
    assert len(rows) == 4
    for _, said, found, ratio in rows:
        assert float(said) > 0 and float(found) > 0 and float(ratio) > 0
