"""Rows of a data set: from a file, a folder or the Hub, as plain dicts. Nothing is validated here but the format.

Local files are read without the `datasets` library (an import of a second); only the Hub needs it. `iter_rows` reads
them row by row, so that a large file never stands in memory whole (but `.json`).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infalign.types import InputError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_BUILDERS = {"json", "csv", "parquet", "text"}
_SPLIT_WORDS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
_PARQUET_ROWS = 1024  # at a time
_EXTRA = "\0extra"  # fields beyond the header's
DEEPEST = 100
"""Levels of lists and objects in a row: what reads, copies and writes them again recurses."""


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
        name: a file (`SUFFIXES`, text ones also in a `COMPRESSED` form), a folder of such files or one written by
            `Dataset.save_to_disk`, a generic builder of `datasets` with local `data_files`, or a Hub id.
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
        if "[" in split:
            raise InputError(
                f"split {split!r} of the file {path}: slices are read from the Hub only; give num_train_prompts, or a "
                "file of those rows"
            )
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


def iter_rows(
    name: str, *, split: str | None = None, base_dir: Path | None = None, text_column: str = "prompt"
) -> Iterator[Row]:
    """The rows of a local file or folder, one after the other, in order.

    Args:
        name: a file, a folder of files, or a folder written by `Dataset.save_to_disk`.
        split: which split of a folder; None where it has one only.
        base_dir: folder that relative paths start from; the working directory is tried after it.
        text_column: what the one column of a `.txt` file is called.

    Raises:
        InputError: nothing there, several splits and none chosen, or malformed content (file and line).
    """
    path = find_local(name, base_dir)
    if path is None:
        raise InputError(f"{name}: no such file or folder")
    if path.is_file():
        yield from iter_file(path, text_column)
    elif any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        yield from importlib.import_module("infalign.data.hub").load_saved(path, split=split)
    else:
        for file in _files_of_split(path, split):
            yield from iter_file(file, text_column)


def saved_splits(name: str, base_dir: Path | None = None) -> list[str]:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; none for anything else."""
    path = find_local(name, base_dir)
    record = path / "dataset_dict.json" if path is not None else None
    if record is None or not record.is_file():
        return []
    try:
        return [str(split) for split in json.loads(record.read_text(encoding="utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError):  # half-written: `load_saved` says so
        return []


def read_file(path: Path, text_column: str = "prompt") -> list[Row]:
    """The rows of one file, by its suffix; see `iter_file`."""
    return list(iter_file(path, text_column))


def iter_file(path: Path, text_column: str = "prompt") -> Iterator[Row]:
    """The rows of one file, one after the other, by its suffix (a `COMPRESSED` one on top is unpacked).

    Raises:
        InputError: an unknown suffix, or content that does not parse, with its line.
    """
    suffix = _data_suffix(path)
    if suffix not in SUFFIXES:
        packed = f", text ones also with {' '.join(COMPRESSED)}"
        raise InputError(
            f"{path}: cannot read {suffix or 'a file without suffix'!r}; one of {', '.join(SUFFIXES)}{packed}"
        )
    read = {".parquet": _parquet, ".txt": _lines, ".csv": _table, ".tsv": _table, ".json": _json}.get(suffix, _jsonl)
    try:
        for row in read(path):
            yield {text_column: row} if isinstance(row, str) else row
    except UnicodeDecodeError as error:
        raise InputError(f"{path}{_where_not_utf8(path)}") from error
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # pyarrow's are among them
        raise InputError(f"{path}: cannot be read ({_first_line(error)})") from error


def _open(path: Path) -> IO[bytes]:
    """The unpacked bytes of a file."""
    if path.suffix in (".zst", ".lz4"):
        return io.BufferedReader(
            pa.CompressedInputStream(pa.OSFile(str(path)), path.suffix.strip(".").replace("zst", "zstd"))
        )
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")


def _where_not_utf8(path: Path) -> str:
    """Which line of a file is not UTF-8, and what it may be instead."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte {line[error.start]:#04x}"
                return f", line {number}: not UTF-8 ({byte}); {_likely(line)}: convert the file to UTF-8"
    return ": not UTF-8; convert the file"


def _likely(line: bytes) -> str:
    if line[:2] in (b"\xff\xfe", b"\xfe\xff") or line.count(0) > len(line) // 4:
        return "it looks like UTF-16"
    try:
        line.decode("cp1252")
    except UnicodeDecodeError:
        return "it is in another encoding, or no text at all"
    return "it may be Windows-1252 or Latin-1"


def _data_suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix in COMPRESSED else path.suffix.lower()


def _parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_PARQUET_ROWS):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[str]:
    with _text(path, newline="\n") as file:  # "\r" alone is no line end
        yield from (line.rstrip("\r\n") for line in file if line.strip())


def _text(path: Path, newline: str | None = None) -> IO[str]:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline=newline)


def _jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as file:  # bytes: text would also be cut at other line ends than these
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parsed(line.decode("utf-8-sig" if number == 1 else "utf-8"), path, number)
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: a JSON object is wanted, got {type(row).__name__}")
            yield row


def _json(path: Path) -> Iterator[Row]:
    """A list of objects; or, as other tools name such files too, an object a line."""
    with _text(path) as file:
        text = file.read()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path)
            return
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {_unreadable(error)}") from error
    if text.count("[") + text.count("{") > DEEPEST and _depth(rows) > DEEPEST:
        raise InputError(f"{path}: {_unreadable(RecursionError())}")
    if isinstance(rows, dict) and "\n" not in text.strip():
        rows = [rows]  # one line of JSONL
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a JSON list of objects is wanted (or .jsonl with an object per line)")
    yield from rows


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        row = json.loads(line)
        if line.count("[") + line.count("{") > DEEPEST and _depth(row) > DEEPEST:
            raise RecursionError
        return row
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: {_unreadable(error)}") from error


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, counted without recursion."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (list, dict))]:
        depth += 1
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
    return depth


def _unreadable(error: Exception) -> str:
    """Why Python does not read JSON that is well formed."""
    if isinstance(error, RecursionError):
        return f"lists or objects are nested too deeply to be read ({DEEPEST} levels at most)"
    return f"a number has too many digits to be read ({sys.get_int_max_str_digits()} at most)"


def _table(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if _data_suffix(path) == ".tsv" else ","
    with _text(path, newline="") as file:
        head = file.readline()
    if delimiter not in head and ";" in head:  # as spreadsheets write it where the comma is a decimal point
        delimiter = ";"
    with _text(path, newline="") as file:
        reader = csv.DictReader(file, restkey=_EXTRA, strict=True, delimiter=delimiter)
        start = 1
        try:
            if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]:
                raise InputError(f"{path}: two columns are called {twice[0]!r}: rename one")
            start = reader.line_num + 1
            for number, row in enumerate(reader, start=1):
                if any(row.pop(_EXTRA, ())):
                    raise InputError(f"{path}, row {number}: more fields than the header has; quote the commas")
                row.pop("", None)  # a column without a name: pandas' index, or a comma at the end of the line
                start = reader.line_num + 1
                yield row
        except csv.Error as error:
            kind = "TSV" if delimiter == "\t" else "CSV"
            raise InputError(f"{path}, in the row that begins in line {start}: not {kind} ({error})") from error


def _read_files(paths: Sequence[Path], text_column: str) -> list[Row]:
    return [row for path in paths for row in read_file(path, text_column)]


def _files_of_split(folder: Path, split: str | None) -> list[Path]:
    """A folder's data files of a split; None is all of them, where they are not of several splits."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _data_suffix(path) in SUFFIXES)
    hidden = [path for path in files if any(part.startswith(".") for part in path.relative_to(folder).parts)]
    skipped = {"dataset_infos.json", "dataset_info.json", "config.json"}
    data = [path for path in files if path.name not in skipped and path not in hidden]
    if not data:
        raise InputError(f"{folder}: no data file in this folder; one of {', '.join(SUFFIXES)} is wanted")
    words = {path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())) for path in data}
    listing = ", ".join(str(path.relative_to(folder)) for path in data[:8])
    found = set.union(*words.values()) & _SPLIT_WORDS
    if split is None:
        if len(found) > 1:
            raise InputError(f"{folder}: has the splits {', '.join(sorted(found))}: say which with --split")
        return data
    chosen = [path for path in data if split.lower() in words[path]]
    if chosen:
        return chosen
    if split == "train" and not found:
        return data
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
