"""The YAML of a sweep, and the cells that it stands for.

    recipe: small_language_model.yaml        # a recipe; its keys can be given here as well, and win over it
    output_dir: outputs/sweep
    arms:                                    # what is compared, each with its keys
      optimal: {transform: optimal}
      identity: {transform: identity}
    grid: {target_kl: [0.25, 0.5, 1.0], seed: [1, 2]}
    reference: identity                      # the others' differences are to it
    compare_at: [0.3, 0.5, 0.9]              # nats, within what is measured

A cell is an arm with one value of each key of the grid, and is a run like any other: `cells/NAME` has all that
`infalign run` would have written there. Without `arms` the grid's own keys tell objectives apart. `target_kl`, `beta`
and `seed` never do: cells that differ only in KL are points of one objective's curve, and seeds are averaged over.

An arm may combine the policies of others instead of training one of its own. It has `merge`, what `infalign merge`
takes (mergekit's YAML), with arms in place of models and `base` for the base policy; at each point of the grid the
cells of those arms are its parents. Arms of one `family` are candidates of a search:

    linear .3: {family: linear, merge: {merge_method: linear, models: [{model: helpful, ...}, {model: harmless, ...}]}}

`initial_weights: ARM` trains on from another arm's policy.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infalign.runtime.artifacts import fingerprint
from infalign.runtime.config import check, field_hints, flag_value, nearest, read_yaml
from infalign.runtime.launch import FLAGS as LAUNCH_FLAGS
from infalign.stages.recipe import REPORTING, Recipe, find_recipe, key, load_recipe, settle_paths, settled_output
from infalign.stages.sweep.combined import COMBINES, combination_problems, in_order, parents_of
from infalign.theory.optimum import LARGEST_KL
from infalign.types import InputError

ALONG = ("target_kl", "beta")
"""Keys that move along one objective's curve."""
SHARED = (
    *("model_name_or_path", "model_revision", "dtype", "temperature", "max_completion_length", "system_prompt"),
    *("dataset_name", "dataset_config", "dataset_data_dir", "datasets", "num_test_prompts", "confidence", "objectives"),
)
"""Keys that all cells have in common: objectives are compared on the same base, prompts and samples of the base."""
OF_THE_SWEEP = ("output_dir", "overwrite")
EVALUATED = (
    *("eval_n", "eval_samples", "kl_samples", "judge", "judge_kwargs", "judge_samples", "gold_reward_kwargs"),
    "held_out_texts",
)
"""Keys of a recipe that change how a cell is measured, and not its policy."""
LONGEST = 120
"""Bytes of a cell's name, which is a folder's."""
OBJECTIVE = (
    *("procedure", "n", "procedure_kwargs", "objective", "transform", "transform_kwargs", "target_kl", "beta"),
    *("solver", "loss", "loss_kwargs", "eval_n", "eval_samples", "confidence", "seed"),
)
"""A recipe's keys that are checked where the sweep's own function makes cells."""
_INTERNAL = ("keys", "flags", "base_dir")
_UNSAFE = re.compile(r"[^\w.=,+-]+")


