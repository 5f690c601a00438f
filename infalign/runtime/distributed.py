"""Ranks: who am I, whose turn is it, and what happens to the others when one of them fails.

Reads the launcher's environment, so it costs no torch import by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import psutil

from infalign.types import InputError, RewardError, TrainingError

Item = TypeVar("Item")

_OURS = {kind.__name__: kind for kind in (InputError, RewardError, TrainingError)}


_SAID = "infalign-said-"
_KNOWN = "_infalign_known_to_all_ranks"


class PeerError(RuntimeError):
    """Another process failed and says why; this one stops without a word of its own."""


def rank() -> int:
    """This process' rank under `accelerate launch` or `torchrun`, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_process(code: int) -> NoReturn:
    """End with an exit code; one of several processes ends at once, without the interpreter's own end.

    What was registered with `atexit` has run, the process group is left and the output flushed. Otherwise a rank that
    is done aborts once in a long while, and the launcher takes it for one that failed: a thread of gloo may drop the
    last reference to a tensor when the interpreter has begun to end, and Python 3.11 ends that thread inside a
    destructor ("terminate called without an active exception"; recipes/LOG.md, 2026-11-26).
    """
    if world_size() > 1:
        if _connected():
            sys.modules["torch"].distributed.destroy_process_group()
        atexit._run_exitfuncs()  # what `sys.exit` would do first
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def first_to_say(text: str) -> bool:
    """Whether no process of this launch has said `text` on this machine yet; without a launcher there is no other.

    A mistake in a recipe is found by every rank before they are connected. Which comes first does not matter, but a
    mistake that only one of them finds must be told, so that rank 0 alone would not do. An empty file, named after the
    launcher and the text, settles it; such files go after an hour.
    """
    if world_size() == 1:
        return True
    launcher = psutil.Process(os.getppid())
    name = hashlib.sha256(f"{launcher.pid} {launcher.create_time()} {text}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir())
    for old in folder.glob(f"{_SAID}*"):
        with contextlib.suppress(OSError):  # another user's, or gone already
            if old.stat().st_mtime < time.time() - 3600:
                old.unlink()
    try:
        (folder / f"{_SAID}{name}").open("x").close()
    except FileExistsError:
        return False
    except OSError:  # better twice than not at all
        return True
    return True


def my_share(items: Sequence[Item]) -> list[Item]:
    """This rank's part of a list that every rank knows: every `world_size()`-th item.

    >>> my_share([1, 2, 3])
    [1, 2, 3]
    """
    return list(items[rank() :: world_size()])


def even_share(items: Sequence[Item]) -> list[Item | None]:
    """`my_share`, filled up with None: work whose every item is a collective must be equally long on all ranks.

    >>> even_share([1, 2, 3])
    [1, 2, 3]
    """
    most = -(-len(items) // world_size())
    mine: list[Item | None] = list(my_share(items))
    return mine + [None] * (most - len(mine))


def barrier() -> None:
    """Wait for the other ranks (nothing to wait for without a launcher).

    Raises:
        PeerError: one of them is gone.
    """
    if not _connected():
        return
    try:
        sys.modules["torch"].distributed.barrier()
    except RuntimeError as error:  # the connection is closed: the launcher is about to stop this process, too
        raise PeerError("another process has stopped") from error


class _Tagged(NamedTuple):
    """What a rank puts into an exchange: what it takes part in, and its value."""

    what: str
    value: Any


class _Failure(NamedTuple):
    """The value of a rank whose `together` has failed."""

    kind: str
    message: str


def gathered(value: Any, what: str = "an exchange of values") -> list[Any]:
    """A picklable value of every rank, in rank order; `[value]` without a launcher. `what` names the exchange.

    Raises:
        PeerError: one of them is gone, or has failed in a `together` block (rank 0 raises its failure by name).
        TrainingError: they do not all take part in `what` (the others get a `PeerError`).
    """
    parts = _exchanged(what, value)
    failed = _first_failed(parts)
    if failed is not None:
        _raise_failure(failed, parts[failed].value)
    _check_in_step(parts)
    return [part.value for part in parts]


def _exchanged(what: str, value: Any) -> list[_Tagged]:
    """What every rank takes part in now, with its value."""
    mine = _Tagged(what, value)
    if not _connected():
        return [mine]
    parts: list[Any] = [None] * world_size()
    try:
        sys.modules["torch"].distributed.all_gather_object(parts, mine)
    except RuntimeError as error:
        raise PeerError("another process has stopped") from error
    return [part if isinstance(part, _Tagged) else _Tagged("a collective of other code", part) for part in parts]


def _first_failed(parts: Sequence[_Tagged]) -> int | None:
    return next((number for number, part in enumerate(parts) if isinstance(part.value, _Failure)), None)


def _raise_failure(failed: int, failure: _Failure, mine: Exception | None = None) -> NoReturn:
    """The failure of a rank: by name on rank 0; on the others, which say nothing, after `mine`."""
    message = f"rank {failed}: {failure.message}"
    if is_main() and failure.kind in _OURS:
        raise _known(_OURS[failure.kind](message))
    raise PeerError(message) from mine


def _check_in_step(parts: Sequence[_Tagged]) -> None:
    """Raise when ranks take part in different exchanges: the values of one mean nothing to the other."""
    places = [part.what for part in parts]
    other = next((number for number, place in enumerate(places) if place != places[0]), None)
    if other is not None:
        fail(
            TrainingError(
                f"the processes have lost step: rank 0 is at {places[0]} and rank {other} at {places[other]}: see that "
                "a reward or plug-in does the same collectives on every rank, or report it with --debug"
            )
        )


def any_rank(flag: bool) -> bool:
    """True when the flag is set on any rank."""
    return any(gathered(flag, "a question to all ranks"))


def fail(error: Exception) -> NoReturn:
    """Raise what every rank has found out alike: rank 0 says it, the others leave without a word."""
    raise _known(error) if is_main() else PeerError(str(error))


@contextlib.contextmanager
def together(what: str = "a block that all ranks pass") -> Iterator[None]:
    """A block that all ranks pass at the same time: when it fails on one, it fails on all, and none waits for ever.

    `what` names it for the message to ranks that have lost step.

    Rank 0 raises the failure by name (with the rank it happened on), every other rank a `PeerError`; a failure that
    is none of infalign's own errors is raised where it happened, with its traceback.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others must hear of it, unless they have
        if isinstance(error, PeerError) or getattr(error, _KNOWN, False):
            raise
        mine = error
    parts = _exchanged(what, None if mine is None else _Failure(type(mine).__name__, str(mine)))
    failed = _first_failed(parts)
    if failed is None:
        _check_in_step(parts)
        return
    failure: _Failure = parts[failed].value
    if mine is not None and (failed == rank() == 0 or failure.kind not in _OURS or len(parts) == 1):
        raise _known(mine)
    _raise_failure(failed, failure, mine)


def _known(error: Exception) -> Exception:
    """Mark an error that every rank knows of: an outer `together` passes it on without asking around again."""
    setattr(error, _KNOWN, True)
    return error


def _connected() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
