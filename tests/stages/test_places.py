"""Where names lead: the recipe's folder first, the same files under any spelling, wherever a plug-in goes meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from infalign.cli import main
from infalign.models.loading import resolve_model
from infalign.rewards.http import HTTPReward
from infalign.rewards.loader import load_reward
from infalign.stages.calibrate import calibrate
from infalign.stages.compare import compare, load_comparison
from infalign.stages.generate import generate
from infalign.stages.recipe import load_recipe
from infalign.stages.reward_check import reward_check
from infalign.stages.reward_model.recipe import load_reward_model_recipe
from infalign.stages.reward_model.train import reward_model
from infalign.stages.run import run
from infalign.stages.train import train
from infalign.types import InputError, RewardError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal, tiny_classifier, tiny_tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory beside the recipe's folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def in_folder(folder: Path, **changes) -> Path:
    """The tiny experiment with a YAML whose names are relative to it."""
    keys = tiny_experiment(folder)
    keys |= {"model_name_or_path": "model", "dataset_name": "prompts.jsonl", "reward": "score.py:reward", **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


# --- the recipe's folder first --------------------------------------------------------------------------------------


def test_a_model_beside_the_recipe_goes_before_one_in_the_working_directory(tmp_path, here):
    ours, theirs = tiny_causal(tmp_path / "recipe" / "m"), tiny_causal(here / "m", seed=1)
    assert resolve_model("m", tmp_path / "recipe") == str(Path(ours).resolve())
    assert resolve_model("./m/", tmp_path / "recipe") == str(Path(ours).resolve())
    assert resolve_model("m", tmp_path / "elsewhere") == str(Path(theirs).resolve())
    assert resolve_model(theirs, tmp_path / "recipe") == str(Path(theirs).resolve())


def test_so_does_the_tokenizer_of_a_reward(tmp_path, here):
    ours, theirs = tiny_tokenizer(), tiny_tokenizer(words=["other"])
    ours.save_pretrained(tmp_path / "recipe" / "tok"), theirs.save_pretrained(here / "tok")
    model = tiny_classifier(tmp_path / "recipe" / "rm")
    kwargs = {"tokenizer": "tok", "as_chat": False}
    reward = load_reward(model, kwargs, base_dir=tmp_path / "recipe")
    assert reward.function.tokenizer.get_vocab() == ours.get_vocab()
    served = load_reward(
        "http://127.0.0.1:1/x", {"shape": "openrlhf", "tokenizer": "tok"}, base_dir=tmp_path / "recipe"
    ).function
    assert isinstance(served, HTTPReward) and served.tokenizer.get_vocab() == ours.get_vocab()
    assert HTTPReward("http://127.0.0.1:1/x", shape="openrlhf", tokenizer="tok").tokenizer.get_vocab() == (
        theirs.get_vocab()
    )


# --- the same files, spelt otherwise --------------------------------------------------------------------------------

SPELLINGS = {
    "a trailing slash": {"model_name_or_path": "model/", "dataset_name": "prompts.jsonl"},
    "with a dot": {"model_name_or_path": "./model", "dataset_name": "./prompts.jsonl"},
    "by way of another folder": {"model_name_or_path": "../recipe/model", "dataset_name": "../recipe/prompts.jsonl"},
    "absolute": {"model_name_or_path": "FOLDER/model", "dataset_name": "FOLDER/prompts.jsonl"},
}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places") / "recipe"
    calibrate(load_recipe(in_folder(folder)))
    return folder


@pytest.mark.parametrize("case", SPELLINGS)
def test_the_same_files_are_the_same_recipe(case, calibrated, here):
    """From another working directory too: nothing is drawn, nothing refused."""
    changes = {name: value.replace("FOLDER", str(calibrated)) for name, value in SPELLINGS[case].items()}
    assert calibrate(load_recipe(calibrated / "recipe.yaml", changes))["drawn"] == 0


def test_a_record_that_holds_names_as_they_were_spelt_is_accepted(calibrated, here):
    """As earlier versions wrote it."""
    path = calibrated / "out" / "recipe.json"
    record = json.loads(path.read_text())
    record["identity"] |= {"model_name_or_path": "model", "dataset_name": "prompts.jsonl"}
    path.write_text(json.dumps(record))
    assert calibrate(load_recipe(calibrated / "recipe.yaml"))["drawn"] == 0
    assert (
        calibrate(load_recipe(calibrated / "recipe.yaml", {"model_name_or_path": f"{calibrated}/model"}))["drawn"] == 0
    )


def test_a_mixture_of_data_sets_is_placed_too(tmp_path, here):
    recipe = in_folder(tmp_path / "recipe", dataset_name=None, datasets=[{"path": "prompts.jsonl"}])
    calibrate(load_recipe(recipe))
    whole = {"datasets": [{"path": str(tmp_path / "recipe" / "prompts.jsonl")}]}
    keys = {**yaml.safe_load(recipe.read_text()), **whole}
    recipe.write_text(yaml.safe_dump(keys))
    assert calibrate(load_recipe(recipe))["drawn"] == 0


def test_other_files_of_the_same_name_are_another_recipe(calibrated, tmp_path, here):
    shutil.copytree(calibrated, tmp_path / "other")
    with pytest.raises(InputError, match=r"belongs to another recipe \(model_name_or_path: .*/recipe/model"):
        calibrate(load_recipe(tmp_path / "other" / "recipe.yaml", {"output_dir": str(calibrated / "out")}))


def test_an_experiment_that_has_moved_with_its_files_goes_on(calibrated, tmp_path, here):
    """To another folder, or another machine: the recorded paths are gone."""
    shutil.copytree(calibrated, tmp_path / "before")
    calibrate(load_recipe(tmp_path / "before" / "recipe.yaml", {"output_dir": str(tmp_path / "before" / "new")}))
    (tmp_path / "before").rename(tmp_path / "after")
    moved = load_recipe(tmp_path / "after" / "recipe.yaml", {"output_dir": str(tmp_path / "after" / "new")})
    assert calibrate(moved)["drawn"] == 0


# --- a failed verb leaves nothing behind ----------------------------------------------------------------------------

MISTAKES = {
    "no such reward": {"reward": "nowhere.py:f"},
    "too many prompts": {"num_train_prompts": 100},
    "an unknown transform": {"transform": "exponental"},
    "a model without weights": {"model_name_or_path": "hollow"},
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_calibration_that_fails_leaves_nothing_in_the_way(case, tmp_path, here):
    """The next try, with the mistake mended, finds no folder that belongs to another recipe."""
    recipe = in_folder(tmp_path / "recipe", output_dir="new/out")
    shutil.copytree(tmp_path / "recipe" / "model", tmp_path / "recipe" / "hollow")
    (tmp_path / "recipe" / "hollow" / "model.safetensors").unlink()
    with pytest.raises(InputError):
        calibrate(load_recipe(recipe, MISTAKES[case]))
    assert not (here / "new").exists()
    mended = {"seed": 43} if case == "a model without weights" else {}  # what would be another recipe
    assert calibrate(load_recipe(recipe, mended))["drawn"] == 6 * 12


def test_samples_that_are_drawn_are_kept(tmp_path, here):
    """The reward failed on them: with another one they need not be drawn again."""
    recipe = in_folder(tmp_path / "recipe", output_dir="new/out", tokens_per_batch=10**6)
    with pytest.raises(RewardError):
        calibrate(load_recipe(recipe, {"reward": "score.py:fails"}))
    assert calibrate(load_recipe(recipe))["drawn"] == 0


def test_an_empty_folder_stays_and_what_was_there_is_kept(tmp_path, here):
    recipe = in_folder(tmp_path / "recipe", output_dir="out")
    (here / "out").mkdir()
    with pytest.raises(InputError):
        calibrate(load_recipe(recipe, MISTAKES["a model without weights"] | {"model_name_or_path": "./nowhere"}))
    assert list((here / "out").iterdir()) == []
    calibrate(load_recipe(recipe))
    before = sorted(str(path) for path in (here / "out").rglob("*"))
    with pytest.raises(InputError):
        calibrate(load_recipe(recipe, MISTAKES["no such reward"]))
    assert sorted(str(path) for path in (here / "out").rglob("*")) == before


def test_a_training_that_fails_before_its_first_checkpoint_can_be_started_otherwise(calibrated, tmp_path, here):
    shutil.copytree(calibrated / "out", tmp_path / "out")
    recipe = calibrated / "recipe.yaml"
    with pytest.raises(InputError, match="0 steps"):
        train(load_recipe(recipe, {"output_dir": str(tmp_path / "out"), "max_steps": 0}))
    (calibrated / "breaks.py").write_text(
        "def reward(completions, completion_ids, trainer_state, **_):\n"
        "    if trainer_state is not None:\n        raise RuntimeError('down')\n"
        "    return [sum(ids) + 0.01 * ids[0] for ids in completion_ids]\n"
    )
    keys = {"output_dir": str(tmp_path / "out"), "reward": "breaks.py:reward"}
    calibrate(load_recipe(recipe, keys))
    with pytest.raises(RewardError, match="down"):
        train(load_recipe(recipe, keys))
    assert not (tmp_path / "out" / "policy").exists()
    calibrate(load_recipe(recipe, {"output_dir": str(tmp_path / "out")}))
    assert train(load_recipe(recipe, {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-4}))["trained"]


def test_generate_and_reward_model_leave_nothing_either(calibrated, tmp_path, here):
    keys = {"policy_name_or_path": str(calibrated / "model"), "reward": "score.py:fails", "output_dir": "none"}
    with pytest.raises(RewardError):
        generate(load_recipe(calibrated / "recipe.yaml", keys), output="deep/er/out.jsonl")
    with pytest.raises(InputError):
        generate(load_recipe(calibrated / "recipe.yaml", keys), prompts="nowhere.jsonl", output="deep/er/out.jsonl")
    rows = [{"prompt": f"p {number}", "chosen": "a", "rejected": "b"} for number in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"model_name_or_path": str(calibrated / "model"), "dataset_name": str(tmp_path / "pairs.jsonl")}
    with pytest.raises(InputError):
        reward_model(load_reward_model_recipe({**asked, "output_dir": "rm/out", "num_test_prompts": 50}))
    assert list(here.iterdir()) == []


# --- a plug-in that changes the working directory -------------------------------------------------------------------

WANDERS = """
import os
from pathlib import Path

