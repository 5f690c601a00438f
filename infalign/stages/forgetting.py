"""`held_out_texts`: what base and policy make of texts that nobody was trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infalign.data.examples import Example, read_examples
from infalign.evaluation.forgetting import TextFit, text_fit
from infalign.generation.likelihood import completion_logps
from infalign.models.loading import context_length, local_path
from infalign.runtime.artifacts import fingerprint, read_json, write_json
from infalign.runtime.console import Progress
from infalign.runtime.distributed import my_share, together
from infalign.runtime.seeds import stream
from infalign.stages.experiment import Experiment
from infalign.types import InputError

TEXTS, LENGTH = 200, 512
"""Texts of a file that are read, and tokens of each, at most."""
TEXTS_AT_A_TIME = 20


def measure_texts(experiment: Experiment) -> tuple[TextFit, ...]:
    """Every file of the recipe; what has been measured is found beside the samples.

    Raises:
        InputError: a file is not there, or has nothing to predict.
    """
    found = []
    for name, file in text_files(experiment).items():
        examples = _examples(experiment, name, file)
        base, policy = (
            _logps(experiment, side, path, name, examples)
            for side, path in (("base", experiment.base_path), ("policy", experiment.judged_path))
        )
        tokens = np.array([len(one.ids) - one.start for one in examples], dtype=np.float64)
        found.append(text_fit(name, base, policy, tokens))
    return tuple(found)


def text_files(experiment: Experiment) -> dict[str, str]:
    """The recipe's `held_out_texts` by name.

    Raises:
        InputError: one is not there.
    """
    found = {}
    for name, file in experiment.recipe.held_out_texts.items():
        path = local_path(str(file), experiment.recipe.base_dir)
        if path is None:
            raise InputError(
                f"held_out_texts, {name}: there is no {file}: give a JSONL of texts, or of prompts with completions"
            )
        found[str(name)] = str(path)
    return found


def _examples(experiment: Experiment, name: str, file: str) -> list[Example]:
    recipe = experiment.recipe
    context = context_length(experiment.base_path, recipe.model_revision, recipe.trust_remote_code)
    rng = stream(recipe.seed, "held-out texts", name)
    try:
        return read_examples(file, experiment.tokenizer, min(LENGTH, context or LENGTH), TEXTS, rng)
    except InputError as error:
        raise InputError(f"held_out_texts, {name}: {error}") from error


def _logps(experiment: Experiment, side: str, path: str, name: str, examples: list[Example]) -> NDArray[np.float64]:
    """(T,) summed log-probabilities by one model, shared out over the processes and cached."""
    identity = [experiment.sampling_parts(path, "texts"), [one.ids for one in examples]]
    folder = experiment.recipe.output / "evaluation" / f"texts-{side}-{fingerprint(identity)}"
    parts = {
        folder / f"{start:06d}.json": examples[start : start + TEXTS_AT_A_TIME]
        for start in range(0, len(examples), TEXTS_AT_A_TIME)
    }
    missing = [part for part in my_share(list(parts)) if not part.exists()]
    with together(f"the texts {name}"):
        model = experiment.model(path) if missing else None
        with Progress(f"evaluate: {name}, {side}", sum(len(parts[part]) for part in missing), "texts") as progress:
            for part in missing:
                prompts = [one.ids[: one.start] for one in parts[part]]
                logps = completion_logps(model, prompts, [one.ids[one.start :] for one in parts[part]])
                write_json(part, logps.tolist())
                progress.advance(len(parts[part]))
    return np.concatenate([read_json(part, "the texts' log-probabilities") for part in parts])
