"""The mixture of several models' logits: `log pi(a | s) = sum_k w_k log pi_k(a | s) + constant`, token by token.

For experts that were trained from one base under one KL penalty it is what a joint training aims at (design: the exact
optimum of a weighted sum of their objectives), up to its normalisation: theirs is over whole completions, this one is
over the next token. `infalign.merging.gap` measures the difference.

On disk it is a folder with `mixture.json`, which names the models and their weights, and a tokenizer:

    {"models": ["../helpful/policy", "../harmless/policy"], "weights": [0.5, 0.5]}
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infalign.types import InputError

FILE = "mixture.json"


def write_mixture(folder: Path, models: Sequence[str], weights: Sequence[float], place: Path) -> None:
    """Write a mixture's file.

    Args:
        folder: where it is written.
        models: absolute folders, which are noted relative to `place`, or Hub ids.
        weights: one for each.
        place: where the folder will be in the end.
    """
    # links are followed first: `..` from behind one leads elsewhere
    real = place.resolve()
    named = [os.path.relpath(Path(one).resolve(), real) if Path(one).is_dir() else one for one in models]
    text = json.dumps({"models": named, "weights": list(weights)}, indent=2)
    (folder / FILE).write_text(f"{text}\n", encoding="utf-8")


def read_mixture(folder: str | Path) -> tuple[list[str], list[float]] | None:
    """The models (absolute folders or Hub ids) and weights of a mixture's folder, None for another folder.

    Raises:
        InputError: the file is damaged, or a model is gone.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        named, weights = list(map(str, found["models"])), list(map(float, found["weights"]))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no mixture's file: it needs models and weights, a list each") from error
    models = []
    for name in named:
        there = (Path(folder) / name).resolve()
        if not there.is_dir() and name.startswith((".", "/")):
            raise InputError(f"{path}: there is no model at {there}: a mixture needs its parents where they were")
        models.append(str(there) if there.is_dir() else name)
    return models, weights


@dataclass(frozen=True)
class LogitMixture:
    """Models of one vocabulary with a weight each. Weights that do not sum to one sharpen or flatten the mixture."""

    models: tuple[Any, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.models) != len(self.weights) or not self.models:
            raise InputError(f"a mixture needs a weight for each model: {len(self.weights)} for {len(self.models)}")
        sizes = {one.get_input_embeddings().weight.shape[0] for one in self.models}
        if len(sizes) > 1:
            raise InputError(f"models of a mixture must have one vocabulary, these have {sorted(sizes)} tokens")

    @property
    def config(self) -> Any:
        """The first model's."""
        return self.models[0].config

    @property
    def generation_config(self) -> Any:
        """The first model's."""
        return getattr(self.models[0], "generation_config", None)

    def get_input_embeddings(self) -> Any:
        """The first model's: for the size of the vocabulary."""
        return self.models[0].get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: its logits come from no single layer."""

    def modules(self) -> Iterator[Any]:
        """All models'."""
        return itertools.chain.from_iterable(one.modules() for one in self.models)

    @property
    def device(self) -> torch.device:
        """The models' device."""
        return self.models[0].device

    def mixed(self, logits: Sequence[Tensor]) -> Tensor:
        """`sum_k w_k log softmax(z_k)` of logits (..., V): unnormalised log-probabilities, float32."""
        parts = (w * one.float().log_softmax(-1) for w, one in zip(self.weights, logits, strict=True))
        return torch.stack(tuple(parts)).sum(0)
