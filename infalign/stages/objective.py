"""What a recipe optimises: its procedure, its transform and its beta, from names to objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infalign.calibration.judged import JudgedCurve
from infalign.rewards.fingerprint import callable_digest, digest
from infalign.runtime.plugins import built, find_own
from infalign.stages.judged import GOLD_OPTIMAL, check_gold_optimal, judged_objective
from infalign.stages.recipe import Recipe
from infalign.stages.terms import TermKeys
from infalign.theory.objective import Objective, objective
from infalign.theory.optimum import optimal_transform
from infalign.theory.pairs import BestAndWorst
from infalign.theory.procedures import BUILT_IN, NEEDS, Procedure, refuse_n, takes_n
from infalign.theory.tilted import tilt
from infalign.theory.transforms import CATALOGUE, check_transform, log
from infalign.theory.truncated import UniformAbove
from infalign.training.baselines import Baseline, Name, start
from infalign.types import InputError


def load_procedure(recipe: Recipe) -> Procedure:
    """The recipe's procedure: a built-in name with `n` and `procedure_kwargs`, or `path.py:name`.

    Raises:
        InputError: an unknown name, or arguments that it does not take.
    """
    name = recipe.procedure
    n = recipe.n if name in BUILT_IN and takes_n(name) else None  # what `load_recipe` did not refuse is the default
    return find_procedure(name, n, recipe.procedure_kwargs, recipe.base_dir)


def load_procedures(recipe: Recipe) -> list[Procedure]:
    """Those of `objectives`, in order; without any the recipe's own; errors as `load_procedure`."""
    terms = [TermKeys(**one) for one in recipe.objectives]
    found = [find_procedure(one.procedure, one.n, one.procedure_kwargs, recipe.base_dir) for one in terms]
    return found or [load_procedure(recipe)]


def trained_procedures(recipe: Recipe) -> list[Procedure]:
    """Those whose term has a weight; errors as `load_procedure`."""
    procedures = load_procedures(recipe)
    weights = [one["weight"] for one in recipe.objectives] or [1.0]
    return [procedure for procedure, weight in zip(procedures, weights, strict=True) if weight > 0]


def find_procedure(name: str, n: int | None, kwargs: Mapping[str, Any], base_dir: Path) -> Procedure:
    """The procedure of that name, with `n` candidates (None: 4 where it takes a number); errors as `load_procedure`."""
    arguments: dict[str, Any] = dict(kwargs)
    if name in BUILT_IN:
        build: Any = BUILT_IN[name]
        wanted, example = NEEDS.get(name, ("", ""))
        if wanted and wanted not in arguments:
            raise InputError(f"procedure {name} needs procedure_kwargs: {example}")
        if takes_n(name):
            arguments = {"n": 4 if n is None else n, **arguments}
        else:
            refuse_n(name, n)
    else:
        build = find_own(name, BUILT_IN, base_dir, what="procedure")
        arguments = kwargs = arguments if n is None else {"n": n, **arguments}
    if isinstance(build, Procedure) and arguments:
        raise InputError(
            f"procedure {name!r} is {build!r} already and takes no arguments, got {arguments}: leave them out"
        )
    procedure = (
        build if isinstance(build, Procedure) else built(build, arguments, name, what="procedure", kwargs=kwargs)
    )
    if not isinstance(procedure, Procedure):
        raise InputError(f"procedure {name!r} gave {type(procedure).__name__}, not an infalign Procedure")
    return procedure


def objective_name(recipe: Recipe) -> str:
    """What is optimised, in words: the transform, which the direct objective has none of."""
    if len(recipe.objectives) > 1:
        return f"{len(recipe.objectives)} objectives"
    if recipe.solver == "offline" and recipe.loss not in (None, "variance"):
        return f"offline loss {recipe.loss}" + ("" if recipe.loss != "qrpo" else f", transform {recipe.transform}")
    if recipe.objective == "transform":
        return f"transform {recipe.transform}{'' if recipe.solver == 'online' else f', solver {recipe.solver}'}"
    return "direct objective" if recipe.objective == "direct" else f"objective {recipe.objective} (a baseline)"


def load_objective(recipe: Recipe, procedure: Procedure, curve: JudgedCurve | None = None) -> Objective:
    """The recipe's objective; `target_kl` gives the beta at which its transform aims at that KL.

    Args:
        recipe: whose.
        procedure: the recipe's.
        curve: what the proxy's quantiles are worth under gold, for `gold_optimal`; None while it is not known: the
            ordinary optimum stands in.

    Raises:
        InputError: an unknown transform, wrong arguments, or not exactly one of beta and target_kl.
    """
    if (recipe.beta is None) == (recipe.target_kl is None):
        got = "both" if recipe.beta is not None else "neither"
        raise InputError(f"give exactly one of beta and target_kl, got {got}: e.g. target_kl: 1.0 (nats)")
    if recipe.solver == "offline" and recipe.loss in ("tup", "ipo", "bonbon"):
        return _of_a_loss(recipe, procedure)
    if recipe.objective == "direct":
        return _direct(recipe, trained_procedures(recipe) if recipe.objectives else [procedure])
    if recipe.objective != "transform":
        return _baseline(recipe, recipe.objective, procedure)
    if recipe.transform == GOLD_OPTIMAL:
        check_gold_optimal(recipe)
        if curve is not None:
            return judged_objective(recipe, procedure, curve)
        return objective(procedure, None, recipe.beta, recipe.target_kl, f"{GOLD_OPTIMAL}, not calibrated yet")
    if recipe.transform == "optimal":
        return objective(procedure, None, recipe.beta, recipe.target_kl)
    transform = _transform(recipe)
    # in words that stay the same from run to run; one's own function by its name and source
    source = f"{recipe.transform} {recipe.transform_kwargs or ''} {digest(callable_digest(transform))}"
    label = repr(transform) if hasattr(transform, "name") else source
    return objective(procedure, transform, recipe.beta, recipe.target_kl, label)


