"""Which engine samples what: `generation: vllm`, one engine at a time, since each takes what memory there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ADAPTER_CONFIG_NAME

from infalign.generation.vllm_engine import Engine, VLLMSampler, check_vllm
from infalign.models import mixture
from infalign.runtime.distributed import world_size
from infalign.stages.servers import served_end_ids
from infalign.types import InputError

if TYPE_CHECKING:
    from infalign.stages.experiment import Experiment
    from infalign.stages.recipe import Recipe


def check_engine(experiment: Experiment) -> None:
    """See that this process can sample with an engine, where the recipe asks for one.

    Raises:
        InputError: it can't.
    """
    if experiment.recipe.generation != "vllm":
        return
    check_vllm()
    if world_size() > 1:
        raise InputError(
            f"generation: vllm samples in one process, got {world_size()}: calibrate and evaluate without a launcher "
            "(vllm_tensor_parallel_size splits a model), or sample from a server (generation: openai)"
        )
    if experiment.quantization is not None:
        raise InputError("generation: vllm does not sample from a base that training quantises: leave one of them out")


def engine_sampler(
    experiment: Experiment, path: str | Path, revision: str | None, engines: dict[str, Engine], seed: str
) -> VLLMSampler:
    """A sampler of the model at `path`; its engine is added to `engines`, and the others there are closed.

    Raises:
        InputError: there is no vLLM, several processes, or a model in parts.
    """
    check_engine(experiment)
    name, recipe = str(path), experiment.recipe
    if unmerged := [file for file in (ADAPTER_CONFIG_NAME, mixture.FILE) if (Path(path) / file).exists()]:
        raise InputError(f"generation: vllm needs one whole model, and {path} has {unmerged[0]}: leave generation out")
    if name not in engines:
        experiment.release_models()
        engines[name] = Engine(name, _options(recipe, revision))
    ends = served_end_ids(name, experiment.tokenizer, revision, recipe.trust_remote_code)
    return VLLMSampler(engines[name], experiment.tokenizer, recipe.sampling, ends, seed)


def _options(recipe: Recipe, revision: str | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; the training keys of TRL's engine mean the same here."""
    keys = {
        "gpu_memory_utilization": "vllm_gpu_memory_utilization",
        "max_model_len": "vllm_max_model_length",
        "tensor_parallel_size": "vllm_tensor_parallel_size",
    }
    options = {name: recipe.training[key] for name, key in keys.items() if recipe.training.get(key)}
    if recipe.use_cpu or not torch.cuda.is_available():
        options["enforce_eager"] = True  # compiling takes minutes there
        options.setdefault("gpu_memory_utilization", 0.3)  # of the memory of a machine that others use, too
    if revision is not None:
        options["revision"] = revision
    return {"dtype": recipe.dtype, "trust_remote_code": recipe.trust_remote_code, **options}
