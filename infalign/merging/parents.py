"""The models that are merged and the one that comes out, looked at through the headers of their files.

Nothing here loads a model: names and shapes stand in a safetensors file's header, and values are read a tensor at a
time, so that memory does not grow with the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from infalign.models.loading import model_fingerprint, resolve_model
from infalign.runtime.console import notice
from infalign.types import InputError, TrainingError

ADAPTER = "adapter_config.json"
Shapes = dict[str, tuple[int, ...]]


def resolve_parent(name: str, base: str | None, base_dir: Path) -> str:
    """A parent as mergekit takes it: a folder or Hub id, or `MODEL+ADAPTER`; an adapter alone gets its model.

    Args:
        name: as the YAML has it.
        base: the merge's base model, resolved, which an adapter must have been trained on.
        base_dir: the YAML's folder.

    Raises:
        InputError: no such folder, or an adapter of another base.
    """
    model, _, adapter = name.partition("+")
    if not adapter:
        resolved = resolve_model(model, base_dir)
        if not (Path(resolved) / ADAPTER).is_file():
            return resolved
        model, adapter = "", resolved
    adapter = resolve_model(adapter, base_dir)
    own = _base_of_adapter(adapter)
    on = resolve_model(model, base_dir) if model else own if base is None else base
    if on is None:
        raise InputError(f"the adapter {adapter} does not say what it was trained on: write MODEL+{Path(adapter).name}")
    if own is not None and not _is_same_model(own, on):
        raise InputError(
            f"the adapter {adapter} was trained on {own}, not on {on}: merge it with its own base, or write "
            f"{own}+{adapter}"
        )
    return f"{on}+{adapter}"


def _base_of_adapter(adapter: str) -> str | None:
    path = Path(adapter) / ADAPTER
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or None


def _is_same_model(one: str, other: str) -> bool:
    """Whether two names stand for one model; where one of them is not here, names have to do."""
    if one == other:
        return True
    here = [Path(name).is_dir() for name in (one, other)]
    return all(here) and model_fingerprint(one) == model_fingerprint(other)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model's folder.

    Raises:
        InputError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no safetensors: save the model with transformers' save_pretrained")
    return files


def shapes_of(folder: Path) -> Shapes:
    """The shape of every tensor of a model, from the headers."""
    found: Shapes = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def check_alike(parents: Mapping[str, Shapes], aligned: bool) -> None:
    """See that all parents have the first one's tensors in its shapes.

    Args:
        parents: shapes by the parents' names.
        aligned: whether the merge aligns vocabularies (`tokenizer` or `tokenizer_source`), so that their sizes may
            differ.

    Raises:
        InputError: naming the first tensor that differs, and what it is in which parent.
    """
    (first, reference), *others = parents.items()
    for name, shapes in others:
        for tensor in sorted({*reference, *shapes}):
            ours, theirs = reference.get(tensor), shapes.get(tensor)
            if ours == theirs or (aligned and _only_vocabulary(tensor, ours, theirs)):
                continue
            if ours is None or theirs is None:
                if tensor == "lm_head.weight":  # one has it tied to the embedding
                    continue
                there, lacking = (name, first) if ours is None else (first, name)
                raise InputError(f"{tensor} is in {there} and not in {lacking}: merge models of one architecture")
            how = (
                "their vocabularies differ: set tokenizer: {source: base} (or union)"
                if _only_vocabulary(tensor, ours, theirs)
                else "merge models of one architecture and size"
            )
            raise InputError(f"{tensor} is {list(ours)} in {first} and {list(theirs)} in {name}: {how}")


def _only_vocabulary(tensor: str, one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> bool:
    embedding = any(word in tensor for word in ("embed", "lm_head", "wte"))
    return embedding and one is not None and other is not None and one[1:] == other[1:]


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors, one at a time."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                yield name, file.get_tensor(name)


def mapped(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors by name, mapped from the files: the system reads them when they are used and may drop them again.

    Raises:
        InputError: one is not there.
    """
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
    lacking = [name for name in names if name not in found]
    if lacking:
        raise InputError(f"{folder} has no tensor {lacking[0]}: merge models of one architecture")
    return found


def check_finite(folder: Path) -> None:
    """See that every number of a merged model is finite.

    Raises:
        TrainingError: naming the first tensor that is not.
    """
    for name, tensor in tensors_of(folder):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise TrainingError(
                f"{bad} of {tensor.numel()} numbers of the merged {name} are not finite: see that weights do not sum "
                "to zero at some layer and that the parents are finite"
            )


def check_loadable(folder: Path, trust_remote_code: bool = False) -> None:
    """See that a merged model has the tensors that its config wants, without allocating it.

    Raises:
        TrainingError: naming the first that is missing or of another shape.
    """
    import transformers  # noqa: PLC0415 - seconds

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        notice(f"the merged {config.model_type} is no architecture of transformers' own: it was not compared with it")
        return
    with torch.device("meta"):
        model: Any = kind(config)
    shapes = shapes_of(folder)
    for name, parameter in model.named_parameters():
        if name not in shapes:
            raise TrainingError(f"the merged model lacks {name}, which its config wants")
        if shapes[name] != tuple(parameter.shape):
            raise TrainingError(
                f"the merged {name} is {list(shapes[name])}, and its config wants {list(parameter.shape)}"
            )
