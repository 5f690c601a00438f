"""Artifacts are written whole or not at all.

A file or folder is written under a temporary name beside its place, flushed, and renamed: at any instant a reader (or a
rerun after a kill) finds the old one, the new one or nothing. Every artifact folder carries a `manifest.json`, written
last, with the *parts* its content depends on; two runs share an artifact exactly when their parts have one fingerprint,
and when they don't, the parts say which setting differs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from infalign.types import InputError

Record = TypeVar("Record")
"""A dataclass."""

FORMAT = 1
MANIFEST = "manifest.json"
SECRET = "<secret>"
_DIGEST = re.compile(r"(?P<name>.* |)[0-9a-f]{16}")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container\.cc")
_SECRET_KEY = re.compile(r"(.*_)?(api_key|token|secret|password)|authorization")
_NO_SECRETS = {f"{name}_token" for name in ("pad", "eos", "bos", "unk", "cls", "sep", "mask", "image", "stop", "end")}
_PACKAGES = ("infalign", "torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "numpy")


def fingerprint(parts: object) -> str:
    """16 hex digits that stand for a JSON-like value, independent of the order of its keys.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, flush what it wrote, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with disk_errors(path.parent):
            write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(without_nan(value), indent=2, default=str, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Whatever a library calls a full disk is raised as the OSError that it is; every other error passes.

    safetensors and the tokenizers raise classes of their own with the system's number in the text; torch.save loses
    the number, so that the folder is asked.

    Raises:
        OSError: with its errno (ENOSPC, EDQUOT, EFBIG, ...).
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        text = str(error)
        found = re.search(r"\(os error (\d+)\)", text)
        number = int(found[1]) if found else None
        if number is None and isinstance(error, RuntimeError) and _TORCH_WRITER.search(text):
            number = _why_not_writable(folder)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _why_not_writable(folder: Path) -> int | None:
    """The errno of writing a MiB to a folder, EFBIG where this process may only write files below a size, or None."""
    probe = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415 - absent on Windows

    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if limited else None


def without_secrets(value: Any) -> Any:
    """A JSON-like value with "<secret>" in place of keys, tokens and passwords: what may be written down.

    Secret is what stands under `api_key`, `token`, `secret`, `password`, `authorization` or a name that ends with
    `_api_key`, `_token`, `_secret` or `_password` (`pad_token` and the like are none), at any depth.

    >>> without_secrets({"hub_token": "hf_x", "reward_kwargs": {"api_key": "sk", "max_tokens": 5, "token": None}})
    {'hub_token': '<secret>', 'reward_kwargs': {'api_key': '<secret>', 'max_tokens': 5, 'token': None}}
    """
    if isinstance(value, Mapping):
        return {n: SECRET if _is_secret(n, one) else without_secrets(one) for n, one in value.items()}
    if isinstance(value, (list, tuple)):
        plain = [without_secrets(one) for one in value]
        return tuple(plain) if isinstance(value, tuple) else plain
    return value


def _is_secret(name: object, value: object) -> bool:
    plain = str(name).lower().replace("-", "_")
    known = bool(_SECRET_KEY.fullmatch(plain)) and plain not in _NO_SECRETS
    return known and value is not None and not isinstance(value, bool)


def without_nan(value: Any) -> Any:
    """A JSON-like value with null in place of NaN and infinities.

    >>> without_nan({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: Callable[..., Record], given: Mapping[str, Any]) -> Record:
    """A dataclass from what `dataclasses.asdict` and `without_nan` made of it.

    Where a number stands, null is NaN. A field that is missing (an older version wrote the file) has its default, a
    number without a default is NaN; keys that are no fields are ignored.

    Raises:
        InputError: a field is missing that has neither.
    """
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for one in fields(cast("Any", kind)):
        if one.name in given:
            values[one.name] = _typed(hints[one.name], given[one.name])
        elif one.default is MISSING and one.default_factory is MISSING:
            if hints[one.name] is not float and not is_dataclass(hints[one.name]):
                raise InputError(f"{one.name!r} is missing: the file was not written by infalign, or was changed")
            values[one.name] = _typed(hints[one.name], None)
    return kind(**values)


def _typed(hint: Any, value: Any) -> Any:
    """A JSON value as its type hint says: dataclasses in tuples, mappings and optionals are built, null is NaN."""
    arguments = get_args(hint)
    if get_origin(hint) is UnionType:  # of one type and None: fields that may be absent
        return None if value is None else _typed(arguments[0], value)
    if get_origin(hint) is tuple:
        return tuple(_typed(arguments[0], one) for one in value)
    if get_origin(hint) is dict:
        return {name: _typed(arguments[1], one) for name, one in value.items()}
    if is_dataclass(hint):
        return from_plain(cast("type", hint), value or {})
    return (math.nan if value is None else float(value)) if hint is float else value


def read_json(path: Path, what: str) -> Any:
    """Read a JSON artifact; a file that is not whole is named, with the way out."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} is damaged ({error}): delete it and run again to make it anew") from error


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        with disk_errors(path.parent):
            yield temporary
        if path.exists():
            old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old.tmp"
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class BusyError(InputError):
    """Another process is at work in a folder."""


