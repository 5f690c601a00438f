"""Recipes are strict: what TRL's parser lets through is refused here, in words that name the way out."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import fields
from pathlib import Path
from typing import Literal

import pytest
from trl import DPOConfig, GRPOConfig, ScriptArguments, SFTConfig

from infalign.runtime.config import check, coerce, field_hints, read_flags, read_yaml
from infalign.stages.keys_of_other_trainers import FOREIGN, OPEN_R1_REWARDS, explain
from infalign.stages.recipe import Recipe, load_recipe
from infalign.stages.training_keys import training_hints
from infalign.types import InputError

OF_OTHER_METHODS = {"packing_strategy", "eval_packing"}  # so rare that the plain refusal does
OPEN_R1_KEYS = """
    attn_implementation benchmarks beta bf16 callbacks code_eval_test_batch_size code_language dataset_configs
    dataset_name dataset_prompt_column dataset_train_split ddp_find_unused_parameters do_eval eval_steps eval_strategy
    gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs hub_model_id hub_model_revision
    hub_strategy learning_rate log_completions log_level logging_first_step logging_steps logging_strategy loss_type
    lr_scheduler_type mask_truncated_completions max_completion_length max_grad_norm max_prompt_length max_steps
    model_name_or_path model_revision num_generations num_iterations num_processes num_train_epochs output_dir
    overwrite_output_dir per_device_eval_batch_size per_device_train_batch_size push_to_hub remote_gen_model_url
    report_to reward_funcs reward_weights save_steps save_strategy save_total_limit scale_rewards seed system_prompt
    temperature torch_dtype use_liger_kernel use_vllm vllm_device vllm_gpu_memory_utilization wandb_entity
    wandb_project warmup_ratio
