"""From what was measured to what it says: accuracies, ratios, behaviours, predictors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.evaluation.forgotten import (
    Accuracy,
    ForgetResult,
    Forgotten,
    OpenAnswers,
    Prediction,
    Probed,
    Relearned,
    TaskFacts,
)
from infalign.forgetting.measures import (
    accuracy,
    behaviour,
    best_of,
    cluster_order,
    confidence_of,
    correlation,
    forget_gap,
    forget_ratio,
    pass_at,
)
from infalign.forgetting.scoring import correct, right_probability
from infalign.forgetting.tasks import Question, Task
from infalign.stages.forget.bench import pass_shares
from infalign.stages.forget.recipe import BASE, FORGOTTEN, RELEARNED, TUNED, ForgetRecipe, Node

Array = NDArray[np.float64]
Measured = Mapping[str, Any]

PREDICTORS = ("confidence", "difficulty", "total variance")


def summarise(
    recipe: ForgetRecipe,
    tasks: Mapping[str, Task],
    nodes: Sequence[Node],
    measured: Mapping[str, Measured],
    wins: Mapping[str, Mapping[str, Accuracy]],
    seconds: float,
) -> ForgetResult:
    """Everything that the experiment found.

    Args:
        recipe: the verb's.
        tasks: by name.
        nodes: every model, parents first.
        measured: by the models' names, from `Bench`.
        wins: win rates of forgotten models under the `general` recipe, by name and decoder.
        seconds: spent in all.
    """
    by_name = {node.name: node for node in nodes}
    facts = tuple(_facts(recipe, task, nodes, measured) for task in tasks.values())
    found = tuple(
        _forgotten(recipe, tasks, node, by_name, measured, wins.get(node.name, {}))
        for node in nodes
        if node.role == FORGOTTEN
    )
    kinds = list(dict.fromkeys((one.labels, one.examples) for one in found))
    return ForgetResult(
        model=recipe.model_name_or_path,
        fine_tune=recipe.fine_tune,
        confidence=recipe.confidence,
        tasks=facts,
        forgotten=found,
        predictions=tuple(one for kind in kinds for one in _predictions(facts, found, kind, recipe.confidence)),
        order={f"{labels} {count}": _order(facts, found, (labels, count)) for labels, count in kinds},
        seconds=seconds,
    )


def answers_of(measured: Measured, task: Task) -> Array:
    """(I,) 1 where a model answered a test question of the task rightly."""
    return correct(_logps(measured, task), task.test)


def _logps(measured: Measured, task: Task) -> Array:
    return np.array(measured["logps"][task.name], dtype=np.float64)


def _facts(recipe: ForgetRecipe, task: Task, nodes: Sequence[Node], measured: Mapping[str, Measured]) -> TaskFacts:
    base = measured[BASE]
    tuned = next(node for node in nodes if node.role == TUNED and node.task in ("", task.name))
    logps = _logps(base, task)
    return TaskFacts(
        name=task.name,
        family=task.family,
        train=len(task.train),
        test=len(task.test),
        overlap=task.overlap,
        repeated=task.repeated,
        base=accuracy(correct(logps, task.test), recipe.confidence),
        base_per_character=float(correct(logps, task.test, per_character=True).mean()),
        confidence=confidence_of(right_probability(logps, task.test)),
        variance=float(base["variance"][task.name]),
        tuned=accuracy(answers_of(measured[tuned.name], task), recipe.confidence),
    )


def _forgotten(
    recipe: ForgetRecipe,
    tasks: Mapping[str, Task],
    node: Node,
    by_name: Mapping[str, Node],
    measured: Mapping[str, Measured],
    wins: Mapping[str, Accuracy],
) -> Forgotten:
    mine, tuned, base = measured[node.name], measured[node.parent], measured[BASE]
    level, own = recipe.confidence, tasks[node.task]
    after, before, first = (
        {name: answers_of(one, task) for name, task in tasks.items()} for one in (mine, tuned, base)
    )
    p_after, p_before = (right_probability(_logps(one, own), own.test) for one in (mine, tuned))
    verifier = before[node.task]

    def again(parent: str) -> tuple[Relearned, ...]:
        return tuple(
            Relearned(one.source, one.examples, accuracy(answers_of(measured[one.name], own), level))
            for one in by_name.values()
            if (one.role, one.parent, one.task) == (RELEARNED, parent, node.task)
        )

    sizes = recipe.eval_n
    return Forgotten(
        name=node.name,
        task=node.task,
        labels=node.labels,
        examples=node.asked,
        used=node.examples,
        accuracies={name: accuracy(one, level) for name, one in after.items()},
        before={name: accuracy(one, level) for name, one in before.items()},
        ratios={name: forget_ratio(before[name], after[name], level, recipe.seed) for name in tasks},
        behaviours={name: behaviour(first[name], before[name], after[name], level) for name in tasks},
        gap=forget_gap(float(after[node.task].mean())),
        best_of={str(n): best_of(p_after, verifier, n) for n in sizes},
        pass_at={str(n): pass_at(p_after, n) for n in sizes},
        best_of_before={str(n): best_of(p_before, verifier, n) for n in sizes},
        pass_at_before={str(n): pass_at(p_before, n) for n in sizes},
        best_of_coin={str(n): best_of(np.full_like(p_after, 0.5), verifier, n) for n in sizes},
        probed=_probed(mine, tuned, base, node.task, level),
        quantized=_quantized(mine, own.test, level),
        open_answers=_open(recipe, mine, tuned, node.task),
        relearned=again(node.name),
        learned=again(BASE) if again(node.name) else (),
        texts=dict(mine.get("texts", {})),
        texts_before=dict(tuned.get("texts", {})),
        wins=dict(wins),
    )


def _probed(mine: Measured, tuned: Measured, base: Measured, task: str, level: float) -> Probed | None:
    if "probed" not in mine:
        return None
    rows = (tuned["probed"][task], mine["probed"][task], base["control"][task])
    before, after, control = (accuracy(np.array(one), level) for one in rows)
    return Probed(before, after, control)


def _quantized(mine: Measured, questions: Sequence[Question], level: float) -> Accuracy | None:
    if "quantized" not in mine:
        return None
    return accuracy(correct(np.array(mine["quantized"], dtype=np.float64), questions), level)


def _open(recipe: ForgetRecipe, mine: Measured, tuned: Measured, task: str) -> OpenAnswers | None:
    if "open" not in mine:
        return None
    before, after = (
        pass_shares(np.array(one["open"][task]), recipe.open_answers, recipe.eval_n) for one in (tuned, mine)
    )
    return OpenAnswers(before, after)


def _of_kind(found: Sequence[Forgotten], kind: tuple[str, int]) -> list[Forgotten]:
    return [one for one in found if (one.labels, one.examples) == kind]


def _predictions(
    facts: Sequence[TaskFacts], found: Sequence[Forgotten], kind: tuple[str, int], level: float
) -> list[Prediction]:
    by_task = {one.name: one for one in facts}
    ours = _of_kind(found, kind)
    ratios = np.array([one.ratios[one.task].value for one in ours])
    values = {
        "confidence": [by_task[one.task].confidence for one in ours],
        "difficulty": [1.0 - by_task[one.task].base.mean for one in ours],
        "total variance": [by_task[one.task].variance for one in ours],
    }
    return [
        Prediction(name, *kind, correlation(np.array(values[name], dtype=np.float64), ratios, level))
        for name in PREDICTORS
    ]


def _order(facts: Sequence[TaskFacts], found: Sequence[Forgotten], kind: tuple[str, int]) -> list[int]:
    """Rows of the matrix (places among the tasks that were forgotten) with those alike side by side."""
    rows = [[one.accuracies[task.name].mean for task in facts] for one in _of_kind(found, kind)]
    return cluster_order(np.array(rows, dtype=np.float64))