def _of_a_loss(recipe: Recipe, procedure: Procedure) -> Objective:
    """What an offline loss aims at that has no transform of the recipe's: a policy for any decoder, or none."""
    group, options = int(recipe.training.get("num_generations", 8)), recipe.loss_kwargs
    if recipe.loss == "ipo":
        return objective(procedure, BestAndWorst(group), recipe.beta, recipe.target_kl, f"ipo on pairs of {group}")
    if recipe.loss == "bonbon":
        # the Best-of-G policy is a tilt of log u, and so is every policy on the line of logits from the base to it
        name = f"bonbon {group} {options.get('alpha', '')}".strip()
        return objective(procedure, log, recipe.beta, recipe.target_kl, name)
    threshold = options.get("threshold", -math.expm1(-(recipe.target_kl or 1.0)))
    policy = UniformAbove(threshold)
    return Objective(procedure, policy, 1.0, policy, repr(policy))


def _direct(recipe: Recipe, procedures: list[Procedure]) -> Objective:
    """The direct objective's; its optimum is that of the optimal transform.

    Of several terms nobody knows the optimum: it depends on how their rewards go together. Their beta is the weighted
    sum of the terms' own, at which terms that all want the same reach the KL.
    """
    for procedure in procedures:
        if recipe.num_calibration_samples < procedure.n:
            raise InputError(
                f"objective: direct needs num_calibration_samples of at least {procedure.n} for {procedure!r}, got "
                f"{recipe.num_calibration_samples}"
            )
    if len(procedures) == 1:
        of = ""
        if len(recipe.objectives) > 1:
            of = f" of {_aim(next(one for one in recipe.objectives if one['weight']))}"
        return objective(procedures[0], None, recipe.beta, recipe.target_kl, f"direct{of}")
    trained = [one for one in recipe.objectives if one["weight"] > 0]
    weights, beta = [one["weight"] for one in trained], recipe.beta
    if beta is None:
        betas = [optimal_transform(procedure, kl=recipe.target_kl).beta for procedure in procedures]
        beta = _mean_beta(trained, betas, bool(recipe.objective_mix))
    named = zip(weights, procedures, map(_aim, trained), strict=True)
    how = "direct, each prompt for one of: " if recipe.objective_mix else "direct: "
    label = how + " + ".join(f"{weight:g} {procedure!r} of {aim}" for weight, procedure, aim in named)
    first = optimal_transform(procedures[0], beta / sum(weights))
    return Objective(procedures[0], first, beta, None, label)


def _aim(term: Mapping[str, Any]) -> str:
    """A term's reward and group."""
    return f"{term['reward']}{' on ' + term['group'] if term.get('group') else ''}"


def _mean_beta(terms: Sequence[Mapping[str, Any]], betas: Sequence[float], mixed: bool) -> float:
    """The mean over groups of prompts of the weighted sum of the betas of the terms that a prompt is for.

    Of a mix the weights are shares of prompts: their sum is the mean.
    """
    weighted = [term["weight"] * beta for term, beta in zip(terms, betas, strict=True)]
    if mixed:
        return sum(weighted)
    groups = {term["group"] for term in terms if term.get("group")} or {None}
    sums = [
        sum(one for one, term in zip(weighted, terms, strict=True) if term.get("group") in (None, group))
        for group in groups
    ]
    return sum(sums) / len(sums)


def _baseline(recipe: Recipe, name: Name, procedure: Procedure) -> Objective:
    """A rival objective's: what it aims at depends on the rewards, and its first beta is that of Gaussian ones."""
    near = start(name, procedure, recipe.target_kl)
    beta = tilt(near, kl=recipe.target_kl).beta if recipe.beta is None else recipe.beta
    return Objective(procedure, near, beta, None, Baseline(name, procedure).label)


def _transform(recipe: Recipe) -> Any:
    name, kwargs = recipe.transform, recipe.transform_kwargs
    if name in CATALOGUE:
        if name == "exponential" and "t" not in kwargs:
            raise InputError(
                "transform exponential needs transform_kwargs: {t: ...}: about 5 for Best-of-2, 10 for Best-of-4, "
                "negative for Worst-of-N"
            )
        return built(CATALOGUE[name], kwargs, name, what="transform", kwargs=kwargs)
    transform = find_own(name, ["optimal", GOLD_OPTIMAL, *CATALOGUE], recipe.base_dir, what="transform")
    if kwargs:
        transform = built(transform, kwargs, name, what="transform", kwargs=kwargs)
    check_transform(transform, f"transform {name!r}")
    return transform
