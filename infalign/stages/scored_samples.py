"""What an evaluation has drawn and scored, what the samples look like, and win rate against compute from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.diagnostics import duplicate_rate
from infalign.decoding.early_rejection import EarlyRejection
from infalign.decoding.replay import Pool
from infalign.decoding.strategy import Strategy
from infalign.evaluation.compute import Compute, Contest, measure_compute
from infalign.evaluation.length import Side
from infalign.evaluation.summary import PROXY, Drawn, Example, SampleFacts, Scored
from infalign.rewards.scoring import score_samples
from infalign.stages.experiment import Experiment
from infalign.stages.strategy import load_strategy
from infalign.theory.procedures import Procedure
from infalign.types import Prompt, Sample

EXAMPLES = 8

Rewards = Mapping[str, NDArray[np.float64]]
"""(M,) by prompt key, in sample order; NaN for no score."""


@dataclass(frozen=True)
class ScoredSamples:
    """What one model drew, with its rewards by prompt key: the recipe's, and all by judge (`PROXY`, `GOLD`, a name)."""

    samples: Mapping[str, list[Sample]]
    by_judge: Mapping[str, Rewards]

    @property
    def rewards(self) -> Rewards:
        """The recipe's reward."""
        return self.by_judge[PROXY]

    def side(self, keys: Sequence[str], judge: str, chosen_by: str) -> Side:
        """The prompts' rewards that decode (`chosen_by`), those that judge, and lengths in tokens."""
        decoding, judged = self.by_judge[chosen_by], self.by_judge[judge]
        lengths = [np.array([len(one.token_ids) for one in self.samples[key]], dtype=np.float64) for key in keys]
        return Side([decoding[key] for key in keys], [judged[key] for key in keys], lengths)

    def facts(self, keys: Sequence[str]) -> SampleFacts:
        """Means over all samples of the prompts."""
        rows = [self.samples[key] for key in keys]
        flat = [sample for row in rows for sample in row]
        return SampleFacts(
            reward=float(np.nanmean(np.concatenate([self.rewards[key] for key in keys]))),
            tokens=float(np.mean([len(sample.token_ids) for sample in flat])),
            clipped=float(np.mean([not sample.finished for sample in flat])),
            duplicates=duplicate_rate([[sample.text for sample in row] for row in rows]),
        )

    def decoded(self, key: str, procedure: Procedure) -> Drawn:
        """A prompt's first n samples with a score, and which of them the decoder picks."""
        scores, samples = self.rewards[key], self.samples[key]
        rows = np.flatnonzero(np.isfinite(scores))[: procedure.n]
        shown = tuple(Scored(samples[row].text, float(scores[row])) for row in rows.tolist())
        return Drawn(shown[int(procedure.select(scores[rows][None], np.random.default_rng(0))[0])], shown)


@dataclass(frozen=True)
class Measured:
    """Both models on the prompts with enough scores."""

    prompts: Sequence[Prompt]
    base: ScoredSamples
    policy: ScoredSamples

    @property
    def keys(self) -> list[str]:
        """The prompts' keys."""
        return [prompt.key for prompt in self.prompts]

    def enough(self, key: str, judge: str, least: int) -> bool:
        """Whether a prompt has so many samples on both sides that a judge scored."""
        rows = [side.by_judge[judge].get(key, np.empty(0)) for side in (self.base, self.policy)]
        return all(np.isfinite(row).sum() >= least for row in rows)

    def with_scores(self, judge: str, least: int) -> Measured:
        """Those prompts alone."""
        return dataclasses.replace(self, prompts=[one for one in self.prompts if self.enough(one.key, judge, least)])


def examples(procedure: Procedure, measured: Measured) -> tuple[Example, ...]:
    """A few prompts with the answers of both models."""
    return tuple(
        Example(prompt.content, *(side.decoded(prompt.key, procedure) for side in (measured.base, measured.policy)))
        for prompt in measured.prompts[:EXAMPLES]
    )


def compute_facts(experiment: Experiment, measured: Measured) -> Compute:
    """Win rate against compute of base and policy; the recipe's strategy is measured beside Best-of-N."""
    strategy = load_strategy(experiment.recipe, experiment.procedure)
    base, policy = (_pools(experiment, strategy, measured.prompts, one) for one in (measured.base, measured.policy))
    contests = [Contest(prompt, base[prompt.key], policy[prompt.key]) for prompt in measured.prompts]
    return measure_compute(contests, strategy, confidence=experiment.recipe.confidence, seed=experiment.recipe.seed)


def _pools(
    experiment: Experiment, strategy: Strategy, prompts: Sequence[Prompt], drawn: ScoredSamples
) -> dict[str, Pool]:
    """Each prompt's pool; with early rejection the rewards of beginnings as well, which are scored here."""
    found = {}
    for prompt in prompts:
        row = drawn.rewards[prompt.key]
        pool = Pool(drawn.samples[prompt.key][: row.size], row)
        if isinstance(strategy, EarlyRejection):
            length = strategy.check_tokens
            pool = dataclasses.replace(pool, beginnings={length: _beginnings(experiment, prompt, pool, length)})
        found[prompt.key] = pool
    return found


def _beginnings(experiment: Experiment, prompt: Prompt, pool: Pool, length: int) -> NDArray[np.float64]:
    """Rewards of a pool's completions cut after `length` tokens; those that are no longer keep their own."""
    long = [place for place, sample in enumerate(pool.samples) if len(sample.token_ids) > length]
    found = pool.rewards_M.copy()
    if long:
        cut = [cut_short(pool.samples[place], length, experiment.tokenizer) for place in long]
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
