"""What a sweep says: cells, one tidy table of all they measured, and objectives compared at equal KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infalign.evaluation.combined import Combination
from infalign.evaluation.limits import attainment, limit_at, regret_ratio
from infalign.evaluation.matched import AtKL, Curve, at_equal_kl
from infalign.evaluation.summary import GOLD, PROXY, DecoderRow
from infalign.evaluation.transfer import Transfer

if TYPE_CHECKING:
    from infalign.theory.procedures import Procedure

Array = NDArray[np.float64]
MERGED = "merge: "
"""What the objective's name of a cell starts with that was merged and not trained."""
LOST = "lost on "
"""What facts about held-out texts start with: nats a token more than the base."""
MULTIPLES = (2, 4, 8)
"""How many times the samples the untrained base is given, in rows of its own."""


@dataclass(frozen=True)
class PerPrompt:
    """P prompts: their keys, the KL on each in nats, and win rates by (judge, decoder), (P,) each."""

    keys: tuple[str, ...]
    kl_P: Array
    wins: Mapping[tuple[str, str], Array]


@dataclass(frozen=True)
class CellSamples:
    """What a sweep's own `cell` function returns, given a cell's keys: M samples a side on P prompts.

    Attributes:
        keys: names of the prompts, the same for all cells of a seed.
        kl_P: sequence KL on each prompt, nats.
        policy_PM, base_PM: rewards of samples; the base's are the same for all cells of a seed.
        exact: where it is known, the win rate by the repr of a decoder, and the KL as "kl".
    """

    keys: Sequence[str]
    kl_P: Array
    policy_PM: Array
    base_PM: Array
    exact: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CellResult:
    """A finished or failed cell.

    Attributes:
        name, arm, seed: its folder, the objective that it is a point of, the recipe's seed.
        varied: the grid's keys with its values.
        keys: everything that it was made of.
        error: why it failed, in one line; empty for a finished one.
        seconds: of wall time: what its policy cost in all attempts but those that were killed, and its measurement.
        procedure, transform: what was trained for.
        kl, kl_error: measured sequence KL in nats, with its standard error.
        tokens: of rollouts in training, prompts included.
        length: mean completion length of the policy, tokens.
        rows: the table of win rates.
        notes: what limited it, and what its stages warned of.
        exact: win rates by decoder, and "kl", where they are known without sampling.
        facts: further numbers, by name: `merge_gap`, nats.
        source: what it was made from beside its keys: the content of rewards and data, or of the cell function.
        measured_against: names the base's samples and the reward; cells of one seed are compared where they share them.
    """

    name: str
    arm: str
    seed: int
    varied: dict
    keys: dict
    error: str = ""
    seconds: float = math.nan
    procedure: str = ""
    transform: str = ""
    kl: float = math.nan
    kl_error: float = math.nan
    tokens: float = math.nan
    length: float = math.nan
    rows: tuple[DecoderRow, ...] = ()
    notes: tuple[str, ...] = ()
    exact: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    source: dict = field(default_factory=dict)
    measured_against: str = ""

    @property
    def finished(self) -> bool:
        """Whether it was measured."""
        return not self.error


@dataclass(frozen=True)
class Compared:
    """One objective under one decoder at one KL; `predicted` is what theory expects of the difference, NaN: unknown."""

    judge: str
    decoder: str
    arm: str
    at: AtKL
    limit: float
    predicted: float = math.nan


@dataclass(frozen=True)
class LimitCurve:
    """The most that any method reaches under a decoder (its repr): win rates along KLs in nats."""

    decoder: str
    kl: tuple[float, ...]
    limit: tuple[float, ...]


