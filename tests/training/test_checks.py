"""What only the training loop would find is found before any work, and in the dry run."""

from __future__ import annotations

import json

import pytest

from infalign.stages.calibrate import calibrate
from infalign.stages.recipe import load_recipe
from infalign.stages.run import run
from infalign.stages.train import train
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment

HELD_OUT = {"eval_strategy": "steps", "eval_steps": 1, "num_validation_prompts": 2}
BEST = {**HELD_OUT, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return tiny_experiment(tmp_path_factory.mktemp("checks"))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({**BEST, "metric_for_best_model": "reward"}, "'reward' is not measured; one of winrate, winrate_1, kl_seq"),
        (
            {"eval_strategy": "steps", "eval_steps": 1},
            "eval_strategy steps needs prompts .*: set num_validation_prompts",
        ),
        ({"learning_rate": -1.0}, "learning_rate must be a number of at least 0, got -1.0"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type warmup_stable_decay with .*: .*num_decay_steps",
        ),
        ({"dataloader_persistent_workers": True}, "needs dataloader_num_workers above 0"),
    ],
)
def test_it_is_told_before_any_work(change, message, dry, keys, tmp_path):
    recipe = load_recipe({**keys, **change, "output_dir": str(tmp_path / "out")})
    with pytest.raises(InputError, match=message):
        run(recipe, dry=dry)
    assert not (tmp_path / "out").exists()


def test_the_best_model_is_that_of_the_held_out_win_rate(keys, tmp_path):
    """Without a metric TRL would ask for a loss, which is not measured."""
    output = tmp_path / "out"
    recipe = load_recipe({**keys, **BEST, "output_dir": str(output), "max_steps": 3})
    calibrate(recipe)
    train(recipe)
    log = json.loads((output / "policy" / "training_log.json").read_text())
    assert len([row for row in log if "eval_winrate" in row]) == 3
