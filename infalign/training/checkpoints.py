"""Whole checkpoints, or none: a manifest is written last and names every file with its size.

Resume takes the newest checkpoint whose files are all there, says which it passed over and why, and refuses one that
another recipe, model or number of processes made (before anything is loaded), naming the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infalign.runtime.artifacts import MANIFEST, differences, read_manifest, write_manifest
from infalign.types import InputError

KIND = "checkpoint"


def seal(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint whose other files are written: from now on it is whole.

    Args:
        folder: the checkpoint.
        identity: what a run must share with it to resume from it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_manifest(folder, KIND, identity, files=sizes)


def defect(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None when it is."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(folder, KIND)
    except InputError as error:
        return str(error)
    if manifest is None:
        return "it was not written to its end"
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole `checkpoint-STEP` in a folder (None: there is none), and the newer ones with their defects."""
    skipped: list[tuple[Path, str]] = []
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        wrong = defect(path)
        if wrong is None:
            return path, skipped
        skipped.append((path, wrong))
    return None, skipped


def check_resumable(folder: Path, identity: Mapping[str, Any]) -> None:
    """A checkpoint can be resumed from by a run of this identity.

    Raises:
        InputError: it is not whole, or was made by another run; what differs and the way out are named.
    """
    wrong = defect(folder)
    if wrong is not None:
        raise InputError(
            f"{folder} is no whole checkpoint: {wrong}; name another one, or leave it out to take the newest"
        )
    manifest = read_manifest(folder, KIND) or {}
    found = differences(manifest["parts"], identity)
    if found:
        raise InputError(
            f"{folder} was made by another run ({'; '.join(found)}): resume with the same, or start a new output_dir "
            f"from its weights alone: --initial_weights {folder}"
        )


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
