"""`infalign sweep`: every cell, one after the other; what is finished is kept, and a failure is a row."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from infalign.evaluation.combined import Origin, as_rows, combine
from infalign.evaluation.summary import DecoderRow
from infalign.evaluation.sweep import CellResult, SweepResult, compare, judged_decoders, limit_curve, tidy
from infalign.evaluation.transfer import transfers
from infalign.report.combined_page import combined_tables
from infalign.report.sweep_page import compared_tables, headline, remarks, report_sweep
from infalign.report.table import ABSENT, Table, number, plain_text
from infalign.runtime.artifacts import (
    BusyError,
    at_work,
    differences,
    fingerprint,
    sweep_temporaries,
    without_nan,
    write_json,
    write_whole,
)
from infalign.runtime.console import clock, notice, say
from infalign.runtime.distributed import any_rank, barrier, is_main, together
from infalign.runtime.imports import file_digest
from infalign.runtime.plugins import find_object
from infalign.stages.estimate import stage_costs
from infalign.stages.evaluate import check_samples
from infalign.stages.experiment import CALIBRATION, Experiment
from infalign.stages.forgetting import text_files
from infalign.stages.objective import load_objective, load_procedure, load_procedures
from infalign.stages.per_prompt import read_per_prompt
from infalign.stages.recipe import Recipe, require
from infalign.stages.run import preflight
from infalign.stages.sweep.cells import (
    Held,
    OwnCell,
    drop_weights,
    has_weights,
    look,
    make_cell,
    read_cell,
    refuse_changed,
    remove_cell,
)
from infalign.stages.sweep.gap import GAP_SAMPLES
from infalign.stages.sweep.recipe import Cell, Sweep, cells_of, chosen, load_sweep, unreachable
from infalign.stages.sweep.sources import TEXTS, Sources
from infalign.theory.procedures import Procedure
from infalign.types import InputError, TrainingError

PAGE_EVERY_SECONDS = 120.0


def sweep(config: Sweep | Mapping[str, Any] | str | Path, *, dry_run: bool = False, **flags: Any) -> SweepResult | None:
    """Run every cell that is not finished yet, and write the table, the comparison and the page after each.

    Args:
        config: a `Sweep`, its keys as a mapping, or the path of a YAML file.
        dry_run: only check all cells, and estimate tokens and time.
        flags: keys that win over `config`: the sweep's own, or a recipe's for all cells.

    Returns:
        What was measured; None for a dry run.

    Raises:
        InputError: whatever is wrong with the sweep, a cell's recipe, or the output folder.
        TrainingError: cells failed; the others are finished and written.
    """
    settings = config if isinstance(config, Sweep) else load_sweep(config, flags)
    require(settings, "output_dir")  # pyright: ignore[reportArgumentType] - any recipe with such a key
    cells = cells_of(settings)
    ours = chosen(settings, cells)
    for line in unreachable(settings):
        notice(line)
    if dry_run:
        _dry_run(settings, cells, ours)
        return None
    own = _own_cell(settings)
    folders = [settings.output / "cells" / cell.name for cell in cells]
    with together("the checks before a sweep"):  # every rank looks, and one of them speaks
        _check_output(settings.output)
        if own is None:
            _check_cells(cells)
        sources = Sources(cells, own)
        found: list[CellResult | None] = []
        for cell, folder in zip(cells, folders, strict=True):
            if cell.name in ours:
                found.append(_fresh(read_cell(folder, cell, settings.overwrite), cell, settings, sources))
            else:
                found.append(_of_another(cell, folder))
        if settings.overwrite and not settings.only:
            found = _without_lost_parents(settings, cells, found)
    if is_main() and not settings.only:
        sweep_temporaries(settings.output)
    done = {cell.name: one for cell, one in zip(cells, found, strict=True) if one is not None}
    whose = f", {len(ours)} for this process" if settings.only else ""
    say(f"infalign: a sweep of {len(cells)} cells{whose}, {len(done)} finished, output in {settings.output}")
    start, made, written = time.monotonic(), 0, -math.inf
    for place, (cell, folder) in enumerate(zip(cells, folders, strict=True)):
        if cell.name in done or cell.name not in ours:
            continue
        with contextlib.ExitStack() as held:
            if not _taken_up(folder, held):
                say(f"{cell.name}: another process is at it")
                continue
            # who shares the sweep may have finished it since
            made_meanwhile = _of_another(cell, folder) if settings.only else None
            done[cell.name] = made_meanwhile or make_cell(cell, folder, folders[:place], own, settings.gap_samples)
        for other, where in zip(cells, folders, strict=True):
            if other.name not in ours and (of_another := _of_another(other, where)) is not None:
                done[other.name] = of_another
        if not settings.keep_policies:
            _drop_finished(cells, done, settings.output / "cells")
        made += 1
        left = len(ours - set(done))
        say(f"[{len(done)}/{len(cells)}] {_line(done[cell.name])}{_time_left(start, made, left)}")
        for note in done[cell.name].notes:
            say(f"    {note}")
        # the comparison takes seconds: not after every cell of a few seconds
        whole = any_rank(is_main() and time.monotonic() - written > PAGE_EVERY_SECONDS)
        _written(settings, cells, done, whole)
        written = time.monotonic() if whole else written
    result = _written(settings, cells, done, True)
    _tell(settings, result)
    failed = [cell for cell in result.cells if not cell.finished and cell.name in ours]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(cells)} cells failed (first: {failed[0].name}: {failed[0].error}): their logs are "
            f"in {settings.output / 'logs'}; the same command tries them again"
        )
    return result


def sweep_verb(recipe: Sweep, *, dry_run: bool = False) -> None:
    """`sweep` as the command line calls it."""
    sweep(recipe, dry_run=dry_run)


def _taken_up(folder: Path, held: contextlib.ExitStack) -> bool:
    """Keep a cell to this launch until the stack ends; false where another process has it (every rank calls this)."""
    busy = False
    if is_main():
        try:
            held.enter_context(at_work(folder))
        except BusyError:
            busy = True
    return not any_rank(busy)


def _of_another(cell: Cell, folder: Path) -> CellResult | None:
    """What another process of this sweep has finished."""
    held = look(folder, cell)
    return held.result if held.whole else None


def _drop_finished(cells: Sequence[Cell], done: Mapping[str, CellResult], folder: Path) -> None:
    """Let go of weights that no cell to come is made from."""
    whole = {name for name, result in done.items() if result.finished}
    needed = {parent for cell in cells if cell.name not in whole for parent in cell.parents.values()}
    if is_main():
        for name, result in done.items():
            if result.finished and name not in needed:
                drop_weights(folder / name)
    barrier()


def _own_cell(settings: Sweep) -> OwnCell | None:
    """The sweep's `cell`, None where cells are runs."""
    if settings.cell is None:
        return None
    found = find_object(settings.cell, settings.base_dir, what="cell")
    if found is None or not callable(found.value):
        raise InputError(f"cell {settings.cell!r} names no function: give file.py:name")
    files = {name: file_digest(path) for name, path in sorted(found.modules.items())}
    return OwnCell(found.value, {"cell": " ".join([*map(str, found.source), *files.values()])})


