"""`solver: offline` and `offline+online` as recipes: what they write, reuse, refuse, and that a killed run goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import infalign
from infalign.cli import main
from infalign.stages.recipe import load_recipe
from infalign.stages.train import train
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment

OFFLINE = {"solver": "offline", "max_steps": 6, "learning_rate": 5e-3}
BOTH = {"solver": "offline+online", "offline_training": {"max_steps": 3, "learning_rate": 5e-3}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    keys = {**tiny_experiment(folder), **OFFLINE}
    return folder, keys, infalign.run(keys)


def test_the_policy_is_trained_on_the_calibration_samples(finished, monkeypatch):
    folder, keys, result = finished
    out = folder / "out"
    assert result["trained"] and result["drawn"] == 6 * 12 + 2 * 4 * 8
    assert (out / "report" / "index.html").is_file()
    log = json.loads((out / "policy" / "training_log.json").read_text())
    assert [row["step"] for row in log if "kl_seq" in row][:3] == [1, 2, 3]
    assert abs(log[0]["kl_seq"]) < 1e-5
    parts = json.loads((out / "policy" / "manifest.json").read_text())["parts"]
    assert (parts["solver"], parts["loss"]) == ("offline", "variance")
    monkeypatch.setattr("infalign.stages.experiment.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    assert infalign.run(keys)["trained"] is False


def test_training_calls_no_reward(finished, tmp_path, monkeypatch):
    folder, keys, _ = finished
    shutil.copytree(folder / "out" / "calibration", tmp_path / "out" / "calibration")
    shutil.copy(folder / "out" / "recipe.json", tmp_path / "out")
    monkeypatch.setattr("infalign.rewards.loader.Reward.__call__", lambda *_, **__: pytest.fail("a reward was asked"))
    assert train(load_recipe({**keys, "output_dir": str(tmp_path / "out")}))["steps"] == 6


def test_the_estimate_knows_the_solver(finished, tmp_path):
    """An offline step is the policy's passes alone; `offline+online` is both parts."""
    _, keys, _ = finished
    tokens = {}
    for solver, more in (("online", {}), ("offline", {}), ("offline+online", {"offline_training": {"max_steps": 3}})):
        tokens[solver] = infalign.run(
            {**keys, "solver": solver, **more, "output_dir": str(tmp_path / "out")}, dry=True
        )["tokens"]["train"]
    assert tokens["offline"] == pytest.approx(tokens["online"] * 3 / 5, abs=1)
    assert tokens["offline+online"] == pytest.approx(tokens["online"] + tokens["offline"] / 2, abs=2)  # 3 of 6 steps


def test_another_loss_is_another_policy(finished):
    _, keys, _ = finished
    with pytest.raises(InputError, match='loss: "variance" -> "qrpo"'):
        train(load_recipe({**keys, "loss": "qrpo"}))


def test_offline_then_online(finished, tmp_path):
    """The second part starts from the first one's weights and measures its KL to the base."""
    _, keys, _ = finished
    keys = {**keys, **BOTH, "max_steps": 2, "learning_rate": 1e-9, "output_dir": str(tmp_path / "out")}
    keys |= {"kl_control": False}  # and so the weights are not moved at the end
    infalign.run(keys)
    out = tmp_path / "out"
    first, second = (load_file(out / name / "model.safetensors") for name in ("offline", "policy"))
    base = load_file(f"{keys['model_name_or_path']}/model.safetensors")
    moved = max(float((first[name] - base[name]).abs().max()) for name in base)
    assert moved > 1e-2
    for name in base:
        torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=0)
    log = json.loads((out / "policy" / "training_log.json").read_text())
    assert log[0]["kl_seq"] > 0.01, "measured to the base, which the start is away from"


def test_a_killed_second_part_finds_the_first(finished, tmp_path, capsys, monkeypatch):
    _, keys, _ = finished
    keys = {**keys, **BOTH, "max_steps": 2, "output_dir": str(tmp_path / "out")}
    with monkeypatch.context() as patch:
        patch.setattr("infalign.training.trainer.CTRLTrainer._generate_single_turn", _killed)
        with pytest.raises(KeyboardInterrupt):
            infalign.run(keys)
    assert (tmp_path / "out" / "offline" / "manifest.json").is_file()
    assert not (tmp_path / "out" / "policy" / "manifest.json").exists()
    capsys.readouterr()
    again = infalign.run(keys)
    assert again["trained"] and "offline is trained already" in capsys.readouterr().out
    whole = infalign.run({**keys, "output_dir": str(tmp_path / "whole")})
    assert again["evaluation"].as_json()["main"] == whole["evaluation"].as_json()["main"]


def _killed(*_args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": "qrpo", "solver": "online"}, "loss and loss_kwargs are the offline solver's"),
        ({"loss": "qrop"}, "loss: expected 'variance' or 'qrpo'"),
        ({"solver": "ofline"}, "solver: expected 'online' or 'offline'"),
        ({"objective": "direct"}, "objective direct is about the policy's own samples"),
        ({"solver": "offline+online", "objective": "pkpo"}, "can't begin with objective pkpo"),
        ({"loss": "ipo", "transform": "log"}, "loss: ipo has an aim of its own"),
        ({"loss": "tup", "target_kl": None, "beta": 0.1}, "loss: tup has no beta, got 0.1: give target_kl"),
        ({"offline_training": {"max_steps": 3}}, "offline_training is for solver: offline\\+online, got offline"),
        ({**BOTH, "offline_training": {"max_stepss": 3}}, "offline_training: unknown key max_stepss: did you mean"),
        ({**BOTH, "offline_training": {"max_steps": "many"}}, "offline_training: max_steps: expected an integer"),
        ({**BOTH, "initial_weights": "x"}, "starts from its own offline part"),
        ({"calibration_method": "pooled"}, "ranks samples among themselves, got calibration_method pooled"),
        ({"num_calibration_samples": 3}, "3 scored samples are fewer than num_generations 4"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "multiple of num_generations, got 2"),
    ],
)
def test_mistakes_are_one_line(changes, told, finished, tmp_path):
    _, keys, _ = finished
    changed = {name: value for name, value in {**keys, **changes}.items() if value is not None}
    with pytest.raises(InputError, match=told) as caught:
        infalign.run({**changed, "output_dir": str(tmp_path / "out")})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "policy" / "started.json").exists()


def test_the_command_line_takes_it(finished, tmp_path, capsys):
    _, keys, _ = finished
    (tmp_path / "recipe.yaml").write_text(json.dumps({**keys, "output_dir": str(tmp_path / "out")}))
    given = ["run", "--config", str(tmp_path / "recipe.yaml")]
    assert main([*given, "--loss", "ipo", "--dry_run"]) == 0
    assert "offline loss ipo" in capsys.readouterr().out
    assert main([*given, "--loss", "variancee"]) == 2
    assert "variancee" in capsys.readouterr().err


def test_a_sweep_that_keeps_no_policies_keeps_no_first_part(finished, tmp_path):
    _, keys, _ = finished
    out = tmp_path / "sweep"
    shared = {name: value for name, value in {**keys, **BOTH}.items() if name not in ("target_kl", "output_dir")}
    infalign.sweep({**shared, "grid": {"target_kl": [0.5]}, "keep_policies": False, "output_dir": str(out)})
    cell = out / "cells" / "target_kl=0.5"
    assert (cell / "policy" / "manifest.json").is_file()
    assert not list(cell.rglob("*.safetensors")) and not (cell / "offline").exists()
