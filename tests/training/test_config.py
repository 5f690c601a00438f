"""Every key of TRL's is sorted; what would change the method is refused, from a recipe as from Python."""

from __future__ import annotations

import dataclasses
import json

import pytest
from datasets import Dataset
from trl import GRPOConfig, RLOOConfig

from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.train import training_arguments
from infalign.theory.optimum import optimal_transform
from infalign.theory.procedures import BestOfN
from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.training.trl_keys import COMPENSATED, KEPT, REFUSED
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal
from tests.training.test_trainer import config, references, token_sum

BAD = {  # a value that must be refused, and a word of the way out
    "normalize_advantages": (True, "leave it false"),
    "reward_weights": ([2.0], "calibrated_sum.py"),
    "reward_clip_range": ([-1.0, 1.0], "clips the transform"),
    "epsilon": (0.0, "above 0"),
    "epsilon_high": (-0.1, "unset for the same as epsilon"),
    "sync_ref_model": (True, "a reference that moves"),
    "ref_model_mixup_alpha": (0.5, "a reference that moves"),
    "ref_model_sync_steps": (10, "a reference that moves"),
    "disable_dropout": (False, "leave it true"),
    "neftune_noise_alpha": (5.0, "another policy's"),
    "label_smoothing_factor": (0.1, "no labels to smooth"),
    "top_p": (0.9, "leave it 1.0"),
    "top_k": (50, "leave it 0"),
    "min_p": (0.1, "leave it out"),
    "repetition_penalty": (1.1, "leave it 1.0"),
    "generation_kwargs": ({"num_beams": 4}, "num_beams=4"),
    "vllm_structured_outputs_regex": ("a+", "calibration samples are free"),
    "remove_unused_columns": (True, "leave it false"),
    "train_sampling_strategy": ("group_by_length", "shuffle_dataset"),
    "dataloader_in_order": (False, "leave it true"),
    "accelerator_config": ({"split_batches": True}, "cut prompt groups apart"),
    "auto_find_batch_size": (True, "per_device_train_batch_size"),
    "ignore_data_skip": (True, "leave it false"),
    "enable_jit_checkpoint": (True, "SIGTERM"),
}


def test_every_key_of_trl_is_sorted_once():
    """A key that a new version adds belongs into one of the three: see `training/trl_keys.py`."""
    declared = {one.name for one in dataclasses.fields(RLOOConfig) if one.init}
    assert not declared - KEPT - REFUSED.keys() - COMPENSATED.keys(), "sort these"
    assert not (KEPT | REFUSED.keys() | COMPENSATED.keys()) - declared, "gone from TRL"
    assert not KEPT & REFUSED.keys() and not KEPT & COMPENSATED.keys() and not REFUSED.keys() & COMPENSATED.keys()


def test_every_refusal_is_tried():
    assert BAD.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", BAD)
def test_a_key_that_changes_the_method_is_refused(name, tmp_path):
    value, way_out = BAD[name]
    CTRLConfig(**config(tmp_path))
    with pytest.raises(InputError, match=rf"{name}.*{way_out}"):
        CTRLConfig(**config(tmp_path, **{name: value}))


def test_a_recipe_refuses_the_same(tmp_path):
    """All at once, before anything is loaded."""
    own = {"top_p", "top_k", "min_p", "repetition_penalty"}  # the recipe's own keys, which `generate` may set
    keys = {name: value for name, (value, _) in BAD.items() if name not in {*own, "generation_kwargs"}}
    experiment = Experiment(load_recipe({**tiny_experiment(tmp_path), **keys}))
    with pytest.raises(InputError) as told:
        training_arguments(experiment)
    assert all(f"{name}=" in str(told.value) for name in keys)


def test_a_file_for_accelerate_is_read_too(tmp_path):
    (tmp_path / "accelerate.json").write_text(json.dumps({"dispatch_batches": True}))
    with pytest.raises(InputError, match=r"accelerator_config.*dispatch_batches would cut"):
        CTRLConfig(**config(tmp_path, accelerator_config=str(tmp_path / "accelerate.json")))


@pytest.mark.parametrize(
    "change",
    [
        {"reward_weights": [1.0]},
        {"generation_kwargs": {"do_sample": True, "num_beams": 1, "top_k": None, "max_new_tokens": 5, "seed": 3}},
        {"epsilon_high": 0.28},
        {"ref_model_sync_steps": 512},
    ],
)
def test_neutral_values_pass(change, tmp_path):
    CTRLConfig(**config(tmp_path, **change))


def test_a_key_without_effect_says_so(tmp_path, capsys):
    CTRLConfig(**config(tmp_path))
    assert "has no effect" not in capsys.readouterr().err
    CTRLConfig(**config(tmp_path, data_seed=3, cache_implementation="static", batch_eval_metrics=True))
    told = capsys.readouterr().err
    assert "data_seed=3 has no effect: the order of prompts follows from seed" in told
    assert "cache_implementation='static' has no effect" in told and "batch_eval_metrics=True has no effect" in told
    CTRLConfig(**config(tmp_path, data_seed=3))
    assert "has no effect" not in capsys.readouterr().err  # a run makes its arguments several times, and says it once


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


