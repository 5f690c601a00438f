"""`infalign run --dry_run`: check everything, show one prompt as the model sees it, estimate tokens, memory, time."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from infalign.models.loading import choose_device, replicated
from infalign.runtime.console import clock, say
from infalign.runtime.distributed import world_size
from infalign.runtime.launch import sharding
from infalign.stages.calibrate import calibration_prompts
from infalign.stages.experiment import Experiment
from infalign.stages.objective import objective_name
from infalign.stages.train import offline_part, training_arguments
from infalign.stages.training_keys import adapter_of, split_training
from infalign.training.config import CTRLConfig
from infalign.training.memory import (
    PolicyShape,
    Setup,
    cache_bytes_per_token,
    fitting_batch,
    rollout_bytes,
    training_bytes,
)
from infalign.types import InputError

GIB = 2**30


def dry_run(experiment: Experiment) -> dict[str, Any]:
    """Validate the recipe against its data, model config and reward; load no weights and write nothing.

    Under a launcher the estimate is of one of its processes.

    Returns:
        `tokens` by stage (prompt tokens computed once each, completion tokens at the length limit), `bytes` on each
        process by what holds them, `seconds` by stage at the matrix-product rate measured on the spot, and the largest
        `tokens_per_batch` that the free memory allows.
    """
    splits = experiment.splits
    rewards = ", ".join(reward.name for reward in experiment.rewards)
    arguments = training_arguments(experiment)
    shape, setup = _set_up(experiment, arguments)
    tokens = _tokens(experiment, arguments)
    held = _bytes(experiment, arguments, shape, setup)
    rate = _flops()
    seconds = _seconds(tokens, shape.parameters, rate)
    first = splits.train[0]
    say(
        f"recipe is valid: {len(splits.train)} train, {len(splits.validation)} validation, "
        f"{len(splits.test)} test prompts"
    )
    aim = objective_name(experiment.recipe)
    say(f"  {experiment.procedure}, {aim}, {_beta(arguments)}, reward {rewards}")
    say("  one prompt as the model sees it:")
    say("    " + repr(experiment.tokenizer.decode(experiment.prompt_ids[first.key])))
    if isinstance(first.content, str) and getattr(experiment.tokenizer, "chat_template", None):
        say("    (a text, given as it is; the model has a chat template: data_format: chat makes it the user's turn)")
    say(f"  {shape.parameters / 1e6:.0f} M parameters; this machine multiplies at {rate / 1e9:.0f} GFLOP/s")
    for stage, count in tokens.items():
        say(f"  {stage:<10} {count:>12,} tokens   about {clock(seconds[stage])}")
    say(
        "  (time: 2 x parameters x tokens at that rate; decoding on an accelerator is slower: it is bound by bandwidth)"
    )
    say(
        f"  memory of each of {world_size()} process(es), {setup.sharding}, {setup.method}; in training, without "
        f"activations: {(sum(held.values()) - held['sampling cache']) / GIB:.2f} GiB"
    )
    for name, size in held.items():
        if size:
            say(f"    {name:<17} {size / GIB:8.2f} GiB")
    fitting = _fitting_batch(experiment, shape, held["reward model"])
    return {"tokens": tokens, "bytes": held, "seconds": seconds, "tokens_per_batch": fitting, "drawn": 0}


def stage_costs(experiment: Experiment) -> tuple[dict[str, int], dict[str, float]]:
    """Tokens and seconds of each stage, as `dry_run` says them."""
    arguments = training_arguments(experiment)
    tokens = _tokens(experiment, arguments)
    parameters = _set_up(experiment, arguments)[0].parameters
    return tokens, _seconds(tokens, parameters, _flops())


def _seconds(tokens: dict[str, int], parameters: int, rate: float) -> dict[str, float]:
    """A forward pass takes two operations a parameter and token."""
    return {stage: 2.0 * parameters * count / rate / world_size() for stage, count in tokens.items()}


def _beta(arguments: CTRLConfig) -> str:
    """The beta that training starts from, and where it goes from there."""
    if arguments.beta_start is not None:
        return f"beta from {arguments.beta_start:.4g} down to {arguments.beta:.4g}"
    if arguments.target_kl is not None:
        return f"beta {arguments.beta:.4g} at first, steered to {arguments.target_kl:g} nats"
    return f"beta {arguments.beta:.4g}"


def _fitting_batch(experiment: Experiment, shape: PolicyShape, reward: int) -> int:
    """The largest `tokens_per_batch` for half of the memory that is free beside the policy and the reward; says it."""
    recipe, width = experiment.recipe, _width(experiment)
    longest = max(map(len, experiment.prompt_ids.values())) + recipe.max_completion_length
    free = _free_bytes(choose_device(recipe.use_cpu)) - shape.parameters * width - reward
    fitting = fitting_batch(shape, free / 2, longest, width)
    rows = max(1, recipe.tokens_per_batch // longest)
    most = f"up to tokens_per_batch {fitting:,}" if fitting else "not even one sample"
    say(f"  tokens_per_batch {recipe.tokens_per_batch:,}: {rows} samples of the longest prompt are drawn at a time")
    say(f"    the models leave {max(free, 0) / GIB:.1f} GiB free; half of that holds {most}")
    say("    (samples that are there already keep the value they were drawn with)")
    return fitting


def _free_bytes(device: torch.device) -> float:
    """Memory that this process can still take: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _set_up(experiment: Experiment, arguments: Any) -> tuple[PolicyShape, Setup]:
    """The policy's shape from its config alone, and how the recipe and the launcher train it."""
    recipe = experiment.recipe
    config: Any = AutoConfig.from_pretrained(
        experiment.base_path, revision=recipe.model_revision, trust_remote_code=recipe.trust_remote_code
    )
    with replicated(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ends = {id(one.weight): one.weight.numel() for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    embeddings = sum(ends.values())
    parameters, layers = model.num_parameters(), text.num_hidden_layers
    shape = PolicyShape(parameters, layers, heads, width, text.vocab_size, embeddings)
    adapter, four_bit = _adapter(model, recipe.training)
    setup = Setup(
        sharding=sharding(),
        processes=world_size(),
        width=_width(experiment),
        mixed=bool(arguments.bf16),
        method=("qlora" if four_bit else "lora") if adapter else "full",
        adapter=adapter,
        gather=bool(arguments.ds3_gather_for_generation),
    )
    return shape, setup


def _adapter(model: Any, training: dict[str, Any]) -> tuple[int, bool]:
    """Numbers of the recipe's adapter (0 without one), and whether its base is in 4 bits; leaves `model` adapted."""
    _, given = split_training(training)
    try:
        config = adapter_of(given)
        if config is None:
            return 0, False
        from peft import get_peft_model  # noqa: PLC0415 - an extra, and seconds

        with replicated(), torch.device("meta"):
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, ImportError) as error:  # TRL's and PEFT's own refusals; their words are passed on
        raise InputError(f"the adapter's keys do not fit: {' '.join(str(error).split())}") from error
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad), bool(given.get("load_in_4bit"))


