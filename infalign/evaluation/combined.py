"""Mix or merge: policies that serve several terms at once, compared by what they keep of each term's expert.

A term's expert is the policy trained for it alone. What a policy keeps of it is its retention,
`(W - 1/2) / (W_expert - 1/2)` under the term's decoder and reward, and a policy's score is the least of its retentions
(MergeBench, arXiv:2505.10833, normalises by the expert likewise). Arms of a family are candidates of one search: the
best is chosen on one part of the test prompts and measured on the other, so that ten candidates are not ten chances.

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
        difference: of the score to the reference family's, paired.
        validated: the score on the prompts that it was chosen on.
        seconds: of all candidates and of everything that they were made from.
        facts: of the chosen arm's cells: `merge_gap`.
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
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Where a cell comes from: its family, the cells that it was made from, and whether it was trained."""

    family: str
    parents: tuple[str, ...] = ()
    trained: bool = True


def axes_of(cells: Sequence[CellResult], origins: Mapping[str, Origin]) -> list[Axis]:
    """The terms that the cells' tables have weights for, with their experts; fewer than two: nothing to combine."""
    found: dict[tuple[str, str], str] = {}
    for cell in cells:
        weighted = {(row.judge, row.label): row.weight for row in cell.rows if not math.isnan(row.weight)}
        alone = [axis for axis, weight in weighted.items() if weight > 0]
        for axis in weighted:
            found.setdefault(axis, "")
        origin = origins[cell.name]
        if len(alone) == 1 and origin.trained and not origin.parents and not found[alone[0]]:
            found[alone[0]] = cell.arm
    return [Axis(judge, decoder, expert) for (judge, decoder), expert in found.items()]


def combine(
    cells: Sequence[CellResult],
    prompts: Mapping[str, PerPrompt],
    origins: Mapping[str, Origin],
    reference: str,
    *,
    share: float,
    confidence: float,
    seed: int,
) -> tuple[list[Axis], list[Combined]]:
    """Every family's best at every point of the grid.

    Args:
        cells: finished ones.
        prompts: of each cell by its name.
        origins: likewise.
        reference: the family that differences are to.
        share: of the prompts, on which the best is chosen.
        confidence, seed: of the bootstrap.
    """
    axes = axes_of(cells, origins)
    if len(axes) < 2 or not any(_combines(cell, origins[cell.name]) for cell in cells):
        return axes, []
    found: list[Combined] = []
    for point in dict.fromkeys(map(_point, cells)):
        group = [cell for cell in cells if _point(cell) == point]
        found += _at_point(group, prompts, origins, axes, reference, share, confidence, seed)
    return axes, found


def _combines(cell: CellResult, origin: Origin) -> bool:
    """Whether a sweep with this cell asks for this comparison."""
    return not origin.trained or bool(origin.parents) or origin.family != cell.arm


def _point(cell: CellResult) -> str:
    return repr({name: value for name, value in cell.varied.items() if name != "seed"})


