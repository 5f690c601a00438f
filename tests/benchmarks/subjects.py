"""Models, prompts and timing that the benchmarks share. One thread, CPU seconds, A and B interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tests.tiny import tiny_causal, tiny_classifier, tiny_tokenizer

WORDS = [f"w{number}" for number in range(2000)]
SHAPE = {"hidden": 512, "layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1408}
LONGEST = {"max_position_embeddings": 2048, "initializer_range": 0.05}


def policy(folder: Path) -> str:
    """A random Llama of about 5 M parameters in its layers, with its tokenizer."""
    return tiny_causal(folder / "policy", "llama", tokenizer=tiny_tokenizer(WORDS), **SHAPE, **LONGEST)


def reward_model(folder: Path) -> str:
    """A random classifier of the policy's size."""
    return tiny_classifier(folder / "reward", "llama", tokenizer=tiny_tokenizer(WORDS), seed=1, **SHAPE, **LONGEST)


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