@dataclass(frozen=True)
class Sweep:
    """A sweep's own keys.

    `keys` are the recipe's that all cells share and `flags` those from the command line, which win over them;
    `base_dir` is where relative paths start: the recipe's folder.
    """

    recipe: str | None = key(None, "the recipe that cells vary: a file, or the name of one that is shipped", "sweep")
    arms: dict = key({}, "what is compared, by name: {optimal: {transform: optimal}, raw: {objective: raw}}", "sweep")
    grid: dict = key({}, "values that every arm is run with: {target_kl: [0.25, 0.5, 1.0], seed: [1, 2]}", "sweep")
    cell: str | None = key(None, "file.py:name that makes a cell in place of `infalign run`", "sweep")
    reference: str | None = key(None, "the arm that differences are to; unset: the last one", "sweep")
    compare_at: list[float] = key([], "KLs in nats for the comparison; unset: within what all arms have", "sweep")
    validation_share: float = key(0.5, "of the test prompts, on which a family's best arm is chosen", "sweep")
    gap_samples: int = key(
        2, "of the mixture on each test prompt, for the gap between it and a merge; 0: none", "sweep"
    )
    only: list[str] = key(
        [], "make only the cells with such names, e.g. 'raw-*' '*seed=1'; the others may run elsewhere", "sweep"
    )
    keep_policies: bool = key(True, "false: a cell's weights are deleted when they are of no more use", "sweep")
    output_dir: str = key("", "where everything is written; a relative path starts at the working directory", "sweep")
    overwrite: bool = key(False, "make cells anew whose keys have changed, instead of refusing", "sweep")

    keys: dict = field(default_factory=dict, metadata={"kind": "internal"})
    flags: dict = field(default_factory=dict, metadata={"kind": "internal"})
    base_dir: Path = field(default=Path(), metadata={"kind": "internal"})

    __post_init__ = settle_paths
    output = property(settled_output)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: its folder under `cells/`.
        arm: the objective that it is a point of.
        varied: the grid's keys with this cell's values.
        keys: everything that its recipe is made of, flags included.
        seed: of the recipe.
        recipe: checked; where the sweep's own function makes cells, what it says of the objective.
        merge: how it is merged, with cells in place of arms; None for one that is trained.
        parents: the cells that it is made from, by their names in `keys`.
        family: its search; the arm itself where there is none.
        plain_arm: the arm, without keys of the grid.
    """

    name: str
    arm: str
    varied: dict[str, Any]
    keys: dict[str, Any]
    seed: int
    recipe: Recipe
    merge: dict[str, Any] | None = None
    parents: Mapping[str, str] = field(default_factory=dict)
    family: str = ""
    plain_arm: str = ""


def load_sweep(config: str | Path | Mapping[str, Any] | None, flags: Mapping[str, Any] | None = None) -> Sweep:
    """A checked sweep from a YAML path or a mapping, with flags on top: its own keys, or a recipe's for all cells.

    Raises:
        InputError: everything that is wrong with its own keys.
    """
    values, base_dir = dict(config) if isinstance(config, Mapping) else {}, Path()
    if config is not None and not isinstance(config, Mapping):
        path = find_recipe(str(config))
        values, base_dir = read_yaml(path), path.parent
    flags = dict(flags or {})
    hints = {name: hint for name, hint in field_hints(Sweep).items() if name not in _INTERNAL}
    ours, ours_flags = ({name: value for name, value in given.items() if name in hints} for given in (values, flags))
    own = check(ours, ours_flags, hints)
    keys = {name: value for name, value in values.items() if name not in hints}
    _refuse_both(own, {**keys, **flags})
    if own.get("recipe"):
        beside = base_dir / own["recipe"]
        path = beside if beside.is_file() else find_recipe(own["recipe"])
        if not path.is_file():
            raise InputError(f"recipe: there is no {own['recipe']}: give a file, or the name of a shipped recipe")
        base, base_dir = read_yaml(path), path.parent
        if "arms" in base or "grid" in base:
            raise InputError(f"recipe {own['recipe']} is a sweep itself: name a recipe, or run that sweep")
        keys = {**{name: value for name, value in base.items() if name not in hints}, **keys}
    keys = {name: value for name, value in keys.items() if name not in LAUNCH_FLAGS}
    flags = {name: value for name, value in flags.items() if name not in hints}
    known = {**hints, **field_hints(Recipe)}
    for name in {**values, **flags}:
        near = [] if name in known else difflib.get_close_matches(name, list(hints), n=1, cutoff=0.8)
        if near:
            raise InputError(f"unknown key {name}: did you mean {near[0]!r}?")
    if own.get("cell"):  # whose function knows the types of its keys
        flags = {name: _value(one) for name, one in flags.items()}
    recipe = Sweep(**own, keys=keys, flags=flags, base_dir=base_dir)
    _check(recipe)
    return recipe


def _refuse_both(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Of target_kl and beta a cell has one: one that stands in a sweep's own YAML must be some cell's."""
    arms = [keys for keys in own.get("arms", {}).values() if isinstance(keys, dict)]
    for name, other in (ALONG, ALONG[::-1]):
        everywhere = other in own.get("grid", {}) or (arms and all(other in keys for keys in arms))
        if name in given and everywhere:
            raise InputError(f"{name} is given, and every cell has its {other}: leave one of them out")


def _value(given: Any) -> Any:
    """A flag's text, or several of them, as YAML would read it."""
    if isinstance(given, list):
        return [_value(one) for one in given]
    return flag_value(given) if isinstance(given, str) else given


