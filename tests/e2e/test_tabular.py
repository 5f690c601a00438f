"""The whole chain on a policy whose optimum is known: calibrate, transform, train, evaluate come near the limit."""

from __future__ import annotations

from infalign.stages.calibrate import calibrate
from infalign.stages.evaluate import evaluate
from infalign.stages.recipe import load_recipe
from infalign.stages.train import train
from tests.e2e.tabular import write_tabular

SETTINGS = {
    "n": 4,
    "num_calibration_samples": 256,
    "eval_samples": 256,
    "eval_n": [1, 4],
    "kl_samples": 256,
    "per_device_train_batch_size": 512,
    "num_generations": 16,
    "learning_rate": 3e-3,
}


def chain(folder, **settings):
    path = write_tabular(folder, train=32, test=8)
    recipe = load_recipe(path, {**SETTINGS, "output_dir": str(folder / "out"), **settings})
    calibrate(recipe)
    train(recipe)
    found = evaluate(recipe)
    print(found["kl"], found["main"])
    return found


def test_best_of_4_reaches_the_limit(tmp_path):
    found = chain(tmp_path, procedure="best_of_n", target_kl=1.0, max_steps=100, lr_scheduler_type="linear")
    assert 0.8 < found["kl"]["mean"] < 1.2
    assert found["main"]["attainment"] >= 0.9
    assert found["main"]["mean"] <= found["main"]["limit"] + 0.02  # sampling error; nothing beats the limit


def test_worst_of_4_regret(tmp_path):
    """Aimed a little below KL 1, and down to its small beta from a larger one (see `CTRLConfig.beta_start`)."""
    found = chain(
        tmp_path,
        procedure="worst_of_n",
        target_kl=0.78,
        beta_start=0.3,
        max_steps=300,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
    )
    assert 0.8 < found["kl"]["mean"] < 1.2
    assert found["main"]["regret_ratio"] <= 2.0
