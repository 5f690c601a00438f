"""The policy's weights in and out: where training starts from, and what it leaves in `policy/`.

`policy/` always holds a whole model that anything can load. Trained adapters are merged into the base model for it (in
the recipe's dtype, also where training saw a quantised base) and kept beside it in `policy/adapter/`.
"""

# peft and transformers type what they return as unions of everything that it may be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import upload_folder
from trl.trainer.utils import create_model_from_path

from infalign.models.loading import load_policy
from infalign.runtime.artifacts import disk_errors
from infalign.runtime.console import say
from infalign.runtime.distributed import barrier, is_main
from infalign.stages.experiment import Experiment
from infalign.training.config import CTRLConfig
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError

ADAPTER = "adapter_config.json"


def initial_model(arguments: CTRLConfig, base_path: str) -> Any | None:
    """The policy to start from when `initial_weights` names a whole model, else None (start from the base).

    Raises:
        InputError: the folder holds no weights.
    """
    if arguments.initial_weights is None:
        return None
    folder = Path(arguments.initial_weights)
    if (folder / ADAPTER).is_file():
        return None
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise InputError(
            f"initial_weights {arguments.initial_weights!r} is no folder with config.json and safetensors (a ZeRO-3 "
            "checkpoint has them with zero3_save_16bit_model: true; else run its zero_to_fp32.py first)"
        )
    model = create_model_from_path(str(folder), **(arguments.model_init_kwargs or {}))
    model.config._name_or_path = base_path  # TRL re-loads the reference from here
    return model


def load_initial_adapter(trainer: CTRLTrainer) -> None:
    """Put the adapter that `initial_weights` names into the trainer's fresh one.

    Raises:
        InputError: the run trains no adapter, or one of another shape.
    """
    named = trainer.args.initial_weights
    if named is None or not (Path(named) / ADAPTER).is_file():
        return
    if not (Path(named) / "adapter_model.safetensors").is_file():
        raise InputError(f"initial_weights {named!r} has no adapter_model.safetensors (pickled weights are not loaded)")
    if not is_peft_model(trainer.model):
        raise InputError(f"initial_weights {named!r} is an adapter: set use_peft, or name its merged policy")
    from peft import load_peft_weights, set_peft_model_state_dict  # noqa: PLC0415 - an extra

    found = set_peft_model_state_dict(trainer.model, load_peft_weights(named, device="cpu"))
    if found.unexpected_keys:
        raise InputError(f"initial_weights {named!r} is an adapter of another shape: use the same lora settings")


def save_policy(trainer: CTRLTrainer, folder: Path, experiment: Experiment) -> None:
    """Write the trained policy as a whole model, with its card, and push it where asked (every rank calls this)."""
    trainer.create_model_card()
    if not is_peft_model(trainer.accelerator.unwrap_model(trainer.model)):
        trainer.save_model(str(folder))
        return
    trainer.save_model(str(folder / "adapter"), _internal_call=True)
    if is_main():
        _write_merged(experiment, folder)
        if trainer.args.push_to_hub:
            _push(trainer, folder)
    barrier()


def tell(result: dict[str, Any]) -> None:
    """Print where the policy is that `train` has made now; of one that was there it has spoken itself."""
    if result["trained"]:
        say(f"policy: {result['folder']} ({result['steps']} steps)")


def _push(trainer: CTRLTrainer, folder: Path) -> None:
    """Upload the merged policy and its adapter (TRL would push the adapter alone)."""
    trainer.init_hf_repo(token=trainer.args.hub_token)
    upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=folder,
        token=trainer.args.hub_token,
        ignore_patterns=["checkpoint-*", "*.json.tmp", "started.json"],
        commit_message="Trained with infalign",
    )


def _write_merged(experiment: Experiment, folder: Path) -> None:
    from peft import PeftModel  # noqa: PLC0415 - an extra

    recipe = experiment.recipe
    base = load_policy(
        experiment.base_path,
        device=torch.device("cpu"),
        dtype=getattr(torch, recipe.dtype),
        revision=recipe.model_revision,
        trust_remote_code=recipe.trust_remote_code,
    )
    merged: Any = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    with disk_errors(folder):
        merged.save_pretrained(folder)
        experiment.tokenizer.save_pretrained(folder)
