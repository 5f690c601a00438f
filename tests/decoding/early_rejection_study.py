"""What early rejection saves and what it costs in win rate, on SmolLM2-135M-Instruct and VADER:

    python -m tests.decoding.early_rejection_study --prompts 64 --samples 24 --tokens 32

Samples are drawn and scored once, their beginnings are scored as well; every setting is then replayed on them in random
orders, so that all of them are compared on the same samples. Win rates are against one plain base sample; intervals
are over prompts. The last lines decode for real, and time it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from infalign.decoding.by_procedure import ByProcedure
from infalign.decoding.decode import decode, plan_decoding
from infalign.decoding.early_rejection import EarlyRejection
from infalign.decoding.replay import Pool
from infalign.decoding.strategy import Strategy
from infalign.evaluation.compute import Contest, Point, strategy_point
from infalign.evaluation.winrate import difference
from infalign.generation.hf import HFSampler
from infalign.generation.plan import Request, plan_batches
from infalign.rewards.scoring import score_samples
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import find_recipe, load_recipe
from infalign.stages.scored_samples import cut_short
from infalign.theory.procedures import BestOfN
from infalign.types import Prompt, Sample

N = 8


@dataclass
class Study:
    """The model, the reward and the prompts of the quickstart recipe."""

    experiment: Experiment
    prompts: list[Prompt]
    sampler: HFSampler

    @classmethod
    def open(cls, prompts: int, tokens: int) -> Study:
        flags = {"max_completion_length": str(tokens), "use_cpu": "true"}
        experiment = Experiment(load_recipe(find_recipe("quickstart"), flags))
        splits = experiment.splits
        sampler = experiment.sampler(experiment.base_path, "early rejection")
        assert isinstance(sampler, HFSampler)
        return cls(experiment, [*splits.test, *splits.train][:prompts], sampler)

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.experiment.prompt_ids[prompt.key])

    def score(self, prompts: list[Prompt], samples: list[Sample]) -> np.ndarray:
        return score_samples(self.experiment.reward, prompts, samples)

    def contests(self, count: int, lengths: list[int]) -> list[Contest]:
        """`count` samples of every prompt, with the rewards of their beginnings."""
        wanted = [Request(p.key, index, self.ids(p)) for p in self.prompts for index in range(count)]
        drawn: dict[str, list[Sample]] = {}
        for batch in plan_batches(wanted, self.sampler.settings.max_tokens, 8192):
            for sample in self.sampler.sample(batch):
                drawn.setdefault(sample.key, []).append(sample)
            print(f"{sum(map(len, drawn.values()))} of {len(wanted)} samples", end="\r", flush=True)
        tables = {prompt.key: self._table(prompt, drawn[prompt.key], lengths) for prompt in self.prompts}
        return [Contest(prompt, tables[prompt.key], tables[prompt.key]) for prompt in self.prompts]

    def _table(self, prompt: Prompt, samples: list[Sample], lengths: list[int]) -> Pool:
        def rewards(length: int) -> np.ndarray:
            cut = [cut_short(one, length, self.experiment.tokenizer) for one in samples]
            return self.score([prompt] * len(cut), cut)

        return Pool(samples, rewards(10**6), {length: rewards(length) for length in lengths})

    def timed(self, strategy: Strategy, prompts: list[Prompt]) -> tuple[float, int]:
        """Seconds and tokens of decoding for real."""
        start = time.perf_counter()
        ids = [self.ids(prompt) for prompt in prompts]
        limit = self.sampler.settings.max_tokens
        plan = plan_decoding(prompts, ids, strategy, max_tokens=limit, tokens_per_batch=8192)
        batches = decode(plan, {prompt.key: prompt for prompt in prompts}, self.sampler, self.score, strategy)
        tokens = sum(one.spent.tokens for batch in batches for one in batch)
        return time.perf_counter() - start, tokens


@dataclass(frozen=True)
class Finding:
    """One setting against full Best-of-N: share of tokens saved, and the win rate lost with its interval."""

    label: str
    point: Point
    saved: float
    lost: tuple[float, float, float]

    def __str__(self) -> str:
        lost, low, high = (100 * value for value in self.lost)
        return (
            f"{self.label:<24} win rate {self.point.win}  tokens {self.point.tokens:6.1f}  saved {self.saved:6.1%}  "
            f"reward calls {self.point.reward_calls:4.1f}  win rate lost {lost:5.2f} [{low:.2f}, {high:.2f}] points"
        )


def compare(contests: list[Contest], settings: list[tuple[int, float]]) -> tuple[Point, list[Finding]]:
    """Full Best-of-N, and every (check_tokens, keep) against it."""
    full = strategy_point(contests, "base", ByProcedure(BestOfN(N)))
    findings = []
    for length, keep in settings:
        point = strategy_point(contests, "base", EarlyRejection(BestOfN(N), length, keep))
        lost = difference(full.win, point.win)
        findings.append(Finding(f"check {length}, keep {keep:g}", point, 1 - point.tokens / full.tokens, lost))
    return full, findings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    study = Study.open(given.prompts, given.tokens)
    lengths = [given.tokens // 4, given.tokens // 2]
    contests = study.contests(given.samples, lengths)
    full, findings = compare(contests, [(length, keep) for length in lengths for keep in (0.125, 0.25, 0.5, 1.0)])
    print(f"Best-of-{N} in full: win rate {full.win}, {full.tokens:.1f} tokens, {full.reward_calls:.0f} reward calls")
    print(*findings, sep="\n", flush=True)
    for name, one in (("full", ByProcedure(BestOfN(N))), ("early", EarlyRejection(BestOfN(N), lengths[1], 0.25))):
        seconds, tokens = study.timed(one, study.prompts[:16])
        print(f"{name}: {seconds:.1f} s, {tokens} tokens for 16 prompts")


if __name__ == "__main__":
    main()
