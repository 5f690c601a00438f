"""What is said of a decoder: its win rate beside the limit, at equal length, and the rewards that it picks.

One row a decoder and judge, which evaluate, compare and the report share; JSON is written from it and read into it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from infalign.evaluation.length import LengthControlled, Side, decoded_reward, length_controlled_win_rate
from infalign.evaluation.limits import attainment, regret_ratio
from infalign.evaluation.winrate import judged_win_rate, win_rate
from infalign.theory.optimum import win_rate_limit
from infalign.theory.procedures import BestOfN, WorstOfN

if TYPE_CHECKING:
    from infalign.theory.procedures import Procedure

PROXY, GOLD = "reward", "gold"
"""Judges: the reward that decodes, or another one."""


@dataclass(frozen=True)
class DecoderRow:
    """The policy against the base, both decoded by one procedure. NaN is what is not known.

    Attributes:
        label, kind, n: the procedure's repr, its name and the candidates it draws.
        judge: "reward" or "gold".
        mean, low, high: the win rate with its interval over prompts.
        length_controlled: the win rate at equal length.
        limit, attainment, regret_ratio: against the best that any method reaches at the measured KL; of the reward
            that decodes alone.
        policy_reward, base_reward: mean judged reward of what is picked.
    """

    label: str
    kind: str
    n: int
    judge: str
    mean: float
    low: float
    high: float
    length_controlled: LengthControlled
    limit: float
    attainment: float
    regret_ratio: float
    policy_reward: float
    base_reward: float


def decoder_row(
    policy: Side, base: Side, procedure: Procedure, judge: str, *, kl: float | None, confidence: float, seed: int
) -> DecoderRow:
    """Measure one decoder.

    Args:
        policy, base: P prompts each.
        procedure: decodes both sides.
        judge: `PROXY` (then what judges is what decodes) or `GOLD`.
        kl: measured, in nats, for the limit; None where it is not known.
        confidence, seed: of the intervals.

    Raises:
        InputError: another number of prompts, or a prompt with too few scored samples.
    """
    if judge == PROXY:
        found = win_rate(policy.proxy, base.proxy, procedure, confidence, seed)
    else:
        sides = ((policy.proxy, policy.judge), (base.proxy, base.judge))
        found = judged_win_rate(*sides, procedure, confidence, seed)
    limit = math.nan
    if judge == PROXY and kl is not None:  # a gold judge is not what decodes: the limit does not hold for it
        limit = float(win_rate_limit(procedure, max(kl, 0.0)))
    return DecoderRow(
        label=repr(procedure),
        kind=procedure.name,
        n=procedure.n,
        judge=judge,
        mean=found.mean,
        low=found.low,
        high=found.high,
        length_controlled=length_controlled_win_rate(policy, base, procedure, confidence, seed),
        limit=limit,
        attainment=attainment(found.mean, limit, kl or 0.0),
        regret_ratio=regret_ratio(found.mean, limit),
        policy_reward=decoded_reward(policy, procedure),
        base_reward=decoded_reward(base, procedure),
    )


def decoders(procedure: Procedure, sizes: Iterable[int]) -> list[Procedure]:
    """The procedure, then Best-of-N and Worst-of-N of every size, each once."""
    return list(dict.fromkeys([procedure, *(kind(n) for kind in (BestOfN, WorstOfN) for n in sizes)]))


def ordered_labels(rows: Sequence[DecoderRow]) -> list[str]:
    """The decoders of the rows, each once: one sample, then Best-of-N, other ones, Worst-of-N, by N."""
    rank = {"best_of_n": 1, "worst_of_n": 3}
    found = {row.label: (0 if row.n == 1 else rank.get(row.kind, 2), row.n) for row in rows}
    return sorted(found, key=lambda label: found[label])


def row_from_json(given: Mapping[str, Any]) -> DecoderRow:
    """A row of evaluation.json, which says null for NaN; what an older version did not measure is NaN."""
    controlled = given.get("length_controlled") or {}
    length = LengthControlled(**{one.name: _number(controlled.get(one.name)) for one in fields(LengthControlled)})
    words: dict[str, Any] = {name: given[name] for name in ("label", "kind", "n", "judge")}
    others = [one.name for one in fields(DecoderRow) if one.name not in (*words, "length_controlled")]
    numbers: dict[str, Any] = {name: _number(given.get(name)) for name in others}
    return DecoderRow(**words, **numbers, length_controlled=length)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
