"""A reward model that is an adapter (peft's LoRA and its kin) on a base model: loaded and merged, head included."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers.utils.peft_utils import find_adapter_config_file

from infalign.runtime.plugins import one_line
from infalign.types import InputError

CONFIG = "adapter_config.json"
_WRAPPED = "base_model.model."  # what peft puts before the names of weights


def adapter_config(name: str) -> dict[str, Any] | None:
    """The content of `adapter_config.json` in a folder or Hub repository; None when it is a whole model.

    Raises:
        InputError: the file is no JSON.
    """
    folder = Path(name)
    if folder.is_dir():
        path = folder / CONFIG
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise InputError(f"reward model {name!r}: {CONFIG} can't be read ({one_line(error)})") from error
    return _hub_config(name)


@functools.cache
def _hub_config(name: str) -> dict[str, Any] | None:
    """As above, of a Hub repository: asked for once, because without a network every question takes half a minute."""
    try:
        found = find_adapter_config_file(name)
    except (OSError, ValueError):  # no such repository, or no network: loading it as a model will say so
        return None
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def load_merged(name: str, config: dict[str, Any], dtype: Any, trust_remote_code: bool, factory: Any) -> Any:
    """The base model of an adapter with the adapter merged in.

    Args:
        name: folder or Hub id of the adapter.
        config: of `adapter_config`.
        dtype: of the base, "auto" as stored.
        trust_remote_code: run Python code that comes with the base.
        factory: the transformers class that loads the base, with its head.

    Raises:
        InputError: peft is not installed, the base can't be found, the adapter has no merged form or doesn't fit, or
            neither of the two has a trained head.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"reward model {name!r} is an adapter, which needs the package peft: pip install 'infalign[peft]'"
        )
    peft: Any = importlib.import_module("peft")
    if Path(name).is_dir() and not (Path(name) / "adapter_model.safetensors").is_file():
        raise InputError(
            f"reward model {name!r}: the folder has {CONFIG} and no adapter_model.safetensors; take {CONFIG} out if "
            "the model next to it is whole"
        )
    try:
        weights = peft.load_peft_weights(name, device="cpu")
    except Exception as error:  # OS, network and file format errors
        raise InputError(f"reward model {name!r}: the adapter's weights can't be read ({one_line(error)})") from error
    given = {key.removeprefix(_WRAPPED): weight for key, weight in weights.items()}
    model, info = _base(name, config, _labels(given, config), dtype, trust_remote_code, factory)
    wanted = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if untrained := sorted(wanted - set(given)):
        raise InputError(
            f"reward model {name!r} has no trained {', '.join(untrained[:3])}, neither in the adapter nor in its base: "
            "it would score at random; train the head too (modules_to_save; task_type SEQ_CLS does)"
        )
    try:
        return peft.PeftModel.from_pretrained(model, name).merge_and_unload()
    except Exception as error:  # other shapes, unknown kinds of adapters, ones that can't be merged
        raise InputError(
            f"reward model {name!r}: the adapter can't be merged into its base ({one_line(error)}); merge it where it "
            "was trained (merge_and_unload) and save the whole model"
        ) from error


def unwrapped(model: Any) -> Any:
    """The model inside a `PeftModel`, its adapter in place; any other model as it is.

    Raises:
        InputError: the adapter is a learned prompt, which lies outside of the model.
    """
    if not type(model).__module__.startswith("peft."):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise InputError(
            f"the reward model is a {type(model).__name__} with a learned prompt, which can't be scored here: give a "
            "whole model, or an adapter of its weights (LoRA)"
        )
    return model.get_base_model()


def base_of(name: str, config: dict[str, Any]) -> str:
    """Folder or Hub id of an adapter's base model; a relative path may start at the adapter's folder."""
    wanted = str(config.get("base_model_name_or_path") or "")
    beside = Path(name) / Path(wanted).expanduser()
    return str(beside) if wanted and beside.is_dir() else wanted


def _labels(given: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """How many labels the adapter's head has, as an option of loading; nothing when it has no head."""
    saved = set(config.get("modules_to_save") or ())
    heads = [w.shape[0] for key, w in given.items() if w.ndim == 2 and key.split(".")[0] in saved]
    return {"num_labels": min(heads), "ignore_mismatched_sizes": True} if heads else {}


def _base(
    name: str, config: dict[str, Any], labels: dict[str, Any], dtype: Any, trust_remote_code: bool, factory: Any
) -> tuple[Any, dict[str, Any]]:
    base = base_of(name, config)
    try:
        return factory.from_pretrained(
            base,
            revision=config.get("revision"),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **labels,
        )
    except Exception as error:  # as in `classifier_loading`
        raise InputError(
            f"reward model {name!r} is an adapter of the base model {base!r}, which can't be loaded "
            f"({one_line(error)}); put it there, or correct base_model_name_or_path in {CONFIG}"
        ) from error
