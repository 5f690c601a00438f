"""Completions that a sweep draws beside its samples: of a mixture for a merge's gap, of experts for DAM."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infalign.generation.hf import decode_rows
from infalign.models.loading import end_token_ids
from infalign.runtime.artifacts import write_whole
from infalign.runtime.distributed import barrier, is_main
from infalign.runtime.seeds import uniforms
from infalign.stages.experiment import Experiment
from infalign.types import Prompt

ROWS = 256
"""Completions that are drawn at a time."""
OWN = "own"
"""As a model's `data` in a merge by DAM: what it answers to the training prompts itself."""


@torch.no_grad()
def draw(
    experiment: Experiment, model: Any, prompts: Sequence[Prompt], samples: int, purpose: str
) -> tuple[list[Sequence[int]], list[list[int]]]:
    """Prompts' tokens, each `samples` times, and completions at temperature 1.

    Args:
        experiment: of the cell.
        model: or mixture.
        prompts: of its splits.
        samples: of each.
        purpose: separates the random streams.
    """
    recipe = experiment.recipe
    settings = dataclasses.replace(recipe.sampling, temperature=1.0)  # models as they are
    ends = end_token_ids(getattr(model, "models", (model,))[0], experiment.tokenizer)
    each = [(prompt, number) for prompt in prompts for number in range(samples)]
    rows: list[Sequence[int]] = [experiment.prompt_ids[prompt.key] for prompt, _ in each]
    completions: list[list[int]] = []
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        noise = [
            uniforms(f"{recipe.seed}/{purpose}", prompt.key, number, settings.max_tokens)
            for prompt, number in each[part]
        ]
        completions += [ids for ids, _ in decode_rows(model, rows[part], np.array(noise), settings, ends)]
    return rows, completions


def write_own_data(experiment: Experiment, merge: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A merge whose models have files in place of `data: own`, one answer to each training prompt; they are written.

    Args:
        experiment: of the cell.
        merge: mergekit's mapping, with models' folders.
        folder: for the files.
    """
    models = []
    for number, one in enumerate(merge.get("models", ())):
        if isinstance(one, dict) and one.get("data") == OWN:
            path = folder / f"own-{number}.jsonl"
            if is_main() and not path.exists():
                _write(experiment, str(one["model"]), path)
            one = {**one, "data": str(path)}
        models.append(one)
    barrier()
    return {**merge, "models": models} if models else merge


def _write(experiment: Experiment, model: str, path: Path) -> None:
    prompts = experiment.splits.train
    _, completions = draw(experiment, experiment.model(model), prompts, 1, "own data")
    texts = [experiment.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    rows = [
        json.dumps({"prompt": prompt.content, "completion": text}, default=str)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    write_whole(path, lambda temporary: temporary.write_text("\n".join(rows) + "\n", encoding="utf-8"))