def _check(sweep: Sweep) -> None:
    """What is wrong with the sweep's own keys, all at once."""
    problems = []
    if not sweep.arms and not sweep.grid:
        problems.append("a sweep needs arms or a grid: e.g. grid: {target_kl: [0.25, 0.5, 1.0]}")
    for name, values in sweep.grid.items():
        if not isinstance(values, list) or not values:
            problems.append(f"grid, {name}: must be a list of values, got {values!r}")
        elif len({repr(value) for value in values}) < len(values):
            problems.append(f"grid, {name}: has a value twice, got {values!r}")
    for name, keys in sweep.arms.items():
        if not isinstance(keys, dict):
            problems.append(f"arms, {name}: must be keys of a recipe, e.g. {{transform: identity}}, got {keys!r}")
            continue
        problems += [
            f"arms, {name}: {one} is in the grid, too: leave one of them out" for one in keys if one in sweep.grid
        ]
    names = list(map(str, sweep.arms))
    problems += [f"arms: {name} is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += [
        f"arms, {name!r}: must be a text, because YAML reads it as {type(name).__name__}: put it in quotes"
        for name in sweep.arms
        if not isinstance(name, str)
    ]
    varied = [*sweep.grid, *(one for keys in sweep.arms.values() if isinstance(keys, dict) for one in keys)]
    for name in dict.fromkeys(varied):
        if name in SHARED:
            problems.append(f"{name} can't be varied: cells are compared on the same base, prompts and samples")
        elif name in OF_THE_SWEEP or name in LAUNCH_FLAGS:
            problems.append(f"{name} can't be varied: it is the whole sweep's")
    problems += [
        f"--{name} is given, and the sweep varies it: leave one of them out"
        for name in dict.fromkeys(varied)
        if name in sweep.flags
    ]
    if not 0 < sweep.validation_share < 1:
        problems.append(f"validation_share must be between 0 and 1, got {sweep.validation_share:g}")
    if sweep.gap_samples < 0:
        problems.append(f"gap_samples must be at least 0, got {sweep.gap_samples}")
    problems += [] if problems else combination_problems(sweep)
    if any(not 0 < kl <= LARGEST_KL for kl in sweep.compare_at):
        problems.append(f"compare_at must be nats above 0, at most {LARGEST_KL:g}, got {sweep.compare_at}")
    if problems:
        raise InputError("; ".join(problems))


def unreachable(sweep: Sweep) -> list[str]:
    """A line where KLs are asked for that the grid does not aim at: an objective is compared where it was measured."""
    asked = [one for one in sweep.grid.get("target_kl", []) if isinstance(one, (int, float))]
    outside = [kl for kl in sweep.compare_at if asked and not min(asked) <= kl <= max(asked)]
    if not outside:
        return []
    return [
        f"compare_at {', '.join(f'{kl:g}' for kl in outside)}: outside of the grid's target_kl, {min(asked):g} to "
        f"{max(asked):g}: nothing will be measured there"
    ]


def cells_of(sweep: Sweep) -> list[Cell]:
    """Every cell, with its recipe checked; all arms at the grid's first point, then at the next.

    Raises:
        InputError: naming the first cell whose recipe does not fit, or two cells that are the same.
    """
    points = _points(sweep)
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two cells are called {name}: give the arms names that differ in letters or digits")
        if name.startswith("."):
            raise InputError(f"a cell is called {name}, which is no name for a folder: begin with a letter or a digit")
        if len(name.encode()) > LONGEST:
            raise InputError(f"a cell's name is above {LONGEST} bytes: {name[:60]}...: give the arm a shorter one")
    cells: list[Cell] = []
    for point in points:
        cells.append(_with_parents(_cell(sweep, point), cells))
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    if sweep.reference is not None and sweep.reference not in arms:
        raise InputError(f"reference {sweep.reference!r} is none of the arms: {', '.join(arms)}")
    _refuse_twins(cells)
    return _under_all_decoders(cells)


def chosen(sweep: Sweep, cells: Sequence[Cell]) -> set[str]:
    """The names of the cells that this process makes.

    Raises:
        InputError: a pattern of `only` fits none.
    """
    names = [cell.name for cell in cells]
    for pattern in sweep.only:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise InputError(f"only: no cell is called {pattern!r}{nearest(pattern, names)} (--dry_run lists them)")
    return {name for name in names if not sweep.only or any(fnmatch.fnmatchcase(name, one) for one in sweep.only)}


def _with_parents(cell: Cell, earlier: Sequence[Cell]) -> Cell:
    """A cell whose keys say what its parents were trained with: other parents make another cell."""
    if not cell.parents:
        return cell
    made = {one.name: one for one in earlier}
    of = {
        arm: fingerprint({key: value for key, value in made[name].keys.items() if key not in {*EVALUATED, *REPORTING}})
        for arm, name in cell.parents.items()
    }
    return replace(cell, keys={**cell.keys, "parents": of})


