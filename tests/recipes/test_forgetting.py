"""The forgetting recipes: the tasks that they make are right, apart where they say so, and their YAML is valid."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest

from infalign.forgetting.tasks import build_task, normalised, read_items
from infalign.stages.forget.recipe import load_forget_recipe, nodes_of

RECIPES = Path(__file__).parents[2] / "recipes" / "forgetting"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("forgetting_tasks", RECIPES / "tasks.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def tasks(module):
    return module.all_tasks()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_valid(path):
    recipe = load_forget_recipe(path)
    families = {name: task["family"] for name, task in recipe.tasks.items()}
    nodes = nodes_of(recipe, families, dict.fromkeys(families, 1000))
    assert len({node.name for node in nodes}) == len(nodes) and {node.parent for node in nodes} <= {
        "",
        *(node.name for node in nodes),
    }


def test_eight_tasks_without_overlap(tasks):
    assert len(tasks) == 8
    for name, (train, test) in tasks.items():
        task = build_task(
            name, name, read_items(train, name), read_items(test, name), num_train=10_000, num_test=10_000, seed=1
        )
        assert task.overlap == 0 and len(task.test) >= 60, name


def test_knowledge_is_tested_on_what_training_does_not_ask_about(module, tasks):
    for name, things in (("animals", module.FACTS), ("capitals", module.CITY)):
        asked = [
            {thing for row in part for thing in things if re.search(rf"\b{thing}\b", row["context"])}
            for part in tasks[name]
        ]
        assert not asked[0] & asked[1] and asked[0] | asked[1] == set(things)


def rows(tasks, name):
    return [row for part in tasks[name] for row in part]


def test_answers_are_right(module, tasks):
    """Computed once more from the words of the questions."""
    for row in rows(tasks, "sums"):
        a, b = map(int, re.findall(r"\d+", row["context"]))
        assert row["correct"] == str(a + b) and row["correct"] not in row["distractors"]
    for row in rows(tasks, "parity"):
        assert (row["correct"] == "yes") == (int(re.findall(r"\d+", row["context"])[0]) % 2 == 0)
    for row in rows(tasks, "negation"):
        said, claim = row["context"].split("Question:")
        assert (row["correct"] == "true") == (("not" in said) == ("not" in claim.partition(" True or")[0]))
    for row in rows(tasks, "more"):
        count, word, bound = re.findall(r"has (\d+) .* has (more|fewer) than (\d+)", row["context"])[0]
        assert (row["correct"] == "true") == (int(count) > int(bound) if word == "more" else int(count) < int(bound))
    for row in rows(tasks, "tone"):
        said = re.findall(r"was (not )?(\w+)\.", row["context"])[0]
        assert (row["correct"] == "yes") == ((said[1] in module.LIKED) != bool(said[0]))
    for row in rows(tasks, "animals"):
        animal = next(one for one in module.FACTS if re.search(rf"\b{one}\b", row["context"]))
        assert row["correct"].split()[-1] == module.FACTS[animal]


def test_agreement_is_of_the_subject(module, tasks):
    plurals = {module._plural(one) for one in module.BEINGS}
    for row in rows(tasks, "agreement"):
        subject, verb = re.findall(r"^The (\w+)(?: near the \w+)? (\w+) today", row["context"])[0]
        assert (row["correct"] == "yes") == ((subject in plurals) != (verb not in module.VERBS))


def test_the_small_model_reads_no_question(module, tasks):
    """Its statements have other words than the questions that are tested."""
    rng = random.Random(0)
    read = {normalised(module.statement(rng)) for _ in range(3000)}
    assert not read & {normalised(row["context"]) for part in tasks.values() for row in part[1]}
    assert len(read) > 1000