def _width(experiment: Experiment) -> int:
    """Bytes of a number in the recipe's `dtype`."""
    return torch.finfo(getattr(torch, experiment.recipe.dtype)).bits // 8


def _bytes(experiment: Experiment, arguments: Any, shape: PolicyShape, setup: Setup) -> dict[str, int]:
    """Bytes on each process: of training with a batch of its rollouts, and of sampling in the other stages."""
    recipe, width = experiment.recipe, _width(experiment)
    rows = int(arguments.generation_batch_size) // world_size()
    longest = max(len(experiment.prompt_ids[prompt.key]) for prompt in experiment.splits.train)
    return {
        **training_bytes(shape, setup),
        **rollout_bytes(shape, rows, longest + recipe.max_completion_length, width),
        "reward model": _reward_bytes(experiment),
        "sampling cache": recipe.tokens_per_batch * cache_bytes_per_token(shape, width),
    }


def _reward_bytes(experiment: Experiment) -> int:
    """Bytes of the rewards' own models, whole on every process, where they have one in memory."""
    models = [getattr(reward.function, "model", None) for reward in experiment.rewards]
    loaded = [model for model in models if isinstance(model, torch.nn.Module)]
    return sum(parameter.numel() * parameter.element_size() for model in loaded for parameter in model.parameters())


def _tokens(experiment: Experiment, arguments: Any) -> dict[str, int]:
    """Tokens through the policy by stage.

    A training step is one sampling, one reference and three policy passes; offline it is the policy's alone.
    """
    recipe, splits, longest = experiment.recipe, experiment.splits, experiment.recipe.max_completion_length
    length = {key: len(ids) for key, ids in experiment.prompt_ids.items()}
    calibrated = calibration_prompts(experiment)
    count = recipe.num_calibration_samples
    mean_prompt = sum(length[prompt.key] for prompt in splits.train) / max(len(splits.train), 1)

    def trained(given: Any) -> float:
        """Of all steps, one pass."""
        rows = int(given.generation_batch_size)
        groups = rows // int(given.num_generations)
        steps = int(given.max_steps)
        if steps <= 0:
            steps = int(given.num_train_epochs * len(splits.train) / max(groups, 1))
        # each prompt once for its group, each completion at its longest
        return steps * (groups * mean_prompt + rows * longest)

    training = trained(arguments) * (3 if recipe.solver == "offline" else 5)
    if recipe.solver == "offline+online":
        training += 3 * trained(training_arguments(offline_part(experiment)))
    test_prompts = sum(length[prompt.key] for prompt in splits.test)
    # base and policy both sample, and both judge the policy's own samples for the KL
    sampled = 2 * (test_prompts + len(splits.test) * recipe.eval_samples * longest)
    judged = 2 * (test_prompts + len(splits.test) * min(recipe.kl_samples, recipe.eval_samples) * longest)
    return {
        "calibrate": sum(length[prompt.key] for prompt in calibrated) + len(calibrated) * count * longest,
        "train": round(training),
        "evaluate": sampled + judged,
    }


def _flops() -> float:
    """Matrix-product FLOP/s of this machine, measured for about a tenth of a second."""
    size, device = 1024, choose_device()
    left = torch.randn(size, size, device=device)
    warm = left @ left
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        warm = left @ left
        warm[0, 0].item()  # waits for the GPU, which works on while Python runs ahead
        count += 1
    # a product of two n x n matrices takes n^3 multiplications and as many additions
    return count * 2.0 * size**3 / (time.perf_counter() - start)
