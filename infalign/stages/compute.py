"""Win rate against compute on evaluation's samples: nothing is sampled for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.decoding.course import Strategy
from infalign.decoding.early_rejection import EarlyRejection
from infalign.decoding.replay import Table
from infalign.evaluation.compute import Contest, measure_compute
from infalign.rewards.scoring import score_samples
from infalign.stages.experiment import Experiment
from infalign.stages.strategy import load_strategy
from infalign.types import Prompt, Sample

Rewards = Mapping[str, NDArray[np.float64]]


def compute_facts(
    experiment: Experiment,
    prompts: Sequence[Prompt],
    drawn: Mapping[str, Mapping[str, Sequence[Sample]]],
    rewards: Mapping[str, Rewards],
) -> dict[str, Any]:
    """Win rate against compute of base and policy, for evaluation.json.

    Args:
        experiment: its recipe's strategy is measured beside Best-of-N.
        prompts: those measured.
        drawn, rewards: by "base" and "policy", then by prompt key; as many samples count as there are rewards.
    """
    strategy = load_strategy(experiment.recipe, experiment.procedure)
    tables = {side: _tables(experiment, strategy, prompts, drawn[side], rewards[side]) for side in ("base", "policy")}
    contests = [Contest(prompt, tables["base"][prompt.key], tables["policy"][prompt.key]) for prompt in prompts]
    return measure_compute(contests, strategy, confidence=experiment.recipe.confidence, seed=experiment.recipe.seed)


def _tables(
    experiment: Experiment,
    strategy: Strategy,
    prompts: Sequence[Prompt],
    drawn: Mapping[str, Sequence[Sample]],
    rewards: Rewards,
) -> dict[str, Table]:
    """Each prompt's table; with early rejection the rewards of beginnings as well, which are scored here."""
    found = {}
    for prompt in prompts:
        row = rewards[prompt.key]
        table = Table(drawn[prompt.key][: row.size], row)
        if isinstance(strategy, EarlyRejection):
            length = strategy.check_tokens
            table = dataclasses.replace(table, beginnings={length: _beginnings(experiment, prompt, table, length)})
        found[prompt.key] = table
    return found


def _beginnings(experiment: Experiment, prompt: Prompt, table: Table, length: int) -> NDArray[np.float64]:
    """Rewards of a table's completions cut after `length` tokens; those that are no longer keep their own."""
    long = [place for place, sample in enumerate(table.samples) if len(sample.token_ids) > length]
    found = table.rewards_M.copy()
    if long:
        cut = [cut_short(table.samples[place], length, experiment.tokenizer) for place in long]
        found[long] = score_samples(experiment.reward, [prompt] * len(cut), cut)
    return found


def cut_short(sample: Sample, length: int, tokenizer: Any) -> Sample:
    """A sample's first `length` tokens, as the sampler would have stopped it; a shorter one as it is."""
    if len(sample.token_ids) <= length:
        return sample
    ids = sample.token_ids[:length]
    return dataclasses.replace(
        sample,
        token_ids=ids,
        token_logps=sample.token_logps[:length],
        text=tokenizer.decode(ids, skip_special_tokens=True),
        finished=False,
    )
