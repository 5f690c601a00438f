"""What a recipe needs and the environment lacks is told before any work, in the dry run as in the run."""

from __future__ import annotations

import importlib.util

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

import infalign
from infalign.stages.recipe import load_recipe
from infalign.stages.reward_model.recipe import load_reward_model_recipe
from infalign.stages.reward_model.train import reward_model
from infalign.stages.train import train
from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.packages import OPTIMIZERS, PLAIN_OPTIMIZERS, TRACKERS, missing_packages
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.training.test_trainer import config, references, token_sum


@pytest.fixture
def bare(monkeypatch):
    """An environment with the packages that infalign itself declares, and no other."""
    real = importlib.util.find_spec
    optional = {
        *("wandb", "trackio", "tensorboard", "tensorboardX", "mlflow", "comet_ml", "clearml", "dvclive", "swanlab"),
        *("neptune", "codecarbon", "flytekit", "azureml", "dagshub", "liger_kernel", "vllm", "deepspeed", "peft"),
        *("bitsandbytes", "flash_attn", "flash_attn_interface", "kernels", *OPTIMIZERS.values()),
    }
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.split(".")[0] in optional else real(name, *rest)
    )
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)


def test_every_tracker_and_every_optimizer_is_known():
    """A new version of transformers may have more: say what they need."""
    assert TRACKERS.keys() == INTEGRATION_TO_CALLBACK.keys()
    names = {one.value for one in OptimizerNames}
    assert names >= PLAIN_OPTIMIZERS
    assert all(any(name.startswith(start) for start in OPTIMIZERS) for name in names - PLAIN_OPTIMIZERS)


KEYS = {
    "wandb": ({"report_to": "wandb"}, "report_to: wandb needs the package wandb: pip install wandb"),
    "several": ({"report_to": ["trackio", "mlflow"]}, "trackio: pip install trackio; .*mlflow: pip install mlflow"),
    "dagshub": ({"report_to": "dagshub"}, "the package dagshub: .*the package mlflow: pip install mlflow"),
    "kubeflow": ({"report_to": "kubeflow"}, "sets KUBEFLOW_TRAINER_SERVER_URL"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel: true needs the package liger_kernel: pip install liger-"),
    "vllm": ({"use_vllm": True}, "use_vllm: true needs the package vllm"),
    "deepspeed": ({"deepspeed": "zero3.json"}, r"deepspeed: pip install 'infalign\[deepspeed\]'"),
    "8 bits": ({"optim": "paged_adamw_8bit"}, r"optim: paged_adamw_8bit needs .*pip install 'infalign\[qlora\]'"),
    "galore": ({"optim": "galore_adamw_8bit"}, "galore_torch: pip install galore-torch; .*package bitsandbytes"),
    "optimi": ({"optim": "stable_adamw"}, "pip install torch-optimi"),
    "kernels": ({"model_init_kwargs": {"use_kernels": True}}, "use_kernels needs the package kernels"),
}
MODEL_KEYS = {
    "peft": ({"use_peft": True}, r"use_peft: true needs the package peft: pip install 'infalign\[peft\]'"),
    "4 bits": ({"load_in_4bit": True}, r"load_in_4bit: true needs the package bitsandbytes"),
    "flash": (
        {"attn_implementation": "flash_attention_2"},
        "needs the package flash_attn: pip install flash-attn",
    ),
    "hub kernel": ({"attn_implementation": "kernels-community/flash-attn"}, "needs the package kernels"),
}


@pytest.mark.parametrize("name", [*KEYS, *MODEL_KEYS])
@pytest.mark.parametrize("dry", [True, False])
def test_told_before_any_work(name, dry, bare, tmp_path):
    change, message = {**KEYS, **MODEL_KEYS}[name]
    keys = {**tiny_experiment(tmp_path), **change, "reward": f"{tmp_path / 'score.py'}:missing"}
    with pytest.raises(InputError, match=message):
        infalign.run(keys, dry=dry)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(KEYS.keys() - {"deepspeed"}))
def test_told_from_python_before_the_model_is_loaded(name, bare, tmp_path):
    change, message = KEYS[name]
    arguments = CTRLConfig(**config(tmp_path, **change))  # which may be written down anywhere
    with pytest.raises(InputError, match=message):
        CTRLTrainer("nowhere", CTRLReward(token_sum, identity), arguments, references())


def test_told_by_train_alone(bare, tmp_path):
    with pytest.raises(InputError, match="report_to: wandb needs"):
        train(load_recipe({**tiny_experiment(tmp_path), "report_to": "wandb"}))


def test_told_by_the_reward_models_verb(bare, tmp_path):
    keys = {"model_name_or_path": "m", "dataset_name": "nowhere.jsonl", "output_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match="report_to: wandb needs"):
        reward_model(load_reward_model_recipe({**keys, "report_to": "wandb", "use_cpu": True}))


def test_what_is_installed_passes():
    assert missing_packages({"optim": "adamw_torch_fused", "report_to": ["tensorboard"], "use_peft": True}) == []
    assert missing_packages({"attn_implementation": "sdpa", "report_to": "all", "deepspeed": None}) == []


@pytest.mark.parametrize("dry", [True, False])
def test_the_hub_is_asked_before_any_work(dry, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    keys = {**tiny_experiment(tmp_path), "push_to_hub": True, "hub_token": "hf_none"}
    with pytest.raises(InputError, match=r"push_to_hub: the Hub does not know you \(.*offline.*\).*hf auth login"):
        infalign.run(keys, dry=dry)
    assert not (tmp_path / "out").exists()
