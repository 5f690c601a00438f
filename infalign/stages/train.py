"""`infalign train`: KL-regularised RL on the calibrated, transformed reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from infalign.calibration.table import SampleTable
from infalign.runtime.artifacts import write_json, write_manifest
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import is_main
from infalign.stages.calibrate import calibration_parts, open_table, reference_rewards
from infalign.stages.experiment import Experiment
from infalign.stages.objective import describe_transform
from infalign.stages.output import STARTED, refuse_stale_start, reusable
from infalign.stages.recipe import Recipe, require_plain
from infalign.stages.training_keys import split_training
from infalign.training.config import CTRLConfig
from infalign.training.progress import TrainingProgress, quiet
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError, Prompt

_REPORTING = {
    "report_to",
    "run_name",
    "project",
    "logging_steps",
    "logging_first_step",
    "log_completions",
    "log_level",
    "disable_tqdm",
    "save_steps",
    "save_total_limit",
    "save_strategy",
    "resume_from_checkpoint",
}


def train(recipe: Recipe, experiment: Experiment | None = None) -> dict[str, Any]:
    """Train the policy, or find it trained.

    Returns:
        `folder` of the policy, `trained` (False when it was reused).

    Raises:
        InputError: the recipe does not fit itself, the calibration is missing or another one, or a check at step 0.
    """
    require_plain(recipe)
    experiment = experiment or Experiment(recipe)
    experiment.claim_output()
    folder = experiment.policy_path
    parts = training_parts(experiment)
    if reusable(folder, "policy", parts, recipe.overwrite):
        say(f"policy: {folder} is trained already")
        return {"folder": folder, "trained": False}
    table = open_table(experiment)
    reference_rewards(experiment, table)
    experiment.release_models()
    refuse_stale_start(folder, parts, recipe.overwrite)
    checkpoint = _checkpoint(recipe, folder)
    try:
        trainer = make_trainer(experiment, table)
    except InputError:
        raise
    except (ValueError, ImportError) as error:  # TRL's and transformers' own refusals of a combination of settings
        raise InputError(f"the training keys do not fit: {' '.join(str(error).split())}") from error
    if is_main():
        write_json(folder / STARTED, {"parts": parts})
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step == 0:
        raise InputError("training made 0 steps: max_steps or num_train_epochs is 0, or there is too little data")
    trainer.save_model(str(folder))
    if is_main():
        write_json(folder / "training_log.json", trainer.state.log_history)
        write_manifest(folder, "policy", parts, steps=trainer.state.global_step)
        experiment.record()
    trainer.accelerator.wait_for_everyone()
    return {"folder": folder, "trained": True, "steps": trainer.state.global_step}


def training_parts(experiment: Experiment) -> dict[str, Any]:
    """What the policy depends on, by name."""
    recipe = experiment.recipe
    training = {name: value for name, value in recipe.training.items() if name not in _REPORTING}
    return {
        **{f"calibration {name}": value for name, value in calibration_parts(experiment).items()},
        "procedure": repr(experiment.procedure),
        "transform": describe_transform(recipe, experiment.transform),
        "beta": float(f"{experiment.beta:.6g}"),
        "calibration_method": recipe.calibration_method,
        **training,
    }


def make_trainer(experiment: Experiment, table: SampleTable) -> CTRLTrainer:
    """The trainer of an experiment, with its calibrated data sets."""
    recipe = experiment.recipe
    reward = CTRLReward(experiment.reward, experiment.transform, method=recipe.calibration_method)
    arguments = training_arguments(experiment)
    _, adapter = split_training(recipe.training)
    model = ModelConfig(model_name_or_path=experiment.base_path, **adapter)
    splits = experiment.splits
    check_batch(arguments, len(splits.train))
    trainer = CTRLTrainer(
        experiment.base_path,
        reward,
        arguments,
        procedure=experiment.procedure,
        render=experiment.ids_of,
        train_dataset=_dataset(experiment, table, splits.train),
        eval_dataset=_dataset(experiment, table, splits.validation) if splits.validation else None,
        processing_class=experiment.tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.add_callback(TrainingProgress())
    quiet(trainer)
    return trainer


def training_arguments(experiment: Experiment) -> CTRLConfig:
    """`CTRLConfig` from the recipe: its training keys, and what it shares with calibration.

    Raises:
        InputError: TRL or transformers refuse a combination; their words are passed on.
    """
    recipe = experiment.recipe
    ours, _ = split_training(recipe.training)
    if ours.get("max_steps") == 0:
        raise InputError("training made 0 steps: max_steps is 0; leave it out to train num_train_epochs")
    if recipe.dtype == "float16":
        raise InputError("dtype float16 can't be trained in: its range is too small; use bfloat16 or float32")
    shared = {
        "output_dir": str(experiment.policy_path),
        "seed": recipe.seed,
        "beta": experiment.beta,
        "temperature": recipe.temperature,
        "max_completion_length": recipe.max_completion_length,
        "chat_template_kwargs": recipe.chat_template_kwargs,
        "use_cpu": recipe.use_cpu,
        "trust_remote_code": recipe.trust_remote_code,
        "disable_tqdm": True,
        "model_init_kwargs": {"revision": recipe.model_revision, "use_safetensors": True, "dtype": recipe.dtype}
        | ({"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {})
        | (ours.get("model_init_kwargs") or {}),
    }
    defaults: dict[str, Any] = {
        "save_total_limit": 1,
        "bf16": None,
        "dataloader_pin_memory": torch.cuda.is_available() and not recipe.use_cpu,
    }
    try:
        return CTRLConfig(**{**defaults, **ours, **shared})
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"the training keys do not fit: {' '.join(str(error).split())}") from error


def check_batch(arguments: CTRLConfig, prompts: int) -> None:
    """A generation needs so many distinct prompts.

    Raises:
        InputError: there are fewer, or evaluation during training has no validation prompts.
    """
    needed = int(arguments.generation_batch_size or 0) // int(arguments.num_generations or 1)
    if prompts < needed:
        raise InputError(
            f"{prompts} training prompts are fewer than the {needed} of one batch (per_device_train_batch_size x "
            "processes x steps_per_generation / num_generations): add prompts, or lower per_device_train_batch_size"
        )


def _dataset(experiment: Experiment, table: SampleTable, prompts: tuple[Prompt, ...]) -> Dataset:
    """A TRL data set: `prompt`, the data's own columns, and the reference rewards."""
    names = sorted({name for prompt in prompts for name in prompt.columns} - {"prompt", "ref_rewards"})
    rows = [{"prompt": p.content, **{name: p.columns.get(name) for name in names}} for p in prompts]
    count = experiment.recipe.num_calibration_samples
    return table.attach(Dataset.from_list(rows), experiment.reward.fingerprint, count=count)


