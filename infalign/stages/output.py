"""The stages' folders: reuse what is fresh, refuse what is stale with the reason, replace it on request."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from infalign.calibration.table import SampleTable
from infalign.rewards.loader import Reward
from infalign.runtime.artifacts import differences, fingerprint, read_json, read_manifest
from infalign.runtime.console import say
from infalign.runtime.distributed import barrier, is_main
from infalign.types import InputError

STARTED = "started.json"  # what a training was started with, until its manifest says that it is finished


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
