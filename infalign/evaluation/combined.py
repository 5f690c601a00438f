"""Mix or merge: policies that serve several terms at once, compared by what they keep of each term's expert.

A term's expert is the policy trained for it alone. What a policy keeps of it is its retention,
`(W - 1/2) / (W_expert - 1/2)` under the term's decoder and reward, and a policy's score is the least of its retentions
(MergeBench, arXiv:2505.10833, normalises by the expert likewise). Arms of a family are candidates of one search: the
best is chosen on one part of the test prompts and measured on the other, so that ten candidates are not ten chances.

Beside the terms stands what no policy was trained for: terms without a weight anywhere, and what one term's decoder
picks as another term's reward judges it.

Intervals resample the prompts, the same ones for all arms (percentile bootstrap), each seed's its own. They hold for
the policies that were trained.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infalign.evaluation.summary import GOLD

if TYPE_CHECKING:
    from infalign.evaluation.sweep import CellResult, PerPrompt

Array = NDArray[np.float64]
RESAMPLES = 1000
LEAST_GAIN = 0.02
"""What an expert must win above 1/2 for retention to be a number."""


@dataclass(frozen=True)
class Axis:
    """A term: its judge and decoder as rows name them, and the arm that is trained for it alone, empty without one."""

    judge: str
    decoder: str
    expert: str = ""


@dataclass(frozen=True)
class Interval:
    """A number with its interval; NaN is not known."""

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Combined:
    """A family's best arm at one point of the grid, on prompts that it was not chosen on.

    Attributes:
        family, arm: the search, and what it found.
        candidates: how many arms it had.
        at: the grid's keys with their values, without the seed.
        kl: measured, nats; the mean over seeds, like all that follows.
        wins, retentions: one for each axis.
        score: the least retention; without experts the least win rate.
        beside: a win rate for each row that nobody was trained for.
        difference: of the score to the reference family's, paired.
        validated: the score on the prompts that it was chosen on; NaN: there the least win rate chose.
        seconds: of all candidates and of everything that they were made from.
        facts: of the chosen arm's cells: `merge_gap`, nats on held-out texts.
    """

    family: str
    arm: str
    candidates: int
    at: dict
    kl: float
    wins: tuple[Interval, ...]
    retentions: tuple[Interval, ...]
    score: Interval
    difference: Interval
    validated: float
    seconds: float
    beside: tuple[Interval, ...] = ()
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Combination:
    """The terms, what nobody was trained for, and every family's best at every point of the grid."""

    axes: tuple[Axis, ...] = ()
    beside: tuple[Axis, ...] = ()
    families: tuple[Combined, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where a cell comes from.

    Attributes:
        family, arm: its search and itself, as the sweep calls them: without the grid's keys.
        parents: the cells that it was made from, by name.
        trained: and not merged.
    """

    family: str
    arm: str
    parents: tuple[str, ...] = ()
    trained: bool = True


def axes_of(cells: Sequence[CellResult], origins: Mapping[str, Origin]) -> tuple[list[Axis], list[Axis]]:
    """The terms that a cell was trained for, with their experts, and the rows that nobody was trained for."""
    found: dict[tuple[str, str], str] = {}
    beside: dict[tuple[str, str], None] = {}
    for cell in cells:
        weighted = {(row.judge, row.label): row.weight for row in cell.rows if not math.isnan(row.weight)}
        beside |= dict.fromkeys([*weighted, *((row.judge, row.label) for row in cell.rows if row.chosen_by)])
        origin = origins[cell.name]
        aims = [axis for axis, weight in weighted.items() if weight > 0] if origin.trained else []
        for axis in aims:
            found.setdefault(axis, "")
        if len(aims) == 1 and not origin.parents and not found[aims[0]]:
            found[aims[0]] = origin.arm
    ordered = [one for one in beside if one in found]  # as the recipe has them
    others = [Axis(*one) for one in beside if one not in found and one[0] != GOLD]
    return [Axis(judge, decoder, found[judge, decoder]) for judge, decoder in ordered], others


def combine(
    cells: Sequence[CellResult],
    prompts: Mapping[str, PerPrompt],
    origins: Mapping[str, Origin],
    reference: str,
    *,
    share: float,
    confidence: float,
    seed: int,
) -> Combination:
    """Every family's best at every point of the grid; no families where nothing is combined.

    Args:
        cells: finished ones.
        prompts: of each cell by its name.
        origins: likewise.
        reference: the family that differences are to, without the grid's keys.
        share: of the prompts, on which the best is chosen.
        confidence, seed: of the bootstrap.
    """
    axes, beside = axes_of(cells, origins)
    if len(axes) < 2 or not any(_combines(origins[cell.name]) for cell in cells):
        return Combination(tuple(axes), tuple(beside))
    found: list[Combined] = []
    for point in dict.fromkeys(map(_point, cells)):
        group = _complete([cell for cell in cells if _point(cell) == point], prompts, origins, axes)
        if group:
            wins = _measure(group, prompts, [*axes, *beside], share, seed)
            found += _families(group, wins, axes, cells, origins, reference, confidence)
    return Combination(tuple(axes), tuple(beside), tuple(found))


def _combines(origin: Origin) -> bool:
    """Whether a sweep with this cell asks for this comparison."""
    return not origin.trained or bool(origin.parents) or origin.family != origin.arm


def _point(cell: CellResult) -> str:
    return repr({name: value for name, value in cell.varied.items() if name != "seed"})


def in_validation(key: str, share: float) -> bool:
    """Whether a prompt is one of those that candidates are chosen on: by its key alone."""
    digest = hashlib.blake2b(f"validation/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


BySeed = Mapping[int, Mapping[str, "CellResult"]]
"""The cells of one point of the grid by seed and arm; every seed has the same arms in the same order."""


def _complete(
    cells: Sequence[CellResult],
    prompts: Mapping[str, PerPrompt],
    origins: Mapping[str, Origin],
    axes: Sequence[Axis],
) -> BySeed:
    """The cells that were measured on all axes, of the seeds that have all arms: another mean would not compare."""
    cells = [cell for cell in cells if all((one.judge, one.decoder) in prompts[cell.name].wins for one in axes)]
    arms = list(dict.fromkeys(origins[cell.name].arm for cell in cells))
    by_seed: dict[int, dict[str, CellResult]] = {}
    for cell in cells:
        by_seed.setdefault(cell.seed, {})[origins[cell.name].arm] = cell
    return {number: {arm: group[arm] for arm in arms} for number, group in by_seed.items() if len(group) == len(arms)}


@dataclass(frozen=True)
class _Wins:
    """Win rates, means over seeds: (A, X) of arms and axes on the prompts that choose and on the others, and these
    resampled, (A, X, R)."""

    chosen_on_AX: Array
    mean_AX: Array
    resampled_AXR: Array


def _measure(by_seed: BySeed, prompts: Mapping[str, PerPrompt], axes: Sequence[Axis], share: float, seed: int) -> _Wins:
    rng = np.random.default_rng(seed)
    found: list[tuple[Array, Array, Array]] = []
    for group in by_seed.values():
        wins_AXP, validation_P = _wins(group, prompts, axes, share)
        test_AXT = wins_AXP[..., ~validation_P]
        drawn_TR = _resampled(np.isfinite(test_AXT[0]), rng)
        found.append((_mean(wins_AXP[..., validation_P]), _mean(test_AXT), _mean(test_AXT, drawn_TR)))
    chosen_on, mean, resampled = (np.mean(one, axis=0) for one in zip(*found, strict=True))
    return _Wins(chosen_on[..., 0], mean[..., 0], resampled)


def _mean(wins_AXP: Array, drawn_PR: Array | None = None) -> Array:
    """(A, X, R) means over the prompts of each axis, a prompt counting as often as it was drawn; NaN without any."""
    drawn_PR = np.ones((wins_AXP.shape[-1], 1)) if drawn_PR is None else drawn_PR
    known = np.isfinite(wins_AXP)
    with np.errstate(invalid="ignore"):
        return (np.where(known, wins_AXP, 0.0) @ drawn_PR) / (known @ drawn_PR)


def _resampled(known_XP: NDArray[np.bool_], rng: np.random.Generator) -> Array:
    """(P, R): how often each prompt is drawn, as many as there are of those that are for the same axes."""
    drawn_PR = np.zeros((known_XP.shape[1], RESAMPLES))
    _, kind_P = np.unique(known_XP, axis=1, return_inverse=True)
    for kind in np.unique(kind_P):
        mine = np.flatnonzero(kind_P == kind)
        drawn_PR[mine] = rng.multinomial(mine.size, np.full(mine.size, 1 / mine.size), RESAMPLES).T
    return drawn_PR


def _families(
    by_seed: BySeed,
    wins: _Wins,
    axes: Sequence[Axis],
    cells: Sequence[CellResult],
    origins: Mapping[str, Origin],
    reference: str,
    confidence: float,
) -> list[Combined]:
    """Each family's arm that is best where it is chosen, with what it does elsewhere."""
    first = next(iter(by_seed.values()))
    arms, terms = list(first), len(axes)
    score = _scoring(axes, arms)
    with np.errstate(invalid="ignore", divide="ignore"):
        validated_A = score(wins.chosen_on_AX[:, :terms, None])[1][:, 0]
        kept_AX, score_A = (one[..., 0] for one in score(wins.mean_AX[:, :terms, None]))
        kept_AXR, score_AR = score(wins.resampled_AXR[:, :terms])
    families: dict[str, list[int]] = {}
    for place, arm in enumerate(arms):
        families.setdefault(origins[first[arm].name].family, []).append(place)
    # where an expert won too little to tell what is kept of it, the least win rate chooses
    told_A = wins.chosen_on_AX[:, :terms].min(1) if np.isnan(validated_A).any() else validated_A
    best = {
        family: max(places, key=lambda at: -math.inf if math.isnan(told_A[at]) else told_A[at])
        for family, places in families.items()
    }

    def interval(mean: float, resampled_R: Array) -> Interval:
        if math.isnan(mean) or np.isnan(resampled_R).any():
            return Interval(float(mean))
        low, high = np.quantile(resampled_R, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(float(mean), float(low), float(high))

    rows = []
    for family, at in best.items():
        mine = [of_seed[arms[at]] for of_seed in by_seed.values()]
        measured = [interval(wins.mean_AX[at, x], wins.resampled_AXR[at, x]) for x in range(wins.mean_AX.shape[1])]
        other = best.get(reference)
        candidates = [[of_seed[arms[one]] for one in families[family]] for of_seed in by_seed.values()]
        rows.append(
            Combined(
                family=family,
                arm=arms[at],
                candidates=len(families[family]),
                at={name: value for name, value in mine[0].varied.items() if name != "seed"},
                kl=float(np.mean([cell.kl for cell in mine])),
                wins=tuple(measured[:terms]),
                retentions=tuple(interval(kept_AX[at, x], kept_AXR[at, x]) for x in range(terms)),
                score=interval(score_A[at], score_AR[at]),
                difference=Interval()
                if other is None
                else interval(score_A[at] - score_A[other], score_AR[at] - score_AR[other]),
                validated=float(validated_A[at]),
                seconds=float(np.mean([_seconds(one, cells, origins) for one in candidates])),
                beside=tuple(measured[terms:]),
                facts={
                    name: float(np.mean([cell.facts.get(name, math.nan) for cell in mine]))
                    for name in sorted(mine[0].facts)
                },
            )
        )
    return rows


def _wins(
    group: Mapping[str, CellResult], prompts: Mapping[str, PerPrompt], axes: Sequence[Axis], share: float
) -> tuple[Array, NDArray[np.bool_]]:
    """(A, X, P) win rates on the prompts that all arms of a seed have, NaN where an axis is for others, and which of
    them choose."""
    kept = set.intersection(*(set(prompts[cell.name].keys) for cell in group.values()))
    first = prompts[next(iter(group.values())).name].keys
    keys = [key for key in first if key in kept]
    wins = np.full((len(group), len(axes), len(keys)), np.nan)
    for a, cell in enumerate(group.values()):
        mine = prompts[cell.name]
        place = {key: at for at, key in enumerate(mine.keys)}
        rows = [place[key] for key in keys]
        for x, one in enumerate(axes):
            if (one.judge, one.decoder) in mine.wins:  # further rows may be missing in cells of earlier versions
                wins[a, x] = mine.wins[one.judge, one.decoder][rows]
    return wins, np.array([in_validation(key, share) for key in keys], dtype=bool)


def _scoring(axes: Sequence[Axis], arms: Sequence[str]) -> Callable[[Array], tuple[Array, Array]]:
    """Retentions (arms, axes, R) and scores (arms, R) of win rates (arms, axes, R).

    Without an expert of each axis anywhere the score is the least win rate; where one is missing at this point of the
    grid there is none.
    """
    everywhere, here = all(axis.expert for axis in axes), all(axis.expert in arms for axis in axes)
    experts = [arms.index(axis.expert) for axis in axes] if here else []

    def score(wins_AXR: Array) -> tuple[Array, Array]:
        if not here:
            nothing = np.full_like(wins_AXR, np.nan)
            return nothing, nothing[:, 0] if everywhere else wins_AXR.min(1)
        gain_XR = np.stack([wins_AXR[expert, axis] for axis, expert in enumerate(experts)]) - 0.5
        kept = (wins_AXR - 0.5) / np.where(gain_XR > LEAST_GAIN, gain_XR, np.nan)
        return kept, kept.min(1)

    return score


def _seconds(candidates: Sequence[CellResult], cells: Sequence[CellResult], origins: Mapping[str, Origin]) -> float:
    """Of the candidates and, once each, of all cells that they were made from."""
    by_name = {cell.name: cell for cell in cells}
    wanted, met = [cell.name for cell in candidates], dict[str, float]()
    while wanted:
        name = wanted.pop()
        if name not in met:
            met[name] = by_name[name].seconds if name in by_name else math.nan
            wanted += origins[name].parents if name in origins else ()
    return sum(met.values())


def columns(axes: Sequence[Axis]) -> list[str]:
    """The axes in words."""
    return [f"{axis.decoder}, {axis.judge}" for axis in axes]


def as_rows(found: Combination) -> list[dict[str, Any]]:
    """A row of a tidy table each."""
    rows = []
    for one in found.families:
        row: dict[str, Any] = {"family": one.family, "arm": one.arm, "candidates": one.candidates}
        row |= {**one.at, "kl": one.kl}
        for name, wins, kept in zip(columns(found.axes), one.wins, one.retentions, strict=True):
            row |= {f"win {name}": wins.mean, f"win {name} low": wins.low, f"win {name} high": wins.high}
            row |= {f"retention {name}": kept.mean}
        row |= {"score": one.score.mean, "score low": one.score.low, "score high": one.score.high}
        row |= {"difference": one.difference.mean, "difference low": one.difference.low}
        row |= {"difference high": one.difference.high, "validated": one.validated, "seconds": one.seconds}
        for name, wins in zip(columns(found.beside), one.beside, strict=True):
            row |= {f"win {name}": wins.mean, f"win {name} low": wins.low, f"win {name} high": wins.high}
        row |= one.facts
        rows.append(row)
    return rows