def _checkpoint(recipe: Recipe, folder: Path) -> str | None:
    """The newest checkpoint of a killed run, or the one that the recipe names."""
    named = recipe.training.get("resume_from_checkpoint")
    if isinstance(named, str) and named.lower() not in ("true", "false"):
        if not (Path(named) / "trainer_state.json").is_file():
            raise InputError(f"resume_from_checkpoint {named!r} is no whole checkpoint (trainer_state.json is missing)")
        return named
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        lacking = missing_from_checkpoint(path)
        if not lacking:
            say(f"continuing from {path.name}")
            return str(path)
        notice(f"{path.name} was not written whole (no {lacking}): it is passed over")
    return None


def missing_from_checkpoint(path: Path) -> str:
    """What a checkpoint lacks, or "". The trainer writes trainer_state.json last."""
    wanted = {
        "weights": ("*.safetensors", "pytorch_model*", "global_step*"),
        "optimizer": ("optimizer*", "global_step*"),
        "scheduler.pt": ("scheduler.pt", "global_step*"),
        "rng_state": ("rng_state*.pth",),
        "trainer_state.json": ("trainer_state.json",),
    }
    for what, patterns in wanted.items():
        if not any(any(path.glob(pattern)) for pattern in patterns):
            return what
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return "readable trainer_state.json"
    return ""


def memory_estimate(parameters: int, trainable: int, dtype: str) -> int:
    """Bytes that training holds at least: policy and gradients, two Adam moments, reference; without activations."""
    width = torch.finfo(getattr(torch, dtype)).bits // 8
    reference = parameters if trainable == parameters else 0
    return parameters * width + trainable * (width + 2 * width) + reference * width
