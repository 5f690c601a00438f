"""Optional packages that training keys ask for: looked for before any work is done, not after hours of calibration."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

Alternatives = tuple[str, ...]
"""Modules of which one is enough."""

TRACKERS: dict[str, list[Alternatives]] = {
    "azure_ml": [("azureml.core",)],
    "clearml": [("clearml",)],
    "codecarbon": [("codecarbon",)],
    "comet_ml": [("comet_ml",)],
    "dagshub": [("dagshub",), ("mlflow",)],
    "dvclive": [("dvclive",)],
    "flyte": [("flytekit",)],
    "kubeflow": [],
    "mlflow": [("mlflow",)],
    "neptune": [("neptune",)],
    "swanlab": [("swanlab",)],
    "tensorboard": [("tensorboard", "tensorboardX")],
    "trackio": [("trackio",)],
    "wandb": [("wandb",)],
}
"""What each value of `report_to` needs."""

PLAIN_OPTIMIZERS = {"adafactor", "adagrad", "adamw_torch", "adamw_torch_fused", "rmsprop", "sgd"}
OPTIMIZERS: dict[str, str] = {
    "adalomo": "lomo_optim",
    "adamw_8bit": "bitsandbytes",
    "adamw_anyprecision": "torchdistx",
    "adamw_bnb": "bitsandbytes",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_npu": "torch_npu",
    "adamw_torch_xla": "torch_xla",
    "ademamix": "bitsandbytes",
    "apollo_": "apollo_torch",
    "galore_": "galore_torch",
    "grokadamw": "grokadamw",
    "lion_": "bitsandbytes",
    "lomo": "lomo_optim",
    "paged_": "bitsandbytes",
    "rmsprop_bnb": "bitsandbytes",
    "schedule_free_": "schedulefree",
    "stable_adamw": "optimi",
}
"""Which module an `optim` that starts so needs."""

ATTENTION: dict[str, Alternatives] = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
    "flash_attention_4": ("flash_attn.cute", "kernels"),
}
SWITCHES: dict[str, Alternatives] = {
    "use_liger_kernel": ("liger_kernel",),
    "use_vllm": ("vllm",),
    "deepspeed": ("deepspeed",),
    "use_peft": ("peft",),
    "load_in_4bit": ("bitsandbytes",),
    "load_in_8bit": ("bitsandbytes",),
}
"""What a key needs that is set."""

_INSTALL = {
    "bitsandbytes": "'infalign[qlora]'",
    "deepspeed": "'infalign[deepspeed]'",
    "peft": "'infalign[peft]'",
    "optimi": "torch-optimi",
    "azureml.core": "azureml-core",
    "flash_attn.cute": "flash-attn-4",
    "flash_attn_interface": "flash-attn-3",
}


def missing_packages(values: Mapping[str, Any]) -> list[str]:
    """What these keys need and this environment lacks, each with how to install it.

    >>> missing_packages({"optim": "adamw_torch", "report_to": "none"})
    []
    """
    needed = [
        *[(f"{name}: {_shown(values[name])}", [modules]) for name, modules in SWITCHES.items() if values.get(name)],
        *[(f"report_to: {name}", TRACKERS[name]) for name in _names(values.get("report_to")) if name in TRACKERS],
        *_of_optimizer(values.get("optim")),
        *_of_attention(values.get("attn_implementation")),
        *_of_attention((_mapping(values.get("model_init_kwargs"))).get("attn_implementation")),
    ]
    if _mapping(values.get("model_init_kwargs")).get("use_kernels"):
        needed.append(("model_init_kwargs: use_kernels", [("kernels",)]))
    problems = [
        f"{what} needs the package {modules[0]}: pip install {_INSTALL.get(modules[0], modules[0].replace('_', '-'))}"
        for what, all_of in needed
        for modules in all_of
        if not any(map(_is_installed, modules))
    ]
    if "kubeflow" in _names(values.get("report_to")) and "KUBEFLOW_TRAINER_SERVER_URL" not in os.environ:
        problems.append("report_to: kubeflow works inside a Kubeflow job, which sets KUBEFLOW_TRAINER_SERVER_URL")
    return problems


def _of_optimizer(value: Any) -> list[tuple[str, list[Alternatives]]]:
    name = str(getattr(value, "value", value))  # transformers makes it an enumeration
    if name in PLAIN_OPTIMIZERS:
        return []
    found = [module for start, module in OPTIMIZERS.items() if name.startswith(start)]
    if name.startswith("galore_") and "8bit" in name:
        found.append("bitsandbytes")
    return [(f"optim: {name}", [(module,)]) for module in found]


def _of_attention(value: Any) -> list[tuple[str, list[Alternatives]]]:
    name = str(value or "").removeprefix("paged|")
    modules = ("kernels",) if "/" in name else ATTENTION.get(name)
    return [] if modules is None else [(f"attn_implementation: {value}", [modules])]


def _names(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "..." if isinstance(value, Mapping) else str(value)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent that is not there
        return False
