"""Every recipe in the repository is a valid one, and its data can be read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from infalign.data.prompts import load_prompts
from infalign.data.splits import split_prompts
from infalign.rewards.loader import load_reward
from infalign.stages.objective import load_objective, load_procedure
from infalign.stages.recipe import find_recipe, load_recipe, require
from infalign.stages.reward_model.recipe import load_reward_model_recipe
from infalign.stages.reward_model.train import load_pairs
from infalign.stages.sweep.recipe import cells_of, load_sweep
from tests.tiny import tiny_causal

ROOT = Path(__file__).parents[2]
REWARD_MODELS = [ROOT / "recipes" / "harmless_reward.yaml"]
SWEEPS = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if "\ngrid:" in path.read_text(encoding="utf-8"))
RECIPES = sorted(set((ROOT / "recipes").glob("*.yaml")) - set(REWARD_MODELS) - set(SWEEPS))
TRAINED = {str(Path(load_reward_model_recipe(path).output_dir) / "reward_model") for path in REWARD_MODELS}
HARMLESS = ROOT.parent / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path):
    recipe = load_recipe(path)
    require(recipe, "model_name_or_path", "dataset_name", "reward", "output_dir")
    procedure = load_procedure(recipe)
    beta = load_objective(recipe, procedure).beta
    assert beta > 0
    if recipe.reward not in TRAINED:  # another recipe makes it
        assert load_reward(recipe.reward, recipe.reward_kwargs, base_dir=recipe.base_dir).fingerprint


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_cell_of_a_sweep_is_valid(path):
    settings = load_sweep(path)
    cells = cells_of(settings)
    assert len(cells) == len(settings.arms) * math.prod(map(len, settings.grid.values()))
    for cell in cells[: len(settings.arms)]:
        assert load_objective(cell.recipe, load_procedure(cell.recipe)).beta > 0
        # compared where every arm is measured
        for kl in settings.compare_at:
            assert min(settings.grid["target_kl"]) < kl < max(settings.grid["target_kl"])


def test_the_sweeps_are_found():
    assert {path.stem for path in SWEEPS} >= {"headline", "language_model_sweep", "transfer", "how_many_samples"}


def test_the_harmless_recipe_uses_the_reward_that_the_other_one_trains():
    reward, policy = load_reward_model_recipe(REWARD_MODELS[0]), load_recipe(find_recipe("harmless_worst_of_4"))
    assert policy.reward == str(Path(reward.output_dir) / "reward_model")
    assert (reward.seed, reward.dataset_name, reward.dataset_data_dir) == (
        policy.seed,
        policy.dataset_name,
        policy.dataset_data_dir,
    )


@pytest.mark.skipif(not HARMLESS.exists(), reason="../shared/data is not there")
def test_the_policy_is_tested_on_prompts_that_its_reward_never_saw(tmp_path):
    data = {"dataset_name": str(HARMLESS)}
    pairs = load_pairs(
        load_reward_model_recipe(REWARD_MODELS[0], {**data, "model_name_or_path": tiny_causal(tmp_path)})
    )
    recipe = load_recipe(find_recipe("harmless_worst_of_4"), data)
    prompts = load_prompts(recipe.dataset_name, data_format=recipe.data_format).prompts
    splits = split_prompts(
        prompts, num_train=1000, num_validation=0, num_test=recipe.num_test_prompts, seed=recipe.seed
    )
    trained_on = {pair.key for pair in pairs.train}
    assert len(splits.test) == 256 and not trained_on & {prompt.key for prompt in splits.test}


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
    assert len(loaded.prompts) == 2312 and all(prompt.content[-1]["role"] == "user" for prompt in loaded.prompts)
