"""`objectives`: one policy for several decoders and rewards.

    objectives:
      - {procedure: best_of_n, n: 4, reward: helpful.py:build, weight: 1.0}
      - {procedure: worst_of_n, n: 4, reward: harmless.py:build, weight: 0.5}

What is maximised is the weighted sum of the terms' win rates, less beta times the KL: each by the direct objective,
whose gradient is that of the win rate itself, so that their sum is the gradient of the sum. (A transform is optimal for
one procedure alone: the sum of two terms' transforms is not the optimum of anything.)

`objective_weights: [1.0, 0.0]` puts other weights in place of the terms' own: a sweep varies it to draw the trade-off.
A term of weight 0 is measured like the others and not trained for, so that an expert of one term is compared with the
policies of both.

`objective_mix: [0.7, 0.3]` mixes data instead: each training prompt is trained for one of the terms, drawn with these
chances, as who mixes two data sets does.

A term with a `group` is for the prompts whose column `group_column` has that value, in training and in the table: one
term for each language with the same reward, or red-teaming prompts for one reward and questions for the other. An
expert is then trained on its group alone, and `objective_mix` says which share of the prompts each group has.

A term takes what it leaves out from the recipe's own keys. The first one is the recipe's own decoder and reward:
`generate` and `serve` decode with it, and it is what `evaluate` calls the recipe's decoder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from infalign.runtime.config import check, field_hints
from infalign.theory.procedures import BUILT_IN, refuse_n, takes_n
from infalign.types import InputError

if TYPE_CHECKING:
    from infalign.rewards.loader import Reward
    from infalign.stages.recipe import Recipe
    from infalign.theory.procedures import Procedure

OWN = ("procedure", "n", "procedure_kwargs", "reward", "reward_kwargs")
"""A term's keys that are the recipe's own, too."""


@dataclass(frozen=True)
class TermKeys:
    """The keys of one entry of `objectives`."""

    procedure: str
    reward: str
    n: int | None = None
    procedure_kwargs: dict = field(default_factory=dict)
    reward_kwargs: dict = field(default_factory=dict)
    weight: float = 1.0
    group: str | None = None


@dataclass(frozen=True)
class Term:
    """What one entry of `objectives` stands for; a recipe without any has one term, its procedure and reward."""

    procedure: Procedure
    reward: Reward
    weight: float = 1.0
    group: str = ""

    @property
    def name(self) -> str:
        """`BestOfN(4) of vader`, or `BestOfN(4) of vader on de`."""
        return f"{self.procedure!r} of {self.reward.name}{f' on {self.group}' if self.group else ''}"


def with_objectives(recipe: Recipe, given: Collection[str]) -> Recipe:
    """A recipe whose `objectives` are complete, with the first one's procedure and reward as its own.

    Args:
        recipe: as it was read.
        given: the keys that were set in it.

    Raises:
        InputError: an entry that is none, two that are the same, or a key that has no meaning beside them.
    """
    problems = []
    for name in ("objective_weights", "objective_mix"):
        if weights := getattr(recipe, name):
            problems += _weight_problems(name, weights, len(recipe.objectives))
    if recipe.objective_weights and recipe.objective_mix:
        problems.append(
            "objective_weights sums the terms on every prompt and objective_mix gives each prompt one: "
            "leave one of them out"
        )
    if problems:
        raise InputError("; ".join(problems))
    if not recipe.objectives:
        return recipe
    if "objective" in given and recipe.objective != "direct":
        problems.append(f"objectives are trained by objective: direct, got {recipe.objective}: leave it out")
    terms: list[TermKeys] = []
    for number, entry in enumerate(recipe.objectives, 1):
        try:
            terms.append(_read(recipe, entry))
        except InputError as error:
            problems.append(f"objectives, entry {number}: {error}")
    met: dict[str, int] = {}
    for number, term in enumerate(terms, 1):
        first = met.setdefault(repr(dataclasses.replace(term, weight=1.0)), number)
        if first != number and len(terms) == len(recipe.objectives):
            problems.append(f"objectives, entries {first} and {number}: the same twice: keep one, with both weights")
    grouped = sum(bool(term.group) for term in terms)
    if recipe.objective_mix and (0 < grouped < len(terms) or grouped > len({term.group for term in terms})):
        problems.append(
            "objective_mix gives each prompt one of objectives: give each of them a group of its own, or none a group"
        )
    if len(recipe.objectives) == 1 and terms and terms[0].weight != 1.0:
        problems.append(f"objectives has one entry: its weight {terms[0].weight:g} would only scale beta: leave it out")
    if problems:
        raise InputError("; ".join(problems))
    if recipe.objective_weights or recipe.objective_mix:
        weights = [float(one) for one in recipe.objective_weights or recipe.objective_mix]
        if recipe.objective_mix:  # chances
            weights = [one / sum(weights) for one in weights]
        terms = [dataclasses.replace(term, weight=weight) for term, weight in zip(terms, weights, strict=True)]
    own = {name: value for name, value in vars(terms[0]).items() if name in OWN and value is not None}
    for name in OWN:
        if name in given and name in own and getattr(recipe, name) != own[name]:
            problems.append(
                f"{name} is {getattr(recipe, name)!r}, and {own[name]!r} in the first of objectives, which is the "
                f"recipe's own: leave {name} out"
            )
    if problems:
        raise InputError("; ".join(problems))
    whole = [{name: value for name, value in vars(term).items() if value is not None} for term in terms]
    return dataclasses.replace(recipe, objectives=whole, objective="direct", **own)


def _weight_problems(name: str, weights: Sequence[float], terms: int) -> list[str]:
    """What is wrong with numbers in place of the terms' own weights."""
    if terms < 2:
        return [f"{name} are for several objectives, got {terms}: leave it out"]
    if len(weights) != terms:
        return [f"{name} must be {terms} numbers, one for each of objectives, got {list(weights)}"]
    if not all(0 <= one < math.inf for one in weights) or not any(weights):
        return [f"{name} must be at least 0, and one of them above, got {list(weights)}"]
    return []


def _read(recipe: Recipe, entry: dict[str, Any]) -> TermKeys:
    """An entry with what it leaves out."""
    keys = check(entry, {}, field_hints(TermKeys))
    procedure = keys.get("procedure", recipe.procedure)
    if procedure in BUILT_IN:
        refuse_n(procedure, keys.get("n"))
    elif keys.get("n") is not None:
        raise InputError(f"n is for the built-in procedures: give {procedure} its arguments as procedure_kwargs")
    own_n = recipe.n if procedure in BUILT_IN and takes_n(procedure) else None
    same_procedure, same_reward = procedure == recipe.procedure, "reward" not in keys
    defaults = {
        "procedure": procedure,
        "reward": recipe.reward,
        "n": own_n,
        "procedure_kwargs": recipe.procedure_kwargs if same_procedure else {},
        "reward_kwargs": recipe.reward_kwargs if same_reward else {},
    }
    term = TermKeys(**{**defaults, **keys})
    if not term.reward:
        raise InputError("it has no reward, and the recipe has none: add reward: file.py:name")
    if term.n is not None and term.n < 1:
        raise InputError(f"n must be at least 1, got {term.n}")
    if not 0 < term.weight < math.inf:
        raise InputError(
            f"weight must be a number above 0, got {term.weight:g}: for what should be low, turn the reward's sign"
        )
    return term
