"""Prompts and calibrations that do not fit: counted before any work, named, with the way out; rows 22 to 25."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import trl
import yaml
from packaging.requirements import Requirement

from infalign.cli import main
from infalign.stages.env import env
from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal
from tests.training.test_resume import rows
from tests.training.test_trainer import config, token_sum

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A recipe's keys, and the folder of its finished calibration."""
    folder = tmp_path_factory.mktemp("calibrated")
    keys = tiny_experiment(folder)
    assert run(folder, keys, "calibrate") == 0
    return folder, keys


def run(folder: Path, keys: dict, verb: str, **changes) -> int:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**keys, **changes}))
    return main([verb, "--config", str(folder / "recipe.yaml")])


def refused(capsys, folder: Path, keys: dict, verb: str, **changes) -> str:
    capsys.readouterr()
    assert run(folder, keys, verb, **changes) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("infalign: error: ")
    return lines[0]


# -- row 22: long prompts


@pytest.mark.parametrize(("policy", "told"), [("drop", "dropped"), ("truncate", "truncated")])
def test_long_prompts_are_counted_up_front(policy, told, calibrated, tmp_path, capsys):
    """Prompts have 3, 4 or 5 tokens; at most 3 are allowed."""
    _, keys = calibrated
    changes = {"max_prompt_length": 3, "prompt_length_policy": policy, "output_dir": str(tmp_path / "out")}
    assert run(tmp_path, keys, "calibrate", **changes) == 0
    captured = capsys.readouterr()
    assert re.search(rf"warning: [1-9] of 10 prompts {told}: longer than 3 tokens", captured.err)
    left = json.loads((tmp_path / "out" / "calibration" / "manifest.json").read_text())["prompts"]
    assert (left == 6) is (policy == "truncate") and 0 < left <= 6
    assert f"{12 * left} base samples on {left} prompts" in captured.out


def test_a_context_without_room_for_the_completion(calibrated, tmp_path, capsys):
    _, keys = calibrated
    line = refused(capsys, tmp_path, keys, "calibrate", max_completion_length=600, output_dir=str(tmp_path / "out"))
    assert "no room for a prompt" in line and "context 512 tokens, of which 600 for the completion" in line
    line = refused(capsys, tmp_path, keys, "calibrate", max_completion_length=509, output_dir=str(tmp_path / "out"))
    assert "prompts are longer than 3 tokens (the longest has 5" in line
    assert not (tmp_path / "out" / "calibration").exists()


# -- row 24: a calibration that is not this training's


def test_another_reward_has_no_calibration(calibrated, capsys):
    folder, keys = calibrated
    line = refused(capsys, folder, keys, "train", reward=f"{folder / 'score.py'}:gold")
    assert "6 of 6 prompts lack calibration samples" in line and "run `infalign calibrate` with this recipe" in line


def test_an_edited_reward_is_another_reward(calibrated, tmp_path, capsys):
    """The same name in the same place: the source tells."""
    folder, keys = calibrated
    text = (folder / "score.py").read_text()
    (tmp_path / "score.py").write_text(text)
    moved = {**keys, "reward": f"{tmp_path / 'score.py'}:reward"}
    assert run(tmp_path, moved, "calibrate") == 0 and "(all of them cached)" in capsys.readouterr().out
    (tmp_path / "score.py").write_text(text.replace("0.01 *", "0.02 *"))
    assert "lack calibration samples" in refused(capsys, tmp_path, moved, "train")


def test_prompts_that_were_never_calibrated_are_counted_and_shown(calibrated, capsys):
    folder, keys = calibrated
    line = refused(capsys, folder, keys, "train", num_train_prompts=8)
    assert "2 of 8 prompts lack calibration samples" in line and "(first: '" in line


# -- row 25: dependencies


def test_env_says_what_a_bug_report_needs(capsys):
    found = env()
    out = capsys.readouterr().out
    for name in ("python", "torch", "transformers", "trl", "accelerate", "numpy"):
        assert re.search(rf"^{name} +{re.escape(str(found[name]))}$", out, re.MULTILINE), name
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["fast path"] == "on"


def test_the_ranges_hold_here_and_bound_what_has_broken_before():
    needed = [Requirement(text) for text in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]]
    for one in needed:
        assert one.specifier, f"{one.name} has no range"
        assert one.specifier.contains(version(one.name), prereleases=True), one.name
    bounded = {one.name for one in needed if any(part.operator == "<" for part in one.specifier)}
    assert bounded >= {"transformers", "trl"}


def test_an_untested_trl_takes_trls_own_path_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    model = tiny_causal(tmp_path / "model", "llama")
    arguments = CTRLConfig(**config(tmp_path / "out", max_steps=1))
    subject = CTRLTrainer(model, CTRLReward(token_sum, identity), arguments, train_dataset=rows())
    assert "warning: TRL 1.99.0 is not among the tested versions" in capsys.readouterr().err
    monkeypatch.setattr(subject, "_decode", lambda *_: pytest.fail("the fast path"))
    subject.train()
    assert subject.state.global_step == 1
    assert env()["fast path"].startswith("off: TRL not in")
