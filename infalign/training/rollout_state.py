"""What TRL's trainer keeps between steps and leaves out of its checkpoints: rollouts in use, counters, metrics.

A generation of rollouts serves `steps_per_generation * num_iterations` micro-steps. A checkpoint that falls inside one
must carry it: a resumed run would otherwise draw others, from a policy that has moved on. Each rank saves its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from infalign.runtime.distributed import rank


def save_rollout_state(folder: Path, buffer: list[dict[str, torch.Tensor]] | None, counters: dict[str, Any]) -> None:
    """Write this rank's part of a checkpoint.

    Args:
        folder: the checkpoint.
        buffer: the micro-batches of the generation in use, None between generations.
        counters: JSON-like values to have again after resuming.
    """
    tensors = {
        f"{number}/{name}": value.detach().cpu().contiguous()
        for number, part in enumerate(buffer or [])
        for name, value in part.items()
    }
    save_file(tensors, _path(folder), metadata={"counters": json.dumps(counters), "parts": str(len(buffer or []))})


def load_rollout_state(
    folder: Path, device: torch.device
) -> tuple[list[dict[str, torch.Tensor]] | None, dict[str, Any]]:
    """This rank's buffer (None between generations) and counters."""
    with safe_open(_path(folder), framework="pt") as file:
        metadata = file.metadata()
        buffer: list[dict[str, torch.Tensor]] = [{} for _ in range(int(metadata["parts"]))]
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            number, _, name = key.partition("/")
            buffer[int(number)][name] = file.get_tensor(key).to(device)
    return buffer or None, json.loads(metadata["counters"])


def _path(folder: Path) -> Path:
    return folder / f"rollouts-{rank()}.safetensors"
