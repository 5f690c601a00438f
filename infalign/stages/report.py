"""`infalign report`: one page and PNGs of whatever an output folder holds. Loads no torch and no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infalign.calibration.few_samples import expected_cost
from infalign.evaluation.shortfall import kl_missed, last_rollouts, shortfall
from infalign.evaluation.summary import Evaluation
from infalign.report.findings import Findings, read_findings
from infalign.report.gallery import draw_all
from infalign.report.page import Page, Setting, render_page
from infalign.report.sweep_page import FILE as SWEEP
from infalign.report.sweep_page import report_sweep
from infalign.runtime.artifacts import write_whole
from infalign.runtime.console import say
from infalign.stages.judged import GOLD_OPTIMAL
from infalign.stages.objective import load_objective, load_procedure
from infalign.stages.recipe import Recipe, own_keys, require
from infalign.theory.objective import Objective, differing
from infalign.types import InputError


def report(recipe: Recipe) -> Path:
    """Write `report/index.html` and the plots beside it, each whole or not at all.

    Args:
        recipe: only its `output_dir` (and `base_dir`) is needed; the other keys are read from `recipe.json` there,
            so that the page tells of the recipe that made the artifacts.

    Returns:
        The page's path.

    Raises:
        InputError: no output_dir, nothing to report in it, or a damaged file.
    """
    require(recipe, "output_dir")
    folder = recipe.output
    if (folder / SWEEP).exists():
        return report_sweep(folder)
    found = read_findings(folder)
    if found.is_empty:
        raise InputError(
            f"{folder} holds nothing to report (no calibration, policy or evaluation.json): give another --output_dir, "
            "or run `infalign run --config RECIPE.yaml` (or calibrate, train and evaluate one by one) first"
        )
    made_with = recorded_recipe(found, recipe)
    objective, problem = objective_of(made_with, found)
    plots = draw_all(found, objective, made_with.seed)
    for plot in plots:
        write_whole(folder / "report" / f"{plot.name}.png", lambda path, png=plot.png: path.write_bytes(png))
    notes = [problem] if problem else []
    limits = []
    if objective is not None and found.evaluation is not None and found.log:
        lines = limited_by(made_with, objective, found.evaluation, found.log)
        limits = [f"{line[0].upper()}{line[1:]}." for line in lines]
    html = render_page(Page(f"infalign · {folder.resolve().name}", found, plots, notes, settings(made_with), limits))
    page = folder / "report" / "index.html"
    write_whole(page, lambda path: path.write_text(html, encoding="utf-8"))
    return page


def tell(page: Path) -> None:
    """Print where the page is."""
    say(f"report: {page}")


def recorded_recipe(found: Findings, given: Recipe) -> Recipe:
    """The recipe that made the artifacts, from recipe.json; `given` where there is none."""
    if found.recipe is None:
        return given
    known = {one.name for one in dataclasses.fields(Recipe)} - {"base_dir", "output_dir"}
    values = {name: value for name, value in found.recipe.items() if name in known}
    return Recipe(**values, output_dir=given.output_dir, base_dir=given.base_dir)


def objective_of(recipe: Recipe, found: Findings) -> tuple[Objective | None, str]:
    """The recipe's objective; or None, and why: it cannot be made, or it is not what was used."""
    if found.recipe is None:
        return None, "No limit and transform plots: recipe.json is missing."
    try:
        objective = load_objective(recipe, load_procedure(recipe), found.judged)
    except InputError as error:
        return None, f"No limit and transform plots: {error}"
    if objective.policy is None and recipe.objective == "transform":
        return None, "No limit and transform plots: on [0, 1] the transform has no optimal policy at this beta."
    used = (found.policy or {}).get("parts", {}) if found.evaluation is None else found.evaluation.record()
    made = objective.record()
    for name in differing(used, made):
        return None, f"No limit and transform plots: recipe.json gives {name} {made[name]}, but {used[name]} was used."
    return objective, ""


def settings(recipe: Recipe) -> dict[str, list[Setting]]:
    """The recipe's keys by heading, then the training keys that were given."""
    defaults = Recipe()
    shown: dict[str, list[Setting]] = {}
    for one in own_keys():
        value = getattr(recipe, one.name)
        entry = Setting(one.name, value, value == getattr(defaults, one.name), one.metadata["help"])
        shown.setdefault(one.metadata["kind"], []).append(entry)
    shown["training"] = [Setting(name, value, meaning="training") for name, value in recipe.training.items()]
    return shown


def limited_by(
    recipe: Recipe, objective: Objective, evaluation: Evaluation, log: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What limited a trained policy's result, in sentences without a full stop (`evaluation.shortfall`)."""
    if len(recipe.objectives) > 1:  # what they reach together is not known
        return kl_missed(evaluation.kl.mean, recipe.target_kl)
    count = recipe.num_calibration_samples
    ranks_alone = recipe.objective == "transform" and recipe.calibration_method != "pooled"
    cost = None
    if ranks_alone and objective.kl and recipe.transform != GOLD_OPTIMAL:
        cost = expected_cost(objective.transform, objective.procedure, count, objective.kl)
    rollouts = last_rollouts(log)
    return shortfall(evaluation, objective.procedure, rollouts, target_kl=recipe.target_kl, count=count, cost=cost)
