"""Win rates by a pairwise judge: decoded pairs are drawn, judged in both orders, and averaged over prompts.

A judge reads two answers, so it cannot be asked about every pair of samples. Pairs are drawn from the decoder's exact
law on the samples at hand: sample i with its order weight, ties shared: the law of the decoder run on n of them, drawn
without replacement. So the mean over pairs is an unbiased estimate of the judged win rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.evaluation.pairs import clustered_mean
from infalign.evaluation.winrate import Interval, tied_weights
from infalign.rewards.contract import shape_completions
from infalign.theory.procedures import Procedure
from infalign.types import InputError, Prompt

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DecodedPair:
    """Of prompt number `prompt`, the policy's sample and the base's that the decoder picked."""

    prompt: int
    policy: int
    base: int


@dataclass(frozen=True)
class JudgedWins:
    """How often the judge prefers the policy, and how far its word can be trusted.

    Attributes:
        win_rate: both orders averaged; interval over prompts.
        pairs, unjudged: how many pairs were judged, and how many got no verdict.
        disagreement: share of judged pairs whose two orders name different winners.
        first_preferred: how often the answer shown first wins; 1/2 without position bias.
        proxy_agreement: share of pairs on which judge and decoding reward name the same winner, ties left out.
        judge: which one, as a recipe names it.
    """

    win_rate: Interval
    pairs: int
    unjudged: int
    disagreement: float
    first_preferred: float
    proxy_agreement: float
    judge: str = ""

    def __str__(self) -> str:
        rate, agreement = self.win_rate, self.proxy_agreement
        agrees = "" if math.isnan(agreement) else f"; it agrees with the reward on {agreement:.0%}"
        unjudged = f", {self.unjudged} without a verdict" if self.unjudged else ""
        return (
            f"judge {self.judge}: win rate {rate.mean:.3f} [{rate.low:.3f}, {rate.high:.3f}] over "
            f"{self.pairs} decoded pairs{unjudged}; its two orders disagree on {self.disagreement:.0%}, the answer "
            f"shown first wins {self.first_preferred:.0%}{agrees}"
        )


def draw_pairs(
    policy_rewards_PM: Sequence[Array], base_rewards_PM: Sequence[Array], procedure: Procedure, count: int, seed: int
) -> list[DecodedPair]:
    """`count` decoded pairs of every prompt.

    Args:
        policy_rewards_PM, base_rewards_PM: what decodes; NaN (no score) is never picked.
        procedure: decodes both sides.
        count: pairs a prompt.
        seed: of the draws; each prompt has its own stream.
    """
    drawn: list[DecodedPair] = []
    for prompt, rows in enumerate(zip(policy_rewards_PM, base_rewards_PM, strict=True)):
        rng = np.random.default_rng([seed, prompt])
        picks: list[NDArray[np.intp]] = []
        for row in rows:
            rewards_M = np.asarray(row, dtype=np.float64)
            scored = np.flatnonzero(~np.isnan(rewards_M))
            # `choice` wants weights that are not negative and sum to 1, to more digits than a sum of weights has
            weights = np.maximum(tied_weights(rewards_M[scored], procedure), 0.0)
            picks.append(rng.choice(scored, size=count, p=weights / weights.sum()))
        drawn += [DecodedPair(prompt, int(ours), int(theirs)) for ours, theirs in zip(*picks, strict=True)]
    return drawn


def judged_wins(
    pairs: Sequence[DecodedPair],
    first_B: Array,
    second_B: Array,
    margins_B: Array,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    judge: str = "",
    unread: str = "",
) -> JudgedWins:
    """What the verdicts on decoded pairs say.

    Args:
        pairs: B of them.
        first_B: P(the policy's answer is better) when it was shown first, NaN for no verdict.
        second_B: the same when it was shown second.
        margins_B: decoding reward of the policy's answer minus the base's.
        confidence: of the interval.
        seed: of the bootstrap.
        judge: its name.
        unread: one of the judge's answers that gave no verdict, to be shown if none did.

    Raises:
        InputError: no pair was judged in both orders.
    """
    judged = ~(np.isnan(first_B) | np.isnan(second_B))
    if not judged.any():
        seen = f"one of its answers: {unread}" if unread else "look at its answers"
        raise InputError(f"the judge gave no verdict on any of {len(pairs)} pairs in both orders: {seen}")
    first, second = first_B[judged], second_B[judged]
    wins = (first + second) / 2.0
    prompts = [str(pair.prompt) for pair, kept in zip(pairs, judged, strict=True) if kept]
    # a tie by either of them names no winner
    decided = (wins != 0.5) & (margins_B[judged] != 0.0)
    agree = (wins > 0.5) == (margins_B[judged] > 0.0)
    return JudgedWins(
        win_rate=clustered_mean(wins, prompts, confidence, seed).interval,
        pairs=int(judged.sum()),
        unjudged=int((~judged).sum()),
        # both are chances that the policy's answer is better: on different sides of 1/2 they name different winners
        disagreement=float(((first - 0.5) * (second - 0.5) < 0.0).mean()),
        first_preferred=float(((first + (1.0 - second)) / 2.0).mean()),
        proxy_agreement=float(agree[decided].mean()) if decided.any() else float("nan"),
        judge=judge,
    )


def judge_decoded(
    spec: str,
    kwargs: Mapping[str, Any],
    prompts: Sequence[Prompt],
    texts: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
    rewards: tuple[Sequence[Array], Sequence[Array]],
    procedure: Procedure,
    *,
    count: int,
    confidence: float,
    seed: int,
    base_dir: Path | None = None,
) -> JudgedWins:
    """Judge `count` decoded pairs of every prompt, each in both orders.

    Args:
        spec, kwargs: the judge, as `rewards.judge.load_judge` takes it.
        prompts: P prompts.
        texts: (policy, base) samples of every prompt.
        rewards: (policy, base) rewards of these samples: what decodes.
        procedure: decodes both sides.
        count: pairs a prompt.
        confidence, seed: of the interval and of the draws.
        base_dir: folder of the recipe.

    Raises:
        InputError: no such judge, or no verdict at all.
        RewardError: the judge fails, or answers what is no verdict.
    """
    from infalign.rewards.judge import both_orders, load_judge  # noqa: PLC0415 - files without a judge load no HTTP

    judge = load_judge(spec, kwargs, base_dir=base_dir or Path())
    pairs = draw_pairs(rewards[0], rewards[1], procedure, count, seed)
    contents = [prompts[pair.prompt].content for pair in pairs]
    ours = shape_completions(contents, [texts[0][pair.prompt][pair.policy] for pair in pairs])
    theirs = shape_completions(contents, [texts[1][pair.prompt][pair.base] for pair in pairs])
    verdicts = both_orders(judge, contents, ours, theirs)
    margins = np.array([rewards[0][p.prompt][p.policy] - rewards[1][p.prompt][p.base] for p in pairs])
    return judged_wins(
        pairs,
        verdicts.shown_first_B,
        verdicts.shown_second_B,
        margins,
        confidence=confidence,
        seed=seed,
        judge=spec,
        unread=getattr(judge.function, "unread", ""),
    )
