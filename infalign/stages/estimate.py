"""`infalign run --dry_run`: check everything, show one prompt as the model sees it, estimate tokens, memory, time."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from infalign.runtime.console import clock, say
from infalign.runtime.models import choose_device
from infalign.stages.experiment import Experiment
from infalign.stages.train import memory_estimate, training_arguments

GIB = 2**30


def dry_run(experiment: Experiment) -> dict[str, Any]:
    """Validate the recipe against its data, model config and reward; load no weights and write nothing.

    Returns:
        `tokens` by stage (prompt tokens computed once each, completion tokens at the length limit), `bytes` by what
        holds them, `seconds` by stage at the matrix-product rate measured on the spot.
    """
    splits = experiment.splits
    beta, reward = experiment.beta, experiment.reward
    arguments = training_arguments(experiment)
    parameters, cache_bytes = _shape(experiment)
    tokens = _tokens(experiment, arguments)
    held = {
        "training": memory_estimate(parameters, parameters, experiment.recipe.dtype),
        "sampling cache": experiment.recipe.tokens_per_batch * cache_bytes,
    }
    rate = _flops()
    seconds = {stage: 2.0 * parameters * count / rate for stage, count in tokens.items()}
    first = splits.train[0]
    say(
        f"recipe is valid: {len(splits.train)} train, {len(splits.validation)} validation, "
        f"{len(splits.test)} test prompts"
    )
    say(f"  {experiment.procedure}, transform {experiment.recipe.transform}, beta {beta:.4g}, reward {reward.name}")
    say("  one prompt as the model sees it:")
    say("    " + repr(experiment.tokenizer.decode(experiment.prompt_ids[first.key])))
    say(f"  {parameters / 1e6:.0f} M parameters; this machine multiplies at {rate / 1e9:.0f} GFLOP/s")
    for stage, count in tokens.items():
        say(f"  {stage:<10} {count:>12,} tokens   about {clock(seconds[stage])}")
    say(
        "  (time: 2 x parameters x tokens at that rate; decoding on an accelerator is slower: it is bound by bandwidth)"
    )
    for name, size in held.items():
        say(f"  {name:<16} {size / GIB:.2f} GiB")
    return {"tokens": tokens, "bytes": held, "seconds": seconds, "drawn": 0}


def _shape(experiment: Experiment) -> tuple[int, int]:
    """Parameters of the policy, and bytes of KV cache a token, from its config alone."""
    config: Any = AutoConfig.from_pretrained(
        experiment.base_path,
        revision=experiment.recipe.model_revision,
        trust_remote_code=experiment.recipe.trust_remote_code,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=experiment.recipe.trust_remote_code)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_number = torch.finfo(getattr(torch, experiment.recipe.dtype)).bits // 8
    return model.num_parameters(), 2 * text.num_hidden_layers * heads * width * per_number


def _tokens(experiment: Experiment, arguments: Any) -> dict[str, int]:
    """Tokens through the policy by stage; a training step is one sampling, one reference and three policy passes."""
    recipe, splits, longest = experiment.recipe, experiment.splits, experiment.recipe.max_completion_length
    length = {key: len(ids) for key, ids in experiment.prompt_ids.items()}
    calibrated = [*splits.train, *splits.validation]
    count = recipe.num_calibration_samples
    rollouts = int(arguments.generation_batch_size)
    groups = rollouts // int(arguments.num_generations)
    steps = int(arguments.max_steps)
    if steps <= 0:
        steps = int(arguments.num_train_epochs * len(splits.train) / max(groups, 1))
    mean_prompt = sum(length[prompt.key] for prompt in splits.train) / max(len(splits.train), 1)
    step_tokens = groups * mean_prompt + rollouts * longest
    test_prompts = sum(length[prompt.key] for prompt in splits.test)
    sampled = 2 * (test_prompts + len(splits.test) * recipe.eval_samples * longest)
    judged = 2 * (test_prompts + len(splits.test) * min(recipe.kl_samples, recipe.eval_samples) * longest)
    return {
        "calibrate": sum(length[prompt.key] for prompt in calibrated) + len(calibrated) * count * longest,
        "train": round(5 * steps * step_tokens),
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
        warm[0, 0].item()
        count += 1
    return count * 2.0 * size**3 / (time.perf_counter() - start)