def plain(completions, **_):
    return [0.0] * len(completions)


def test_the_weight_of_the_calibrated_reward_is_one(llama, tmp_path):
    functions = [plain, CTRLReward(token_sum, identity)]
    with pytest.raises(InputError, match=r"reward_weights=\[1.0, 0.5\]: the weight would multiply the transform"):
        CTRLTrainer(llama, functions, CTRLConfig(**config(tmp_path, reward_weights=[1.0, 0.5])), references())
    CTRLTrainer(llama, functions, CTRLConfig(**config(tmp_path, reward_weights=[0.5, 1.0])), references())


def test_the_kl_counts_truncated_completions_too(llama, tmp_path):
    """TRL's mask takes them out of the loss; the reference is another model here, so that there is a KL to measure."""
    logs = []
    for masked in (True, False):
        arguments = CTRLConfig(
            **config(tmp_path, mask_truncated_completions=masked, max_steps=1, initial_weights="moved on purpose")
        )
        subject = CTRLTrainer(llama, CTRLReward(token_sum, identity), arguments, references())
        for parameter in subject.ref_model.parameters():
            parameter.data.mul_(0.9)
        subject.train()
        logs.append(subject.state.log_history[0])
    assert logs[0]["completions/clipped_ratio"] > 0.5
    assert logs[1]["kl_seq"] > 0.1 and logs[0]["kl_seq"] == pytest.approx(logs[1]["kl_seq"], abs=1e-5)


class TestAnRLOOConfig:
    def test_is_read_as_ours(self, llama, tmp_path, capsys):
        reward = CTRLReward(token_sum, optimal_transform(BestOfN(2), kl=0.5))
        given = RLOOConfig(**{**config(tmp_path, learning_rate=0.25, num_generations=2, bf16=False), "beta": 0.05})
        subject = CTRLTrainer(llama, reward, given, references())
        assert isinstance(subject.args, CTRLConfig) and subject.args.shared_prefix
        assert (subject.args.learning_rate, subject.args.num_generations) == (0.25, 2)
        assert subject.args.beta == pytest.approx(reward.transform.beta) and subject.args.disable_dropout
        assert "args is TRL's RLOOConfig: read as CTRLConfig, with beta the transform's own" in capsys.readouterr().err
        subject.train()
        assert subject.state.global_step == 2 and given.beta == 0.05, "the user's own is left alone"

    def test_keeps_a_beta_that_was_given(self, llama, tmp_path):
        reward = CTRLReward(token_sum, optimal_transform(BestOfN(2), kl=0.5))
        given = RLOOConfig(**config(tmp_path, bf16=False, beta=0.3))
        assert CTRLTrainer(llama, reward, given, references()).args.beta == 0.3

    def test_is_refused_where_ours_is(self, llama, tmp_path):
        given = RLOOConfig(**config(tmp_path, bf16=False, normalize_advantages=True))
        with pytest.raises(InputError, match="normalize_advantages=True: rescales"):
            CTRLTrainer(llama, CTRLReward(token_sum, identity), given, references())

    def test_other_arguments_are_refused(self, llama, tmp_path):
        with pytest.raises(
            InputError, match=r"args must be a CTRLConfig \(or TRL's RLOOConfig\), got a GRPOConfig: its keys are here"
        ):
            CTRLTrainer(llama, CTRLReward(token_sum, identity), GRPOConfig(str(tmp_path), bf16=False), references())


def test_a_checkpoint_of_weights_alone_is_not_resumed_from(llama, tmp_path):
    settings = config(tmp_path, save_strategy="steps", save_steps=1, save_only_model=True)
    CTRLTrainer(llama, CTRLReward(token_sum, identity), CTRLConfig(**settings), references()).train()
    again = CTRLTrainer(llama, CTRLReward(token_sum, identity), CTRLConfig(**settings), references())
    with pytest.raises(InputError, match=r"it holds the weights alone \(save_only_model\).*--initial_weights"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_too_few_prompts_are_told(llama, tmp_path):
    """TRL's trainer would make no step and say nothing."""
    few = Dataset.from_dict({"prompt": ["the cat"], "ref_rewards": [[1.0, 2.0]]})
    with pytest.raises(InputError, match="1 training prompts are fewer than the 2 of one batch"):
        CTRLTrainer(llama, CTRLReward(token_sum, identity), CTRLConfig(**config(tmp_path)), few)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype", "revision", "attn_implementation", "trust_remote_code"])
def test_a_recipe_loads_one_model_in_all_stages(name, tmp_path):
    keys = {**tiny_experiment(tmp_path), "model_init_kwargs": {name: "bfloat16"}}
    with pytest.raises(InputError, match=f"model_init_kwargs: {name} is the recipe's key .*: set that, so that calib"):
        training_arguments(Experiment(load_recipe(keys)))
