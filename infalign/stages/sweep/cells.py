"""One cell of a sweep: made, measured, and written down so that the next run of the sweep finds it.

    cells/NAME/            the run: calibration/, policy/, evaluation/, evaluation.json
    logs/NAME.log          what it said
    results/NAME.json      what came out: measured, or failed and why

Cells with the same base, prompts and seed share their samples: a new cell starts with the tables of the latest earlier
one as hard links. Tables only grow, by whole new files, so that cells never see each other's additions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infalign.evaluation.length import Side
from infalign.evaluation.limits import cluster_mean
from infalign.evaluation.summary import PROXY, Evaluation, decoder_row, decoders
from infalign.evaluation.sweep import LOST, MERGED, CellResult, CellSamples, PerPrompt
from infalign.models.mixture import FILE as MIXTURE_FILE
from infalign.runtime.artifacts import (
    MANIFEST,
    differences,
    fingerprint,
    from_plain,
    read_json,
    whole_folder,
    without_nan,
    write_json,
)
from infalign.runtime.console import LINE_EVERY_SECONDS, WARNING
from infalign.runtime.distributed import any_rank, barrier, is_main
from infalign.runtime.plugins import one_line
from infalign.stages.calibrate import calibrate, calibration_parts
from infalign.stages.evaluate import check_samples, evaluate
from infalign.stages.experiment import CALIBRATION, Experiment
from infalign.stages.merge.recipe import load_merge_recipe
from infalign.stages.merge.run import merge
from infalign.stages.objective import load_objective, load_procedure
from infalign.stages.per_prompt import FILE as PER_PROMPT
from infalign.stages.per_prompt import wins_per_prompt, write_per_prompt
from infalign.stages.recipe import REPORTING
from infalign.stages.report import limited_by
from infalign.stages.run import preflight
from infalign.stages.sweep.combined import merge_with_folders
from infalign.stages.sweep.draws import write_own_data
from infalign.stages.sweep.gap import GAP_SAMPLES, gap_facts
from infalign.stages.sweep.recipe import EVALUATED, Cell
from infalign.stages.sweep.sources import beside, parent_sources, record_of, source_of
from infalign.stages.train import OFFLINE, train
from infalign.types import InputError, Interrupted

SHARED = (CALIBRATION, "evaluation/base")
"""The tables that cells share, by folder and purpose: all that does not depend on what a policy is trained for."""


@dataclasses.dataclass(frozen=True)
class OwnCell:
    """A sweep's own function, and the content of the files that it is made of."""

    function: Callable[..., Any]
    source: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Held:
    """What a cell's folder holds.

    Attributes:
        result: its record, None without one.
        whole: it is measured, with these keys.
        changed: its other keys, in words.
        measure: nothing but how it is measured has changed, and its policy is there.
        trained: a finished policy is there.
    """

    result: CellResult | None
    whole: bool = False
    changed: tuple[str, ...] = ()
    measure: bool = False
    trained: bool = False


def look(folder: Path, cell: Cell) -> Held:
    """What is there of a cell; nothing is written or removed."""
    path = record_of(folder)
    trained = (folder / "policy" / MANIFEST).exists()
    if not path.exists():
        return Held(None, trained=trained)
    found = from_plain(CellResult, read_json(path, "the cell"))
    names, changed = _changed(found, cell)
    weights = has_weights(folder)
    return Held(
        found,
        whole=found.finished and not changed and (folder / PER_PROMPT).exists(),
        changed=tuple(changed),
        measure=(found.finished or trained) and set(names) <= set(EVALUATED) and weights,
        trained=trained,
    )


def has_weights(folder: Path) -> bool:
    """Whether a cell's policy is there, and not only its log."""
    return any((folder / "policy").glob("*.safetensors")) or (folder / "policy" / MIXTURE_FILE).is_file()


