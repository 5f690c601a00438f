"""The keys of `infalign forget`, and the models that they stand for.

A task is learned from its true labels, then forgotten by training on random (or flipped) ones, then, for the curves,
learned again from a few true labels of its own or of another task. Every such model is a `Node`: the fine-tuned,
forgotten and relearned ones each start from their parent's weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from infalign.forgetting.tasks import LABELS, TRUE
from infalign.runtime.config import nearest
from infalign.stages.recipe import key, read_keys, settle_paths, settled_output, training_help
from infalign.types import InputError

BASE, TUNED, FORGOTTEN, RELEARNED = "base", "tuned", "forgotten", "relearned"
"""Roles of a model."""

_NAME = re.compile(r"[\w.]{1,60}")
_OF_TASK = ("path", "test_path", "harness", "include_path", "family")


@dataclass(frozen=True)
class ForgetRecipe:
    """One experiment. `base_dir` is the folder that relative paths start from (the YAML's)."""

    model_name_or_path: str = key("", "folder, .gguf file, package://PACKAGE/FILE, or Hub id", "model")
    model_revision: str | None = key(None, "revision on the Hub", "model")
    dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "precision for training and scoring", "model")
    attn_implementation: str | None = key(None, "attention kernel, e.g. sdpa", "model")
    trust_remote_code: bool = key(False, "run code that ships with a model", "model")
    use_cpu: bool = key(False, "stay on the CPU even where there is a GPU", "model")

    tasks: dict = key(
        {},
        "NAME: {path: FILE} (rows with context, correct, distractors; test_path: held out from it if unset), or "
        "NAME: {harness: TASK} of lm-evaluation-harness; family: groups them",
        "tasks",
    )
    num_train: int = key(1000, "training questions of a task, at most", "tasks")
    num_test: int = key(500, "test questions of a task, at most", "tasks")
    max_length: int | None = key(None, "tokens of a question with an answer; unset: the model's context", "tasks")

    fine_tune: Literal["each", "together"] = key(
        "each", "one fine-tuned model a task, or one for all of them; it is what forgets", "forgetting"
    )
    forget: list[str] = key([], "tasks to forget; unset: each of them, in a model of its own", "forgetting")
    labels: list[str] = key(["random"], "random, flipped, or both", "forgetting")
    forget_examples: list[int] = key([1000], "how many questions to forget with, e.g. 1000 100", "forgetting")
    tune_training: dict = key({}, "training keys for fine-tuning alone, e.g. {num_train_epochs: 3}", "forgetting")
    forget_training: dict = key({}, "training keys for forgetting alone", "forgetting")
    relearn_training: dict = key({}, "training keys for relearning alone", "forgetting")

    relearn_examples: list[int] = key([10, 30, 100], "true labels to learn again from; none: []", "measures")
    relearn_from: dict = key(
        {}, "TASK: the other task for out-of-domain relearning; unset: the next of another family", "measures"
    )
    eval_n: list[int] = key([1, 2, 4, 8], "answers a question, for Best-of-N and pass@N", "measures")
    probes: bool = key(True, "linear probes of hidden states, before and after", "measures")
    quantized: bool = key(True, "also measure a 4-bit copy (the extra qlora; left out without it)", "measures")
    open_answers: int = key(0, "answers sampled for a question with no choices given, for pass@N; 0: none", "measures")
    held_out_texts: dict = key({}, "NAME: file of texts; nats a token before and after", "measures")
    general: str | None = key(
        None,
        "recipe whose prompts, reward and procedure tell what else went: evaluate, forgotten against fine-tuned",
        "measures",
    )
    confidence: float = key(0.95, "of the intervals", "measures")
    tokens_per_batch: int = key(8192, "padded tokens of a forward pass when scoring", "measures")

    output_dir: str = key("", "where everything is written; a relative path starts at the working directory", "output")
    keep_models: bool = key(True, "false: weights are deleted when they are of no more use", "output")
    seed: int = key(42, "of distractors, splits, labels and training", "output")
    overwrite: bool = key(False, "make anew what was made with other settings, instead of refusing", "output")

    training: dict = field(default_factory=dict, metadata={"kind": "training", "help": training_help("SFTConfig")})
    base_dir: Path = field(default=Path(), metadata={"kind": "internal"})

    __post_init__ = settle_paths
    output = property(settled_output)


