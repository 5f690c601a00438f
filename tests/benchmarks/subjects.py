"""Models, prompts and timing that the benchmarks share. One thread, CPU seconds, A and B interleaved."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.tiny import tiny_causal, tiny_classifier, tiny_tokenizer

WORDS = [f"w{number}" for number in range(2000)]
SHAPE = {"hidden": 512, "layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1408}
LONGEST = {"max_position_embeddings": 2048, "initializer_range": 0.05}


def tokenizer() -> Any:
    """One token a word."""
    found = tiny_tokenizer(WORDS)
    found.model_max_length = 2048
    return found


def policy(folder: Path) -> str:
    """A random Llama of about 5 M parameters in its layers, with its tokenizer."""
    return tiny_causal(folder / "policy", "llama", tokenizer=tokenizer(), **SHAPE, **LONGEST)


def reward_model(folder: Path) -> str:
    """A random classifier of the policy's size."""
    return tiny_classifier(folder / "reward", "llama", tokenizer=tokenizer(), seed=1, **SHAPE, **LONGEST)


def prompts(count: int, length: int) -> list[str]:
    """Distinct prompts of exactly `length` tokens."""
    return [" ".join(WORDS[(31 * row + place) % len(WORDS)] for place in range(length)) for row in range(count)]


def interleaved(subjects: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median CPU seconds of each subject, in turns so that a slow moment of the machine hits all; one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, subject in subjects.items():
            start = time.process_time()
            subject()
            if repeat:
                seconds[name].append(time.process_time() - start)
    return {name: median(values) for name, values in seconds.items()}


def rates_of(subjects: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Tokens a second (of the clock) of each subject, which returns its tokens; in turns, the best after a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, subject in subjects.items():
            start = time.perf_counter()
            count = subject()
            if repeat:
                rates[name].append(count / (time.perf_counter() - start))
    return {name: max(values) for name, values in rates.items()}


def ready_for_steps(trainer: Any) -> None:
    """Let `stepper` step a trainer: an optimizer, and completions that all have all their tokens."""
    trainer.eos_token_ids = []
    if getattr(trainer, "generation_config", None) is not None:
        trainer.generation_config.eos_token_id = None
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1


def stepper(trainer: Any) -> Callable[[], None]:
    """One whole step: rollouts, rewards, reference, loss, backward, optimizer."""
    batches = iter([])

    def run() -> None:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(trainer.get_train_dataloader())
            batch = next(batches)
        trainer.training_step(trainer.model, batch, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1

    return run


def decoding_bounds(model: Any, rows: int, cached: int) -> dict[str, float]:
    """Tokens a second that one decoding step for `rows` rows can't exceed on all cores, measured on the spot.

    By memory: every weight is read once a step, and every row's cache of `cached` tokens. By arithmetic: two operations
    a weight and row, at the rate of a large float32 product.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    block, square = torch.ones(2**28), torch.ones(2048, 2048)
    read = block.numel() * 4 / _fastest(block.sum)
    flops = 2 * 2048**3 / _fastest(lambda: square @ square)
    torch.set_num_threads(1)
    return {
        "memory": rows / (4 * (weights + rows * cached * width) / read),
        "arithmetic": rows / (2 * rows * weights / flops),
    }


def _fastest(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