def _check_output(folder: Path) -> None:
    """An output folder is nobody's, or a sweep's."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file: give a folder")
    if not folder.is_dir() or (folder / "results").is_dir() or not any(folder.iterdir()):
        return
    if any(not path.match(".*.tmp") and path.name not in ("cells", "logs") for path in folder.iterdir()):
        what = "an experiment's" if (folder / "recipe.json").exists() else "not empty and not a sweep's"
        raise InputError(f"output_dir {folder} is {what}: give another --output_dir")


def _check_cells(cells: Sequence[Cell]) -> None:
    """All that can be known before the first cell: every cell's recipe, and one experiment of each arm.

    Raises:
        InputError: naming the cell.
    """
    met: set[str] = set()
    for cell in cells:
        try:
            require(cell.recipe, "model_name_or_path", "reward")
            load_objective(cell.recipe, load_procedure(cell.recipe))
            if cell.arm not in met:
                _check_one(cell)
        except InputError as error:
            raise InputError(f"cell {cell.name}: {error}") from error
        met.add(cell.arm)


def _check_one(cell: Cell) -> None:
    experiment = Experiment(cell.recipe)
    if cell.merge is None:
        preflight(experiment)
        return
    check_samples(cell.recipe)
    text_files(experiment)
    _ = experiment.objective, experiment.terms, experiment.gold


def _without_lost_parents(
    settings: Sweep, cells: Sequence[Cell], found: Sequence[CellResult | None]
) -> list[CellResult | None]:
    """Finished cells, but for those whose weights a cell to come needs and which are gone: they are made anew."""
    lost: set[str] = set()
    for cell, result in reversed(list(zip(cells, found, strict=True))):  # parents come before their children
        if result is not None and cell.name not in lost:
            continue
        for name in cell.parents.values():
            if not has_weights(settings.output / "cells" / name):
                lost.add(name)
    for name in lost:
        remove_cell(settings.output / "cells" / name)
    return [None if cell.name in lost else one for cell, one in zip(cells, found, strict=True)]


def _fresh(held: Held, cell: Cell, settings: Sweep, sources: Sources) -> CellResult | None:
    """A finished cell, unless its rewards, data or cell function have been edited since; None: to make or measure.

    Raises:
        InputError: they have; with `overwrite` the cell is made anew.
    """
    found, folder = held.result, settings.output / "cells" / cell.name
    if found is None or not found.finished or not found.source:
        return found if held.whole else None
    now = sources.of(cell)
    if cell.merge is not None and found.facts.get(GAP_SAMPLES, 0.0) != settings.gap_samples and has_weights(folder):
        held = dataclasses.replace(held, whole=False)
    if found.source.get(TEXTS) != now.get(TEXTS) and has_weights(folder):  # measured on others
        held = dataclasses.replace(held, whole=False)
        now = {**now, TEXTS: found.source.get(TEXTS)}
    changed = differences(found.source, {name: value for name, value in now.items() if value is not None})
    if changed and not settings.overwrite:
        raise InputError(
            f"cell {cell.name} was made from something else ({'; '.join(changed)}): give another --output_dir, or "
            "--overwrite to make such cells anew"
        )
    if changed:
        remove_cell(folder)
    return found if held.whole and not changed else None


def _line(result: CellResult) -> str:
    if not result.finished:
        return f"{result.name}: failed: {result.error}"
    main = next((row for row in result.rows if row.label == result.procedure), result.rows[0])
    terms = [row for row in result.rows if row.weight > 0]
    rows = [_win(row, f" of {row.judge}" if terms else "") for row in terms or [main]]
    return f"{result.name}: KL {result.kl:.3f}, {', '.join(rows)}, {clock(result.seconds)}"


def _win(row: DecoderRow, judge: str) -> str:
    interval = "" if math.isnan(row.low) else f" [{row.low:.3f}, {row.high:.3f}]"
    return f"{row.label}{judge} {row.mean:.3f}{interval}, attainment {number(row.attainment, 2)}"


def _time_left(start: float, made: int, left: int) -> str:
    """At the pace of the cells made now."""
    return f"; {left} left, about {clock((time.monotonic() - start) / made * left)}" if left else ""


def _written(settings: Sweep, cells: Sequence[Cell], done: Mapping[str, CellResult], whole: bool) -> SweepResult:
    """The result so far: its table, and where `whole` the comparison and the page; rank 0 writes them."""
    results = tuple(done[cell.name] for cell in cells if cell.name in done)
    procedures = {repr(one): one for cell in cells for one in load_procedures(cell.recipe)}
    reference = settings.reference or cells[-1].arm
    result = SweepResult(reference, cells[0].recipe.confidence, results, len(cells))
    if whole:
        result = _compared(settings, cells, result, procedures)
    if is_main():
        table = pa.Table.from_pylist(_same_columns(tidy(result, procedures)))
        write_whole(settings.output / "sweep.parquet", lambda path: pq.write_table(table, path))
        write_whole(settings.output / "sweep.csv", lambda path: csv.write_csv(table, path))
        if result.combination.families:
            rows = pa.Table.from_pylist(_same_columns(as_rows(result.combination)))
            write_whole(settings.output / "combined.csv", lambda path: csv.write_csv(rows, path))
        if whole:
            write_json(settings.output / "sweep.json", without_nan(dataclasses.asdict(result)))
            report_sweep(settings.output)
    barrier()
    return result


def _compared(
    settings: Sweep, cells: Sequence[Cell], result: SweepResult, procedures: Mapping[str, Procedure]
) -> SweepResult:
    """With the objectives at equal KL."""
    finished = [one for one in result.cells if one.finished]
    recipes = {cell.arm: cell.recipe for cell in cells if cell.merge is None}
    prompts = {one.name: read_per_prompt(settings.output / "cells" / one.name) for one in finished}
    compared, lacking = compare(
        finished,
        prompts,
        procedures,
        result.reference,
        settings.compare_at,
        lambda arm, label, kl: predicted(recipes[arm], procedures[label], kl) if arm in recipes else math.nan,
        confidence=result.confidence,
        seed=0,
    )
    origins = {
        cell.name: Origin(cell.family, cell.plain_arm, tuple(cell.parents.values()), trained=cell.merge is None)
        for cell in cells
    }
    family = next((cell.family for cell in cells if cell.arm == result.reference), result.reference)
    combination = combine(
        finished, prompts, origins, family, share=settings.validation_share, confidence=result.confidence, seed=0
    )
    largest = max((one.kl for one in finished), default=0.0)
    shown = {label for _, label in judged_decoders(finished, list(procedures))}
    limits = tuple(limit_curve(one, largest) for label, one in procedures.items() if label in shown)
    crossed = transfers(finished)
    return dataclasses.replace(
        result,
        compared=compared,
        lacking=lacking,
        limits=limits,
        transfers=crossed,
        combination=combination,
    )


def predicted(recipe: Recipe, decoder: Procedure, kl: float) -> float:
    """The win rate under a decoder of the exact policy that a recipe's objective aims at with `kl` nats.

    NaN for baselines on the raw reward, whose policy depends on how rewards are distributed, and where a transform
    reaches no such KL, or a loss aims at one policy with a KL of its own.
    """
    if recipe.objective not in ("transform", "direct"):
        return math.nan
    try:
        aim = load_objective(dataclasses.replace(recipe, target_kl=kl, beta=None), load_procedure(recipe))
    except InputError:
        return math.nan
    if aim.policy is None or not math.isclose(aim.policy.kl, kl, rel_tol=1e-3):
        return math.nan
    return float(aim.policy.win_rate(decoder))


def _same_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table: every column in each, and keys that are mappings or lists as text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    mixed = {name for name in names if len({type(row.get(name)) for row in rows} - {type(None)}) > 1}

    def plain(name: str, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return str(value) if name in mixed and not isinstance(value, (int, float)) and value is not None else value
        return json.dumps(value)

    return [{name: plain(name, row.get(name)) for name in names} for row in rows]


def _tell(settings: Sweep, result: SweepResult) -> None:
    """The comparison at equal KL, what it says and how far to trust it, and where everything is."""
    tables = compared_tables(result)
    for title, table in tables:
        say()
        say(title)
        for line in plain_text(table):
            say(line)
    if tables:
        say(f"\n* the reference, {result.reference}")
    for title, table in combined_tables(result):
        say()
        say(title)
        for line in plain_text(table):
            say(line)
    say(f"\n{headline(result)}")
    for line in remarks(result):
        say(f"- {line}")
    say(f"\ntable: {settings.output / 'sweep.csv'}\nreport: {settings.output / 'report' / 'index.html'}")


def _dry_run(settings: Sweep, cells: Sequence[Cell], ours: Set[str]) -> None:
    """Check every cell, and say what it would cost."""
    own = _own_cell(settings)
    if own is None:
        with together("the checks before a sweep"):
            _check_output(settings.output)
            _check_cells(cells)
    arms = len({cell.arm for cell in cells})
    say(f"infalign: a sweep of {len(cells)} cells of {arms} objective{'s' if arms > 1 else ''}")
    sources = Sources(cells, own)
    rows: list[tuple[str, ...]] = []
    drawn: set[str] = set()
    total, all_tokens = 0.0, 0
    for cell in cells:
        folder = settings.output / "cells" / cell.name
        held = look(folder, cell)
        if cell.name not in ours:
            rows.append((cell.name, ABSENT, "finished" if held.whole else "elsewhere"))
            continue
        if not settings.overwrite:  # which replaces what has changed
            refuse_changed(folder, held)
            _fresh(held, cell, settings, sources)
        if held.whole:
            rows.append((cell.name, ABSENT, "finished"))
            continue
        if own is not None:
            rows.append((cell.name, ABSENT, ABSENT))
            continue
        experiment = Experiment(cell.recipe)
        tokens, seconds = stage_costs(experiment)
        if cell.merge is not None:  # it is only measured
            tokens, seconds = (
                {name: one for name, one in some.items() if name == "evaluate"} for some in (tokens, seconds)
            )
        base = fingerprint([experiment.sampling_parts(experiment.base_path, CALIBRATION), tokens.get("calibrate")])
        if base in drawn and "calibrate" in tokens:  # another cell has drawn its base samples
            del tokens["calibrate"], seconds["calibrate"]
        drawn.add(base)
        total, all_tokens = total + sum(seconds.values()), all_tokens + sum(tokens.values())
        rows.append((cell.name, f"{sum(tokens.values()):,}", clock(sum(seconds.values()))))
    for line in plain_text(Table(("cell", "tokens", "about"), tuple(rows))):
        say(line)
    if own is None:
        say(f"  in all {all_tokens:,} tokens, about {clock(total)} at this machine's rate of matrix products")
