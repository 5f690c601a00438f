"""Score samples on their prompts, in the shape that TRL hands completions to a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.rewards.contract import shape_completions
from infalign.rewards.fingerprint import digest
from infalign.types import Prompt, Sample


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


def columns_digest(reward: Any, prompt: Prompt) -> str:
    """16 hex digits over the columns of a prompt that the reward may read, "" where there are none.

    A reward that names its arguments reads those; one that takes `**kwargs` may read all, unless it says otherwise
    (`reads_columns`, a list of names).
    """
    names = reward.reads_columns
    read = {name: value for name, value in prompt.columns.items() if value is not None}
    read = {name: value for name, value in read.items() if names is None or name in names}
    return digest(read) if read else ""
