"""`transform: gold_optimal`: the optimum where the recipe's reward decodes and its gold reward judges.

What the proxy's quantiles are worth under gold is estimated from calibration samples that both have scored, so the
objective is known once a table is filled; `calibrate` scores it with both. Before, the ordinary optimum stands in, for
checks and estimates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from infalign.calibration.judged import SHAPES, JudgedCurve, estimate_h
from infalign.calibration.table import SampleTable
from infalign.stages.sampling import table_rewards
from infalign.theory.judged import gold_optimal
from infalign.theory.objective import Objective
from infalign.types import InputError

if TYPE_CHECKING:
    from infalign.stages.experiment import Experiment
    from infalign.stages.recipe import Recipe
    from infalign.theory.procedures import Procedure

GOLD_OPTIMAL = "gold_optimal"


def check_gold_optimal(recipe: Recipe) -> None:
    """See that a recipe with `transform: gold_optimal` has what it needs.

    Raises:
        InputError: no gold reward, or another option than `shape`.
    """
    if not recipe.gold_reward:
        raise InputError(
            "transform: gold_optimal needs gold_reward, which judges what the reward decodes: file.py:name"
        )
    unknown = [name for name in recipe.transform_kwargs if name != "shape"]
    shape = recipe.transform_kwargs.get("shape", SHAPES[0])
    if unknown or shape not in SHAPES:
        got = unknown[0] if unknown else f"shape: {shape}"
        raise InputError(
            f"transform: gold_optimal takes transform_kwargs: {{shape: {' or '.join(SHAPES)}}}, got {got!r}"
        )


def judged_curve(experiment: Experiment) -> JudgedCurve | None:
    """What the proxy's quantiles are worth under gold; None while the table lacks samples or scores.

    Raises:
        InputError: the recipe lacks something, or no prompt has enough samples that both rewards scored.
    """
    recipe, procedure = experiment.recipe, experiment.procedure
    check_gold_optimal(recipe)
    gold = experiment.gold
    assert gold is not None
    folder = recipe.output / "calibration"
    try:
        table = SampleTable.open(folder, experiment.sampling_parts(experiment.base_path, "calibration"))
    except InputError:  # samples of other settings: `calibrate` says so
        return None
    prompts = [*experiment.splits.train, *experiment.splits.validation]
    count = recipe.num_calibration_samples
    both = [table_rewards(table, one, prompts) for one in (experiment.reward, gold)]
    if any(len(side.get(prompt.key, ())) < count for prompt in prompts for side in both):
        return None
    rows = [tuple(side[prompt.key][:count] for side in both) for prompt in prompts]
    kept = [row for row in rows if np.count_nonzero(~np.isnan(row[0] + row[1])) > procedure.n]
    if not kept:
        raise InputError(
            f"transform: gold_optimal needs more than {procedure.n} samples of a prompt that both rewards scored, and "
            "no prompt has them: raise num_calibration_samples, or look at the rewards"
        )
    shape: Any = recipe.transform_kwargs.get("shape", SHAPES[0])
    return estimate_h([row[0] for row in kept], [row[1] for row in kept], procedure, shape=shape, seed=recipe.seed)


def judged_objective(recipe: Recipe, procedure: Procedure, curve: JudgedCurve) -> Objective:
    """The objective of a curve, at the recipe's beta or target_kl.

    Raises:
        InputError: the curve is constant, so that no policy gains, or no beta reaches the KL.
    """
    found = gold_optimal(procedure, curve.h_J, None, recipe.beta, recipe.target_kl)
    return Objective(procedure, found, found.beta, found, found.label)