@dataclass(frozen=True)
class Node:
    """A model of the experiment.

    Attributes:
        name: of its folder.
        role: base, tuned, forgotten or relearned.
        parent: the model that it is trained from; empty for the base.
        task: what it learns or forgets; for a relearned model the task that had been forgotten.
        source: the task whose questions it is trained on; empty for the base and for all tasks together.
        labels, examples: of its training.
        asked: the number of examples in the recipe, which may be more than the task has.
    """

    name: str
    role: str
    parent: str = ""
    task: str = ""
    source: str = ""
    labels: str = TRUE
    examples: int = 0
    asked: int = 0


def nodes_of(recipe: ForgetRecipe, families: Mapping[str, str], sizes: Mapping[str, int]) -> list[Node]:
    """Every model of an experiment, parents first, and children as soon as may be.

    Relearning starts from the first labels and number of examples, and beside it the base learns from the same labels.
    Numbers of examples beyond a task's are what the task has; a number that comes to the same as another is left out.

    Args:
        recipe: the verb's.
        families, sizes: of the tasks, and how many training questions they have.
    """
    together = recipe.fine_tune == "together"
    forget = recipe.forget or list(recipe.tasks)
    found = [Node(BASE, BASE)]
    if together:
        found.append(Node("tuned", TUNED, BASE))
    for task in recipe.tasks:
        if not together:
            found.append(Node(f"tuned-{task}", TUNED, BASE, task, task))
        if task in forget:
            found += _forgetting(recipe, task, "tuned" if together else f"tuned-{task}", families, sizes)
    return found


def _forgetting(
    recipe: ForgetRecipe, task: str, parent: str, families: Mapping[str, str], sizes: Mapping[str, int]
) -> Iterator[Node]:
    """The models that forget a task, and those that learn it again."""
    first = f"forgot-{task}-{recipe.labels[0]}-{recipe.forget_examples[0]}"
    for labels in recipe.labels:
        for asked, count in distinct(recipe.forget_examples, sizes[task]).items():
            name = f"forgot-{task}-{labels}-{asked}"
            yield Node(name, FORGOTTEN, parent, task, task, labels, count, asked)
            if name != first:
                continue
            for source in filter(None, (task, _other(recipe, task, families))):
                for fewer, size in distinct(recipe.relearn_examples, sizes[source]).items():
                    yield Node(f"{first}-relearned-{source}-{fewer}", RELEARNED, first, task, source, TRUE, size, fewer)
            for fewer, size in distinct(recipe.relearn_examples, sizes[task]).items():
                yield Node(f"base-learned-{task}-{fewer}", RELEARNED, BASE, task, task, TRUE, size, fewer)


def distinct(asked: Sequence[int], size: int) -> dict[int, int]:
    """Numbers of examples that are asked for, with how many there are; what comes to the same as another is left out.

    >>> distinct([1000, 500, 100], 300)
    {1000: 300, 100: 100}
    """
    found: dict[int, int] = {}
    for one in asked:
        if min(one, size) not in found.values():
            found[one] = min(one, size)
    return found


def _other(recipe: ForgetRecipe, task: str, families: Mapping[str, str]) -> str:
    """The task that relearning out of domain takes: as the recipe says, else the next one of another family."""
    if task in recipe.relearn_from:
        return str(recipe.relearn_from[task])
    names = list(recipe.tasks)
    at = names.index(task)
    rest = [*names[at + 1 :], *names[:at]]
    return next((one for one in rest if families[one] != families[task]), rest[0] if rest else "")


