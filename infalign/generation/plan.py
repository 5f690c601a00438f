"""What is to be sampled, and in which batches.

The plan follows from the requests and the token budget alone, never from free memory, restarts or the number of
processes: a killed run redoes a batch with the same neighbours, hence the same rounding, and gets the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from infalign.types import Sample


@dataclass(frozen=True)
class Request:
    """Sample number `index` of the prompt `key`, whose tokens are `prompt_ids`."""

    key: str
    index: int
    prompt_ids: tuple[int, ...]


class Sampler(Protocol):
    """Anything that draws samples; see `infalign.generation.hf.HFSampler` and `infalign.generation.openai`."""

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample a request, in their order, drawn as one batch."""
        ...


def plan_batches(requests: Sequence[Request], max_tokens: int, tokens_per_batch: int) -> list[list[Request]]:
    """Cut requests into batches of at most `tokens_per_batch` cached tokens, prompts of like length together.

    A row costs its batch's longest prompt plus `max_tokens`. Rows of one prompt stay together as far as they fit, so
    that the prompt is computed once. A batch has at least one row, whatever the budget.

    >>> rows = [Request("a", i, (1, 2)) for i in range(3)]
    >>> [len(batch) for batch in plan_batches(rows, max_tokens=2, tokens_per_batch=8)]
    [2, 1]
    """
    ordered = sorted(requests, key=lambda request: (-len(request.prompt_ids), request.key, request.index))
    batches: list[list[Request]] = []
    room = 0
    for request in ordered:
        if room == 0:
            batches.append([])
            room = max(1, tokens_per_batch // (len(request.prompt_ids) + max_tokens))
        batches[-1].append(request)
        room -= 1
    return batches