def _refuse_twins(cells: Sequence[Cell]) -> None:
    """Two arms of the same keys would be trained twice and compared with themselves."""
    met: dict[str, Cell] = {}
    for cell in cells:
        same = repr(sorted(cell.keys.items(), key=lambda one: one[0]))
        twin = met.setdefault(same, cell)
        if twin is not cell:
            raise InputError(f"the arms {twin.arm!r} and {cell.arm!r} have the same keys: leave one out")


def _under_all_decoders(cells: list[Cell]) -> list[Cell]:
    """Every cell is also measured under the Best-of-N and Worst-of-N that another arm is trained for."""
    trained = {cell.recipe.n for cell in cells if cell.recipe.procedure in ("best_of_n", "worst_of_n")}
    found = []
    for cell in cells:
        sizes = [*cell.recipe.eval_n, *sorted(trained - set(cell.recipe.eval_n))]
        # an arm that draws too few samples for another's decoder is told so by its own checks
        found.append(replace(cell, recipe=replace(cell.recipe, eval_n=sizes)))
    return found


@dataclass(frozen=True)
class _Point:
    """A cell before its recipe is checked; `parents` by the arms that its keys name."""

    name: str
    arm: str
    plain_arm: str
    family: str
    varied: dict[str, Any]
    keys: dict[str, Any]
    parents: dict[str, str]


def _points(sweep: Sweep) -> list[_Point]:
    arms: dict[str, dict[str, Any]] = {str(name): keys for name, keys in sweep.arms.items()} or {"": {}}
    order = in_order(sweep) if sweep.arms else [""]
    points = []
    for values in itertools.product(*sweep.grid.values()):
        point = dict(zip(sweep.grid, values, strict=True))
        apart = {name: value for name, value in point.items() if name not in (*ALONG, "seed")}
        for arm in order:
            keys = arms[arm]
            own = {**keys, **point}
            # of beta and target_kl a recipe has one: what the cell sets replaces the other
            replaced = {other for name, other in (ALONG, ALONG[::-1]) if name in own and other not in own}
            shared = {name: value for name, value in sweep.keys.items() if name not in replaced}
            points.append(
                _Point(
                    name=_cell_name(arm, point),
                    arm=" ".join([*([arm] if arm else []), *_named(apart)]) or "all",
                    plain_arm=arm,
                    family=str(keys.get("family") or arm),
                    varied=point,
                    keys={**shared, **own, **sweep.flags},
                    parents={parent: _cell_name(parent, point) for parent in parents_of(sweep, keys)},
                )
            )
    return points


def _cell_name(arm: str, point: Mapping[str, Any]) -> str:
    return _UNSAFE.sub("_", "-".join([*([arm] if arm else []), *_named(point)])) or "all"


def _named(values: Mapping[str, Any]) -> list[str]:
    """Each key with its value, as a person would write it."""
    return [f"{name}={_short(value)}" for name, value in values.items()]


def _short(value: Any) -> str:
    return ",".join(f"{name}={one}" for name, one in value.items()) if isinstance(value, dict) else str(value)


def _cell(sweep: Sweep, point: _Point) -> Cell:
    given = {name: value for name, value in point.keys.items() if name not in (*sweep.flags, *COMBINES)}
    flags, merge = sweep.flags, point.keys.get("merge")
    if (started := given.get("initial_weights")) in point.parents:
        given["initial_weights"] = str(sweep.output / "cells" / point.parents[started] / "policy")
    if sweep.cell is not None:  # the function knows its other keys
        given, flags = ({name: one for name, one in keys.items() if name in OBJECTIVE} for keys in (given, flags))
    else:
        given["output_dir"] = str(sweep.output / "cells" / point.name)
    try:
        recipe = replace(load_recipe(given, flags), base_dir=sweep.base_dir)
    except InputError as error:
        raise InputError(f"cell {point.name}: {error}") from error
    # a flag's text as the recipe has read it: the same value by either way is the same cell
    typed = {name: getattr(recipe, name, recipe.training.get(name, value)) for name, value in flags.items()}
    keys = {**point.keys, **typed}
    return Cell(
        name=point.name,
        arm=point.arm,
        varied=point.varied,
        keys=keys,
        seed=recipe.seed,
        recipe=recipe,
        merge=merge,
        parents=point.parents,
        family=point.family,
        plain_arm=point.plain_arm,
    )
