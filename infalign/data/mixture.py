"""TRL's `datasets:` list: several data sets as one pool of prompts, whole or in given shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from infalign.data.columns import renamed
from infalign.data.prompts import DataFormat, LoadedPrompts, check_choices, numbered, prompts_from_rows
from infalign.data.sources import Row, read_rows
from infalign.types import InputError

FIELDS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")
"""The keys of an entry: those of TRL's `DatasetConfig`."""


def load_mixture(
    entries: Sequence[Mapping[str, Any]],
    *,
    prompt_column: str = "prompt",
    data_format: DataFormat = "auto",
    columns: Mapping[str, str] | None = None,
    base_dir: str | Path | None = None,
    limit: int | None = None,
) -> LoadedPrompts:
    """The prompts of a mixture, one a row, in the order of its entries.

    Args:
        entries: TRL's: `path` (what `load_prompts` calls `dataset_name`), `name` (configuration), `data_dir`,
            `data_files`, `split` ("train"), `columns` (kept ones), `fraction` (share of the mixture's rows, normalised
            to sum 1; for every entry or for none; no data set is repeated to reach its share, and the first rows are
            kept).
        prompt_column: as in `load_prompts`.
        data_format: as in `load_prompts`, per entry.
        columns: our name -> the data's, for columns under other names.
        base_dir: folder of the recipe.
        limit: at most so many rows of each entry are read.

    Raises:
        InputError: an entry is malformed, or what `load_prompts` raises.
    """
    check_choices(data_format, limit)
    checked = [_checked_entry(entry, number) for number, entry in enumerate(entries, start=1)]
    if not checked:
        raise InputError("datasets: the list is empty; give at least one entry with a path")
    folder = None if base_dir is None else Path(base_dir)
    pools = [renamed(_read_entry(entry, prompt_column, folder)[:limit], columns, entry["path"]) for entry in checked]
    shares = _shares([entry.get("fraction") for entry in checked], [len(rows) for rows in pools])
    parts = [
        prompts_from_rows(rows[:share], str(entry["path"]), prompt_column=prompt_column, data_format=data_format)
        for entry, rows, share in zip(checked, pools, shares, strict=True)
        if share
    ]
    return _joined(parts)


def _checked_entry(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise InputError(f"datasets, entry {number}: a mapping with a path is wanted, got {entry!r:.60}")
    for key in entry:
        if key not in FIELDS:
            near = get_close_matches(str(key), FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(FIELDS)}"
            raise InputError(f"datasets, entry {number}: unknown key {key!r}; {hint}")
    return {key: value for key, value in entry.items() if value is not None}


def _read_entry(entry: Mapping[str, Any], prompt_column: str, base_dir: Path | None) -> list[Row]:
    rows = read_rows(
        entry["path"],
        config=entry.get("name"),
        split=entry.get("split", "train"),
        data_dir=entry.get("data_dir"),
        data_files=entry.get("data_files"),
        base_dir=base_dir,
        text_column=prompt_column,
    )
    if not rows:
        raise InputError(f"{entry['path']}: no rows; leave the entry out")
    kept = entry.get("columns")
    if kept is None:
        return rows
    if not isinstance(kept, (list, tuple)):
        raise InputError(f"{entry['path']}: columns must be a list of names, got {kept!r}")
    missing = [name for name in kept if name not in rows[0]]
    if missing:
        raise InputError(f"{entry['path']}: no column {missing[0]!r}; the columns are {', '.join(map(repr, rows[0]))}")
    return [{name: row.get(name) for name in kept} for row in rows]


def _shares(fractions: Sequence[Any], sizes: Sequence[int]) -> list[int]:
    """Rows to keep of each data set: round(fraction * N), N the largest mixture that repeats no row."""
    if all(fraction is None for fraction in fractions):
        return list(sizes)
    if not all(isinstance(fraction, (int, float)) and fraction >= 0 for fraction in fractions):
        raise InputError(f"datasets: fraction must be a number >= 0 in every entry or in none, got {list(fractions)}")
    if sum(fractions) <= 0:
        raise InputError("datasets: the fractions are all 0")
    weights = [fraction / sum(fractions) for fraction in fractions]
    # the data set that is used up first limits the mixture
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True) if weight > 0)
    return [round(weight * total) for weight in weights]


def _joined(parts: Sequence[LoadedPrompts]) -> LoadedPrompts:
    if len({isinstance(part.prompts[0].content, str) for part in parts}) > 1:
        raise InputError("datasets: some entries have text prompts and some chats; make them alike")
    return LoadedPrompts(
        numbered((prompt.content, prompt.columns) for part in parts for prompt in part.prompts),
        " + ".join(part.source for part in parts),
        "+".join(dict.fromkeys(part.data_format for part in parts)),
        tuple(dict.fromkeys(name for part in parts for name in part.columns)),
        tuple(f"{part.source}: {note}" for part in parts for note in part.notes),
    )
