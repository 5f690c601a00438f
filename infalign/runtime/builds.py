"""Locks that a killed process left on PyTorch's compiled extensions.

DeepSpeed's ops are compiled, and later loaded, under a lock file; a process that is killed meanwhile leaves it behind,
and every later run waits for it without a word and without end (torch.utils.file_baton).
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

from infalign.runtime.console import notice

YOUNG = 600.0
"""Seconds: a lock that another machine may hold is left alone until it is this old."""


def clear_abandoned_locks(root: Path | None = None) -> list[Path]:
    """Remove the locks on extensions that no process holds; returns them.

    Whoever builds keeps the lock file open. In a run of several machines, which may share the folder, a lock of the
    last ten minutes stays.

    Args:
        root: the folder of the extensions; None is PyTorch's own.
    """
    if root is None:
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    found = [lock for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)]
    several = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
    held = _open_files() if found else set()
    removed = []
    for lock in found:
        with contextlib.suppress(FileNotFoundError):  # another rank was quicker, or the holder let go
            if str(lock.resolve()) in held or (several and time.time() - lock.stat().st_mtime < YOUNG):
                continue
            lock.unlink()
            removed.append(lock)
            notice(f"removed {lock}: a run that was killed left it, and nobody holds it")
    return removed


def _open_files() -> set[str]:
    """The paths of all regular files that processes of this user hold open."""
    paths: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            paths |= {str(Path(one.path).resolve()) for one in process.open_files()}
    return paths
