"""Which uniforms belong to which rollout: a function of the seed, the prompt, the generation and the row's place.

Not of the process that draws it or of how a batch is cut into accumulation steps, so that 1 process and 2, 8x1 and 1x8
draw the same rollouts. The order of the prompts is a function of the seed and the epoch's number alone: a run that
resumes in the third epoch goes on as if it had been through the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from infalign.runtime.artifacts import fingerprint
from infalign.runtime.seeds import stream, uniforms


class PromptOrder(Sampler[int]):
    """TRL's `RepeatSampler` with a shuffle keyed by (seed, epoch) instead of one generator that runs on.

    Args:
        planned: TRL's sampler, whose repeats and batches are kept.
        seed: of the run.
        epoch: asked whenever an epoch begins.
    """

    def __init__(self, planned: RepeatSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.planned, self.seed, self.epoch = planned, seed, epoch

    def __iter__(self) -> Iterator[int]:
        """The epoch's prompt indices, repeated as TRL needs them."""
        self.planned.generator.manual_seed(int(stream(self.seed, "prompt order", self.epoch()).integers(2**62)))
        return iter(self.planned)

    def __len__(self) -> int:
        """Indices of one epoch."""
        return len(self.planned)


def rollout_uniforms(
    prompt_ids: Sequence[Sequence[int]], *, seed: int, generation: int, first_row: int, count: int
) -> NDArray[np.float64]:
    """(B, T) uniforms of the rollouts of one process.

    Args:
        prompt_ids: the B prompts, in order.
        seed: of the run.
        generation: how many batches of rollouts were drawn before this one.
        first_row: the place of the first row in the batch of all processes.
        count: T, tokens at most.
    """
    # the prompt is in the name and the row's place in the batch of all processes is the index: neither depends on
    # which process draws it
    names = [fingerprint(list(ids)) for ids in prompt_ids]
    rows = [uniforms(seed, f"rollout-{generation}-{name}", first_row + row, count) for row, name in enumerate(names)]
    return np.stack(rows)


def shuffled_groups(rows: int, group: int, generator: torch.Generator) -> torch.Tensor:
    """A permutation of rows that keeps whole groups of consecutive rows together, where they divide the rows.

    >>> order = shuffled_groups(4, 2, torch.Generator().manual_seed(0)).tolist()
    >>> sorted(order), order[1] - order[0]
    ([0, 1, 2, 3], 1)
    """
    if rows % group:
        return torch.randperm(rows, generator=generator)
    groups = torch.randperm(rows // group, generator=generator)
    # (groups, 1) starts + (group,) offsets
    return (groups[:, None] * group + torch.arange(group)).reshape(-1)
