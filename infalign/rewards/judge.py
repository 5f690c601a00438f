"""Pairwise judges: the contract, loading one, and asking it in both orders.

A judge is a callable `judge(prompts, firsts, seconds) -> list[float | None]`, sync or async, called with these three in
order. Lists have one entry per pair (B), prompts and completions in the forms of `rewards.contract`. For each prompt it
says the probability in [0, 1] that the completion shown FIRST is the better one, in this one order (0, 1/2 and 1 where
it knows no more); None is "no verdict". It need not be fair to both orders: `both_orders` asks it twice and tells how
far they agree. NaN, and numbers outside [0, 1], are errors. An exception is tried again, as for rewards.

`path/to/file.py:name` and `package.module:name` are found and built as rewards are (`rewards.loader`): a class is built
with the keyword arguments; a callable that names `prompts`, `firsts` or `seconds` is the judge; anything else is a
builder. `infalign.rewards.llm_judge:LLMJudge` asks a language model on a server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.rewards.contract import Text, as_rewards
from infalign.rewards.guard import GuardedReward
from infalign.rewards.loader import built_callable
from infalign.runtime.plugins import find_object
from infalign.types import InputError, RewardError

_LISTS = {"prompts", "firsts", "seconds"}


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of B pairs in both orders; NaN for no verdict.

    Attributes:
        shown_first_B: (B,) probability that the first of a pair is better, when it was shown first.
        shown_second_B: (B,) the same, when it was shown second.
    """

    shown_first_B: NDArray[np.float64]
    shown_second_B: NDArray[np.float64]

    @property
    def wins_B(self) -> NDArray[np.float64]:
        """(B,) the mean of both orders; NaN unless both have a verdict."""
        return (self.shown_first_B + self.shown_second_B) / 2.0

    @property
    def disagreed_B(self) -> NDArray[np.bool_]:
        """(B,) whether the two orders name different winners; a tie, or no verdict, names none."""
        return (self.shown_first_B - 0.5) * (self.shown_second_B - 0.5) < 0.0


class Judge:
    """A loaded judge: call it for float64 (B,), NaN for no verdict.

    Args:
        function: in the form of this module.
        name: for messages.
        retries: further attempts after an exception.
        timeout: seconds per attempt, or None.
        backoff: seconds before the first retry, see `GuardedReward`.

    Attributes:
        function: as given.
        counts: `calls` (batches), `scored` and `missing` (verdicts), `retries`, `timeouts` (attempts).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        retries: int = 2,
        timeout: float | None = None,
        backoff: float = 1.0,
    ) -> None:
        def in_order(prompts: Any, completions: Any, seconds: Any) -> Any:
            return function(prompts, completions, seconds)

        self.function, self.name = function, name
        if getattr(function, "tries_again", False):
            retries, timeout = 0, None
        self._guard = GuardedReward(
            in_order,
            name=name,
            retries=retries,
            timeout=timeout,
            backoff=backoff,
            kind="judge",
            read=lambda output, count: as_verdicts(output, count, name),
        )

    def __call__(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> NDArray[np.float64]:
        """Probabilities (B,) that the completion shown first is the better one.

        Raises:
            RewardError: the judge failed, or answered what is no verdict.
        """
        return self._guard(prompts, firsts, seconds=seconds)

    @property
    def counts(self) -> dict[str, int]:
        """The guard's counters, live."""
        return self._guard.counts


def load_judge(
    spec: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    base_dir: str | Path = ".",
    retries: int = 2,
    timeout: float | None = None,
    backoff: float = 1.0,
) -> Judge:
    """The judge that `spec` names, guarded.

    Args:
        spec: `path/to/file.py:name`, `package.module:name`, `package.module.name`, or a callable.
        kwargs: keyword arguments of the judge, or of its class or builder.
        base_dir: folder of the recipe, for relative paths.
        retries, timeout, backoff: see `Judge`.

    Raises:
        InputError: nothing of that name, an import or builder that fails, or an object that is no judge.

    >>> longer = load_judge(lambda prompts, firsts, seconds: [float(len(a) > len(b)) for a, b in zip(firsts, seconds)])
    >>> both_orders(longer, ["p"], ["long"], ["s"]).wins_B
    array([1.])
    """
    value, name = spec, str(getattr(spec, "__name__", "") or type(spec).__name__)
    if isinstance(spec, str):
        found = find_object(spec.strip(), Path(base_dir), what="judge")
        if found is None:
            raise InputError(f"judge {spec!r}: give path/to/file.py:name or package.module:name")
        value, name = found.value, found.name
    subject = f"judge {name!r}"
    built = built_callable(value, dict(kwargs or {}), subject, _LISTS, {"recipe_dir": Path(base_dir)})
    if not callable(built):
        raise InputError(f"{subject}: the builder returned {built!r:.60} ({type(built).__name__}), no callable")
    return Judge(built, name, retries=retries, timeout=timeout, backoff=backoff)


def both_orders(
    judge: Callable[..., Any], prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]
) -> Verdicts:
    """Ask a judge about every pair twice, each completion shown first once.

    Args:
        judge: of `load_judge`, or any callable of the form above.
        prompts: B prompts.
        firsts, seconds: B completions each.

    Raises:
        RewardError: the judge failed, or answered what is no verdict.
    """
    loaded = judge if isinstance(judge, Judge) else load_judge(judge)
    first_B = loaded(prompts, firsts, seconds)
    return Verdicts(first_B, 1.0 - loaded(prompts, seconds, firsts))


def as_verdicts(output: Any, count: int, name: str) -> NDArray[np.float64]:
    """What a judge returned, as float64 of shape (B,), NaN for no verdict.

    Raises:
        RewardError: a wrong count, an entry that is no number, NaN (None is no verdict), or one outside [0, 1].
    """
    verdicts = as_rewards(output, count, name, kind="judge")
    for index, (raw, value) in enumerate(zip(output, verdicts, strict=True)):
        if raw is not None and not 0.0 <= value <= 1.0:
            raise RewardError(
                f"judge {name!r} returned {value} at index {index}: give the probability in [0, 1] that the completion "
                "shown first is the better one, or None for no verdict"
            )
    return verdicts
