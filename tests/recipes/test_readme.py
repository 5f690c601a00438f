"""The README's recipe is valid, and its script trains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infalign.merging.plan import read_plan
from infalign.runtime.config import read_yaml
from infalign.stages.objective import load_procedure
from infalign.stages.recipe import load_recipe
from infalign.stages.sweep.recipe import cells_of, load_sweep
from infalign.theory.procedures import BestOfN
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal

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


def test_a_trl_script_after_three_lines(tmp_path):
    model = tiny_causal(tmp_path / "model", "llama")
    rows = [{"prompt": [{"role": "user", "content": said}]} for said in ("the cat", "a dog", "why", "i like the")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = block("python", "from datasets import load_dataset")
    data = f'"json", data_files="{tmp_path / "rows.jsonl"}", split="train"'
    for ours, tiny in {
        "Qwen/Qwen2.5-0.5B-Instruct": model,
        '"trl-lib/ultrafeedback-prompt", split="train[:500]"': data,
        "num_generations=8": "num_generations=2, per_device_train_batch_size=2, max_steps=1, use_cpu=True, bf16=False, "
        "max_completion_length=4, report_to='none', save_strategy='no'",
    }.items():
        assert ours in code
        code = code.replace(ours, tiny)
    code += "print('steps', trainer.state.global_step, len(trainer.train_dataset['ref_rewards'][0]))\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps 1 64" in done.stdout


MERGING = (Path(__file__).parents[2] / "recipes" / "merging" / "README.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", MERGING, re.DOTALL)]


@pytest.mark.parametrize("given", [one for one in BLOCKS if "merge_method" in one], ids=lambda one: one["merge_method"])
def test_the_merges_of_the_merging_page_are_valid(given):
    assert read_plan(given).method == given["merge_method"]


def test_the_sweep_of_the_merging_page_is_valid(tmp_path):
    (given,) = [one for one in BLOCKS if "arms" in one]
    keys = tiny_experiment(tmp_path)
    score = str(keys.pop("reward"))
    for name in ("procedure", "target_kl"):
        del keys[name]
    terms = [{"reward": score}, {"reward": score.replace(":reward", ":gold"), "procedure": "worst_of_n"}]
    (tmp_path / "two_objectives.yaml").write_text(yaml.safe_dump({**keys, "objectives": terms}))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(given))
    cells = cells_of(load_sweep(tmp_path / "sweep.yaml"))
    assert len(cells) == len(given["arms"]) * 4
    on = next(cell for cell in cells if cell.arm == "merged, then trained")
    assert list(on.parents) == ["linear .5"] and on.recipe.training["max_steps"] == 50
