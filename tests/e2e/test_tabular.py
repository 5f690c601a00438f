"""The whole chain on a policy whose optimum is known: calibrate, transform, train, evaluate come near the exact limit."""

from __future__ import annotations

import pytest

from infalign.stages.calibrate import calibrate
from infalign.stages.evaluate import evaluate
from infalign.stages.recipe import load_recipe
from infalign.stages.train import train
from tests.e2e.tabular import write_tabular

SETTINGS = {
    "n": 4,
    "target_kl": 1.0,
    "num_calibration_samples": 256,
    "eval_samples": 256,
    "eval_n": [1, 4],
    "kl_samples": 256,
    "per_device_train_batch_size": 512,
    "num_generations": 64,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
}


def chain(folder, **settings):
    recipe = load_recipe(write_tabular(folder), {**SETTINGS, "output_dir": str(folder / "out"), **settings})
    for stage in (calibrate, train):
        stage(recipe)
    return evaluate(recipe)


def test_best_of_4_reaches_the_limit(tmp_path):
    found = chain(tmp_path, procedure="best_of_n", max_steps=100)
    print(found["kl"], found["main"])
    assert 0.7 < found["kl"]["mean"] < 1.3
    assert found["main"]["attainment"] >= 0.9
    assert found["main"]["mean"] <= found["main"]["limit"] + 0.03  # sampling error; nothing beats the limit


@pytest.mark.parametrize("steps", [100])
def test_worst_of_4_regret(tmp_path, steps):
    found = chain(tmp_path, procedure="worst_of_n", max_steps=steps)
    print(found["kl"], found["main"])
    assert 0.7 < found["kl"]["mean"] < 1.3
    assert found["main"]["regret_ratio"] <= 2.0
