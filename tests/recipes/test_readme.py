"""The README's recipe is valid, and its Python trains in TRL's own trainer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from infalign.cli import main
from infalign.runtime.config import read_yaml
from infalign.stages.objective import load_procedure
from infalign.stages.recipe import load_recipe
from infalign.theory.procedures import BestOfN
from tests.e2e.experiment import tiny_experiment

PAGE = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def block(language: str, beginning: str) -> str:
    """The page's code block that begins so."""
    return next(text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if text.startswith(beginning))


def test_the_recipe_is_valid(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml", "model_name_or_path"))
    recipe = load_recipe(path)
    assert load_procedure(recipe) == BestOfN(4)
    assert set(recipe.training) == {"learning_rate", "max_steps"}
    assert recipe.num_test_prompts == read_yaml(path)["num_test_prompts"]


def test_ref_rewards_for_trls_own_trainer(tmp_path):
    keys = tiny_experiment(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(keys))
    assert main(["calibrate", "--config", str(tmp_path / "mine.yaml")]) == 0
    code = block("python", "from datasets import Dataset")
    for ours, tiny in {
        "Qwen/Qwen2.5-0.5B-Instruct": str(keys["model_name_or_path"]),
        "num_generations=8": "num_generations=2, per_device_train_batch_size=2, max_steps=1, use_cpu=True, bf16=False, "
        "max_completion_length=4, report_to='none', save_strategy='no'",
    }.items():
        assert ours in code
        code = code.replace(ours, tiny)
    code += "trainer.train()\nprint('steps', trainer.state.global_step, len(trainer.train_dataset['ref_rewards'][0]))\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"steps 1 {keys['num_calibration_samples']}" in done.stdout
