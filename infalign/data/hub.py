"""Rows from the Hub and from folders written by `Dataset.save_to_disk`: the one module that imports `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from infalign.types import InputError


def load_rows(
    name: str, *, config: str | None, split: str, data_dir: str | None, data_files: Any = None
) -> list[dict[str, Any]]:
    """The rows of one split of a data set on the Hub (or in its local cache).

    Raises:
        InputError: whatever goes wrong (no network, no such data set, configuration or split), the cause in one line.
    """
    try:
        loaded = datasets.load_dataset(name, name=config, split=split, data_dir=data_dir, data_files=data_files)
    except Exception as error:  # `datasets` raises its own, the Hub client's, httpx's and OS errors: all end here
        raise InputError(
            f"dataset_name {name!r} (split {split!r}) is no local file or folder and could not be loaded from the "
            f"Hub: {_one_line(error)}; check the name and the network, or download it and give the path"
        ) from error
    return loaded.to_list()


def load_saved(folder: Path, *, split: str | None) -> list[dict[str, Any]]:
    """The rows of a folder written by `save_to_disk` (of a `DatasetDict`: those of `split`).

    Raises:
        InputError: the folder cannot be read, has no such split, or several and none is named.
    """
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # half-written folders raise OS, JSON and Arrow errors alike
        raise InputError(f"{folder}: not a whole saved data set ({_one_line(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split is None and len(loaded) == 1:
            split = str(next(iter(loaded)))
        if split is None:
            raise InputError(f"{folder}: has the splits {', '.join(map(str, loaded))}: say which with --split")
        if split not in loaded:
            raise InputError(f"{folder}: no split {split!r}; there are {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return loaded.to_list()


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"
