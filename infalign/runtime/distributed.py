"""Ranks: who am I, whose turn is it. Reads the launcher's environment, so it costs no torch import by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def rank() -> int:
    """This process' rank under `accelerate launch` or `torchrun`, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def my_share(items: Sequence[Item]) -> list[Item]:
    """This rank's part of a list that every rank knows: every `world_size()`-th item.

    >>> my_share([1, 2, 3])
    [1, 2, 3]
    """
    return list(items[rank() :: world_size()])


def join(use_cpu: bool = False) -> None:
    """Under a launcher, set up the process group (once) so that ranks can wait for each other."""
    if world_size() > 1:
        from accelerate import PartialState  # noqa: PLC0415 - imports torch

        PartialState(cpu=use_cpu)


def barrier() -> None:
    """Wait for the other ranks (nothing to wait for without a launcher)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
