"""Score samples on their prompts, in the shape that TRL hands completions to a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.rewards.contract import shape_completions
from infalign.rewards.fingerprint import digest
from infalign.types import Prompt, RewardError, Sample


def score_samples(reward: Any, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> NDArray[np.float64]:
    """(B,) rewards of B samples, each on its prompt; NaN is "no score".

    Args:
        reward: a `Reward`.
        prompts: the prompt of each sample; their data columns are handed on as lists, None where a prompt has none.
        samples: the completions.
    """
    contents = [prompt.content for prompt in prompts]
    names = sorted({name for prompt in prompts for name in prompt.columns})
    columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return reward(
        prompts=contents,
        completions=shape_completions(contents, [sample.text for sample in samples]),
        completion_ids=[list(sample.token_ids) for sample in samples],
        **columns,
    )


ASKED_AGAIN = 16
"""Samples that a reward is asked about a second time."""
NOISE = 0.05
"""Of the rewards' spread: what rounding in another batch (bf16) may come to, and no quantile notices."""


def noise_line(
    reward: Any, prompts: Sequence[Prompt], samples: Sequence[Sample], rewards_B: NDArray[np.float64]
) -> str | None:
    """What to say of a reward that scores the first of these samples otherwise when asked again; None if it doesn't.

    Args:
        reward: a `Reward`.
        prompts: the prompt of each sample.
        samples: B samples, all of them scored in one call.
        rewards_B: what it gave them.
    """
    count = min(len(samples), ASKED_AGAIN)
    try:
        again = score_samples(reward, prompts[:count], samples[:count])
    except RewardError as error:
        return (
            f"reward {reward.name!r} scored {len(samples)} samples and failed when asked again about {count}: {error}"
        )
    before = rewards_B[:count]
    with np.errstate(over="ignore", invalid="ignore"):  # rewards may be as large as numbers get
        spread = _spread(rewards_B[~np.isnan(rewards_B)])
        apart = np.abs(again - before)
    silent = np.isnan(before) != np.isnan(again)
    other = silent | (apart > NOISE * spread)  # NaN compares as False
    if not other.any():
        return None
    by = f", by up to {np.nanmax(apart):.3g} where rewards spread by {spread:.3g} (standard deviation)"
    return (
        f"reward {reward.name!r} is not deterministic, or scores depend on what else is in the call: asked again, it "
        f"scores {other.sum()} of {count} samples otherwise{by if np.isfinite(apart).any() else ''}; every score is "
        "kept as it was first given, and noise limits what Best-of-N and training can gain: give a judge temperature 0 "
        "or the mean of several answers, a model its evaluation mode"
    )


def _spread(rewards: NDArray[np.float64]) -> float:
    """A standard deviation that single outliers do not make: a normal's with the same quartiles, where these differ."""
    if not len(rewards):
        return 0.0
    low, high = np.quantile(rewards, (0.25, 0.75))
    whole = float(rewards.std())
    return min(whole, float(high - low) / 1.349) if high > low else whole


def columns_digest(reward: Any, prompt: Prompt) -> str:
    """16 hex digits over the columns of a prompt that the reward may read, "" where there are none.

    A reward that names its arguments reads those; one that takes `**kwargs` may read all, unless it says otherwise
    (`reads_columns`, a list of names).
    """
    names = reward.reads_columns
    read = {name: value for name, value in prompt.columns.items() if value is not None}
    read = {name: value for name, value in read.items() if names is None or name in names}
    return digest(read) if read else ""
