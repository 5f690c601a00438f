"""Whole checkpoints, or none: a manifest is written last and names every file with its size.

Resume takes the newest checkpoint whose files are all there, says which it skipped and why, and refuses one that
another recipe, model or number of processes made (before anything is loaded), naming the way out.

A checkpoint also holds what TRL's trainer keeps between steps and leaves out: rollouts in use, counters, metrics, and
the earlier rollouts that pooled calibration ranks among. A
generation of rollouts serves `steps_per_generation * num_iterations` micro-steps; without it a run that resumes inside
one would draw others, from a policy that has moved on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from infalign.rewards.fingerprint import callable_digest, digest
from infalign.runtime.artifacts import MANIFEST, differences, read_manifest, write_manifest
from infalign.runtime.console import notice
from infalign.runtime.distributed import rank
from infalign.training.reward import CTRLReward
from infalign.types import InputError

KIND = "checkpoint"
_ARRAY = "arrays/"

ROWS = 64
"""Of a data set, spread over it, that are read for its identity."""


def run_identity(
    functions: Sequence[Any], rewards: Sequence[Any], weights: Sequence[float] | None, dataset: Any, beta: float
) -> dict[str, Any]:
    """What a run from Python must share with a checkpoint: its data, rewards, transform and beta.

    `datasets`' own fingerprint would not do: it follows from how a data set was made, and after `map` from the file it
    is cached in. Streams have no content that could be looked at beforehand.

    Args:
        functions: the reward functions.
        rewards: the `CTRLReward`s among them.
        weights: of the functions, or None.
        dataset: of the training prompts.
        beta: the KL coefficient.
    """
    return {
        "data": _content(dataset) if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") else None,
        "rewards": [_digest_of(one) for one in functions],
        "transform": "; ".join(_named(one.transform) for one in rewards) or None,
        "beta": float(f"{beta:.6g}"),
        **({} if weights is None else {"reward_weights": list(weights)}),
    }


def _named(transform: Any) -> str:
    """A transform as identities know it: its label, what it says of itself, or a digest of its source."""
    named = repr(transform) if hasattr(transform, "name") else None
    return getattr(transform, "label", None) or named or _digest_of(transform)


def _digest_of(function: Any) -> str:
    """A reward or a transform, by its fingerprint, its source, or its name."""
    raw = getattr(function, "raw", None)
    if raw is not None:
        return digest(raw.fingerprint, function.method, function.column)
    if isinstance(function, str) or hasattr(function, "config"):  # a model, or its name
        return digest(str(getattr(getattr(function, "config", None), "_name_or_path", function)))
    return digest(callable_digest(function))


def _content(dataset: Any) -> str:
    """A digest of the number of rows and of `ROWS` of them."""
    count = len(dataset)
    # spread evenly, first and last row included
    chosen = sorted({count * place // ROWS for place in range(ROWS)} | {count - 1}) if count else []
    return digest(count, [_readable(dataset[row]) for row in chosen])


def _readable(value: Any) -> Any:
    """A row without what has no content that JSON can hold (images show as their type)."""
    if isinstance(value, Mapping):
        return {str(name): _readable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def seal(folder: Path, identity: Mapping[str, Any], *, weights_only: bool = False) -> None:
    """Write the manifest of a checkpoint whose other files are written: from now on it is whole.

    Args:
        folder: the checkpoint.
        identity: what a run must share with it to resume from it.
        weights_only: it has no optimizer's state (`save_only_model`) and can't be resumed from.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_manifest(folder, KIND, identity, files=sizes, weights_only=weights_only)


def defect(folder: Path) -> str | None:
    """Why a checkpoint can't be resumed from, or None when it can."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(folder, KIND)
    except InputError as error:
        return str(error)
    if manifest is None:
        return _without_manifest(folder)
    if manifest.get("weights_only"):
        return "it holds the weights alone (save_only_model)"
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def _without_manifest(folder: Path) -> str:
    """What a folder is that infalign did not finish: its checkpoints hold weights first, rollouts and manifest last."""
    if (folder / "trainer_state.json").is_file() and not any(folder.glob("rollouts-*.safetensors")):
        return "it has no rollouts and no manifest: TRL's own trainer wrote it, or infalign was stopped while it did"
    if (folder / "config.json").is_file() and not folder.name.startswith("checkpoint-"):
        return "it is a model, without the state of a training run"
    return "it was not written to its end"


def newest_whole(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole `checkpoint-STEP` in a folder (None: there is none), and the newer ones with their defects."""
    skipped: list[tuple[Path, str]] = []
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        wrong = defect(path)
        if wrong is None:
            return path, skipped
        skipped.append((path, wrong))
    return None, skipped


