"""The whole chain on a policy whose optimum is known: calibrate, transform, train, evaluate come near the limit.

What is asserted of the trained policy is exact, over all of its completions (`tabular.exactly`): what `evaluate`
samples has an error of its own, and 1 - W is so small for Worst-of-4 that it moves the regret by a half. A training is
one draw all the same, and another one on other kernels: the margins are for the spread that was measured over three or
four of them (seeds, and AVX2 against AVX-512), given at each bound.
"""

from __future__ import annotations

import pytest

from infalign.stages.calibrate import calibrate
from infalign.stages.evaluate import evaluate
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.train import train
from infalign.theory.optimum import win_rate_limit
from infalign.theory.procedures import BestOfN, WorstOfN
from tests.e2e.tabular import exactly, write_tabular

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
    """What `evaluate` measured, and what is exactly so."""
    path = write_tabular(folder, train=32, test=8)
    recipe = load_recipe(path, {**SETTINGS, "output_dir": str(folder / "out"), **settings})
    experiment = Experiment(recipe)
    calibrate(recipe, experiment)
    train(recipe, experiment)
    found = evaluate(recipe)
    prompts = [list(experiment.prompt_ids[prompt.key]) for prompt in experiment.splits.test]
    worst = settings["procedure"] == "worst_of_n"
    exact = exactly(experiment.policy_path, experiment.base_path, prompts, SETTINGS["n"], worst)
    print(found.kl, found.main, exact)
    # 256 samples a side on 8 prompts: up to 0.014 and 0.024 apart in seven draws
    assert found.main.mean == pytest.approx(exact.win_rate, abs=0.04)
    assert found.kl.mean == pytest.approx(exact.kl, abs=0.1)
    return exact


def test_best_of_4_reaches_the_limit(tmp_path):
    exact = chain(tmp_path, procedure="best_of_n", target_kl=1.0, max_steps=100, lr_scheduler_type="linear")
    limit = win_rate_limit(BestOfN(4), exact.kl)
    assert 0.8 < exact.kl < 1.2  # 0.95 to 0.98
    assert exact.win_rate <= limit  # of any policy whatever
    assert (exact.win_rate - 0.5) / (limit - 0.5) >= 0.97  # 0.990, give or take 0.001


def test_worst_of_4_regret(tmp_path):
    """Aimed a little below KL 1, and down to its small beta from a larger one (see `CTRLConfig.beta_start`)."""
    exact = chain(
        tmp_path,
        procedure="worst_of_n",
        target_kl=0.78,
        beta_start=0.3,
        max_steps=300,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
    )
    limit = win_rate_limit(WorstOfN(4), exact.kl)
    assert 0.8 < exact.kl < 1.2  # 0.86 to 0.90
    assert exact.win_rate <= limit
    assert (1.0 - exact.win_rate) / (1.0 - limit) <= 2.0  # 1.72, give or take 0.05