def load_forget_recipe(
    config: str | Path | Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None
) -> ForgetRecipe:
    """A checked recipe from a YAML path or a mapping, with flags on top; see `recipe.load_recipe`.

    Raises:
        InputError: everything that is wrong with it, at once.
    """
    recipe = ForgetRecipe(**read_keys(ForgetRecipe, config, flags, _training_hints))
    problems = [*_missing(recipe), *_task_problems(recipe), *_value_problems(recipe), *_training_problems(recipe)]
    if problems:
        raise InputError("; ".join(problems))
    return recipe


def _training_hints() -> dict[str, Any]:
    from infalign.stages.training_keys import supervised_training_hints  # noqa: PLC0415 - imports TRL, seconds

    return supervised_training_hints()


def _missing(recipe: ForgetRecipe) -> list[str]:
    missing = [name for name in ("model_name_or_path", "tasks", "output_dir") if not getattr(recipe, name)]
    return [f"{', '.join(missing)} must be given (in the YAML, or as --NAME VALUE)"] if missing else []


def _task_problems(recipe: ForgetRecipe) -> list[str]:
    problems = []
    for name, given in recipe.tasks.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"tasks: {name!r:.80} is no name for a folder: use up to 60 letters, digits, _ and .")
            continue
        if not isinstance(given, Mapping):
            problems.append(f"tasks, {name}: give {{path: FILE}} or {{harness: TASK}}, got {given!r}")
            continue
        unknown = [one for one in given if one not in _OF_TASK]
        if unknown:
            problems.append(f"tasks, {name}: unknown key {unknown[0]!r}{nearest(str(unknown[0]), _OF_TASK)}")
        elif ("path" in given) == ("harness" in given):
            problems.append(f"tasks, {name}: give one of path and harness")
    known = list(recipe.tasks)
    if len(set(recipe.forget)) < len(recipe.forget):
        problems.append(f"forget names a task twice: {recipe.forget}")
    named = [("forget", one) for one in recipe.forget]
    named += [("relearn_from", one) for pair in recipe.relearn_from.items() for one in pair]
    problems += [
        f"{where}: no task is called {one!r}{nearest(str(one), known)}" for where, one in named if one not in known
    ]
    problems += [
        f"relearn_from: {task!r} is not another task than itself"
        for task, one in recipe.relearn_from.items()
        if task == one
    ]
    return problems


def _value_problems(recipe: ForgetRecipe) -> list[str]:
    problems = []
    for name in ("num_train", "num_test", "tokens_per_batch", "max_length"):
        value = getattr(recipe, name)
        if value is not None and value < (2 if name == "max_length" else 1):
            problems.append(f"{name} must be at least {2 if name == 'max_length' else 1}, got {value}")
    for name in ("forget_examples", "relearn_examples", "eval_n"):
        values = getattr(recipe, name)
        if any(one < 1 for one in values) or (not values and name == "forget_examples"):
            problems.append(f"{name} must be numbers of at least 1, got {values}")
        if len(set(values)) < len(values):
            problems.append(f"{name} has a number twice: {values}")
    unknown = [one for one in recipe.labels if one not in LABELS]
    if unknown or not recipe.labels or len(set(recipe.labels)) < len(recipe.labels):
        problems.append(f"labels must be of {', '.join(LABELS)}, each once, got {recipe.labels}")
    if recipe.open_answers < 0:
        problems.append(f"open_answers must be at least 0, got {recipe.open_answers}")
    if not 0 < recipe.confidence < 1:
        problems.append(f"confidence must be between 0 and 1, got {recipe.confidence}")
    if not 0 <= recipe.seed < 2**32:
        problems.append(f"seed must be between 0 and 2**32 - 1, got {recipe.seed}")
    return problems


def _training_problems(recipe: ForgetRecipe) -> list[str]:
    given = {name: getattr(recipe, name) for name in ("tune_training", "forget_training", "relearn_training")}
    if not any(given.values()):
        return []
    hints = _training_hints()
    return [
        f"{where}: unknown key {name!r}{nearest(str(name), hints)}"
        for where, keys in given.items()
        for name in keys
        if name not in hints
    ]
