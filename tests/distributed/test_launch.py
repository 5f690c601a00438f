"""Under `accelerate launch`, two CPU processes share the work and end with what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from infalign.calibration.table import SampleTable
from tests.e2e.experiment import tiny_experiment
from tests.stages.test_reward_model import write_pairs
from tests.tiny import tiny_causal

TWO = ["--accelerate_config", "cpu_ddp"]


def tables(folder: Path) -> dict[str, list]:
    """Every sample and reward under an output folder."""
    found = {}
    for name in ("calibration", "evaluation/base", "evaluation/policy"):
        plan = json.loads((folder / name / "plan.json").read_text())
        table = SampleTable.open(folder / name, plan["parts"])
        samples = table.samples()
        found[name] = sorted((s.key, s.index, s.token_ids) for rows in samples.values() for s in rows)
    return found


def call(recipe: Path, values: dict, verb: str, *words: str) -> str:
    """Write a recipe and run a verb of it in a process of its own; returns what it printed."""
    recipe.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-W", "ignore", "-m", "infalign", verb, "--config", str(recipe), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The whole recipe on one process and on two, with eight rollouts a step on either."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {**tiny_experiment(folder), "optim": "sgd", "learning_rate": 0.1}  # AdamW makes steps of rounding
    for name, words, batch in (("one", [], 8), ("two", TWO, 4)):
        values = {**keys, "output_dir": str(folder / name), "per_device_train_batch_size": batch}
        out = call(folder / f"{name}.yaml", values, "run", *words)
        assert out.count("report: ") == 1, "only rank 0 speaks"
    return folder, keys


@pytest.mark.slow
def test_two_processes_run_the_recipe(runs):
    folder, keys = runs
    two, one = tables(folder / "two"), tables(folder / "one")
    assert two["calibration"] == one["calibration"]
    assert two["evaluation/base"] == one["evaluation/base"]
    logs = [json.loads((folder / name / "policy" / "training_log.json").read_text()) for name in ("two", "one")]
    first = [next(row for row in log if "reward/calibrated" in row) for log in logs]
    assert first[0]["reward/calibrated"] == pytest.approx(first[1]["reward/calibrated"], abs=1e-6)
    assert first[0]["num_tokens"] == first[1]["num_tokens"], "world size is not 2"
    weights = [load_file(folder / name / "policy" / "model.safetensors") for name in ("two", "one")]
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=1e-5, rtol=0)
    base = load_file(Path(str(keys["model_name_or_path"])) / "model.safetensors")
    assert max(np.abs(value - base[name]).max() for name, value in weights[0].items()) > 1e-3, "nothing was learnt"


@pytest.mark.slow
def test_two_processes_measure_and_decode_one_policy_alike(runs):
    """Tables, win rates, KL and chosen completions of the same policy: equal to the last digit."""
    folder, keys = runs
    policy = str(folder / "one" / "policy")
    values = {**keys, "policy_name_or_path": policy, "output_dir": str(folder / "judged")}
    call(folder / "judged.yaml", values, "evaluate", *TWO)
    assert json.loads((folder / "judged" / "evaluation.json").read_text()) == json.loads(
        (folder / "one" / "evaluation.json").read_text()
    )
    outputs = []
    for name, words in (("one", []), ("two", TWO)):
        outputs.append(folder / f"{name}.jsonl")
        call(
            folder / "judged.yaml", {**values, "tokens_per_batch": 30}, "generate", "--output", str(outputs[-1]), *words
        )
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert len(outputs[0].read_text().splitlines()) == 4
    assert not list(folder.glob(".*.parts"))


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "more"), [("cpu_ddp", {}), ("cpu_zero3", {"use_peft": True, "lora_r": 4})])
def test_two_processes_train_a_reward_model(tmp_path, launch, more):
    """Every pair is seen by one of them, rank 0 alone measures and speaks, and the model is whole."""
    targets = {"lora_target_modules": ["q_proj", "v_proj"]} if more else {}
    values = {
        "model_name_or_path": tiny_causal(tmp_path / "base"),
        "dataset_name": write_pairs(tmp_path / "pairs.jsonl", 60),
        "num_test_prompts": 10,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "output_dir": str(tmp_path / "out"),
        **more,
        **targets,
    }
    out = call(tmp_path / "reward.yaml", values, "reward-model", "--accelerate_config", launch)
    assert out.count("use it: reward: ") == 1, "only rank 0 speaks"
    measured = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert (measured["pairs"], measured["training_pairs"]) == (20, 40)
    weights, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "reward_model", tmp_path / "base")
    )
    shared = set(weights) & set(base)
    assert "score.weight" in weights and all(weights[name].shape == base[name].shape for name in shared)
    moved = {name for name in shared if not np.array_equal(weights[name], base[name])}
    assert moved and all(("q_proj" in name or "v_proj" in name) for name in moved) == bool(more)