def _changed(found: CellResult, cell: Cell) -> tuple[list[str], list[str]]:
    """The names of keys that differ from those that a result was made with, and how in words."""
    now = _plain(cell.keys)
    names = [name for name in {**found.keys, **now} if found.keys.get(name) != now.get(name) and name not in REPORTING]
    before, after = ({name: keys.get(name) for name in names} for keys in (found.keys, now))
    return names, differences(before, after)


def refuse_changed(folder: Path, held: Held) -> None:
    """A finished cell, or a trained policy, of other keys is not replaced unasked.

    Raises:
        InputError: naming the keys.
    """
    if held.changed and not held.measure and held.result is not None and (held.result.finished or held.trained):
        only_measured = all(one.partition(":")[0] in EVALUATED for one in held.changed)
        why = "it can't be measured again, because its weights are gone: " if only_measured else ""
        raise InputError(
            f"{folder} was made with other settings ({'; '.join(held.changed)}): {why}give another --output_dir, or "
            "--overwrite to make such cells anew"
        )


def read_cell(folder: Path, cell: Cell, overwrite: bool) -> Held:
    """What a cell's folder holds, after what is of no more use has been removed.

    A cell that failed is no result, nor is one whose measurement is gone; what they left is kept where it is still of
    use, and removed where the cell's keys have changed and no policy was finished.

    Raises:
        InputError: a finished cell, or a policy, was made of other keys, which are named; with `overwrite` it is
            removed instead.
    """
    held = look(folder, cell)
    if held.result is None:
        if overwrite and folder.exists():  # of a run that was killed, perhaps with other settings
            remove_cell(folder)
        return held
    if not held.changed or held.measure:
        return held
    if not overwrite:
        refuse_changed(folder, held)
    remove_cell(folder)
    return Held(None)


def remove_cell(folder: Path) -> None:
    """A cell's run and its result."""
    barrier()
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
        record_of(folder).unlink(missing_ok=True)
    barrier()


def make_cell(
    cell: Cell, folder: Path, earlier: Sequence[Path], own: OwnCell | None, gap_samples: int = 0
) -> CellResult:
    """Run a cell; whatever goes wrong in it is its result. Only an interruption ends the sweep.

    Args:
        cell: what to make.
        folder: where.
        earlier: folders of cells made before it, the latest last.
        own: makes it in place of the stages (`CellSamples`).
        gap_samples: completions of the mixture on each test prompt, for a merge's gap.
    """
    start = time.monotonic()
    blank = CellResult(cell.name, cell.arm, cell.seed, _plain(cell.varied), _plain(cell.keys))
    error, result = "", blank
    if is_main():
        for place in (folder, record_of(folder), beside(folder, "logs", ".log")):
            place.parent.mkdir(parents=True, exist_ok=True)
    barrier()
    with _logged(beside(folder, "logs", ".log"), cell.name) as told:
        try:
            if own is not None:
                result = _by_own(own, cell, folder, blank)
            elif cell.merge is not None:
                result = _by_merge(cell, folder, earlier, blank, gap_samples)
            else:
                result = _by_stages(cell, folder, earlier, blank)
        except (KeyboardInterrupt, Interrupted):
            if not (folder / "policy" / MANIFEST).exists():
                _spend(folder, time.monotonic() - start)
            raise
        except (Exception, SystemExit) as caught:  # one cell's failure, of whatever kind, is a row; the others go on
            traceback.print_exc()
            error = " ".join(str(caught).split()) if isinstance(caught, InputError) else one_line(caught)
    if any_rank(bool(error)):
        result = dataclasses.replace(blank, error=error or "failed on another process")
        if not (folder / "policy" / MANIFEST).exists():
            _spend(folder, time.monotonic() - start)
    warned = tuple(dict.fromkeys(told.warnings))
    seconds = time.monotonic() - start if math.isnan(result.seconds) else result.seconds
    result = dataclasses.replace(result, seconds=seconds, notes=(*result.notes, *warned))
    if is_main():
        write_json(record_of(folder), without_nan(dataclasses.asdict(result)))
    barrier()
    return result