@dataclass(frozen=True)
class SweepResult:
    """Everything that a sweep's report shows.

    Attributes:
        reference: the arm that differences are to.
        confidence: of the intervals.
        cells: all of them, failures included, in order; those not made yet are missing.
        planned: how many there are in all.
        compared: at equal KL, by decoder, arm and KL.
        lacking: why there is no comparison; empty where there is one.
        limits: of every decoder that an arm is trained for.
        transfers: trained for N, decoded with another; empty unless arms differ in N.
        combination: each family's best policy under all terms; without families unless arms are combined.
    """

    reference: str
    confidence: float
    cells: tuple[CellResult, ...]
    planned: int
    compared: tuple[Compared, ...] = ()
    lacking: str = ""
    limits: tuple[LimitCurve, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    combination: Combination = field(default_factory=Combination)

    @property
    def arms(self) -> list[str]:
        """The objectives, in order."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def trained_for(self) -> list[str]:
        """The decoders that any arm was trained for, in order."""
        return list(dict.fromkeys(cell.procedure for cell in self.cells if cell.finished))


def tidy(result: SweepResult, procedures: Mapping[str, Procedure]) -> list[dict[str, Any]]:
    """One row for each cell, judge and decoder; a failed cell has one row with its error.

    Args:
        result: of the sweep.
        procedures: by their repr: each trained-for one also gets rows of the untrained base with more samples.

    `win_exact` and `kl_exact` are known where a sweep's cells enumerate. The rows of the base, with m times the samples
    of the decoder, are those of a reward without ties: Best-of-m as a policy has KL `log m - (m - 1)/m`, and decoded by
    Best-of-N it wins `m/(m + 1)`.
    """
    varied = list(dict.fromkeys(name for cell in result.cells for name in cell.varied))
    rows: list[dict[str, Any]] = []
    for cell in result.cells:
        point = {name: cell.varied.get(name) for name in varied}
        common = {"cell": cell.name, "arm": cell.arm, **point, "seed": cell.seed, "error": cell.error}
        of_cell = {
            "trained_for": cell.procedure,
            "kl": cell.kl,
            "kl_error": cell.kl_error,
            "seconds": cell.seconds,
            "rollout_tokens": cell.tokens,
            "length": cell.length,
            **cell.facts,
        }
        rows += [{**common, **of_cell, **_measured(row, cell)} for row in cell.rows] or [{**common, **of_cell}]
    best = [one for one in procedures.values() if one.name == "best_of_n" and repr(one) in result.trained_for]
    rows += [_untrained(procedure, count, result.cells[0].seed) for procedure in best for count in MULTIPLES]
    return rows


def _measured(row: DecoderRow, cell: CellResult) -> dict[str, Any]:
    controlled = row.length_controlled
    return {
        "judge": row.judge,
        "decoder": row.label,
        "n": row.n,
        "win": row.mean,
        "low": row.low,
        "high": row.high,
        "limit": row.limit,
        "attainment": row.attainment,
        "regret_ratio": row.regret_ratio,
        "win_equal_length": controlled.mean,
        "win_equal_length_low": controlled.low,
        "win_equal_length_high": controlled.high,
        "policy_reward": row.policy_reward,
        "base_reward": row.base_reward,
        "win_exact": cell.exact.get(row.label, math.nan),
        "kl_exact": cell.exact.get("kl", math.nan),
    }


def _untrained(procedure: Procedure, count: int, seed: int) -> dict[str, Any]:
    kl, wins = math.log(count) - (count - 1) / count, count / (count + 1)
    limit = limit_at(procedure, kl)
    return {
        "cell": f"base, {count} times the samples",
        "arm": f"base x{count}",
        "seed": seed,
        "error": "",
        "judge": PROXY,
        "decoder": repr(procedure),
        "n": count * procedure.n,
        "kl": kl,
        "win": wins,
        "limit": limit,
        "attainment": attainment(wins, limit, kl),
        "regret_ratio": regret_ratio(wins, limit),
        "win_exact": wins,
        "kl_exact": kl,
    }


def limit_curve(procedure: Procedure, largest: float, count: int = 40) -> LimitCurve:
    """The limit from 0 to a little beyond the largest KL, denser near 0."""
    kl_Q = (1.1 * max(largest, 0.05) * np.linspace(0.0, 1.0, count) ** 2).tolist()
    return LimitCurve(repr(procedure), tuple(kl_Q), tuple(limit_at(procedure, kl) for kl in kl_Q))


def common_kls(cells: Iterable[CellResult]) -> list[float]:
    """Three KLs that all objectives were measured around, rounded; empty where they have no range in common."""
    ranges: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        ranges.setdefault((cell.arm, cell.seed), []).append(cell.kl)
    if not ranges:
        return []
    low, high = max(map(min, ranges.values())), min(map(max, ranges.values()))
    if not 0 < low < high:
        return []
    inside = [math.ceil(100 * low) / 100, round(math.sqrt(low * high), 2), math.floor(100 * high) / 100]
    return [kl for kl in dict.fromkeys(inside) if low <= kl <= high]


def judged_decoders(cells: Sequence[CellResult], labels: Sequence[str]) -> list[tuple[str, str]]:
    """Judges with the decoders that objectives are compared under: those trained for, and each further term's own.

    Args:
        cells: finished ones.
        labels: decoders by their repr, in order.
    """
    trained = {cell.procedure for cell in cells}
    rows = [row for cell in cells for row in cell.rows]
    own = dict.fromkeys(
        (row.judge, row.label)
        for row in rows
        if not math.isnan(row.weight) or (row.judge in (PROXY, GOLD) and row.label in trained)
    )
    judges = list(dict.fromkeys(judge for judge, _ in own))
    return [(judge, label) for judge in judges for label in labels if (judge, label) in own]


def compare(
    cells: Sequence[CellResult],
    prompts: Mapping[str, PerPrompt],
    procedures: Mapping[str, Procedure],
    reference: str,
    at: Sequence[float],
    predict: Callable[[str, str, float], float],
    *,
    confidence: float,
    seed: int,
) -> tuple[tuple[Compared, ...], str]:
    """Objectives at equal KL under every decoder that one of them was trained for, and what stands in the way.

    Args:
        cells: finished ones.
        prompts: of each cell by its name.
        procedures: by their repr.
        reference: the arm that differences are to.
        at: nats; none: where all objectives were measured.
        predict: theory's win rate of an arm under a decoder (its repr) at a KL, NaN where it is not known.
        confidence, seed: of the bootstrap.
    """
    if reference not in {cell.arm for cell in cells}:
        return (), f"no cell of the reference {reference} has finished"
    at = list(at) or common_kls(cells)
    if not at:
        return (
            (),
            "the objectives' KLs do not overlap: give the grid several target_kl, and more steps where KLs fall short",
        )
    against = {cell.seed: cell.measured_against for cell in cells if cell.arm == reference}
    apart = [cell for cell in cells if cell.measured_against != against.get(cell.seed, cell.measured_against)]
    cells = [cell for cell in cells if cell not in apart]
    problems = []
    if apart:
        arms = ", ".join(dict.fromkeys(cell.arm for cell in apart))
        problems.append(f"{arms}: measured against another base or reward than {reference}, and left out")
    found: list[Compared] = []
    for judge, label in judged_decoders(cells, list(procedures)):
        curves, unshared = _curves(cells, prompts, judge, label)
        if unshared:
            return (), f"cells of seed {unshared[0]} have no test prompt in common"
        if reference not in curves:
            problems.append(f"{reference} was not measured under {label}: no comparison there")
            continue
        limits = {kl: limit_at(procedures[label], kl) if judge != GOLD else math.nan for kl in at}
        for arm, rows in at_equal_kl(curves, reference, at, confidence, seed).items():
            found += [
                Compared(
                    judge,
                    label,
                    arm,
                    row,
                    limits[row.kl],
                    predict(arm, label, row.kl) - predict(reference, label, row.kl) if judge == PROXY else math.nan,
                )
                for row in rows
            ]
    rivals = [one for one in found if one.arm != reference]
    nobody = [kl for kl in at if all(math.isnan(one.at.difference) for one in rivals if one.at.kl == kl)]
    if rivals and nobody:
        ranges = {arm: [cell.kl for cell in cells if cell.arm == arm] for arm in {cell.arm for cell in cells}}
        measured = ", ".join(f"{arm} {min(kls):.2f} to {max(kls):.2f}" for arm, kls in sorted(ranges.items()))
        asked = ", ".join(f"{kl:g}" for kl in nobody)
        problems.append(
            f"around {asked} nats {reference} and another objective were not both measured (measured: {measured}): "
            "change compare_at, or target_kl and the steps to reach it"
        )
    return tuple(found), "; ".join(dict.fromkeys(problems))


def _curves(
    cells: Sequence[CellResult], prompts: Mapping[str, PerPrompt], judge: str, label: str
) -> tuple[dict[str, dict[int, Curve]], list[int]]:
    """Each objective's cells under a decoder, by seed, on the prompts that all of the seed have; seeds without any."""
    groups: dict[str, dict[int, list[PerPrompt]]] = {}
    shared: dict[int, list[str]] = {}
    for cell in cells:
        mine = prompts[cell.name]
        if (judge, label) not in mine.wins:
            continue
        groups.setdefault(cell.arm, {}).setdefault(cell.seed, []).append(mine)
        kept = {key for key, wins in zip(mine.keys, mine.wins[judge, label], strict=True) if not math.isnan(wins)}
        shared[cell.seed] = [key for key in shared.get(cell.seed, mine.keys) if key in kept]
    empty = [seed for seed, keys in shared.items() if not keys]
    if empty:
        return {}, empty

    def row(one: PerPrompt, values_P: Array, seed: int) -> Array:
        place = {key: at for at, key in enumerate(one.keys)}
        return values_P[[place[key] for key in shared[seed]]]

    curves = {
        arm: {
            seed: Curve(
                tuple(shared[seed]),
                np.array([row(one, one.kl_P, seed) for one in group]),
                np.array([row(one, one.wins[judge, label], seed) for one in group]),
            )
            for seed, group in by_seed.items()
        }
        for arm, by_seed in groups.items()
    }
    return curves, []
