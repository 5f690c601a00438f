"""Objectives compared at equal KL: what each wins there, and the paired difference to a reference.

Two objectives are never compared at equal beta, and hardly ever reach the same KL. So each is trained for several KLs,
and its win rate is interpolated along the measured ones: a monotone cubic (PCHIP) over sqrt(KL), in which the limit
itself starts as a straight line, from the base's own point (0 nats, 1/2). Outside the KLs that an objective was
measured at nothing is said.

All objectives are measured on the same prompts against the same base samples. Intervals resample prompts, with the same
prompts for all objectives, and carry KLs and win rates through the interpolation together (percentile bootstrap; Efron
& Tibshirani 1993, section 13.3). They hold for the policies that were trained: how another seed of training would have
come out is in `by_seed`, not in the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from infalign.types import InputError

Array = NDArray[np.float64]

RESAMPLES = 1000
_COINCIDE = 1e-6  # in sqrt(nats)


@dataclass(frozen=True)
class Curve:
    """One objective at one seed: its cells C, measured on the same P prompts.

    Attributes:
        keys: the prompts, in order.
        kl_CP: sequence KL of each cell on each prompt, nats.
        win_CP: win rate likewise.
    """

    keys: tuple[str, ...]
    kl_CP: Array
    win_CP: Array


@dataclass(frozen=True)
class AtKL:
    """An objective at one KL; NaN is outside of what was measured.

    Attributes:
        kl: nats.
        win, low, high: the interpolated win rate with its interval.
        difference, difference_low, difference_high: to the reference objective, paired; 0 for itself.
        by_seed, seeds: that difference for each seed that both have, and which.
    """

    kl: float
    win: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    by_seed: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()


def interpolated(kl_C: Array, win_C: Array, at_Q: Array) -> Array:
    """(Q,) win rates along an objective's cells; NaN outside their KLs.

    Args:
        kl_C: measured KLs of its cells, nats, in any order.
        win_C: their win rates.
        at_Q: nats.

    >>> interpolated(np.array([0.25, 1.0]), np.array([0.6, 0.7]), np.array([0.1, 0.25, 1.0, 2.0])).round(3).tolist()
    [nan, 0.6, 0.7, nan]
    """
    near = 1e-9 * np.abs(at_Q)  # a mean of equal numbers may be a rounding beside them
    outside = (at_Q < kl_C.min() - near) | (at_Q > kl_C.max() + near)
    return np.where(outside, np.nan, _along(kl_C, win_C, at_Q))


def _along(kl_C: Array, win_C: Array, at_Q: Array) -> Array:
    """Beyond the range the win rate at its end; KLs equal up to rounding count as one with the mean win rate."""
    order = np.argsort(kl_C)
    roots = np.sqrt(np.maximum(kl_C[order], 0.0))
    place_C = np.concatenate([[0], np.cumsum(np.diff(roots) > _COINCIDE)])
    nodes, wins = (np.bincount(place_C, values) / np.bincount(place_C) for values in (roots, win_C[order]))
    if nodes[0] > _COINCIDE:  # the base against itself
        nodes, wins = np.append(0.0, nodes), np.append(0.5, wins)
    if nodes.size < 2:
        return np.full(at_Q.shape, wins[0])
    return PchipInterpolator(nodes, wins)(np.clip(np.sqrt(at_Q), nodes[0], nodes[-1]))


def at_equal_kl(
    curves: Mapping[str, Mapping[int, Curve]],
    reference: str,
    at: Sequence[float],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, list[AtKL]]:
    """Every objective at every KL asked for, and its difference to the reference.

    Args:
        curves: of each objective by its seed. Curves of one seed have the same prompts.
        reference: the objective that the others are compared with.
        at: nats.
        confidence, seed, resamples: of the bootstrap.

    Returns:
        For each objective a row for each KL. Win rates are means over the seeds that all objectives share (over an
        objective's own, where there is none), differences over those that it shares with the reference. No intervals
        from a single prompt.

    Raises:
        InputError: the reference is none of the objectives, or curves of one seed have different prompts.
    """
    if reference not in curves:
        raise InputError(f"reference {reference!r} is none of the objectives: {', '.join(curves)}")
    keys = _prompts(curves)
    common = set.intersection(*(set(by_seed) for by_seed in curves.values()))
    if common:
        curves = {name: {one: by_seed[one] for one in sorted(common)} for name, by_seed in curves.items()}
    at_Q = np.asarray(at, dtype=np.float64)
    # the same resampled prompts for all objectives; seeds with the same prompts share them, too
    rng, drawn = np.random.default_rng(seed), {}
    for names in keys.values():
        drawn.setdefault(names, rng.integers(len(names), size=(resamples, len(names))))
    points: dict[str, dict[int, Array]] = {}
    clouds: dict[str, dict[int, Array]] = {}
    for name, by_seed in curves.items():
        points[name] = {one: interpolated(c.kl_CP.mean(1), c.win_CP.mean(1), at_Q) for one, c in by_seed.items()}
        clouds[name] = {one: _cloud(c, at_Q, drawn[keys[one]]) for one, c in by_seed.items()}
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]

    single = any(len(names) < 2 for names in keys.values())

    def interval(cloud_BQ: Array, point_Q: Array) -> tuple[Array, Array]:
        low_Q, high_Q = np.quantile(cloud_BQ, tails, axis=0)
        unknown = np.isnan(point_Q) | single
        return np.where(unknown, np.nan, low_Q), np.where(unknown, np.nan, high_Q)

    found: dict[str, list[AtKL]] = {}
    for name in curves:
        win_Q = np.mean(list(points[name].values()), axis=0)
        low_Q, high_Q = interval(np.mean(list(clouds[name].values()), axis=0), win_Q)
        shared = [one for one in points[name] if one in points[reference]]
        gaps = np.array([points[name][one] - points[reference][one] for one in shared]).reshape(len(shared), at_Q.size)
        gap_Q = gaps.mean(0) if shared else np.full(at_Q.size, np.nan)
        cloud = np.mean([clouds[name][one] - clouds[reference][one] for one in shared], axis=0) if shared else None
        gap_low_Q, gap_high_Q = (gap_Q, gap_Q) if cloud is None else interval(cloud, gap_Q)
        found[name] = [
            AtKL(
                kl=float(at_Q[q]),
                win=float(win_Q[q]),
                low=float(low_Q[q]),
                high=float(high_Q[q]),
                difference=float(gap_Q[q]),
                difference_low=float(gap_low_Q[q]),
                difference_high=float(gap_high_Q[q]),
                by_seed=tuple(gaps[:, q].tolist()),
                seeds=tuple(shared),
            )
            for q in range(at_Q.size)
        ]
    return found


def _prompts(curves: Mapping[str, Mapping[int, Curve]]) -> dict[int, tuple[str, ...]]:
    """The prompts of each seed."""
    keys: dict[int, tuple[str, ...]] = {}
    for name, by_seed in curves.items():
        for one, curve in by_seed.items():
            if keys.setdefault(one, curve.keys) != curve.keys:
                raise InputError(f"objective {name!r} was measured on other prompts than the others (seed {one})")
    return keys


def _cloud(curve: Curve, at_Q: Array, drawn_BP: NDArray[np.int64]) -> Array:
    """(B, Q) interpolated win rates on resampled prompts; beyond a resample's own KLs the one at their end."""
    kl_BC = curve.kl_CP[:, drawn_BP].mean(2).T
    win_BC = curve.win_CP[:, drawn_BP].mean(2).T
    return np.array([_along(kl_C, win_C, at_Q) for kl_C, win_C in zip(kl_BC, win_BC, strict=True)])
