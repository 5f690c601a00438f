"""Deploy a policy with the procedure that it was aligned for: draw n candidates, score them, choose one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


def plan_decoding(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[tuple[int, ...]],
    procedure: Procedure,
    *,
    max_tokens: int,
    tokens_per_batch: int,
) -> list[list[Request]]:
    """Batches of whole prompts, one request each: the same list in every run and on every rank.

    Args:
        prompts, prompt_ids: the prompts and their tokens as the model sees them.
        procedure: `procedure.n` candidates a prompt will be drawn.
        max_tokens: the sampler's length limit.
        tokens_per_batch: KV-cache tokens a batch may hold.
    """
    heads = [Request(prompt.key, 0, tuple(ids)) for prompt, ids in zip(prompts, prompt_ids, strict=True)]
    return plan_batches(heads, max_tokens, max(1, tokens_per_batch // procedure.n))


def decode(
    batches: Sequence[Sequence[Request]],
    by_key: Mapping[str, Prompt],
    sampler: Sampler,
    score: Scorer,
    procedure: Procedure,
    seed: int = 0,
) -> Iterator[list[Decoded]]:
    """Decode batches of prompts with a procedure, one after the other.

    Args:
        batches: of `plan_decoding`.
        by_key: the prompts.
        sampler: draws the candidates.
        score: rewards of samples, each on its prompt.
        procedure: `procedure.n` candidates a prompt are drawn; it picks one.
        seed: of tie-breaking and of random procedures; keyed by prompt, so order and batches do not matter.
    """
    for batch in batches:
        requests = [Request(head.key, index, head.prompt_ids) for head in batch for index in range(procedure.n)]
        samples = sampler.sample(requests)
        rewards_PN = score([by_key[sample.key] for sample in samples], samples).reshape(len(batch), procedure.n)
        decoded = []
        for row, head in enumerate(batch):
            rng = stream(seed, "decode", head.key)
            scored = not np.isnan(rewards_PN[row]).all()
            chosen = int(procedure.select(rewards_PN[row : row + 1], rng)[0]) if scored else None
            candidates = tuple(samples[row * procedure.n : (row + 1) * procedure.n])
            decoded.append(Decoded(by_key[head.key], chosen, candidates, rewards_PN[row]))
        yield decoded
