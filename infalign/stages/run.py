"""`infalign run`: calibrate, train, evaluate, report; what is finished and fresh is reused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infalign.runtime.artifacts import read_json
from infalign.runtime.console import say
from infalign.runtime.distributed import together
from infalign.stages.calibrate import calibrate
from infalign.stages.engines import check_engine
from infalign.stages.estimate import dry_run
from infalign.stages.evaluate import check_samples, evaluate, tell
from infalign.stages.experiment import Experiment
from infalign.stages.forgetting import text_files
from infalign.stages.imported import imported_path
from infalign.stages.objective import objective_name
from infalign.stages.recipe import Recipe, load_recipe, require, require_plain
from infalign.stages.report import limited_by, report
from infalign.stages.term_prompts import assigned
from infalign.stages.train import check_ready, train, training_arguments
from infalign.training.checks import check_batch
from infalign.types import InputError


def preflight(experiment: Experiment) -> None:
    """Everything that can be known before hours of work: all stages' settings, rewards and batch sizes.

    Raises:
        InputError: the first thing that does not fit.
    """
    recipe = experiment.recipe
    if recipe.policy_name_or_path:
        raise InputError(
            "policy_name_or_path is for evaluate and generate: `run` trains a policy and evaluates that one"
        )
    check_samples(recipe)
    if recipe.calibration_samples:
        imported_path(recipe)
    check_engine(experiment)
    text_files(experiment)
    _ = experiment.objective
    check_ready(experiment)  # before rewards, which may be models
    _ = experiment.terms, experiment.gold
    prompts = experiment.splits.train
    check_batch(training_arguments(experiment), len(assigned(experiment, prompts) or prompts))


def run(config: Recipe | Mapping[str, Any] | str | Path, *, dry: bool = False, **flags: Any) -> dict[str, Any]:
    """The whole experiment, from a notebook or the command line.

    Args:
        config: a `Recipe`, its keys as a mapping, or the path of a YAML file.
        dry: only check everything and estimate tokens, memory and time.
        flags: recipe keys that win over `config`.

    Returns:
        `drawn` (samples generated now), `trained` (whether the policy was trained now), `evaluation` (what was
        measured, an `evaluation.summary.Evaluation`), `report` (the page's path).

    Raises:
        InputError: whatever is wrong with the recipe, its data, models, reward or output folder.
    """
    recipe = config if isinstance(config, Recipe) else load_recipe(config, flags)
    require(recipe, "model_name_or_path", "reward", "output_dir")
    require_plain(recipe)
    experiment = Experiment(recipe)
    with together("the checks before `run`"):  # every rank looks, and one of them speaks
        preflight(experiment)
    if dry:
        return dry_run(experiment)
    say(f"infalign: {experiment.procedure}, {objective_name(recipe)}, output in {recipe.output}")
    calibrated = calibrate(recipe, experiment)
    trained = train(recipe, experiment)
    evaluated = evaluate(recipe, experiment)
    tell(evaluated)
    log = experiment.policy_path / "training_log.json"
    rows = read_json(log, "the training log") if log.exists() else []
    for line in limited_by(recipe, experiment.objective, evaluated, rows):
        say(f"  {line}")
    page = report(recipe)
    say(f"\nreport: {page}")
    return {
        "drawn": calibrated["drawn"] + evaluated.drawn,
        "trained": trained["trained"],
        "evaluation": evaluated,
        "report": page,
    }


def run_verb(recipe: Recipe, *, dry_run: bool = False) -> None:
    """`run` under the name that its option has on the command line."""
    run(recipe, dry=dry_run)