def in_validation(key: str, share: float) -> bool:
    """Whether a prompt is one of those that candidates are chosen on: by its key alone."""
    digest = hashlib.blake2b(f"validation/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def _at_point(
    cells: Sequence[CellResult],
    prompts: Mapping[str, PerPrompt],
    origins: Mapping[str, Origin],
    axes: Sequence[Axis],
    reference: str,
    share: float,
    confidence: float,
    seed: int,
) -> list[Combined]:
    wanted = [(axis.judge, axis.decoder) for axis in axes]
    cells = [cell for cell in cells if all(one in prompts[cell.name].wins for one in wanted)]
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    by_seed = {
        number: {cell.arm: cell for cell in cells if cell.seed == number}
        for number in dict.fromkeys(cell.seed for cell in cells)
    }
    # seeds that all arms have: a mean over other seeds would be another comparison
    by_seed = {number: group for number, group in by_seed.items() if len(group) == len(arms)}
    if not by_seed:
        return []
    rng = np.random.default_rng(seed)
    chosen_on, measured_on, resampled = [], [], []
    for group in by_seed.values():
        wins_AXP, validation_P = _wins(group, prompts, arms, wanted, share)
        for part, into in ((validation_P, chosen_on), (~validation_P, measured_on)):
            into.append(wins_AXP[..., part].mean(-1))
        test = wins_AXP[..., ~validation_P]
        count = test.shape[-1]
        weights_PR = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).T / max(count, 1)
        resampled.append(test @ weights_PR)
    validated_AX, wins_AX, wins_AXR = (np.mean(one, axis=0) for one in (chosen_on, measured_on, resampled))
    experts = [arms.index(axis.expert) if axis.expert in arms else -1 for axis in axes]
    score = _scoring(experts)
    with np.errstate(invalid="ignore", divide="ignore"):
        validated_A = score(validated_AX[..., None])[1][:, 0]
        kept_AX, score_A = (one[..., 0] for one in score(wins_AX[..., None]))
        kept_AXR, score_AR = score(wins_AXR)
    families: dict[str, list[int]] = {}
    for place, arm in enumerate(arms):
        cell = next(iter(by_seed.values()))[arm]
        families.setdefault(origins[cell.name].family, []).append(place)
    best = {
        family: max(places, key=lambda at: -math.inf if math.isnan(validated_A[at]) else validated_A[at])
        for family, places in families.items()
    }

    def interval(mean: float, resampled_R: Array) -> Interval:
        if math.isnan(mean) or np.isnan(resampled_R).any():
            return Interval(mean)
        low, high = np.quantile(resampled_R, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(mean, float(low), float(high))

    rows = []
    for family, at in best.items():
        group = [of_seed[arms[at]] for of_seed in by_seed.values()]
        difference = Interval()
        if reference in best:
            other = best[reference]
            difference = interval(float(score_A[at] - score_A[other]), score_AR[at] - score_AR[other])
        facts = {
            name: float(np.mean([cell.facts.get(name, math.nan) for cell in group])) for name in sorted(group[0].facts)
        }
        spent = [
            _seconds([of_seed[arms[one]] for one in families[family]], cells, origins) for of_seed in by_seed.values()
        ]
        rows.append(
            Combined(
                family=family,
                arm=arms[at],
                candidates=len(families[family]),
                at={name: value for name, value in group[0].varied.items() if name != "seed"},
                kl=float(np.mean([cell.kl for cell in group])),
                wins=tuple(interval(float(wins_AX[at, x]), wins_AXR[at, x]) for x in range(len(axes))),
                retentions=tuple(interval(float(kept_AX[at, x]), kept_AXR[at, x]) for x in range(len(axes))),
                score=interval(float(score_A[at]), score_AR[at]),
                difference=difference,
                validated=float(validated_A[at]),
                seconds=float(np.mean(spent)),
                facts=facts,
            )
        )
    return rows


def _wins(
    group: Mapping[str, CellResult],
    prompts: Mapping[str, PerPrompt],
    arms: Sequence[str],
    wanted: Sequence[tuple[str, str]],
    share: float,
) -> tuple[Array, NDArray[np.bool_]]:
    """(arms, axes, P) win rates on the prompts that all arms of a seed have, and which of them choose."""
    kept = set.intersection(*(set(prompts[group[arm].name].keys) for arm in arms))
    first = prompts[group[arms[0]].name].keys
    keys = [key for key in first if key in kept]
    wins = np.empty((len(arms), len(wanted), len(keys)))
    for a, arm in enumerate(arms):
        mine = prompts[group[arm].name]
        place = {key: at for at, key in enumerate(mine.keys)}
        rows = [place[key] for key in keys]
        for x, one in enumerate(wanted):
            wins[a, x] = mine.wins[one][rows]
    return wins, np.array([in_validation(key, share) for key in keys])


def _scoring(experts: Sequence[int]) -> Callable[[Array], tuple[Array, Array]]:
    """Retentions (arms, axes, R) and scores (arms, R) of win rates (arms, axes, R)."""

    def score(wins_AXR: Array) -> tuple[Array, Array]:
        if min(experts) < 0:
            return np.full_like(wins_AXR, np.nan), wins_AXR.min(1)
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


def as_rows(found: Sequence[Combined], axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """A row of a tidy table each."""
    rows = []
    for one in found:
        row: dict[str, Any] = {"family": one.family, "arm": one.arm, "candidates": one.candidates}
        row |= {**one.at, "kl": one.kl}
        for name, wins, kept in zip(columns(axes), one.wins, one.retentions, strict=True):
            row |= {f"win {name}": wins.mean, f"win {name} low": wins.low, f"win {name} high": wins.high}
            row |= {f"retention {name}": kept.mean}
        row |= {"score": one.score.mean, "score low": one.score.low, "score high": one.score.high}
        row |= {"difference": one.difference.mean, "difference low": one.difference.low}
        row |= {"difference high": one.difference.high, "validated": one.validated, "seconds": one.seconds, **one.facts}
        rows.append(row)
    return rows
