"""What cells are made from beside their keys: whoever edits a reward, a policy or the data makes other cells."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infalign.merging.parents import resolve_parent
from infalign.models.loading import local_path, model_fingerprint
from infalign.runtime.artifacts import fingerprint, read_json
from infalign.runtime.imports import file_digest
from infalign.stages.calibrate import calibration_parts, group_parts
from infalign.stages.experiment import Experiment
from infalign.stages.forgetting import text_files
from infalign.stages.sweep.combined import BASE, OWN, models_of
from infalign.stages.sweep.recipe import ALONG, Cell

if TYPE_CHECKING:
    from infalign.stages.sweep.cells import OwnCell


def beside(folder: Path, kind: str, suffix: str) -> Path:
    """A cell's file in one of the folders beside `cells/`."""
    return folder.parent.parent / kind / f"{folder.name}{suffix}"


def record_of(folder: Path) -> Path:
    """Where a cell's result is written down."""
    return beside(folder, "results", ".json")


TEXTS = "held-out texts"
"""Of a cell's source: what it is measured on, and not made from."""


def source_of(experiment: Experiment, cell: Cell, parents: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What a cell's files are made from, beside its keys: whoever edits a reward or the data makes another cell.

    Args:
        experiment: of the cell.
        cell: itself.
        parents: the sources of the cells that it is made from, by arm.
    """
    found = {name: str(value) for name, value in calibration_parts(experiment).items()}
    if "groups" in found:
        found["test groups"] = group_parts(experiment, experiment.splits.test)["groups"]
    for arm, source in parents.items():
        found[f"made from {arm}"] = fingerprint({name: value for name, value in source.items() if name != TEXTS})
    if cell.merge is not None:
        found |= outside_sources(cell.merge, set(cell.parents), experiment.recipe.base_dir)
    if texts := text_files(experiment):
        found[TEXTS] = fingerprint({name: file_digest(Path(path)) for name, path in texts.items()})
    return found


def parent_sources(cell: Cell, folder: Path) -> dict[str, Mapping[str, str]]:
    """The sources of the cells that a cell is made from, as they are written down."""
    return {arm: read_json(record_of(folder.parent / name), "the cell")["source"] for arm, name in cell.parents.items()}


def outside_sources(merge: Mapping[str, Any], arms: Collection[str], base_dir: Path) -> dict[str, str]:
    """The content of what a merge takes from outside the sweep: models, and files of data."""
    models = sorted(set(models_of(merge)) - {BASE, *arms})
    parts = {
        name: [model_fingerprint(one) for one in resolve_parent(name, None, base_dir).split("+")] for name in models
    }
    files = sorted({str(one["data"]) for one in merge.get("models", ()) if isinstance(one, dict) and one.get("data")})
    digests = {name: file_digest(Path(str(local_path(name, base_dir)))) for name in files if name != OWN}
    return {"models": fingerprint([parts, digests])} if parts or digests else {}


class Sources:
    """What cells are made from now; what was looked up is kept: cells that differ in their KL alone share it."""

    def __init__(self, cells: Sequence[Cell], own: OwnCell | None) -> None:
        self.cells = {cell.name: cell for cell in cells}
        self.own = own
        self.known: dict[str, dict[str, str]] = {}

    def of(self, cell: Cell) -> dict[str, str]:
        """A cell's source."""
        if self.own is not None:
            return self.own.source
        same = fingerprint({name: value for name, value in cell.keys.items() if name not in ALONG})
        if same not in self.known:
            parents = {arm: self.of(self.cells[name]) for arm, name in cell.parents.items()}
            self.known[same] = source_of(Experiment(cell.recipe), cell, parents)
        return self.known[same]
