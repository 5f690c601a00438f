"""The base policy beside the policy, for decoding strategies that compare with it: loaded when first drawn from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infalign.generation.plan import Request
from infalign.stages.experiment import Experiment
from infalign.types import Sample, SamplingSettings

REFERENCE = "generate-reference"
"""The purpose that keeps its random streams apart from the policy's."""


@dataclass
class LateSampler:
    """A sampler that is made when it is first needed; `settings` and `gone` may be set before every batch."""

    make: Callable[[], Any]
    settings: SamplingSettings
    tokenizer: Any
    gone: Callable[[str], bool] | None = None
    _made: Any = field(default=None, init=False, repr=False)

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample a request, in their order.

        Raises:
            InputError: the model can't be loaded.
        """
        if self._made is None:
            self._made = self.make()
            self._made.tokenizer = self.tokenizer
        self._made.settings, self._made.gone = self.settings, self.gone
        return self._made.sample(requests)


def reference_sampler(experiment: Experiment) -> LateSampler:
    """A sampler of the base policy with streams of its own."""
    return LateSampler(
        lambda: experiment.sampler(experiment.base_path, REFERENCE),
        experiment.recipe.sampling,
        copy.deepcopy(experiment.tokenizer),
    )
