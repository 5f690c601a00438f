"""Calling foreign functions: on copies of what we keep, with a time limit, sync ones in a daemon thread, coroutines on
one event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any

_FIXED = {str, int, float, bool, bytes, complex, type(None)}


def own_copy(value: Any) -> Any:
    """A value that a foreign function may change without changing ours.

    Lists, tuples and dictionaries are copied at every depth, and every place gets its own copy: a prompt that stands in
    a list K times, the same object, comes back as K prompts. Anything else with a `copy()` or `clone()` (sets, arrays,
    images, tensors) is copied by it; the rest (numbers, texts, dates, functions, models) is handed on as it is.

    >>> shared = [{"role": "user", "content": "Hi"}]
    >>> copies = own_copy([shared, shared])
    >>> copies[0].append("x"), copies[1], shared
    (None, [{'role': 'user', 'content': 'Hi'}], [{'role': 'user', 'content': 'Hi'}])
    """
    if type(value) in _FIXED:
        return value
    if isinstance(value, list):
        return [one if type(one) in _FIXED else own_copy(one) for one in value]
    if type(value) is tuple:
        return tuple(map(own_copy, value))
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps what a subclass is and knows, e.g. a defaultdict's default
        copied.update((name, own_copy(one)) for name, one in value.items())
        return copied
    method = None if isinstance(value, type) else getattr(value, "copy", None) or getattr(value, "clone", None)
    return method() if callable(method) else value


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling `function` (or an object with an async `__call__`) gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def in_thread(call: Callable[[], Any], timeout: float | None) -> Any:
    """`call()`, in this thread when there is no time limit, else in a daemon thread that is left behind when late.

    A thread cannot be stopped: a late one goes on until it ends by itself, but never holds up the exit.

    Raises:
        TimeoutError: not done after `timeout` seconds.
        BaseException: whatever `call` raised.
    """
    if timeout is None:
        return call()
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="infalign-reward", daemon=True).start()
    return _result(outcome, timeout)


class CoroutineRunner:
    """Runs coroutines on one event loop in a daemon thread: also under a running loop, as in a notebook.

    One loop for all calls, so that a client which a reward keeps open stays usable. A coroutine that blocks its loop
    past the limit is left behind together with it, and a new loop is begun.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, awaitable: Awaitable[Any], timeout: float | None) -> Any:
        """The awaited result.

        Raises:
            TimeoutError: not done after `timeout` seconds; the coroutine is cancelled.
            BaseException: whatever the coroutine raised.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="infalign-reward-loop", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(_awaited(awaitable, timeout), self._loop)
        try:
            return _result(future, timeout, grace=_GRACE)
        except TimeoutError:
            if not future.done():
                self._loop = None
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Without the loop, which cannot travel to another process."""
        return {"_loop": None}


_GRACE = 0.5
"""Seconds that a loop gets, beyond the time-out, to cancel a late coroutine by itself."""


async def _awaited(awaitable: Awaitable[Any], timeout: float | None) -> Any:
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await awaitable
    except TimeoutError as error:
        if limit.expired():
            raise TimeoutError(f"no answer after {timeout:g} s") from error
        raise


def _result(future: concurrent.futures.Future[Any], timeout: float | None, grace: float = 0.0) -> Any:
    try:
        return future.result(None if timeout is None else timeout + grace)
    except TimeoutError as error:
        if future.done():
            raise  # the call's own
        raise TimeoutError(f"no answer after {timeout:g} s") from error
