"""The guard around any reward: time-outs, bounded retries, and what happens to a batch that still fails.

An exception or a time-out may pass, so it is tried again (`runtime.retry`). A wrong count or type will not, so it
raises at once. A failure is never a number.

Every attempt works on its own copies: whatever a function does to prompts, completions, token ids or columns changes
neither what is scored next, nor what is kept, nor what another function sees.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infalign.rewards.contract import TRAINERS, Text, as_rewards
from infalign.rewards.contract import strip_reasoning as strip
from infalign.runtime.calls import CoroutineRunner, in_thread, is_async, own_copy
from infalign.runtime.plugins import one_line
from infalign.runtime.retry import RetryPolicy, announce, times
from infalign.types import InputError, RewardError

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

logger = logging.getLogger(__name__)

OnError = Literal["error", "mask"]
ON_ERROR = ("error", "mask")


class GuardedReward:
    """A reward function that times out, retries, checks what comes back, and keeps count.

    Args:
        function: sync or async, see `infalign.rewards.contract`. A function without `**kwargs` gets only the arguments
            it names.
        name: for messages and for TRL's logs.
        on_error: after the last attempt, `error` raises RewardError and `mask` gives the batch no score. An infinite
            value is an error, or no score for its completion, likewise.
        retries: further attempts after the first.
        timeout: seconds per attempt, or None. A sync function that hangs is left behind in a daemon thread.
        backoff: seconds before the first retry, doubled each time, times a random factor in [0.5, 1.5].
        strip_reasoning: (opening tag, closing tag) of reasoning that the function must not see, or None.
        kind: what it is, the first word of every message.
        read: makes values (B,) of what the function returned, from (output, B); `as_rewards` for None.

    Attributes:
        counts: `calls` (batches), `scored` and `missing` (completions), `infinite` (completions masked for it),
            `failures` (batches masked), `timeouts` and `retries` (attempts).

    >>> GuardedReward(lambda completions: [len(c) for c in completions], name="length")(["a"], ["four"])
    array([4.])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        on_error: OnError = "error",
        retries: int = 2,
        timeout: float | None = None,
        backoff: float = 1.0,
        strip_reasoning: tuple[str, str] | None = None,
        kind: str = "reward",
        read: Callable[[Any, int], NDArray[np.float64]] | None = None,
    ) -> None:
        _check_options(f"{kind} {name!r}", on_error, retries, timeout, backoff, strip_reasoning)
        self.kind, self.read = kind, read
        self.function = function
        self.name = self.__name__ = name
        self.on_error = on_error
        self.retries = retries
        self.timeout = timeout
        self._retry = RetryPolicy(retries, backoff)
        self.strip_reasoning = None if strip_reasoning is None else tuple(strip_reasoning)
        self.counts: dict[str, int] = dict.fromkeys(
            ("calls", "scored", "missing", "infinite", "failures", "timeouts", "retries"), 0
        )
        self._signature = _signature(function)
        self._coroutines = CoroutineRunner()

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> NDArray[np.float64]:
        """Scores of B completions, float64 (B,), NaN for no score.

        Raises:
            RewardError: the function's contract is broken (always), or all attempts failed (`on_error="error"`).
        """
        self.counts["calls"] += 1
        if not len(completions):
            return np.empty(0)
        if self.strip_reasoning is not None:
            completions = [strip(completion, *self.strip_reasoning) for completion in completions]
        arguments = self._arguments(
            {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}, columns
        )
        try:
            rewards = self._checked(self._attempts(arguments), len(completions))
        except _AllFailed as failure:
            rewards = self._failed(failure, len(completions), of_texts=isinstance(completions[0], str))
        missing = int(np.isnan(rewards).sum())
        self.counts["missing"] += missing
        self.counts["scored"] += len(rewards) - missing
        return rewards

    @property
    def reads_columns(self) -> frozenset[str] | None:
        """The columns that the function may read: those it says, those it names, or (with `**kwargs`) None for any."""
        said = getattr(self.function, "reads_columns", None)
        if said is not None:
            return frozenset(said)
        named = [] if self._signature is None else list(self._signature.parameters.values())
        if self._signature is None or any(one.kind is one.VAR_KEYWORD for one in named):
            return None
        return frozenset(one.name for one in named)

    @property
    def required_columns(self) -> frozenset[str]:
        """The columns without which the function can't be called."""
        named = [] if self._signature is None else list(self._signature.parameters.values())
        needed = {one.name for one in named if one.default is one.empty and one.kind in _NAMED}
        return frozenset(needed - {"prompts", "completions", "completion_ids", *TRAINERS})

    def _arguments(self, lists: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
        outside_trainer = dict(zip(TRAINERS, (None, _ignore, _ignore), strict=True))
        arguments = {**outside_trainer, **columns, **lists}
        if self._signature is None:
            return arguments
        named = self._signature.parameters.values()
        lacking = [
            p.name for p in named
            if p.default is p.empty and p.kind in _NAMED and p.name not in arguments
        ]  # fmt: skip
        if lacking:
            raise RewardError(
                f"{self.kind} {self.name!r} needs the column {lacking[0]!r}, which the data does not have; "
                f"its columns are {', '.join(columns) or 'none'}"
            )
        if any(p.kind is p.VAR_KEYWORD for p in named):
            return arguments
        return {p.name: arguments[p.name] for p in named if p.name in arguments}

    def _attempts(self, arguments: dict[str, Any]) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._call(arguments)
            except (RewardError, InputError):
                raise
            except (Exception, SystemExit) as error:  # foreign code may raise anything
                self.counts["timeouts"] += isinstance(error, TimeoutError)
                pause = self._retry.pause(attempt, error)
                if pause is None:
                    raise _AllFailed(attempt) from error
                announce(f"{self.kind} {self.name!r}", one_line(error), attempt, self.retries, pause)
            self.counts["retries"] += 1
            time.sleep(pause)

    def _call(self, given: dict[str, Any]) -> Any:
        # TRL's own three are its objects, not data, and a function may well want to speak to them
        arguments = {name: one if name in TRAINERS else own_copy(one) for name, one in given.items()}
        if is_async(self.function):
            return self._coroutines.run(self.function(**arguments), self.timeout)
        output = in_thread(lambda: self.function(**arguments), self.timeout)
        return self._coroutines.run(output, self.timeout) if inspect.isawaitable(output) else output

    def _checked(self, output: Any, count: int) -> NDArray[np.float64]:
        if self.read is not None:
            return self.read(output, count)
        rewards = as_rewards(output, count, self.name, infinite="error" if self.on_error == "error" else "keep")
        infinite = np.isinf(rewards)
        self.counts["infinite"] += int(infinite.sum())
        rewards[infinite] = np.nan
        return rewards

    def _failed(self, failure: _AllFailed, count: int, *, of_texts: bool) -> NDArray[np.float64]:
        cause = failure.__cause__
        assert cause is not None  # the last attempt's
        message = f"{self.kind} {self.name!r} failed {times(failure.attempts)} ({one_line(cause)})"
        if _is_alarm_in_thread(cause):
            raise RewardError(f"{message}: {self._without_alarm()}") from cause
        if of_texts and isinstance(cause, TypeError) and "string indices must be integers" in str(cause):
            message += (
                ": does it read chats, as TRL's rewards do? The completions of text prompts are texts; data_format: "
                "chat makes each prompt the user's turn of a chat"
            )
        if self.on_error == "error":
            way_out = ", or set on_error (in a recipe reward_on_error) to mask" if self.kind == "reward" else ""
            raise RewardError(f"{message}; fix it{way_out}") from cause
        self.counts["failures"] += 1
        logger.warning("%s; %d completions have no score", message, count)
        return np.full(count, np.nan)

    def _without_alarm(self) -> str:
        """What to do about a function that sets an alarm, which only the main thread may do."""
        why = "it sets an alarm (signal), to stop itself, and was called outside of the main thread"
        if self.timeout is not None and not is_async(self.function):
            return (
                f"{why}, because it has a time limit here too ({self.timeout:g} s): leave timeout (in a recipe "
                "reward_timeout) unset, or switch its own alarm off"
            )
        return f"{why}, as `serve` and coroutines are: switch its own alarm off and set reward_timeout in its place"


def _is_alarm_in_thread(cause: BaseException | None) -> bool:
    """Whether a function failed because `signal.signal` was called outside of the main thread."""
    while cause is not None:
        if isinstance(cause, ValueError) and "signal only works in main thread" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class _AllFailed(Exception):
    """Every attempt failed; the last cause is chained."""

    def __init__(self, attempts: int) -> None:
        super().__init__(attempts)
        self.attempts = attempts


def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """Stands for TRL's `log_extra` and `log_metric` outside a trainer."""


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # builtins without one
        return None


def _check_options(
    subject: str, on_error: str, retries: int, timeout: float | None, backoff: float, tags: tuple[str, str] | None
) -> None:
    problems = []
    if on_error not in ON_ERROR:
        problems.append(f"on_error is one of {', '.join(ON_ERROR)}, got {on_error!r}")
    if not isinstance(retries, int) or retries < 0:
        problems.append(f"retries is a whole number >= 0, got {retries!r}")
    if timeout is not None and not timeout > 0:
        problems.append(f"timeout is seconds > 0 or None, got {timeout!r}")
    if not backoff >= 0:
        problems.append(f"backoff is seconds >= 0, got {backoff!r}")
    if tags is not None and (isinstance(tags, str) or len(tags) != 2 or not all(tags)):
        problems.append(f"strip_reasoning is a pair of tags, got {tags!r}")
    if problems:
        raise InputError(f"{subject}: {'; '.join(problems)}")
