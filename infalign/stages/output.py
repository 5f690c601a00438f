"""The stages' folders: reuse what is fresh, refuse what is stale with the reason, replace it on request."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from infalign.calibration.table import SampleTable
from infalign.rewards.loader import Reward
from infalign.runtime.artifacts import differences, fingerprint, read_json, read_manifest
from infalign.runtime.console import say
from infalign.runtime.distributed import PeerError, barrier, is_main
from infalign.types import InputError, RewardError

Verb = ParamSpec("Verb")
Made = TypeVar("Made")

SAMPLES = "[0-9]*.parquet"  # of a table, scores too
STARTED = "started.json"  # what a training was started with, until its manifest says that it is finished


@contextlib.contextmanager
def nothing_left_behind(folder: Path, kept: str) -> Iterator[None]:
    """A mistake of the user's leaves no folder that would stand in the way of the next try.

    A folder that was not there before, or was empty, goes again with the parents made for it, unless it holds work:
    files that match `kept`.
    """
    fresh = not folder.is_dir() or not any(folder.iterdir())
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except (InputError, RewardError, PeerError):
        if fresh and is_main() and folder.is_dir() and next(folder.rglob(kept), None) is None:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            for path in missing:
                with contextlib.suppress(OSError):  # somebody else's by now
                    path.rmdir()
        raise


def leaves_nothing(kept: str, below: str = ".") -> Callable[[Callable[Verb, Made]], Callable[Verb, Made]]:
    """`nothing_left_behind` for a stage: a function of a recipe, and of its folder `below` `output_dir`."""

    def decorate(stage: Callable[Verb, Made]) -> Callable[Verb, Made]:
        @functools.wraps(stage)
        def careful(*args: Verb.args, **kwargs: Verb.kwargs) -> Made:
            recipe: Any = args[0] if args else kwargs["recipe"]
            if not recipe.output_dir:
                return stage(*args, **kwargs)
            with nothing_left_behind(recipe.output / below, kept):
                return stage(*args, **kwargs)

        return careful

    return decorate


def clear_if_stale(folder: Path, parts: Mapping[str, Any], overwrite: bool) -> None:
    """With `overwrite`, remove a table that was sampled with other settings (opening it would refuse)."""
    plan = folder / "plan.json"
    if overwrite and plan.exists() and differences(read_json(plan, "the sampling plan")["parts"], parts):
        _remove(folder)


def forget_scores(table: SampleTable, rewards: Iterable[Reward], overwrite: bool) -> None:
    """With `overwrite`, remove what these rewards gave to a table's samples, so that all are scored anew.

    Needed where a reward changed in a way that its fingerprint can't see: a file that it reads, a server's model.
    """
    if overwrite:
        barrier()
        for reward in rewards if is_main() else ():
            shutil.rmtree(table.scores_folder(reward.fingerprint), ignore_errors=True)
        barrier()


def reusable(folder: Path, kind: str, parts: Mapping[str, Any], overwrite: bool) -> bool:
    """True when `folder` holds a whole artifact made from these parts.

    A stale one is removed with `overwrite`.

    Raises:
        InputError: it is stale; what differs is named.
    """
    manifest = read_manifest(folder, kind)
    if manifest is None:
        return False
    if manifest["fingerprint"] == fingerprint(dict(parts)):
        return True
    if not overwrite:
        found = "; ".join(differences(manifest["parts"], parts))
        raise InputError(
            f"{folder} was made with other settings ({found}): give another --output_dir, "
            "or --overwrite to make it anew"
        )
    _remove(folder)
    return False


def refuse_stale_start(folder: Path, parts: Mapping[str, Any], overwrite: bool) -> None:
    """Checkpoints of a training that started with other settings are not continued; with `overwrite` they go.

    Raises:
        InputError: naming what differs.
    """
    started = folder / STARTED
    found = differences(read_json(started, "the record")["parts"], parts) if started.exists() else []
    if found and not overwrite:
        raise InputError(
            f"{folder} holds an unfinished training with other settings ({'; '.join(found)}): give another "
            "--output_dir, or --overwrite to start anew"
        )
    if found:
        _remove(folder)


def _remove(folder: Path) -> None:
    barrier()  # every rank has seen that it is stale
    if is_main():
        say(f"removing stale {folder}")
        shutil.rmtree(folder)
    barrier()
