"""The recipe's tasks, read and ready."""

from __future__ import annotations

from pathlib import Path

from infalign.data.sources import read_rows
from infalign.forgetting.tasks import Item, Task, build_task, read_items
from infalign.models.loading import local_path
from infalign.runtime.console import notice
from infalign.stages.forget.recipe import ForgetRecipe
from infalign.types import InputError


def load_tasks(recipe: ForgetRecipe) -> dict[str, Task]:
    """Every task by its name; what was removed is told.

    Raises:
        InputError: a file is not there, a row is no question, a harness's task can't be had, or too little is left.
    """
    found = {}
    for name, given in recipe.tasks.items():
        if "harness" in given:
            from infalign.forgetting.harness import harness_items  # noqa: PLC0415 - the extra `eval`

            folder = given.get("include_path")
            include = local_path(str(folder), recipe.base_dir) if folder else None
            if folder and include is None:
                raise InputError(f"tasks, {name}: there is no folder {folder}")
            train, test, delimiter = harness_items(str(given["harness"]), str(include) if include else None)
        else:
            train = _read(recipe, name, str(given["path"]))
            test = _read(recipe, name, str(given["test_path"])) if given.get("test_path") else None
            delimiter = " "
        task = build_task(
            name,
            str(given.get("family") or name),
            train,
            test,
            num_train=recipe.num_train,
            num_test=recipe.num_test,
            seed=recipe.seed,
            delimiter=delimiter,
        )
        if task.overlap or task.repeated:
            notice(
                f"{name}: {task.overlap} test questions are in the training part and {task.repeated} are there twice: "
                "left out"
            )
        found[name] = task
    return found


def _read(recipe: ForgetRecipe, name: str, file: str) -> list[Item]:
    path = local_path(file, recipe.base_dir)
    if path is None:
        raise InputError(f"tasks, {name}: there is no {file} under {recipe.base_dir} or {Path.cwd()}")
    return read_items(read_rows(str(path)), f"tasks, {name}, {path.name}")
