"""Every recipe in the repository is a valid one, and its data can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from infalign.data.prompts import load_prompts
from infalign.rewards.loader import load_reward
from infalign.stages.objective import load_procedure, load_transform
from infalign.stages.recipe import find_recipe, load_recipe, require

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
HARMLESS = ROOT.parent / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path):
    recipe = load_recipe(path)
    require(recipe, "model_name_or_path", "dataset_name", "reward", "output_dir")
    procedure = load_procedure(recipe)
    _, beta = load_transform(recipe, procedure)
    assert beta > 0
    assert load_reward(recipe.reward, recipe.reward_kwargs, base_dir=recipe.base_dir).fingerprint


@pytest.mark.parametrize("name", ["quickstart", "arithmetic_pass_at_4"])
def test_shipped_prompts_suffice(name):
    recipe = load_recipe(find_recipe(name))
    prompts = load_prompts(recipe.dataset_name, base_dir=recipe.base_dir).prompts
    assert len(prompts) >= recipe.num_train_prompts + recipe.num_validation_prompts + recipe.num_test_prompts


def test_the_verifier_knows_right_from_wrong():
    recipe = load_recipe(find_recipe("arithmetic_pass_at_4"))
    prompt = load_prompts(recipe.dataset_name, base_dir=recipe.base_dir).prompts[0]
    reward = load_reward(recipe.reward, recipe.reward_kwargs, base_dir=recipe.base_dir)
    answer = prompt.columns["answer"]
    said = [f"The answer is {answer}.", "The answer is 1000.", "I do not know."]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    assert reward([prompt.content] * 3, completions, answer=[answer] * 3).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.skipif(not HARMLESS.exists(), reason="../shared/data is not there")
def test_the_harmless_data_fits_its_recipe():
    recipe = load_recipe(find_recipe("harmless_worst_of_4"), {"dataset_name": str(HARMLESS)})
    loaded = load_prompts(
        recipe.dataset_name, split="test", data_format=recipe.data_format, data_dir=recipe.dataset_data_dir
    )
    assert loaded.rows == 2312 and all(prompt.content[-1]["role"] == "user" for prompt in loaded.prompts)
