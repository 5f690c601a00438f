"""Deploy a policy with the procedure that it was aligned for: draw n candidates, score them, choose one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infalign.generation.plan import Request, Sampler, plan_batches
from infalign.runtime.seeds import stream
from infalign.theory.procedures import Procedure
from infalign.types import Prompt, Sample

Scorer = Callable[[Sequence[Prompt], Sequence[Sample]], NDArray[np.float64]]


@dataclass(frozen=True)
class Decoded:
    """The chosen completion of a prompt, with all its candidates and their rewards (NaN: no score).

    `chosen` is None when no candidate has a score.
    """

    prompt: Prompt
    chosen: int | None
    candidates: tuple[Sample, ...]
    rewards_N: NDArray[np.float64]

    @property
    def text(self) -> str | None:
        """The chosen completion."""
        return None if self.chosen is None else self.candidates[self.chosen].text


def decode(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[tuple[int, ...]],
    sampler: Sampler,
    score: Scorer,
    procedure: Procedure,
    *,
    max_tokens: int,
    tokens_per_batch: int,
    seed: int = 0,
) -> Iterator[Decoded]:
    """Decode prompts with a procedure, a batch of whole prompts at a time.

    Args:
        prompts, prompt_ids: the prompts and their tokens as the model sees them.
        sampler: draws the candidates.
        score: rewards of samples, each on its prompt.
        procedure: `procedure.n` candidates a prompt are drawn; it picks one.
        max_tokens: the sampler's length limit, for the batch plan.
        tokens_per_batch: KV-cache tokens a batch may hold.
        seed: of tie-breaking and of random procedures; keyed by prompt, so order and batches do not matter.
    """
    by_key = {prompt.key: prompt for prompt in prompts}
    heads = [Request(prompt.key, 0, tuple(ids)) for prompt, ids in zip(prompts, prompt_ids, strict=True)]
    for batch in plan_batches(heads, max_tokens, max(1, tokens_per_batch // procedure.n)):
        requests = [Request(head.key, index, head.prompt_ids) for head in batch for index in range(procedure.n)]
        samples = sampler.sample(requests)
        rewards_PN = score([by_key[sample.key] for sample in samples], samples).reshape(len(batch), procedure.n)
        for row, head in enumerate(batch):
            rng = stream(seed, "decode", head.key)
            scored = not np.isnan(rewards_PN[row]).all()
            chosen = int(procedure.select(rewards_PN[row : row + 1], rng)[0]) if scored else None
            candidates = tuple(samples[row * procedure.n : (row + 1) * procedure.n])
            yield Decoded(by_key[head.key], chosen, candidates, rewards_PN[row])
