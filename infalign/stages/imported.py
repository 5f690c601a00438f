"""`calibration_samples: FILE`: a calibration from base samples that exist, with their rewards where the file has them.

Prompts are found by their content, so the file may hold more of them than the recipe's data, in any order. Everything
else is as if the samples had been drawn: another file makes another table.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.table import SampleTable, Wanted, read_samples, write_scores
from infalign.data.completions import read_completions
from infalign.data.prompts import numbered
from infalign.data.templates import with_system
from infalign.generation.imported import Given, ImportedSampler
from infalign.models.loading import local_path
from infalign.rewards.scoring import ASKED_AGAIN, NOISE, columns_digest, score_samples
from infalign.runtime.distributed import barrier, is_main, together
from infalign.stages.servers import served_end_ids
from infalign.types import InputError, Messages, Prompt, Sample

Floats = NDArray[np.float64]

if TYPE_CHECKING:
    from infalign.stages.experiment import Experiment
    from infalign.stages.recipe import Recipe


def imported_path(recipe: Recipe) -> Path:
    """The file of samples.

    Raises:
        InputError: there is none.
    """
    named = str(recipe.calibration_samples)
    path = local_path(named, recipe.base_dir)
    if path is None or not Path(path).is_file():
        raise InputError(f"calibration_samples {named!r}: no such file (JSONL, JSON, CSV or Parquet, also compressed)")
    return Path(path)


def imported_digest(recipe: Recipe) -> str:
    """16 hex digits over the file's content."""
    path = imported_path(recipe)
    return _digest(path, _written(path))


def _written(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew: when that was, and its size."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=8)
def _digest(path: Path, written: tuple[int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def imported_sampler(experiment: Experiment) -> ImportedSampler:
    """Hands out the file's completions as the base's samples."""
    recipe, tokenizer = experiment.recipe, experiment.tokenizer
    ends = served_end_ids(experiment.base_path, tokenizer, recipe.model_revision, recipe.trust_remote_code)
    end_id = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    given = {key: [one for one, _ in rows] for key, rows in _rows(experiment).items()}
    return ImportedSampler(
        given,
        tokenizer,
        recipe.sampling,
        end_id,
        lambda: experiment.model(experiment.base_path, experiment.quantization),
    )


def check_imported(experiment: Experiment, wanted: Sequence[Wanted]) -> None:
    """See that the file has so many completions of every prompt.

    Raises:
        InputError: it has not; the first prompt is shown.
    """
    held = {key: len(rows) for key, rows in _rows(experiment).items()}
    short = [entry for entry in wanted if held.get(entry.prompt.key, 0) < entry.count]
    if short:
        count = held.get(short[0].prompt.key, 0)
        raise InputError(
            f"calibration_samples: {len(short)} of {len(wanted)} prompts have fewer than num_calibration_samples "
            f"{short[0].count} completions in the file (first: {count} of {str(short[0].prompt.content)[:60]!r}): "
            "lower num_calibration_samples, or leave those prompts out of the data"
        )


def take_rewards(experiment: Experiment, table: SampleTable, wanted: Sequence[Wanted]) -> None:
    """Write the file's rewards into the table as the recipe's reward's, once that has confirmed some of them.

    Samples without one are left for the reward to score.

    Raises:
        InputError: the reward scores some of them otherwise.
    """
    rows, reward = _rows(experiment), experiment.reward
    prompts = {entry.prompt.key: entry.prompt for entry in wanted}
    columns = {key: columns_digest(reward, prompt) for key, prompt in prompts.items()}
    barrier()
    with together("the rewards of calibration_samples"):
        if is_main():
            scored, checked = table.scored(reward.fingerprint, columns), False
            for segment in table.segments:
                for path in sorted(table.shard(segment, 0).parent.glob("[0-9]*.parquet")):
                    fresh = [
                        (one, rows[one.key][one.index][1])
                        for one in read_samples(path)
                        if one.key in prompts and (one.key, one.index) not in scored
                    ]
                    known = [(one, value) for one, value in fresh if value is not None]
                    if not known:
                        continue
                    samples, values = [one for one, _ in known], np.array([value for _, value in known])
                    if not checked:
                        _confirm(experiment, [prompts[one.key] for one in samples], samples, values)
                        checked = True
                    shard = table.new_score_shard(segment, int(path.stem), reward.fingerprint)
                    write_scores(shard, samples, values, [columns[one.key] for one in samples])
    barrier()


def _confirm(experiment: Experiment, prompts: Sequence[Prompt], samples: Sequence[Sample], values: Floats) -> None:
    """Ask the recipe's reward about the first samples of a batch."""
    count = min(len(samples), ASKED_AGAIN)
    asked = score_samples(experiment.reward, prompts[:count], samples[:count])
    apart = np.abs(asked - values[:count])
    other = (np.isnan(asked) != np.isnan(values[:count])) | (apart > NOISE * max(float(np.nanstd(values)), 1e-6))
    if other.any():
        row = int(other.argmax())
        raise InputError(
            f"calibration_samples: {other.sum()} of {count} rewards in the file are not those of reward "
            f"{experiment.reward.name!r} (first: {values[row]:g} in the file, {asked[row]:g} asked now): name the "
            "reward that made them, or leave rewards out of the file, so that all are scored"
        )


def _rows(experiment: Experiment) -> dict[str, list[tuple[Given, float | None]]]:
    """By prompt key, the file's completions with their rewards (None: not known)."""
    recipe = experiment.recipe
    path = imported_path(recipe)
    return _read(path, _written(path), recipe.system_prompt, recipe.data_format == "chat")


@functools.lru_cache(maxsize=2)
def _read(
    path: Path, written: tuple[int, int], system_prompt: str | None, chat: bool
) -> dict[str, list[tuple[Given, float | None]]]:
    file = read_completions(str(path))

    def content(given: str | Messages) -> str | Messages:
        if chat and isinstance(given, str):
            given = [{"role": "user", "content": given}]
        return with_system(given, system_prompt) if system_prompt else given

    # a row a sample: equal prompts are one; a list a row: rows of equal content are rows of their own, as in the data
    contents = [(content(row.prompt.content), row.prompt.columns) for row in file.rows]
    keys = [prompt.key for prompt in numbered(contents)]
    if file.single:
        keys = [numbered([one])[0].key for one in contents]
    found: dict[str, list[tuple[Given, float | None]]] = {}
    for key, row in zip(keys, file.rows, strict=True):
        assert row.texts is not None
        for place, text in enumerate(row.texts):
            logps = None if row.logps_M is None else row.logps_M[place]
            reward = None if row.rewards_M is None else float(row.rewards_M[place])
            found.setdefault(key, []).append((Given(text, logps), reward))
    return found