"""
MINIMAL = {"model_name_or_path": "m", "reward": "r.py:f", "output_dir": "o", "dataset_name": "d", "beta": 0.1}


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


class TestYaml:
    def test_numbers_are_yaml_1_2(self, tmp_path):
        values = read_yaml(yaml_file(tmp_path, "a: 1e-5\nb: 2.0e-5\nc: .5\nd: 7\ne: 1.5\nf: text\ng: true\nh: v1e5"))
        assert values == {"a": 1e-5, "b": 2e-5, "c": 0.5, "d": 7, "e": 1.5, "f": "text", "g": True, "h": "v1e5"}
        assert isinstance(values["d"], int)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("n: 4\nseed: 1\nn: 8", r"line 3: the key 'n' is given twice"),
            ("- a\n- b", "must hold `key: value` lines, it holds list"),
            ("a: [1, 2", "is not YAML"),
            ("a: 1\n b: 2", "is not YAML"),
        ],
    )
    def test_refused(self, tmp_path, text, message):
        with pytest.raises(InputError, match=message):
            read_yaml(yaml_file(tmp_path, text))

    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match=r"no recipe at .*nowhere.yaml"):
            read_yaml(tmp_path / "nowhere.yaml")


class TestFlags:
    def test_shapes(self):
        assert read_flags(["--a=1", "--b-c", "x", "y", "--d", "--e", "-1"]) == {
            "a": "1",
            "b_c": ["x", "y"],
            "d": True,
            "e": "-1",
        }

    def test_refused(self):
        with pytest.raises(InputError, match="'stray' belongs to no flag"):
            read_flags(["stray"])
        with pytest.raises(InputError, match="--n is given twice"):
            read_flags(["--n", "1", "--n", "2"])

    def test_text_stays_text_where_the_type_is_text(self):
        recipe = load_recipe(
            {**MINIMAL}, read_flags(["--output_dir", "7", "--eval_n", "2", "--beta", "1e-3", "--use_cpu"])
        )
        assert (recipe.output_dir, recipe.eval_n, recipe.beta, recipe.use_cpu) == ("7", [2], 1e-3, True)

    def test_flags_win(self):
        assert load_recipe({**MINIMAL, "n": 8}, {"n": "2"}).n == 2


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (4.5, int), (True, int), ("4", int), (None, int), ("x", float), (True, float), (1, bool), ("yes", bool),
        (3, str), ("b", Literal["a", "c"]), (["x"], list[int]), ("x", list[str]), (1, dict), ([1], dict),
        ((1, 2, 3), tuple[int, int]),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(value, hint):
    with pytest.raises(TypeError, match="expected"):
        coerce(value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (4, float, 4.0), (None, int | None, None), ("a", Literal["a"], "a"), ([1, 2], tuple[int, ...], (1, 2)),
        ({"a": 1}, dict[str, int] | str | None, {"a": 1}), ("x", dict | str | None, "x"),
        ([1, 2], list[float], [1.0, 2.0]),
    ],
)  # fmt: skip
def test_right_types_pass(value, hint, result):
    assert coerce(value, hint) == result


def test_first_declaration_wins():
    first = dataclasses.make_dataclass("First", [("a", int)])
    second = dataclasses.make_dataclass("Second", [("a", str), ("b", str)])
    assert field_hints(first, second) == {"a": int, "b": str}


class TestRecipe:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"procedur": "x"}, r"unknown key procedur: did you mean 'procedure'\?"),
            ({"learning_rat": 1.0}, r"unknown key learning_rat: did you mean 'learning_rate'\?"),
            ({"n": 4.5}, r"n: expected an integer, got 4.5 \(float\)"),
            ({"max_steps": "many"}, r"max_steps: expected an integer, got 'many'"),
            ({"dtype": "float8"}, r"dtype: expected 'float32' or 'bfloat16' or 'float16', got 'float8'"),
            ({"lr_scheduler_type": "cosin"}, r"lr_scheduler_type: expected one of .*cosine.*got 'cosin'"),
            ({"use_cpu": "yes"}, r"use_cpu: expected true or false, got 'yes'"),
            ({"n": 0}, "n must be at least 1, got 0"),
            ({"temperature": 0.0}, "temperature must be above 0, got 0.0: greedy"),
            ({"confidence": 95}, "confidence must be between 0 and 1, got 95"),
            ({"eval_n": [0]}, r"eval_n must be positive integers, got \[0\]"),
            ({"num_validation_prompts": -1}, "num_validation_prompts must be at least 0"),
            ({"datasets": [{"path": "x"}]}, "dataset_name and datasets are both given"),
            (
                {"reward_funcs": ["a.b", "c.d"]},
                r"several rewards \(r.py:f, a.b, c.d\).*reward_models/calibrated_sum.py:build",
            ),
        ],
    )
    def test_refused(self, change, message):
        with pytest.raises(InputError, match=message):
            load_recipe({**MINIMAL, **change})

    def test_all_problems_at_once(self):
        with pytest.raises(InputError, match=r"(?s)unknown key lr.*n: expected.*seed: expected"):
            load_recipe({**MINIMAL, "lr": 1, "n": "x", "seed": 1.5})

    def test_an_unknown_flag(self):
        with pytest.raises(InputError, match=r"unknown flag --bta: did you mean 'beta'\?"):
            load_recipe(MINIMAL, read_flags(["--bta", "1"]))

    def test_a_trl_recipe_moves_over(self):
        """The keys of TRL's own rloo example, plus three lines."""
        recipe = load_recipe(
            {
                "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
                "dataset_name": "trl-lib/ultrafeedback-prompt",
                "reward_funcs": ["think_format_reward"],
                "learning_rate": 1e-6,
                "num_generations": 8,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "max_completion_length": 512,
                "output_dir": "o",
                "report_to": "none",
                "use_peft": True,
                "lora_r": 16,
                "lora_target_modules": ["q_proj", "v_proj"],
                "bf16": True,
                "procedure": "best_of_n",
                "n": 8,
                "target_kl": 1.0,
            }
        )
        assert recipe.reward == "trl.rewards.think_format_reward"
        assert recipe.training["lora_r"] == 16 and recipe.training["learning_rate"] == 1e-6

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("scale_rewards", "would divide the transform away: leave it out"),
            ("loss_type", "the loss is RLOO's"),
            ("torch_dtype", "it is dtype"),
            ("overwrite_output_dir", "it is overwrite: true"),
            ("dataset_prompt_column", "it is prompt_column"),
            ("dataset_mixture", "it is datasets"),
            ("importance_sampling_level", "ratios are of whole sequences"),
            ("vllm_importance_sampling_cap", "it is vllm_importance_sampling_clip_max"),
            ("evaluation_strategy", "it is eval_strategy"),
            ("warmup_ratio", "it is warmup_steps"),
            ("rloo_k", "it is num_generations"),
            ("wandb_entity", "WANDB_ENTITY"),
            ("wandb_notes", "run_name and project"),
        ],
    )
    def test_other_tools_keys_get_the_line_that_helps(self, name, message):
        for given, flags, shown in (({name: 1}, {}, f"key {name}"), ({}, {name: "1"}, f"flag --{name}")):
            with pytest.raises(InputError, match=f"unknown {shown}: .*{message}") as told:
                load_recipe({**MINIMAL, **given}, flags)
            assert "did you mean" not in str(told.value)

    def test_no_key_of_trls_grpo_recipes_is_guessed_at(self):
        """Of the configs of other methods, every key is known here, or explained."""
        known = {**training_hints(), **field_hints(Recipe)}
        declared = {
            one.name for config in (GRPOConfig, SFTConfig, DPOConfig, ScriptArguments) for one in fields(config)
        }
        assert not {name for name in declared - known.keys() if explain(name) is None} - OF_OTHER_METHODS
        assert not FOREIGN.keys() & known.keys(), "explained, though it is a key here"

    def test_keys_of_public_recipes(self):
        """open-r1's GRPO recipes: each key is one here, starts the launcher, or is explained."""
        known = {**training_hints(), **field_hints(Recipe)}
        unknown = [name for name in OPEN_R1_KEYS.split() if name not in known and explain(name) is None]
        assert unknown == ["num_processes"]  # the launcher's (`runtime.launch.FLAGS`)

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (
                ["accuracy", "format"],
                "accuracy: it is accuracy_reward, TRL's; format: it is think_format_reward, TRL's",
            ),
            (["cf_code"], "cf_code: it is a function of open-r1's: copy it into a file, reward: FILE.py:NAME"),
        ],
    )
    def test_names_of_open_r1s_rewards(self, names, words):
        """They look like models of the Hub, which would be asked for them."""
        keys = {name: value for name, value in MINIMAL.items() if name != "reward"}
        with pytest.raises(InputError, match=f"names rewards of open-r1's own script: {words}"):
            load_recipe({**keys, "reward_funcs": names})
        for one in OPEN_R1_REWARDS.values():
            if named := re.match(r"it is (\w+_reward), TRL's", one):
                assert load_recipe({**keys, "reward_funcs": [named[1]]}).reward == f"trl.rewards.{named[1]}"

    def test_what_is_said_to_be_a_key_is_one(self):
        known = {**training_hints(), **field_hints(Recipe)}
        named = {re.match(r"(?:it is|they are) (\w+)", line) for line in FOREIGN.values()}
        assert {found[1] for found in named if found} <= known.keys()

    def test_the_defaults_pass_their_own_types(self):
        hints = {name: hint for name, hint in field_hints(Recipe).items() if name not in ("training", "base_dir")}
        defaults = Recipe()
        check({name: getattr(defaults, name) for name in hints}, {}, hints)


@pytest.mark.parametrize(
    "text", ["Be brief # and kind", "two\nlines", "'quoted'", '"quoted"', "  padded ", "/x/run #1/out", "5", "a: b"]
)
def test_a_text_flag_is_what_was_typed(text):
    """A shell's word, not a line of YAML: comments, quotes and line breaks are part of it."""
    hints = {"system_prompt": str | None, "output_dir": str}
    for name in hints:
        assert check({}, {name: text}, hints)[name] == text