def check_resumable(folder: Path, identity: Mapping[str, Any]) -> None:
    """A checkpoint can be resumed from by a run of this identity; another reward, which may be a mended one, is told.

    Raises:
        InputError: it is not whole, or was made by another run; what differs and the way out are named.
    """
    wrong = defect(folder)
    if wrong is not None:
        raise InputError(
            f"{folder} is no whole checkpoint: {wrong}; name another one, leave it out to take the newest, or start "
            f"from its weights alone, if it has them: --initial_weights {folder}"
        )
    manifest = read_manifest(folder, KIND) or {}
    held, mine = (
        {name: one for name, one in side.items() if name != "rewards"} for side in (manifest["parts"], identity)
    )
    found = differences(held, mine)
    if not found and manifest["parts"].get("rewards") != identity.get("rewards"):
        notice(
            f"{folder.name} was trained with another reward, or with other source of it: right if a fault in it was "
            "mended; otherwise start anew, in another output_dir"
        )
    if found:
        raise InputError(
            f"{folder} was made by another run ({'; '.join(found)}): resume with the same, or start a new output_dir "
            f"from its weights alone: --initial_weights {folder}"
        )


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


# --- rollouts and counters --------------------------------------------------------------------------------------------


def save_rollout_state(
    folder: Path,
    buffer: list[dict[str, Any]] | None,
    counters: dict[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> None:
    """Write this rank's rollouts, counters and arrays into a checkpoint.

    Args:
        folder: the checkpoint.
        buffer: the micro-batches of the generation in use (tensors, and for images JSON-like counts), None between
            generations.
        counters: JSON-like values to have again after resuming.
        arrays: likewise.
    """
    held = {f"{number}/{name}": value for number, part in enumerate(buffer or []) for name, value in part.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in held.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in held.items() if key not in tensors}
    tensors |= {f"{_ARRAY}{name}": torch.from_numpy(value) for name, value in arrays.items()}
    metadata = {"counters": json.dumps(counters), "parts": str(len(buffer or [])), "others": json.dumps(others)}
    save_file(tensors, _rollouts_file(folder), metadata=metadata)


def load_rollout_state(
    folder: Path, device: torch.device
) -> tuple[list[dict[str, Any]] | None, dict[str, Any], dict[str, NDArray[Any]]]:
    """This rank's buffer (None between generations), counters and arrays."""
    arrays: dict[str, NDArray[Any]] = {}
    with safe_open(_rollouts_file(folder), framework="pt") as file:
        metadata = file.metadata()
        buffer: list[dict[str, Any]] = [{} for _ in range(int(metadata["parts"]))]
        for key, value in json.loads(metadata.get("others", "{}")).items():
            number, _, name = key.partition("/")
            buffer[int(number)][name] = value
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            number, _, name = key.partition("/")
            if key.startswith(_ARRAY):
                arrays[name] = file.get_tensor(key).numpy()
            else:
                buffer[int(number)][name] = file.get_tensor(key).to(device)
    return buffer or None, json.loads(metadata["counters"]), arrays


def _rollouts_file(folder: Path) -> Path:
    return folder / f"rollouts-{rank()}.safetensors"


def visits_of(rewards: Sequence[CTRLReward]) -> tuple[list[list[str]], dict[str, NDArray[Any]]]:
    """What pooled calibration has seen, for a checkpoint: each reward's keys, and all their arrays by name."""
    keys: list[list[str]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for number, one in enumerate(rewards):
        state = one.visits.state()
        keys.append(state.pop("keys"))
        arrays |= {f"{number}/{name}": array for name, array in state.items()}
    return keys, arrays


def load_visits(rewards: Sequence[CTRLReward], keys: Sequence[list[str]], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Go on from what `visits_of` gave."""
    for number, (one, own) in enumerate(zip(rewards, keys, strict=True)):
        mine = {name: arrays[f"{number}/{name}"] for name in ("counts", "rewards", "weights")}
        one.visits.load({"keys": own, **mine})
