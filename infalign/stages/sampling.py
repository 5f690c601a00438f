"""Fill a table: draw what is missing, score what is unscored, batch by batch; a kill loses one batch at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.table import SampleTable, Segment, Wanted, read_samples, write_samples, write_scores
from infalign.generation.plan import Request, Sampler, plan_batches
from infalign.rewards.loader import Reward
from infalign.rewards.scoring import columns_digest, score_samples
from infalign.runtime.console import Progress
from infalign.runtime.distributed import barrier, is_main, my_share
from infalign.types import Prompt, Sample

Batch = tuple[Segment, int, list[Request]]
Look = Callable[[Reward, Sequence[Prompt], Sequence[Sample], NDArray[np.float64]], None]
"""Sees a reward's first batch: the prompt of each sample, the samples, their rewards."""


def fill(
    table: SampleTable,
    wanted: Sequence[Wanted],
    rewards: Sequence[Reward],
    make_sampler: Callable[[], Sampler],
    *,
    max_tokens: int,
    tokens_per_batch: int,
    title: str,
    asks: Callable[[Reward, Prompt], bool] = lambda reward, prompt: True,
    look: Look | None = None,
) -> int:
    """Bring a table to at least the wanted samples, scored by every reward.

    Args:
        table: an open table.
        wanted: how many samples of which prompts.
        rewards: each scores every sample on disk that it has not scored.
        make_sampler: called once, and only when something must be drawn.
        max_tokens: the sampler's length limit.
        tokens_per_batch: KV-cache tokens of a batch; recorded, so that a rerun cuts the same batches.
        title: for the progress bar.
        asks: whether a reward scores answers to a prompt.
        look: is shown the first batch that this process scores, once for each reward.

    Returns:
        How many samples this process drew: 0 when everything was there.
    """
    if is_main():
        table.sweep()
        table.request(wanted, tokens_per_batch)
    barrier()
    table.segments = SampleTable.open(table.folder, table.parts).segments  # as rank 0 has just planned them
    batches = my_share(_batches(table, max_tokens))
    by_key = {entry.prompt.key: entry.prompt for entry in wanted}
    asked = [(reward, {key: prompt for key, prompt in by_key.items() if asks(reward, prompt)}) for reward in rewards]
    missing = [batch for batch in batches if not table.shard(*batch[:2]).exists()]
    looked_at: set[int] = set()

    def once(reward: Reward, *seen: Any) -> None:
        if look is not None and id(reward) not in looked_at:
            looked_at.add(id(reward))
            look(reward, *seen)

    if missing:
        _draw(table, missing, make_sampler(), asked, title, once)
    barrier()
    for reward, prompts in asked:
        _score(table, batches, reward, prompts, title, once)
    barrier()
    return sum(len(requests) for _, _, requests in missing)


def _draw(
    table: SampleTable,
    missing: Sequence[Batch],
    sampler: Sampler,
    asked: Sequence[tuple[Reward, Mapping[str, Prompt]]],
    title: str,
    look: Look | None,
) -> None:
    with Progress(f"{title}: sampling", sum(len(requests) for _, _, requests in missing), "samples") as progress:
        for segment, number, requests in missing:
            samples = sampler.sample(requests)
            write_samples(table.shard(segment, number), samples)
            if progress.done == 0:  # a reward that can't score is found now, not after an hour of sampling
                for reward, prompts in asked:
                    _score(table, [(segment, number, requests)], reward, prompts, look=look)
            progress.advance(len(requests))


def _score(
    table: SampleTable,
    batches: Sequence[Batch],
    reward: Reward,
    by_key: Mapping[str, Prompt],
    title: str = "",
    look: Look | None = None,
) -> None:
    """Score the wanted samples that a reward has not scored on these columns; those of other prompts are left alone."""
    columns = {key: columns_digest(reward, prompt) for key, prompt in by_key.items()}
    scored = table.scored(reward.fingerprint, columns)
    todo = [
        (segment, number, names)
        for segment, number, requests in batches
        if (names := {(key, r.index) for r in requests if (key := table.key_of(r.key)) in by_key} - scored)
    ]
    with Progress(title and f"{title}: scoring with {reward.name}", len(todo), "batches") as progress:
        for segment, number, names in todo:
            drawn = read_samples(table.shard(segment, number))
            samples = [sample for sample in drawn if (table.key_of(sample.key), sample.index) in names]
            prompts = [by_key[table.key_of(sample.key)] for sample in samples]
            values = score_samples(reward, prompts, samples)
            shard = table.new_score_shard(segment, number, reward.fingerprint)
            write_scores(shard, samples, values, [columns[prompt.key] for prompt in prompts])
            if look is not None and progress.done == 0:
                look(reward, prompts, samples, values)
            progress.advance()


def table_rewards(table: SampleTable, reward: Reward, prompts: Sequence[Prompt]) -> dict[str, NDArray[np.float64]]:
    """A reward's scores of the prompts' samples, on the columns that they have now, by prompt key in sample order."""
    return table.rewards(reward.fingerprint, {prompt.key: columns_digest(reward, prompt) for prompt in prompts})


def _batches(table: SampleTable, max_tokens: int) -> list[Batch]:
    """Every batch of the table's plan: the same list in every run and on every rank."""
    ids = table.stored_prompt_ids()
    found: list[Batch] = []
    for segment in table.segments:
        requests = [Request(key, index, ids[key]) for key, first, end in segment.rows for index in range(first, end)]
        planned = plan_batches(requests, max_tokens, segment.tokens_per_batch)
        found += [(segment, number, batch) for number, batch in enumerate(planned)]
    return found
