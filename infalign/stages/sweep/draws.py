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
from infalign.models.loading import end_token_ids, model_fingerprint
from infalign.runtime.artifacts import write_whole
from infalign.runtime.distributed import is_main, my_share, together
from infalign.runtime.seeds import uniforms
from infalign.stages.experiment import Experiment
from infalign.stages.sweep.combined import OWN
from infalign.types import Prompt


@torch.no_grad()
def draw(
    experiment: Experiment, model: Any, prompts: Sequence[Prompt], samples: int, purpose: str
) -> tuple[list[Sequence[int]], list[list[int]]]:
    """Prompts' tokens, each `samples` times, and completions at temperature 1, a batch of `tokens_per_batch` at a time.

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
    longest = max(map(len, rows), default=0) + settings.max_tokens
    size = max(1, recipe.tokens_per_batch // (longest * len(getattr(model, "models", (model,)))))
    completions: list[list[int]] = []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        noise = [
            uniforms(f"{recipe.seed}/{purpose}", prompt.key, number, settings.max_tokens)
            for prompt, number in each[part]
        ]
        completions += [ids for ids, _ in decode_rows(model, rows[part], np.array(noise), settings, ends)]
    return rows, completions


PROMPTS = 256
"""Training prompts whose answers are in one file, while they are drawn."""


def write_own_data(experiment: Experiment, merge: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A merge whose models have files in place of `data: own`, one answer to each training prompt; they are written.

    The prompts are shared out over the processes, and answers of the same policy that are there are kept.

    Args:
        experiment: of the cell.
        merge: mergekit's mapping, with models' folders.
        folder: for the files.
    """
    models = []
    for number, one in enumerate(merge.get("models", ())):
        if isinstance(one, dict) and one.get("data") == OWN:
            path, model = folder / f"own-{number}.jsonl", str(one["model"])
            with together("the experts' own answers"):
                parts = _write_share(experiment, model, folder / f"own-{number}-{model_fingerprint(model)}")
            with together("the experts' own answers, in one file"):
                if is_main():
                    text = "".join(part.read_text(encoding="utf-8") for part in parts)
                    write_whole(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
            one = {**one, "data": str(path)}
            experiment.release_models()  # DAM loads its own
        models.append(one)
    return {**merge, "models": models} if models else merge


def _write_share(experiment: Experiment, model: str, folder: Path) -> list[Path]:
    """This process's part of an expert's answers; all files, in order."""
    prompts = experiment.splits.train
    parts = {
        folder / f"{start:06d}.jsonl": prompts[start : start + PROMPTS] for start in range(0, len(prompts), PROMPTS)
    }
    for path in my_share(list(parts)):
        if path.exists():
            continue
        _, completions = draw(experiment, experiment.model(model), parts[path], 1, "own data")
        texts = [experiment.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        rows = [
            json.dumps({"prompt": prompt.content, "completion": text}, default=str)
            for prompt, text in zip(parts[path], texts, strict=True)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "\n".join(rows) + "\n"
        write_whole(path, lambda temporary, content=content: temporary.write_text(content, encoding="utf-8"))
    return list(parts)
