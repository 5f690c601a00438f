"""A reward without the part that length explains.

`r'(x, y) = r(x, y) - b (L(y) - L0)`, with L the length of the completion. The coefficient b is given, or the
least-squares slope of r on L within prompts over a file of samples, in which every prompt has its own intercept:
`b = sum (L - mean_x L) (r - mean_x r) / sum (L - mean_x L)^2`; then L0 is the mean length in that file, else 0. Within
prompts, so that prompts which ask for long answers and score high by themselves do not count as a taste for length. It
is linear and one for all prompts; the idea, not the estimator, is that of length-controlled AlpacaEval
(arXiv:2404.04475), which regresses a judge's preference.

    reward: infalign.rewards.length_control:LengthControlled
    reward_kwargs: {reward: OWNER/MODEL, reward_kwargs: {}, samples: base_samples.jsonl}   # or coefficient: 0.02
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.data.completions import read_completions
from infalign.data.pairing import prompts_of
from infalign.rewards.contract import Text, completion_text, shape_completions
from infalign.rewards.fingerprint import digest
from infalign.rewards.loader import load_reward
from infalign.rewards.members import Load
from infalign.runtime.imports import file_digest
from infalign.runtime.plugins import find_file
from infalign.types import InputError

UNITS = ("words", "characters", "tokens")
Floats = NDArray[np.float64]


class LengthControlled:
    """A reward function that takes the linear effect of length out of another.

    Args:
        reward: the raw reward, anything `load_reward` takes.
        reward_kwargs: its keyword arguments.
        coefficient: b, in the reward's units per unit of length.
        samples: in its place, a file of rows `{"prompt": ..., "completions": [...]}` with at least two completions of
            other lengths a prompt: base samples of prompts like those of the recipe.
        unit: of length: words, characters, or tokens of the policy (only with a `coefficient`: files hold no tokens).
        load_member: loads the raw reward.
        recipe_dir: folder of the recipe, for `samples`.

    Attributes:
        members: the raw reward, loaded, in a list.
        fingerprint: of the raw reward, the coefficient or the file, and the unit.

    Raises:
        InputError: not exactly one of coefficient and samples, or another unit.
    """

    tries_again = True

    def __init__(
        self,
        reward: Any,
        reward_kwargs: Mapping[str, Any] | None = None,
        *,
        coefficient: float | None = None,
        samples: str | Path | None = None,
        unit: str = "words",
        load_member: Load = load_reward,
        recipe_dir: Path = Path(),
    ) -> None:
        _check(coefficient, samples, unit)
        self.members = [load_member(reward, reward_kwargs)]
        self.__name__ = f"{self.members[0].name}_length_controlled"
        self.unit, self._given = unit, coefficient
        self._samples = None if samples is None else find_file(str(samples), recipe_dir, what="samples")
        source = coefficient if self._samples is None else file_digest(self._samples)
        self.fingerprint = digest("length controlled", self.members[0].fingerprint, source, unit)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> Floats:
        """Scores (B,), NaN where the raw reward has none.

        Raises:
            InputError: nothing can be fitted on the samples.
            RewardError: the raw reward failed.
        """
        slope, centre = self.fit
        raw = self.members[0](prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return raw - slope * (self._lengths(completions, completion_ids) - centre)

    @cached_property
    def fit(self) -> tuple[float, float]:
        """(b, L0), found when first needed: the raw reward scores every sample of the file once."""
        if self._samples is None:
            return float(self._given or 0.0), 0.0
        lengths, rewards = [], []
        for found in prompts_of(read_completions(str(self._samples))):
            contents = [found.prompt.content] * len(found)
            texts = shape_completions(contents, found.texts or ())
            columns = {name: [value] * len(texts) for name, value in found.prompt.columns.items()}
            rewards.append(self.members[0](prompts=contents, completions=texts, completion_ids=None, **columns))
            lengths.append(self._lengths(texts, None))
        return slope_within(lengths, rewards), float(np.concatenate(lengths).mean())

    def _lengths(self, completions: Sequence[Text], completion_ids: Any) -> Floats:
        if self.unit == "tokens":
            return np.array([len(ids) for ids in completion_ids], dtype=np.float64)
        count = (lambda text: len(text.split())) if self.unit == "words" else len
        return np.array([count(completion_text(completion)) for completion in completions], dtype=np.float64)


def slope_within(lengths_PM: Sequence[Floats], rewards_PM: Sequence[Floats]) -> float:
    """The least-squares slope of reward on length, with an intercept for every prompt; NaN rewards are left out.

    Raises:
        InputError: no prompt has scored completions of two lengths.

    >>> slope_within([np.array([1.0, 3.0]), np.array([2.0, 4.0])], [np.array([0.0, 1.0]), np.array([7.0, 8.0])])
    0.5
    """
    above = below = 0.0
    for lengths, rewards in zip(lengths_PM, rewards_PM, strict=True):
        scored = ~np.isnan(rewards)
        if scored.any():
            # an intercept a prompt is the same as centring both within the prompt
            x, y = (values[scored] - values[scored].mean() for values in (lengths, rewards))
            above, below = above + float(x @ y), below + float(x @ x)
    if below == 0.0:
        raise InputError(
            "length control: no prompt of the samples has two scored completions of other lengths: give more samples, "
            "or a coefficient"
        )
    return above / below


def _check(coefficient: Any, samples: Any, unit: str) -> None:
    if (coefficient is None) == (samples is None):
        raise InputError("length control: give exactly one of coefficient and samples")
    number = not isinstance(coefficient, bool) and isinstance(coefficient, (int, float)) and np.isfinite(coefficient)
    if coefficient is not None and not number:
        raise InputError(f"length control: coefficient is a finite number, got {coefficient!r}")
    if unit not in UNITS:
        raise InputError(f"length control: unit is one of {', '.join(UNITS)}, got {unit!r}")
    if unit == "tokens" and samples is not None:
        raise InputError("length control: a file of samples holds no tokens: use words or characters, or a coefficient")
