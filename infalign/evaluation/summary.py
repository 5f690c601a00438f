"""What an evaluation says: a row for each decoder and judge, and everything beside it.

Evaluate, compare and the report share these; JSON is written from them and read into them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from infalign.evaluation.compute import Compute
from infalign.evaluation.deployment import Deployment
from infalign.evaluation.forgetting import TextFit
from infalign.evaluation.judging import JudgedWins
from infalign.evaluation.length import LengthControlled, Side, decoded_reward, length_controlled_win_rate
from infalign.evaluation.limits import attainment, limit_at, regret_ratio
from infalign.evaluation.winrate import judged_win_rate, win_rate
from infalign.runtime.artifacts import from_plain, without_nan
from infalign.theory.procedures import BestOfN, WorstOfN

if TYPE_CHECKING:
    from infalign.theory.procedures import Procedure

PROXY, GOLD = "reward", "gold"
"""Judges: the recipe's reward, which decodes, or the gold one. Another name is that of a further term's reward, which
decodes and judges its own rows; `A chosen by B` judges with A what B decodes; `A on GROUP` is for a group."""


@dataclass(frozen=True)
class DecoderRow:
    """The policy against the base, both decoded by one procedure. NaN is what is not known.

    Attributes:
        label, kind, n: the procedure's repr, its name and the candidates it draws.
        judge: "reward", "gold", or the name of another term's reward; with `chosen_by` and `group` in it where they
            are set, so that judge and label name a row.
        mean, low, high: the win rate with its interval over prompts.
        length_controlled: the win rate at equal length.
        limit, attainment, regret_ratio: against the best that any method reaches at the measured KL; of the reward
            that decodes alone.
        policy_reward, base_reward: mean judged reward of what is picked.
        weight: in what was trained for, where that has several terms.
        chosen_by: the reward that decodes, where it is not the one that judges.
        group: the prompts that it is measured on, where it is not all of them.
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
    weight: float = math.nan
    chosen_by: str = ""
    group: str = ""

    @property
    def judged_by_another(self) -> bool:
        """Whether what judges is not what decodes: then no limit holds."""
        return bool(self.chosen_by) or self.judge == GOLD


def decoder_row(
    policy: Side,
    base: Side,
    procedure: Procedure,
    judge: str,
    *,
    kl: float | None,
    confidence: float,
    seed: int,
    chosen_by: str = "",
    group: str = "",
) -> DecoderRow:
    """Measure one decoder.

    Args:
        policy, base: P prompts each.
        procedure: decodes both sides.
        judge: names the row, see `DecoderRow`.
        kl: measured, in nats, for the limit; None where it is not known.
        confidence, seed: of the intervals.
        chosen_by: what decodes; empty: what judges, but for `GOLD`.
        group: the prompts' name, where they are not all.

    Raises:
        InputError: another number of prompts, or a prompt with too few scored samples.
    """
    another = bool(chosen_by) or judge == GOLD
    if another:
        sides = ((policy.proxy, policy.judge), (base.proxy, base.judge))
        found = judged_win_rate(*sides, procedure, confidence, seed)
    else:
        found = win_rate(policy.proxy, base.proxy, procedure, confidence, seed)
    limit = math.nan
    if not another and kl is not None:  # the limit is that of what decodes
        limit = limit_at(procedure, kl)
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
        chosen_by=chosen_by,
        group=group,
    )


def decoders(procedure: Procedure, sizes: Iterable[int]) -> list[Procedure]:
    """The procedure, then Best-of-N and Worst-of-N of every size, each once."""
    return list(dict.fromkeys([procedure, *(kind(n) for kind in (BestOfN, WorstOfN) for n in sizes)]))


def ordered_labels(rows: Sequence[DecoderRow]) -> list[str]:
    """The decoders of the rows, each once: one sample, then Best-of-N, other ones, Worst-of-N, by N."""
    rank = {"best_of_n": 1, "worst_of_n": 3}
    found = {row.label: (0 if row.n == 1 else rank.get(row.kind, 2), row.n) for row in rows}
    return sorted(found, key=lambda label: found[label])


@dataclass(frozen=True)
class SequenceKL:
    """KL of policy against base in nats, summed over tokens: (mean, standard error over prompts) by two estimators.

    `mean` sums the exact KL of each next token; `k1` is the plain log-ratio.
    """

    mean: float
    error: float
    k1: float
    k1_error: float


@dataclass(frozen=True)
class Ties:
    """The limit with the reward's ties, attainment of it, and how often two base samples of a prompt tie."""

    tie_limit: float
    tie_attainment: float
    tie_rate: float


@dataclass(frozen=True)
class SampleFacts:
    """Of one model's samples: mean reward and length, and the shares cut at the limit and equal to an earlier one."""

    reward: float
    tokens: float
    clipped: float
    duplicates: float


@dataclass(frozen=True)
class Scored:
    """A completion and its reward."""

    text: str
    reward: float


@dataclass(frozen=True)
class Drawn:
    """What one model drew for a prompt, and what the decoder picks of it."""

    decoded: Scored
    samples: tuple[Scored, ...]


@dataclass(frozen=True)
class Example:
    """A prompt with the answers of both models."""

    prompt: Any
    base: Drawn
    policy: Drawn


@dataclass(frozen=True)
class Evaluation:
    """Everything that `infalign evaluate` measures.

    Attributes:
        procedure, transform, beta, target_kl: what the policy was trained for.
        reward, gold_reward: what decodes, and what else judges.
        prompts, samples: held-out prompts, samples for each and side.
        confidence, seed: of the intervals.
        kl: measured.
        win_rates: a row for each decoder and judge.
        ties: of the recipe's decoder.
        pairwise: a pairwise judge's word.
        texts: what both models make of held-out texts.
        base, policy: what their samples look like.
        examples: a few prompts with their answers.
        compute: win rate against compute.
        deployment: gold wins against N, where a gold reward judges.
        drawn: samples drawn now, in place of found on disk; not part of the file.
    """

    procedure: str
    transform: str
    beta: float
    reward: str
    prompts: int
    samples: int
    confidence: float
    kl: SequenceKL
    win_rates: tuple[DecoderRow, ...]
    ties: Ties
    base: SampleFacts
    policy: SampleFacts
    examples: tuple[Example, ...] = ()
    compute: Compute | None = None
    deployment: Deployment | None = None
    pairwise: JudgedWins | None = None
    texts: tuple[TextFit, ...] = ()
    target_kl: float | None = None
    gold_reward: str | None = None
    seed: int = 0
    drawn: int = 0

    @property
    def main(self) -> DecoderRow:
        """The recipe's own decoder, judged by the reward that decodes."""
        return next(row for row in self.win_rates if row.label == self.procedure and row.judge == PROXY)

    def record(self) -> dict[str, Any]:
        """What the policy was trained for, as `Objective.record` has it."""
        return {"procedure": self.procedure, "transform": self.transform, "beta": self.beta}

    def as_json(self) -> dict[str, Any]:
        """The content of evaluation.json: `main` holds the recipe's decoder with its ties."""
        content = asdict(self)
        del content["drawn"], content["ties"]
        return without_nan({**content, "main": {**asdict(self.main), **asdict(self.ties)}})


def evaluation_from_json(content: dict[str, Any]) -> Evaluation:
    """What `Evaluation.as_json` wrote.

    Raises:
        InputError: a field is missing.
    """
    return from_plain(Evaluation, {**content, "ties": content.get("main")})
