"""What DAM's parents answer themselves: one answer to each training prompt, kept for as long as they are the same."""

from __future__ import annotations

import json
from pathlib import Path

from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.sweep.draws import write_own_data
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal


def answers(experiment, model, folder):
    merge = {"merge_method": "dam", "models": [{"model": model, "data": "own"}, {"model": "other", "data": "x.jsonl"}]}
    first, second = write_own_data(experiment, merge, folder)["models"]
    assert second == {"model": "other", "data": "x.jsonl"}
    return [json.loads(line) for line in Path(first["data"]).read_text().splitlines()]


def test_answers_are_those_of_the_policy_that_is_there(tmp_path, monkeypatch):
    experiment = Experiment(load_recipe(tiny_experiment(tmp_path)))
    model = tiny_causal(tmp_path / "expert", "llama", seed=3)
    found = answers(experiment, model, tmp_path / "cell")
    assert [one["prompt"] for one in found] == [prompt.content for prompt in experiment.splits.train]
    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "model", None)  # found again, nothing is drawn
        assert answers(experiment, model, tmp_path / "cell") == found
    tiny_causal(tmp_path / "expert", "llama", seed=4)  # the expert is trained anew
    other = answers(experiment, model, tmp_path / "cell")
    assert [one["prompt"] for one in other] == [one["prompt"] for one in found] and other != found
