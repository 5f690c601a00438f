"""Rows of a data set: from a file, a folder or the Hub, as plain dicts. Nothing is validated here but the format.

Local files are read without the `datasets` library (an import of a second); only the Hub needs it.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from infalign.types import InputError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_BUILDERS = {"json", "csv", "parquet", "text"}
_SPLIT_WORDS = {"train", "test", "validation", "valid", "val", "dev", "eval"}


def read_rows(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    data_dir: str | None = None,
    data_files: Any = None,
    base_dir: Path | None = None,
    text_column: str = "prompt",
) -> list[Row]:
    """All rows of the data set `name`, in order.

    Args:
        name: a file (`.jsonl .json .csv .parquet .txt`, text ones also `.gz`), a folder of such files or one written
            by `Dataset.save_to_disk`, a generic builder of `datasets` with local `data_files`, or a Hub id.
        config: configuration name on the Hub.
        split: which split; a single file has none, so it is read whole whatever the split.
        data_dir: folder inside the data set.
        data_files: paths or patterns inside the folder or on the Hub; a mapping is read at `split`.
        base_dir: folder that relative paths start from; the working directory is tried after it.
        text_column: what the one column of a `.txt` file (a prompt per line, blank lines skipped) is called.

    Raises:
        InputError: nothing there, a format that is not one of ours, malformed content (file and line).
    """
    if not name.strip():
        raise InputError("dataset_name is empty; give a file, a folder or a Hub id")
    if name in _BUILDERS and data_files:
        paths = _matching(data_files, split, [base_dir or Path(), Path()])
        return _read_files(paths, text_column)
    path = find_local(name, base_dir)
    if path is None:
        _refuse_if_path_like(name, base_dir)
        hub = importlib.import_module("infalign.data.hub")
        return hub.load_rows(name, config=config, split=split, data_dir=data_dir, data_files=data_files)
    if path.is_file():
        return read_file(path, text_column)
    folder = path / data_dir if data_dir else path
    if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return importlib.import_module("infalign.data.hub").load_saved(folder, split=split)
    paths = _matching(data_files, split, [folder]) if data_files else _files_of_split(folder, split)
    return _read_files(paths, text_column)


def find_local(name: str, base_dir: Path | None = None) -> Path | None:
    """The file or folder called `name` under `base_dir` or the working directory, or None."""
    wanted = Path(name).expanduser()
    candidates = [base_dir / wanted, wanted] if base_dir is not None else [wanted]
    return next((path for path in candidates if path.exists()), None)


def read_file(path: Path, text_column: str = "prompt") -> list[Row]:
    """The rows of one file, by its suffix (`.gz` on top of a text format is unpacked).

    Raises:
        InputError: an unknown suffix, or content that does not parse.
    """
    suffix = _data_suffix(path)
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: cannot read {suffix or 'a file without suffix'!r}; one of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        text = _read_text(path)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's and the decoder's errors are ValueErrors
        raise InputError(f"{path}: cannot be read ({_first_line(error)})") from error
    if suffix == ".txt":
        return [{text_column: line} for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if suffix == ".csv":
        return _read_csv(text, path)
    return _read_jsonl(text, path) if suffix == ".jsonl" else _read_json(text, path)


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")


def _data_suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _read_jsonl(text: str, path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object is wanted, got {type(row).__name__}")
        rows.append(row)
    return rows


def _read_json(text: str, path: Path) -> list[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object per line? then call the file .jsonl" if error.msg == "Extra data" else ""
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg}{hint})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a JSON list of objects is wanted (or .jsonl with an object per line)")
    return rows


def _read_csv(text: str, path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    for number, row in enumerate(rows, start=1):
        if "" in row:
            raise InputError(f"{path}, row {number}: more fields than the header has; quote the commas")
    return rows


def _read_files(paths: Sequence[Path], text_column: str) -> list[Row]:
    return [row for path in paths for row in read_file(path, text_column)]


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _data_suffix(path) in SUFFIXES)
    data = [path for path in files if path.name not in {"dataset_infos.json", "dataset_info.json", "config.json"}]
    if not data:
        raise InputError(f"{folder}: no data file in this folder; one of {', '.join(SUFFIXES)} is wanted")
    words = {path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())) for path in data}
    chosen = [path for path in data if split.lower() in words[path]]
    if chosen:
        return chosen
    if split == "train" and not any(_SPLIT_WORDS & found for found in words.values()):
        return data
    listing = ", ".join(str(path.relative_to(folder)) for path in data[:8])
    raise InputError(f"{folder}: no file of the split {split!r}; there are {listing}")


def _matching(data_files: Any, split: str, folders: Sequence[Path]) -> list[Path]:
    if isinstance(data_files, dict):
        if split not in data_files:
            raise InputError(f"data_files has no split {split!r}; it has {', '.join(map(str, data_files))}")
        data_files = data_files[split]
    patterns = [data_files] if isinstance(data_files, str) else list(data_files)
    found: list[Path] = []
    for pattern in patterns:
        hits = next((hits for folder in folders if (hits := _expand(folder, pattern))), None)
        if hits is None:
            raise InputError(f"data_files {pattern!r}: no such file under {folders[0].resolve()}")
        found += hits
    return found


def _expand(folder: Path, pattern: str) -> list[Path]:
    exact = folder / Path(pattern).expanduser()
    if exact.is_file():
        return [exact]
    return [] if Path(pattern).is_absolute() else sorted(path for path in folder.glob(pattern) if path.is_file())


def _refuse_if_path_like(name: str, base_dir: Path | None) -> None:
    folder = (base_dir or Path()).resolve()
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or _data_suffix(Path(name)) in SUFFIXES
    if looks_like_path:
        raise InputError(f"dataset_name {name!r}: no such file or folder under {folder}; correct the path")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
