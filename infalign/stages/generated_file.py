"""The file that `infalign generate` writes: batch by batch, whole at the end, and never over something else."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
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


def write_output(
    files: list[Path], order: Sequence[str | Mapping[str, Any]], path: Path, identity: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """One JSONL in the order of the input, whole, and the record of what made it; the batches' files go.

    Args:
        files: of the batches, each a list of (key, row).
        order: a line each: the key of a decoded row, or a row as it is (one that could not be decoded).
        path: of the JSONL.
        identity: of the run.

    Returns:
        The rows.
    """
    decoded = {key: row for file in files for key, row in read_json(file, "the batch")}
    rows = [decoded[one] if isinstance(one, str) else one for one in order]
    text = "".join(map(line, rows))
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    failed = sum("error" in row for row in rows)
    write_json(_record_of(path), {"identity": identity, "digest": _digest(path), "failed": failed})
    if files:
        shutil.rmtree(files[0].parent)
    return rows


def failed_rows(path: Path) -> int:
    """How many rows of a finished output have an `error`."""
    return int(read_json(_record_of(path), "the record of the output").get("failed", 0))


def line(row: Mapping[str, Any]) -> str:
    """A record as a line of JSON; one with half a surrogate pair, which UTF-8 can't hold, in ASCII."""
    text = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
    broken = any("\ud800" <= letter <= "\udfff" for letter in text)
    return (json.dumps(plain(row), allow_nan=False) if broken else text) + "\n"


def plain(value: Any) -> Any:
    """A value of the user's data as JSON can hold it: not finite numbers as null, other objects as their text."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