@contextlib.contextmanager
def at_work(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep an output folder to this process of this machine; the system lets go of it when the process ends, however.

    The lock lies in the system's temporary folder, so that the folder itself may not exist yet. Processes that share
    (`shared`) keep out those that don't, and the other way round.

    Raises:
        BusyError: another process is at work in it.
    """
    lock = Path(tempfile.gettempdir()) / f"infalign-{fingerprint(str(folder.resolve()))}.lock"
    try:
        file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 - kept open for as long as the block runs
    except OSError:  # somebody else's, or no place to lock
        yield
        return
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BusyError(
                f"another infalign process ({file.read().strip()}) is at work in {folder}: wait until it has ended, or "
                "end it"
            ) from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield


def sweep_temporaries(folder: Path) -> None:
    """Remove what killed writers left under their temporary names."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_manifest(folder: Path, kind: str, parts: Mapping[str, Any], **more: Any) -> None:
    """Write `folder/manifest.json`: the last file of an artifact, so that its presence means the artifact is whole.

    Args:
        folder: the artifact.
        kind: what it is, e.g. "calibration".
        parts: everything its content depends on, by name; secrets (`without_secrets`) are left out.
        more: anything worth recording that the content does not depend on.
    """
    parts = without_secrets(parts)
    head = {"format": FORMAT, "kind": kind, "fingerprint": fingerprint(parts)}
    write_json(folder / MANIFEST, {**head, "parts": parts, **without_secrets(more), "versions": versions()})


def read_manifest(folder: Path, kind: str) -> dict[str, Any] | None:
    """The manifest of an artifact folder, or None when the folder holds no whole artifact.

    Raises:
        InputError: the manifest is of another kind, or of a newer format than this version reads.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path, "the manifest")
    if "kind" not in manifest or "parts" not in manifest:
        raise InputError(f"the manifest {path} is damaged: delete it and run again to make it anew")
    if manifest.get("kind") != kind:
        raise InputError(f"{folder} holds a {manifest.get('kind')!r}, not a {kind!r}: use another output_dir")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} has format {manifest.get('format')}; this infalign reads format {FORMAT}: upgrade it")
    return manifest


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names in `new` whose values differ from `old`, each as "name: old -> new", shortened; secrets don't count.

    Two digests tell a reader nothing: what they stand for is other content.

    >>> differences({"a": 1, "b": 2}, {"a": 1, "b": 3})
    ['b: 2 -> 3']
    >>> differences({"prompts": fingerprint(["cat"])}, {"prompts": fingerprint(["dog"])})
    ['prompts: other content']
    >>> differences({"reward": f"vader {fingerprint('a')}"}, {"reward": f"vader {fingerprint('b')}"})
    ['reward: vader, of other content']
    """
    plain_old, plain_new = (json.loads(json.dumps(without_secrets(side), default=str)) for side in (old, new))
    names = [name for name in {**plain_old, **plain_new} if plain_old.get(name) != plain_new.get(name)]
    return [f"{name}: {_change(plain_old.get(name), plain_new.get(name))}" for name in names]


def _change(old: object, new: object) -> str:
    was, now = (_DIGEST.fullmatch(one) if isinstance(one, str) else None for one in (old, new))
    if was is None or now is None or was["name"] != now["name"]:
        return f"{_short(old)} -> {_short(new)}"
    return f"{now['name'].strip()}, of other content" if now["name"] else "other content"


def _short(value: object) -> str:
    text = json.dumps(value)  # of a path both ends tell
    return text if len(text) <= 60 else f"{text[:20]}...{text[-37:]}"