def _prepared(experiment: Experiment, folder: Path, earlier: Sequence[Path], names: Sequence[str]) -> None:
    """The cell's folder, with the tables that an earlier one can lend it."""
    experiment.claim_output()
    if is_main():
        for name in names:
            _share_table(folder / name, [one / name for one in earlier], experiment, name)
    barrier()


def _by_stages(cell: Cell, folder: Path, earlier: Sequence[Path], blank: CellResult) -> CellResult:
    """The stages of `infalign run`, all but the report."""
    start, experiment = time.monotonic(), Experiment(cell.recipe)
    preflight(experiment)
    _refuse_lost_parents(cell, folder)
    _prepared(experiment, folder, earlier, SHARED)
    calibrate(cell.recipe, experiment)
    made = train(cell.recipe, experiment)
    ready = _ready(folder, start if made["trained"] else None)
    found = evaluate(cell.recipe, experiment)
    experiment.release_models()
    log = read_json(folder / "policy" / "training_log.json", "the training log")
    counted = [row["num_tokens"] for row in log if "num_tokens" in row]
    objective = load_objective(cell.recipe, load_procedure(cell.recipe))
    return dataclasses.replace(
        blank,
        procedure=found.procedure,
        transform=found.transform,
        kl=found.kl.mean,
        kl_error=found.kl.error,
        tokens=float(counted[-1]) if counted else math.nan,
        length=found.policy.tokens,
        rows=found.win_rates,
        facts=text_facts(found),
        notes=tuple(limited_by(cell.recipe, objective, found, log)),
        source=source_of(experiment, cell, parent_sources(cell, folder)),
        measured_against=_measured_against(experiment),
        seconds=_seconds(folder, ready),
    )


def _measured_against(experiment: Experiment) -> str:
    """Names the base's samples and the reward."""
    reward = str(calibration_parts(experiment)["reward"])
    return fingerprint([experiment.sampling_parts(experiment.base_path, SHARED[1]), reward])


def merge_parents(cell: Cell, folder: Path) -> dict[str, Path]:
    """The policies that a cell is made from, by the arms that stand for them."""
    return {arm: folder.parent / name / "policy" for arm, name in cell.parents.items()}


def _refuse_lost_parents(cell: Cell, folder: Path) -> None:
    """A cell can be made while the policies that it is made from are there.

    Raises:
        InputError: one is not.
    """
    for arm, policy in merge_parents(cell, folder).items():
        if not (policy / MANIFEST).exists():
            raise InputError(f"{arm}, which it is made from, is not finished: see that cell")
        if not has_weights(policy.parent):
            raise InputError(
                f"the weights of {arm}, which it is made from, are gone (keep_policies: false): give another "
                "--output_dir, or --overwrite"
            )


def _by_merge(cell: Cell, folder: Path, earlier: Sequence[Path], blank: CellResult, gap_samples: int) -> CellResult:
    """A merge of other cells' policies, measured as a trained one is."""
    assert cell.merge is not None
    start = time.monotonic()
    _refuse_lost_parents(cell, folder)
    experiment = Experiment(dataclasses.replace(cell.recipe, policy_name_or_path=str(folder / "policy")))
    check_samples(cell.recipe)
    _prepared(experiment, folder, earlier, SHARED[1:])
    yaml = merge_with_folders(cell.merge, merge_parents(cell, folder), experiment.base_path)
    yaml = write_own_data(experiment, yaml, folder)
    settings = {"output_dir": str(folder / "policy"), "seed": cell.seed, "use_cpu": cell.recipe.use_cpu}
    # the folder is the cell's own: what it holds of other parents is of no use
    planned = load_merge_recipe({**yaml, **settings, "overwrite": True}, {})
    made = merge(dataclasses.replace(planned, base_dir=cell.recipe.base_dir))
    ready = _ready(folder, start if made["made"] else None)
    found = evaluate(experiment.recipe, experiment)
    facts, notes = text_facts(found) | {GAP_SAMPLES: float(gap_samples)}, ()
    if gap_samples:
        try:
            facts |= gap_facts(experiment, planned.plan, gap_samples) | _experts_kl(cell, folder)
        except (InputError, RuntimeError) as error:  # torch's own, such as too little memory: the cell is measured
            notes = (f"no merge gap: {one_line(error)}",)
    experiment.release_models()
    return dataclasses.replace(
        blank,
        procedure=found.procedure,
        transform=f"{MERGED}{planned.plan.method}",
        kl=found.kl.mean,
        kl_error=found.kl.error,
        length=found.policy.tokens,
        rows=found.win_rates,
        facts=facts,
        notes=notes,
        source=source_of(experiment, cell, parent_sources(cell, folder)),
        measured_against=_measured_against(experiment),
        seconds=_seconds(folder, ready),
    )


