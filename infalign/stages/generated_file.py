"""The file that `infalign generate` writes: batch by batch, whole at the end, and never over something else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infalign.generation.plan import Request
from infalign.runtime.artifacts import differences, fingerprint, read_json, write_json, write_whole
from infalign.runtime.distributed import barrier, is_main
from infalign.types import InputError


def is_made(path: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a finished run of the same settings wrote the file; a file of other settings is not replaced unasked.

    Raises:
        InputError: the file is there, and is another run's or nobody's.
    """
    record = _record_of(path)
    if not path.exists() or overwrite:
        return False
    held = read_json(record, "the record of the output") if record.exists() else {}
    if held.get("digest") != _digest(path):
        raise InputError(f"{path} is there and holds something else: name another --output, or give --overwrite")
    found = differences(held["identity"], json.loads(json.dumps(identity)))
    if found:
        raise InputError(
            f"{path} was made with other settings ({'; '.join(found)}): name another --output, or give --overwrite"
        )
    return True


def _record_of(path: Path) -> Path:
    """Where it is written down what made a finished output."""
    return path.parent / f".{path.name}.made.json"


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def is_same(one: Path, other: str | Path) -> bool:
    return Path(other).exists() and one.samefile(other)


def parts_folder(path: Path, identity: Mapping[str, Any]) -> Path:
    """Where the batches of an output are kept until all are there."""
    return path.parent / f".{path.name}.{fingerprint(dict(identity))}.parts"


def claim_parts(path: Path, identity: Mapping[str, Any], batches: list[list[Request]]) -> dict[Path, list[Request]]:
    """The file of every batch, in a folder beside the output that a killed run finds again if nothing has changed."""
    folder = parts_folder(path, identity)
    if is_main():
        for other in path.parent.glob(f".{path.name}.*.parts"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    return {folder / f"{number:06d}.json": batch for number, batch in enumerate(batches)}


def write_output(files: list[Path], order: list[str], path: Path, identity: Mapping[str, Any]) -> int:
    """One JSONL in the order of the prompts, whole, and the record of what made it; the batches' files go.

    Returns:
        How many prompts have no scored candidate.
    """
    rows = {key: row for file in files for key, row in read_json(file, "the batch")}
    lines = "".join(line(rows[key]) for key in order)
    write_whole(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    write_json(_record_of(path), {"identity": identity, "digest": _digest(path)})
    if files:
        shutil.rmtree(files[0].parent)
    return sum(row["chosen"] is None for row in rows.values())


def line(row: Mapping[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"
