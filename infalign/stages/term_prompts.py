"""Which prompts each of several terms is trained on: its group's, and with `objective_mix` so many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from infalign.runtime.seeds import stream
from infalign.types import Prompt

if TYPE_CHECKING:
    from infalign.stages.experiment import Experiment

Assigned = tuple[Prompt, tuple[int, ...]]
"""A prompt and the numbers of the trained terms that it is for."""


def assigned(experiment: Experiment, prompts: Sequence[Prompt]) -> list[Assigned] | None:
    """The prompts that are trained on, each with its terms; None where every prompt is for all terms.

    With `objective_mix` each prompt is for one term. Where terms have groups, as many prompts of each are taken as the
    mix says, in their order, and where they have none each prompt's term is drawn by its key and the seed.
    """
    recipe, terms = experiment.recipe, experiment.trained_terms
    grouped = any(term.group for term in terms)
    if not grouped and (not recipe.objective_mix or len(terms) < 2):
        return None
    if not grouped:
        return list(zip(prompts, _drawn(experiment, prompts), strict=True))
    found = [
        (prompt, tuple(number for number, term in enumerate(terms) if experiment.in_group(prompt, term.group)))
        for prompt in prompts
    ]
    found = [one for one in found if one[1]]
    return _shares(found, [term.weight for term in terms]) if recipe.objective_mix else found


def _drawn(experiment: Experiment, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    ends = np.cumsum([term.weight for term in experiment.trained_terms])[:-1]
    draws = [stream(experiment.recipe.seed, "objective_mix", prompt.key).random() for prompt in prompts]
    return [(int(np.searchsorted(ends, one, side="right")),) for one in draws]


def _shares(found: Sequence[Assigned], shares: Sequence[float]) -> list[Assigned]:
    """The most prompts that go together in these shares; each has one term."""
    counts = np.bincount([numbers[0] for _, numbers in found], minlength=len(shares))
    total = min(count / share for count, share in zip(counts, shares, strict=True))
    left = [round(share * total) for share in shares]
    kept = []
    for prompt, numbers in found:
        left[numbers[0]] -= 1
        if left[numbers[0]] >= 0:
            kept.append((prompt, numbers))
    return kept
