"""Arms that combine the policies of others: what they may say, in which order they are made, and making them.

A merge's parents are the cells of the arms that it names, at the same point of the grid. It is written into
`cells/NAME/policy`, where a trained policy would be, and measured like one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infalign.merging.plan import MIXTURE, read_plan
from infalign.models.loading import local_path
from infalign.types import InputError

if TYPE_CHECKING:
    from infalign.stages.sweep.recipe import Sweep

COMBINES = ("merge", "family")
"""An arm's keys that are no recipe's."""
BASE = "base"
"""Names the base policy among a merge's models."""
OWN = "own"
"""As a model's `data` in a merge by DAM: what it answers to the training prompts itself."""


def combination_problems(sweep: Sweep) -> list[str]:
    """What is wrong with the arms that are merges, a line each."""
    problems = []
    for arm, keys in sweep.arms.items():
        if not isinstance(keys, dict):
            continue
        family = keys.get("family")
        if family is not None and (not isinstance(family, str) or not family):
            problems.append(f"arms, {arm}: family must be a name, got {family!r}")
        elif family in sweep.arms and family != arm:
            problems.append(f"arms, {arm}: family {family!r} is an arm: give the family another name")
        started = keys.get("initial_weights")
        if isinstance(started, str) and _is_mixture(sweep, started):
            problems.append(
                f"arms, {arm}: initial_weights: {started!r} is a mixture of logits, which has no weights to train"
            )
        if "merge" not in keys:
            continue
        others = [name for name in keys if name not in COMBINES]
        if others:
            problems.append(f"arms, {arm}: a merge is not trained: leave {', '.join(others)} out")
        problems += [f"arms, {arm}: merge: {one}" for one in _merge_problems(sweep, str(arm), keys["merge"])]
    if BASE in sweep.arms and any("merge" in keys for keys in sweep.arms.values() if isinstance(keys, dict)):
        problems.append(f"arms, {BASE}: in a merge this is the base policy: give the arm another name")
    if "merge" in sweep.keys or "merge" in sweep.grid:
        problems.append("merge belongs to an arm: arms: {NAME: {merge: {merge_method: ...}}}")
    if sweep.cell is not None and any("merge" in keys for keys in sweep.arms.values() if isinstance(keys, dict)):
        problems.append("cell: the sweep's own function makes all cells, and an arm has merge: leave one of them out")
    if not problems and sweep.arms:
        try:
            in_order(sweep)
        except InputError as error:
            problems.append(str(error))
    return problems


def _merge_problems(sweep: Sweep, arm: str, merge: Any) -> Iterator[str]:
    if not isinstance(merge, dict):
        yield f"must be what `infalign merge` takes, e.g. {{merge_method: linear, models: [...]}}, got {merge!r}"
        return
    try:
        plan = read_plan(merge)
    except InputError as error:
        yield str(error)
        return
    for one in plan.parents:
        if one.data is not None and one.data != OWN and local_path(one.data, sweep.base_dir) is None:
            yield f"data {one.data!r}: no such file: give a JSONL of prompts with completions, or of texts, or {OWN!r}"
    named: list[str] = [*(one.model for one in plan.parents), *([plan.base] if plan.base else [])]
    for name in dict.fromkeys(named):
        known = name in sweep.arms or name == BASE or "/" in name or local_path(name, sweep.base_dir) is not None
        if name == arm:
            yield "it names itself among its models"
        elif _is_mixture(sweep, name):
            yield f"{name!r} is a mixture of logits, which has no weights to merge: name what it is made of"
        elif not known:
            near = difflib.get_close_matches(name, [*map(str, sweep.arms), BASE], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the arms are {', '.join(map(str, sweep.arms))}"
            yield f"{name!r} is no arm, no folder and no Hub id: {hint}"


def _is_mixture(sweep: Sweep, name: str) -> bool:
    keys = sweep.arms.get(name)
    merge = keys.get("merge") if isinstance(keys, dict) else None
    return isinstance(merge, dict) and merge.get("merge_method") == MIXTURE


def models_of(merge: Any) -> Iterator[str]:
    """Every name in a merge that stands for a model."""
    if isinstance(merge, Mapping):
        for key, value in merge.items():
            if key in ("model", "base_model") and isinstance(value, str):
                yield value
            else:
                yield from models_of(value)
    elif isinstance(merge, list):
        for one in merge:
            yield from models_of(one)


def parents_of(sweep: Sweep, keys: Mapping[str, Any]) -> list[str]:
    """The arms that an arm's keys name: its merge's models, or what it is trained on from."""
    named = [*models_of(keys.get("merge")), *([keys["initial_weights"]] if "initial_weights" in keys else [])]
    return [name for name in dict.fromkeys(map(str, named)) if name in sweep.arms]


def in_order(sweep: Sweep) -> list[str]:
    """The arms as they can be made: each after its parents, and otherwise as they stand.

    Raises:
        InputError: arms that wait for each other.
    """
    waiting = {str(arm): set(parents_of(sweep, keys)) for arm, keys in sweep.arms.items()}
    order: list[str] = []
    while waiting:
        ready = next((arm for arm, parents in waiting.items() if parents <= set(order)), None)
        if ready is None:
            raise InputError(f"arms {', '.join(waiting)}: each is made from another of them: break the circle")
        order.append(ready)
        del waiting[ready]
    return order


def merge_with_folders(merge: dict[str, Any], folders: Mapping[str, Path | str], base: str) -> dict[str, Any]:
    """A merge's mapping with policies' folders in place of arms, and the base policy's in place of `base`."""
    from infalign.stages.merge.run import with_paths  # noqa: PLC0415 - loads transformers

    return with_paths(merge, {BASE: base, **{name: str(folder) for name, folder in folders.items()}})
