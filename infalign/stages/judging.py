"""A pairwise judge over decoded pairs: loaded, asked in both orders, summarised, told in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.evaluation.judging import draw_pairs, judged_wins
from infalign.rewards.contract import shape_completions
from infalign.theory.procedures import Procedure
from infalign.types import Prompt

Floats = NDArray[np.float64]


def judge_decoded(
    spec: str,
    kwargs: Mapping[str, Any],
    prompts: Sequence[Prompt],
    texts: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
    rewards: tuple[Sequence[Floats], Sequence[Floats]],
    procedure: Procedure,
    *,
    count: int,
    confidence: float,
    seed: int,
    base_dir: Path | None = None,
) -> dict[str, Any]:
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

    Returns:
        The fields of `JudgedWins`, and the judge's spec.

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
    found = judged_wins(
        pairs,
        verdicts.shown_first_B,
        verdicts.shown_second_B,
        margins,
        confidence=confidence,
        seed=seed,
        unread=getattr(judge.function, "unread", ""),
    )
    rate = {name: getattr(found.win_rate, name) for name in ("mean", "low", "high")}
    return {**dataclasses.asdict(found), "win_rate": rate, "judge": spec}


def judge_line(found: Mapping[str, Any]) -> str:
    """What the judge said, in one line."""
    rate = found["win_rate"]
    agreement = found["proxy_agreement"]
    agrees = "" if agreement != agreement else f"; it agrees with the reward on {agreement:.0%}"
    unjudged = f", {found['unjudged']} without a verdict" if found["unjudged"] else ""
    return (
        f"judge {found['judge']}: win rate {rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] over "
        f"{found['pairs']} decoded pairs{unjudged}; its two orders disagree on {found['disagreement']:.0%}, the answer "
        f"shown first wins {found['first_preferred']:.0%}{agrees}"
    )