def _spent(folder: Path) -> Path:
    return folder / "spent.json"


def _spend(folder: Path, seconds: float) -> None:
    """Add to what a cell's policy has cost, over all attempts."""
    if is_main() and folder.is_dir():
        before = read_json(_spent(folder), "the time spent") if _spent(folder).exists() else 0.0
        write_json(_spent(folder), before + seconds)


def _ready(folder: Path, start: float | None) -> float:
    """The policy is there; since `start`, or found. Returns the time now."""
    now = time.monotonic()
    if start is not None:
        _spend(folder, now - start)
    return now


def _seconds(folder: Path, ready: float) -> float:
    """What the policy cost, whenever it was made, and the measurement since."""
    spent = read_json(_spent(folder), "the time spent") if _spent(folder).exists() else 0.0
    return spent + time.monotonic() - ready


def _experts_kl(cell: Cell, folder: Path) -> dict[str, float]:
    """The mean measured KL of the policies that were merged."""
    parents = [read_json(record_of(folder.parent / name), "the cell")["kl"] for name in cell.parents.values()]
    return {"experts_kl": float(np.mean(parents))} if parents else {}


def text_facts(found: Evaluation) -> dict[str, float]:
    """What was lost on each file of held-out texts, nats a token, with its standard error."""
    facts = {f"{LOST}{one.name}": one.lost for one in found.texts}
    facts |= {f"{LOST}{one.name} error": one.error for one in found.texts}
    return {name: value for name, value in facts.items() if math.isfinite(value)}


def _by_own(own: OwnCell, cell: Cell, folder: Path, blank: CellResult) -> CellResult:
    """The sweep's own function, given the cell's keys; its samples are measured as those of a run."""
    found = _checked(own.function(**cell.keys))
    lengths = np.zeros(np.shape(found.policy_PM)[1])  # not known: the same for all
    policy, base = (
        Side(list(rewards_PM), list(rewards_PM), [lengths] * len(found.keys))
        for rewards_PM in (found.policy_PM, found.base_PM)
    )
    kl = cluster_mean([np.atleast_1d(one) for one in found.kl_P])
    procedure, confidence = load_procedure(cell.recipe), cell.recipe.confidence
    shown = decoders(procedure, cell.recipe.eval_n)
    rows = [decoder_row(policy, base, one, PROXY, kl=kl.mean, confidence=confidence, seed=cell.seed) for one in shown]
    wins = {(PROXY, repr(one)): wins_per_prompt(policy, base, one) for one in shown}
    if is_main():
        write_per_prompt(folder, PerPrompt(tuple(found.keys), found.kl_P, wins))
    return dataclasses.replace(
        blank,
        procedure=repr(procedure),
        transform=load_objective(cell.recipe, procedure).label,
        kl=kl.mean,
        kl_error=kl.error,
        rows=tuple(rows),
        exact={name: float(value) for name, value in found.exact.items()},
        source=own.source,
        measured_against=fingerprint([list(found.keys), found.base_PM.tolist()]),
    )