def reward(completions, completion_ids=None, **_):
    os.chdir(Path(__file__).parent / "away")
    texts = map(str, completions)
    return [sum(ids) + 0.01 * ids[0] if ids else float(len(text)) for ids, text in zip(completion_ids, texts)]
"""


@pytest.fixture
def wandering(tmp_path, here):
    (tmp_path / "recipe" / "away").mkdir(parents=True)
    (tmp_path / "recipe" / "wanders.py").write_text(WANDERS)
    yield tmp_path / "recipe"
    assert list((tmp_path / "recipe" / "away").iterdir()) == [], "something was written where the reward went"


def test_a_run_stays_where_it_began(wandering, here):
    """Calibrated, trained, evaluated and reported with a reward that goes elsewhere at every call."""
    recipe = in_folder(wandering, output_dir="results", reward="wanders.py:reward")
    result = run(load_recipe(recipe))
    assert Path(result["report"]).is_file() and Path(result["report"]).is_relative_to(here / "results")
    assert {"calibration", "policy", "evaluation", "evaluation.json", "report", "recipe.json"} <= {
        path.name for path in (here / "results").iterdir()
    }


def test_outputs_of_other_verbs_stay_too(calibrated, wandering, here):
    shutil.copy(wandering / "wanders.py", calibrated)
    (calibrated / "away").mkdir(exist_ok=True)
    keys = {"policy_name_or_path": str(calibrated / "model"), "reward": "wanders.py:reward"}
    (here / "asked.jsonl").write_text('{"prompt": "the cat"}\n')
    assert generate(load_recipe(calibrated / "recipe.yaml", keys), prompts="asked.jsonl", output="made.jsonl") == (
        here / "made.jsonl"
    )
    os.chdir(here)
    rows = [{"prompt": f"p{number}", "completions": ["a", "bb", "ccc"]} for number in range(3)]
    for name in ("base", "policy"):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"base": "base.jsonl", "policy": "policy.jsonl", "output": "compared.json", "n": 2}
    compare(load_comparison({**asked, "reward": f"{wandering}/wanders.py:reward"}))
    os.chdir(here)
    (wandering / "at_once.py").write_text(WANDERS.replace("\ndef", "\nos.chdir(Path(__file__).parent / 'away')\ndef"))
    found = reward_check(f"{wandering}/at_once.py:reward", prompts="asked.jsonl")
    assert np.isfinite(found[0].scores_B).all()
    assert {path.name for path in here.iterdir() if not path.name.startswith(".")} == {
        "asked.jsonl", "base.jsonl", "policy.jsonl", "made.jsonl", "compared.json",
    }  # fmt: skip


def test_the_help_says_where_a_relative_output_dir_starts(capsys):
    for verb in ("run", "reward-model"):
        assert main([verb, "--help"]) == 0
        (line,) = [one for one in capsys.readouterr().out.splitlines() if "--output_dir" in one]
        assert "relative" in line and "working directory" in line
