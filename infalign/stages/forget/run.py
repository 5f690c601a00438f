"""`infalign forget`: learn, forget, measure, and say what went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from infalign.evaluation.forgotten import FILE, Accuracy, ForgetResult
from infalign.evaluation.summary import PROXY
from infalign.forgetting.tasks import Task, shared_questions
from infalign.models.loading import local_path
from infalign.report.forget_page import ratios_table, report_forget, summary_lines
from infalign.report.table import number, plain_text
from infalign.rewards.loader import load_reward
from infalign.runtime.artifacts import fingerprint, read_json, sweep_temporaries, without_nan, write_json
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import barrier, is_main, together
from infalign.runtime.imports import file_digest
from infalign.runtime.launch import join
from infalign.stages.evaluate import evaluate
from infalign.stages.forget.answers import answers_of, summarise
from infalign.stages.forget.bench import Bench
from infalign.stages.forget.load import load_tasks
from infalign.stages.forget.models import Models
from infalign.stages.forget.recipe import BASE, FORGOTTEN, RELEARNED, ForgetRecipe, Node, nodes_of
from infalign.stages.output import leaves_nothing
from infalign.stages.recipe import load_recipe
from infalign.training.packages import missing_packages
from infalign.types import InputError

LONGEST_MEASURING = timedelta(days=1)
"""How long ranks wait for the one that measures a model on all tasks."""


@leaves_nothing("*.json")
def forget(recipe: ForgetRecipe, *, dry_run: bool = False) -> ForgetResult | None:
    """Make every model of the experiment, or find it made, measure all, and write `forget.json` and the report.

    Args:
        recipe: the verb's.
        dry_run: check everything and list the models; write nothing.

    Raises:
        InputError: a task can't be had, or the folder holds another experiment.
        TrainingError: weights are not finite.
    """
    join(recipe.use_cpu, wait=LONGEST_MEASURING)
    if recipe.output.exists() and not recipe.output.is_dir():
        raise InputError(f"output_dir {recipe.output} is a file: give a folder")
    missing = missing_packages(recipe.training)
    if missing:
        raise InputError("; ".join(missing))
    with together("the tasks"):
        tasks = load_tasks(recipe)
        sizes = {name: len(task.train) for name, task in tasks.items()}
        nodes = nodes_of(recipe, {name: task.family for name, task in tasks.items()}, sizes)
        models = Models(recipe, tasks, nodes)
        bench = Bench(recipe, tasks, models)
        models.check_training()
        _check_general(recipe)
    if recipe.quantized and not bench.quantizes:
        notice("no 4-bit copy is measured: pip install 'infalign[qlora]', or quantized: false")
    _tell_tasks(recipe, tasks, len(nodes))
    if dry_run:
        for node in nodes:
            say(f"  {node.name}: {len(models.examples(node)) if node.role != BASE else 0} examples")
        return None
    if is_main():
        sweep_temporaries(recipe.output / "models")
    start, spent = time.monotonic(), _spent(recipe)
    measured: dict[str, dict[str, Any]] = {}
    wins: dict[str, dict[str, Accuracy]] = {}
    for place, node in enumerate(nodes, 1):
        measured[node.name] = bench.found(node) or bench.measure(node, models.weights(node))
        if node.role == FORGOTTEN and recipe.general is not None:
            wins[node.name] = _general(recipe, models, node)
        say(f"[{place}/{len(nodes)}] {node.name}: {_accuracies(node, tasks, measured[node.name])}")
        if not recipe.keep_models:
            _let_go(nodes, models, measured)
        if is_main():
            write_json(recipe.output / "spent.json", {"seconds": spent + time.monotonic() - start})
    result = summarise(recipe, tasks, nodes, measured, wins, spent + time.monotonic() - start)
    if is_main():
        write_json(recipe.output / FILE, without_nan(asdict(result)))
        report_forget(recipe.output)
    barrier()
    return result


def tell(result: ForgetResult | None) -> None:
    """Print what was forgotten and what was not."""
    if result is None:
        return
    for title, table in ratios_table(result):
        say(f"\n{title}")
        for line in plain_text(table):
            say(line)
    say()
    for line in summary_lines(result):
        say(f"- {line}")


def _tell_tasks(recipe: ForgetRecipe, tasks: Mapping[str, Task], count: int) -> None:
    shown = ", ".join(f"{task.name} ({len(task.train)} + {len(task.test)})" for task in tasks.values())
    say(f"forget: {count} models on {len(tasks)} tasks (training + test questions): {shown}")
    few = [task.name for task in tasks.values() if len(task.train) < max(recipe.forget_examples)]
    if few:
        notice(
            f"{', '.join(few)}: fewer training questions than forget_examples {max(recipe.forget_examples)}: all are "
            "used, and numbers that come to the same are left out"
        )
    for (task, other), number_of in shared_questions(tasks).items():
        notice(f"{number_of} of {len(tasks[task].test)} test questions of {task} are training questions of {other}")


def _accuracies(node: Node, tasks: Mapping[str, Task], measured: Mapping[str, Any]) -> str:
    names = [node.task] if node.role == RELEARNED else list(tasks)
    return ", ".join(f"{name} {number(float(answers_of(measured, tasks[name]).mean()), 3)}" for name in names)


def _spent(recipe: ForgetRecipe) -> float:
    file = recipe.output / "spent.json"
    return float(read_json(file, "the time spent")["seconds"]) if file.exists() else 0.0


def _let_go(nodes: Sequence[Node], models: Models, measured: Mapping[str, Any]) -> None:
    """Drop the weights of models whose children are all measured."""
    for node in nodes:
        waiting = any(child.parent == node.name and child.name not in measured for child in nodes)
        if node.name in measured and not waiting:
            models.drop(node)


# ---- what else went, by the project's own evaluation ----


def _check_general(recipe: ForgetRecipe) -> None:
    if recipe.general is not None and local_path(recipe.general, recipe.base_dir) is None:
        raise InputError(f"general: there is no recipe {recipe.general} under {recipe.base_dir} or {Path.cwd()}")


def _general(recipe: ForgetRecipe, models: Models, node: Node) -> dict[str, Accuracy]:
    """Win rates of a forgotten model against the fine-tuned one on the `general` recipe's prompts, by decoder."""
    file = recipe.output / "general" / f"{node.name}.json"
    path = local_path(str(recipe.general), recipe.base_dir)
    judged = load_recipe(path)
    reward = load_reward(str(judged.reward), judged.reward_kwargs, base_dir=judged.base_dir)
    data = local_path(str(judged.dataset_name), judged.base_dir)
    asked = [file_digest(one) for one in (path, data) if one is not None and one.is_file()]
    identity = fingerprint([models.parts(node), asked, reward.fingerprint])
    held = read_json(file, "the win rates") if file.exists() else {}
    if held.get("identity") != identity:
        parent = models.weights(models.nodes[node.parent])
        flags = {
            "model_name_or_path": parent,
            "policy_name_or_path": models.weights(node),
            "output_dir": str(recipe.output / "general" / node.name),
            "dtype": recipe.dtype,
            "use_cpu": recipe.use_cpu,
            "trust_remote_code": recipe.trust_remote_code,
            "overwrite": True,
        }
        found = evaluate(load_recipe(path, flags))
        rows = {
            row.label: Accuracy(row.mean, row.low, row.high, found.prompts)
            for row in found.win_rates
            if row.judge == PROXY
        }
        held = {"identity": identity, "rows": {name: asdict(one) for name, one in rows.items()}}
        if is_main():
            write_json(file, held)
        barrier()
    return {name: Accuracy(**one) for name, one in held["rows"].items()}