def _checked(found: Any) -> CellSamples:
    """What a sweep's own function returned, as arrays.

    Raises:
        InputError: it is something else, or its parts do not fit each other.
    """
    if not isinstance(found, CellSamples):
        raise InputError(f"the cell function returned {type(found).__name__}, not infalign.CellSamples")
    keys, kl_P = list(found.keys), np.asarray(found.kl_P, dtype=np.float64)
    sides = [np.asarray(one, dtype=np.float64) for one in (found.policy_PM, found.base_PM)]
    if len(set(keys)) < len(keys):
        raise InputError("the cell function's keys name a prompt twice: give each prompt a name of its own")
    if kl_P.shape != (len(keys),) or not np.isfinite(kl_P).all():
        raise InputError(f"the cell function's kl_P must be {len(keys)} finite numbers, one a key, got {kl_P.shape}")
    for name, side in zip(("policy_PM", "base_PM"), sides, strict=True):
        if side.ndim != 2 or len(side) != len(keys):
            raise InputError(f"the cell function's {name} must have {len(keys)} rows of samples, got {side.shape}")
    return dataclasses.replace(found, keys=keys, kl_P=kl_P, policy_PM=sides[0], base_PM=sides[1])


def _share_table(folder: Path, earlier: Sequence[Path], experiment: Experiment, purpose: str) -> None:
    """Start with the samples of the latest earlier cell that drew from the same distribution with the same seed."""
    wanted = _plain(experiment.sampling_parts(experiment.base_path, purpose))
    if folder.exists():
        return
    for source in reversed(earlier):
        plan = source / "plan.json"
        if plan.exists() and not differences(read_json(plan, "the sampling plan")["parts"], wanted):
            break
    else:
        return
    with whole_folder(folder) as target:
        for path in source.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)  # of a writer that was killed
            # the manifest is the other cell's word that its calibration is whole
            if path.is_file() and path.name != MANIFEST and not hidden:
                there = target / path.relative_to(source)
                there.parent.mkdir(parents=True, exist_ok=True)
                _link(path, there)


def _link(path: Path, there: Path) -> None:
    try:
        os.link(path, there)
    except OSError:  # a file system without hard links
        shutil.copy2(path, there)


def drop_weights(folder: Path) -> None:
    """Delete what is large of a policy; its log, card and manifest stay."""
    for path in (folder / "policy").glob("checkpoint-*"):
        shutil.rmtree(path)
    for pattern in ("*.safetensors", "*.bin", "adapter/*.safetensors"):
        for path in (folder / "policy").glob(pattern):
            path.unlink()
    shutil.rmtree(
        folder / OFFLINE, ignore_errors=True
    )  # the first part of `offline+online`, of no use without the rest


def _plain(value: Any) -> Any:
    """As JSON will give it back."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


class _Told(io.TextIOBase):
    """A cell's output: into its log, and the latest line to the person who waits."""

    def __init__(self, log: Any, name: str, screen: Any) -> None:
        self.log, self.name, self.screen = log, name, screen
        self.last = time.monotonic()
        self.warnings: list[str] = []

    def write(self, text: str) -> int:
        self.log.write(text)
        self.log.flush()
        line = " ".join(text.split())
        if line.startswith(WARNING):
            self.warnings.append(line.removeprefix(WARNING).strip())
        if not line or not is_main():
            return len(text)
        if self.screen.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K  {self.name}: {line}"[: width + 4], end="", file=self.screen, flush=True)
        elif time.monotonic() - self.last > 2 * LINE_EVERY_SECONDS:
            self.last = time.monotonic()
            print(f"  {self.name}: {line}", file=self.screen, flush=True)
        return len(text)

    def flush(self) -> None:
        self.log.flush()


@contextlib.contextmanager
def _logged(path: Path, name: str) -> Iterator[_Told]:
    """What is printed meanwhile goes to a log; rank 0's, because only it speaks."""
    screen = sys.stdout
    with open(path if is_main() else os.devnull, "a", encoding="utf-8") as log:
        told = _Told(log, name, screen)
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                yield told
        finally:
            if is_main() and screen.isatty():
                print("\r\033[K", end="", file=screen, flush=True)
