"""Tasks of lm-evaluation-harness (the extra `eval`) by name, with its prompts and its choices.

Imported only when a recipe asks for it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

from infalign.forgetting.tasks import Item
from infalign.runtime.config import nearest
from infalign.types import InputError


def harness_items(name: str, include_path: str | None = None) -> tuple[list[Item], list[Item] | None, str]:
    """A harness task's training questions, its test questions, and what stands between context and answer.

    Test questions are those of its test part, or else of its validation part; None where it has one part only.

    Args:
        name: the harness's, e.g. arc_easy.
        include_path: a folder with task files of one's own, in place of the harness's.

    Raises:
        InputError: the extra is missing, no such task, no network for its data, or no multiple choice.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            f"tasks, {name}: tasks of lm-evaluation-harness need the package 'lm_eval': pip install 'infalign[eval]' "
            "(or give a JSONL as path: rows with context, correct, distractors)"
        )
    manager = _manager(include_path)
    if name not in manager.all_tasks:
        raise InputError(f"tasks: lm-evaluation-harness has no task {name!r}{nearest(name, manager.all_tasks)}")
    task = _loaded(manager, name)
    if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "multiple_input", 0):
        raise InputError(f"tasks, {name}: only tasks of multiple choice with one context a question can be forgotten")
    parts = {
        "train": list(task.training_docs() or ()) if task.has_training_docs() else [],
        "validation": list(task.validation_docs() or ()) if task.has_validation_docs() else [],
        "test": list(task.test_docs() or ()) if task.has_test_docs() else [],
    }
    items = {part: _items(task, docs, f"tasks, {name}, {part}") for part, docs in parts.items()}
    test = items["test"] or items["validation"]
    train = items["train"] or (items["validation"] if items["test"] else [])
    delimiter = str(task.config.target_delimiter)
    if not train and not test:
        raise InputError(f"tasks, {name}: none of its questions has a label")
    return (train, test, delimiter) if train and test else (train or test, None, delimiter)


@cache
def _manager(include_path: str | None) -> Any:
    """Knows the tasks' files; reading thousands of them takes the better part of a minute."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an extra

    return TaskManager(include_path=include_path, include_defaults=include_path is None)


def _loaded(manager: Any, name: str) -> Any:
    try:
        found = manager.load([name])["tasks"] if hasattr(manager, "load") else manager.load_task_or_group(name)
    except Exception as error:  # whatever datasets and the hub raise
        cause = " ".join(str(error).split())[:160]
        raise InputError(
            f"tasks, {name}: its data can't be loaded ({type(error).__name__}: {cause}): it comes from the Hub; "
            "without network give a JSONL as path"
        ) from error
    if name not in found or len(found) > 1:
        raise InputError(
            f"tasks: {name} is a group of tasks ({', '.join(map(str, list(found)[:4]))}, ...): name one of them"
        )
    return found[name]


def _items(task: Any, docs: list[Any], where: str) -> list[Item]:
    """Questions of the harness's documents; those without a label (a test part that is kept secret) are left out."""
    found = []
    for number, doc in enumerate(docs, 1):
        choices = [str(one) for one in task.doc_to_choice(doc)]
        target = task.doc_to_target(doc)
        label = choices.index(target) if isinstance(target, str) and target in choices else target
        if not isinstance(label, int) or not 0 <= label < len(choices):
            continue
        wrong = tuple(one for at, one in enumerate(choices) if at != label and one != choices[label])
        if not wrong:
            raise InputError(f"{where}, question {number}: no distractor besides {choices[label]!r}")
        found.append(Item(str(task.doc_to_text(doc)), choices[label], wrong))
    return found
