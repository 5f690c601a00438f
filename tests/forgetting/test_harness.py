"""Tasks of lm-evaluation-harness, from local files: its prompts and choices become our questions."""

from __future__ import annotations

import importlib.util
import json

import pytest

from infalign.forgetting.harness import harness_items
from infalign.forgetting.tasks import Item
from infalign.types import InputError

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
output_type: {kind}
training_split: train
test_split: test
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path):
    rows = [{"q": f"q{at}", "choices": ["a", "b", "c"], "label": at % 3} for at in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hidden = {"q": "secret", "choices": ["a", "b", "c"], "label": -1}
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [*rows[:2], hidden])))
    (tmp_path / "mine.yaml").write_text(TASK.format(name="infalign_mine", folder=tmp_path, kind="multiple_choice"))
    (tmp_path / "open.yaml").write_text(TASK.format(name="infalign_open", folder=tmp_path, kind="generate_until"))
    (tmp_path / "lost.yaml").write_text(TASK.format(name="infalign_lost", folder="/nowhere", kind="multiple_choice"))
    return tmp_path


@needs_harness
def test_prompts_choices_and_labels_are_the_harnesss(folder):
    train, test, delimiter = harness_items("infalign_mine", str(folder))
    assert train[1] == Item("Question: q1\nAnswer:", "b", ("a", "c")) and len(train) == 6
    assert test == train[:2]  # without the one whose label is kept secret
    assert delimiter == " "


@needs_harness
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("infalign_minne", "has no task 'infalign_minne': did you mean 'infalign_mine'"),
        ("infalign_open", "tasks, infalign_open: only tasks of multiple choice"),
        ("infalign_lost", "tasks, infalign_lost: its data can't be loaded"),
    ],
)
def test_tasks_that_cannot_be_had(folder, name, words):
    with pytest.raises(InputError, match=words):
        harness_items(name, str(folder))


def test_without_the_extra_one_line_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need the package 'lm_eval': pip install 'infalign\[eval\]'"):
        harness_items("arc_easy")


@pytest.mark.slow
@needs_harness
def test_the_papers_tasks_are_called_as_the_recipe_has_them():
    """The names in recipes/forgetting/harness.yaml are the harness's."""
    import yaml  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an extra

    from infalign.stages.recipe import recipe_folders  # noqa: PLC0415

    path = next(folder for folder in recipe_folders() if folder.is_dir()) / "forgetting" / "harness.yaml"
    named = [task["harness"] for task in yaml.safe_load(path.read_text())["tasks"].values()]
    assert len(named) == 11 and set(named) <= set(TaskManager().all_subtasks)
