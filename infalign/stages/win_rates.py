"""Which win rates an evaluation measures: who judges, who decodes, by which procedure, on which prompts.

reward                       the recipe's reward, on all test prompts, under its procedure and every `eval_n`
gold                         the gold reward judges what the recipe's decodes
NAME                         a further term of `objectives`, which decodes and judges its own
A on GROUP                   a term that is for a group of prompts, on them
A chosen by B on GROUP       what B's decoder picks on the prompts that A is for, judged by A: does who decodes for
                             one term lose the other?
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from infalign.evaluation.summary import GOLD, PROXY, DecoderRow, decoder_row, decoders
from infalign.evaluation.sweep import PerPrompt
from infalign.stages.experiment import Experiment
from infalign.stages.per_prompt import wins_per_prompt
from infalign.stages.scored_samples import Measured
from infalign.stages.terms import Term
from infalign.theory.procedures import Procedure
from infalign.types import InputError


@dataclass(frozen=True)
class Question:
    """A row to be measured.

    Attributes:
        judge: the reward that judges, `PROXY`, `GOLD` or a name.
        decoder: of both sides.
        chosen_by: the reward that decodes, where it is another.
        group: of prompts; empty: all.
        weight: in what was trained for; NaN where it is not one of several terms.
    """

    judge: str
    decoder: Procedure
    chosen_by: str = ""
    group: str = ""
    weight: float = math.nan

    @property
    def name(self) -> str:
        """What the row calls its judge."""
        chosen = f" chosen by {self.chosen_by}" if self.chosen_by and self.judge != GOLD else ""
        return f"{self.judge}{chosen}{f' on {self.group}' if self.group else ''}"


def questions(experiment: Experiment) -> list[Question]:
    """Everything that the recipe asks for, each row once; with several terms their own decoders have weights."""
    recipe, terms = experiment.recipe, experiment.terms
    found = [Question(PROXY, one) for one in decoders(experiment.procedure, recipe.eval_n)]
    if experiment.gold is not None:
        found += [Question(GOLD, one.decoder, PROXY) for one in found]
    for term in terms:
        found += [
            Question(judge_of(experiment, term), one, group=term.group)
            for one in decoders(term.procedure, recipe.eval_n)
        ]
    for term in terms:
        judge = judge_of(experiment, term)
        found += [
            Question(judge, other.procedure, chooser, term.group)
            for other in terms
            if (chooser := judge_of(experiment, other)) != judge
        ]
    weights = {
        (Question(judge_of(experiment, term), term.procedure, group=term.group).name, term.procedure): term.weight
        for term in terms
        if len(terms) > 1
    }
    each = {(one.name, one.decoder): one for one in found}
    return [replace(one, weight=weights.get(key, math.nan)) for key, one in each.items()]


def judge_of(experiment: Experiment, term: Term) -> str:
    """What a term's reward is called in tables."""
    return PROXY if term.reward is experiment.terms[0].reward else term.reward.name


def measure_win_rates(
    experiment: Experiment, measured: Measured, kls: Mapping[str, float]
) -> tuple[list[DecoderRow], PerPrompt]:
    """The rows of the table, and the same prompt by prompt.

    Args:
        experiment: of the evaluation.
        measured: both sides' samples with their scores.
        kls: the KL on each prompt, by its key.

    Raises:
        InputError: a term's group has no test prompt with enough scores.
    """
    recipe, places = experiment.recipe, {key: at for at, key in enumerate(measured.keys)}
    rows: list[DecoderRow] = []
    wins: dict[tuple[str, str], NDArray[np.float64]] = {}
    for one in questions(experiment):
        keys = [
            prompt.key
            for prompt in measured.prompts
            if experiment.in_group(prompt, one.group)
            and all(
                measured.enough(prompt.key, name, one.decoder.n) for name in {one.judge, one.chosen_by or one.judge}
            )
        ]
        if not keys and one.chosen_by:  # a reward that has nothing to say about the other term's prompts
            continue
        if not keys:
            raise InputError(f"{one.name}: none of its test prompts has {one.decoder.n} scored samples on both sides")
        policy, base = (
            side.side(keys, one.judge, one.chosen_by or one.judge) for side in (measured.policy, measured.base)
        )
        row = decoder_row(
            policy,
            base,
            one.decoder,
            one.name,
            kl=float(np.mean([kls[key] for key in keys])),
            confidence=recipe.confidence,
            seed=recipe.seed,
            chosen_by=one.chosen_by,
            group=one.group,
        )
        rows.append(replace(row, weight=one.weight))
        wins_P = np.full(len(places), np.nan)
        wins_P[[places[key] for key in keys]] = wins_per_prompt(policy, base, one.decoder, bool(one.chosen_by))
        wins[row.judge, row.label] = wins_P
    return rows, PerPrompt(tuple(places), np.array([kls[key] for key in places]), wins)
