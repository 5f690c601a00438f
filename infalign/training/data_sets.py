"""What a `CTRLTrainer`'s data sets must hold, found before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from pyarrow.lib import ArrowNotImplementedError

from infalign.data.prompts import RESERVED_COLUMNS
from infalign.training.reward import CTRLReward
from infalign.types import InputError

_TAKEN = frozenset(RESERVED_COLUMNS) - {"completion_ids"}  # which TRL itself leaves out
_SHOWN = 5


def check_data_sets(rewards: Sequence[CTRLReward], train: Any, held_out: Any) -> None:
    """Every data set whose columns are known has the reference rewards, and no column that a reward can't be given.

    Args:
        rewards: they name the columns of their reference rewards.
        train: the training set.
        held_out: a data set, several by name, or None.

    Raises:
        InputError: one has no such column, a row of it is empty, or a column is called like an argument of a reward.
    """
    several = {f"eval_dataset {name!r}": one for name, one in held_out.items()} if isinstance(held_out, dict) else {}
    for where, dataset in {"train_dataset": train, **(several or {"eval_dataset": held_out})}.items():
        columns = _columns(dataset)
        if columns is None:
            continue
        for reward in rewards:
            reward.require_references(columns, where)
            _check_rows(dataset, reward.column, where)
        if taken := [name for name in columns if name in _TAKEN]:
            raise InputError(
                f"{where} has a column called {taken[0]!r}, like an argument of every reward function: rename it, e.g. "
                f"dataset.rename_column({taken[0]!r}, 'my_{taken[0]}'), or remove it"
            )


def _columns(dataset: Any) -> list[str] | None:
    """The columns that a row shows (a transform of a data set may show others than it stores); None: not known."""
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
        return list(dataset[0])
    columns = getattr(dataset, "column_names", None)
    return columns if isinstance(columns, list) else None


def _check_rows(dataset: Any, column: str, where: str) -> None:
    """No row of a stored column of lists is empty or missing."""
    if not isinstance(dataset, Dataset) or column not in dataset.column_names or not len(dataset):
        return
    try:
        lengths = pc.list_value_length(dataset.with_format("arrow")[column]).to_pylist()  # pyright: ignore
    except ArrowNotImplementedError as error:
        raise InputError(
            f"{where}: {column} must hold a list of numbers in every row, got {dataset[0][column]!r:.40} in the first: "
            "attach the calibration table (SampleTable.attach)"
        ) from error
    empty = [number for number, length in enumerate(lengths) if not length]
    if empty:
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise InputError(
            f"{where}: {column} is empty in row{'s' if len(empty) > 1 else ''} "
            f"{', '.join(map(str, empty[:_SHOWN]))}{more} (from 0): leave those prompts out "
            f"(dataset.filter(lambda row: row[{column!r}])), or score samples for them (SampleTable.attach)"
        )
