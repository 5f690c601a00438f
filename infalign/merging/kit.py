"""mergekit, in a process of its own.

A fresh process for each merge: mergekit keeps the weights of a path that it has read for as long as it lives, so that a
model which was changed since would be merged as it was.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from infalign.runtime.distributed import is_main
from infalign.types import TrainingError

_MODULE = "mergekit.scripts.run_yaml"


def run_mergekit(
    config: Mapping[str, Any],
    folder: Path,
    *,
    seed: int,
    shard_bytes: int,
    trust_remote_code: bool = False,
) -> None:
    """Write the merged model into a folder.

    Args:
        config: mergekit's YAML as a mapping, with folders or Hub ids that it can read.
        folder: exists and is empty; the adapters' merged models are made in it and removed.
        seed: of random masks.
        shard_bytes: size of a file of weights.
        trust_remote_code: run code that ships with a model.

    Raises:
        TrainingError: mergekit failed; its last words are quoted.
    """
    written = folder / "merge.yml"
    written.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    adapters = folder / ".adapters"
    command = [sys.executable, "-m", _MODULE, str(written), str(folder), "--random-seed", str(seed)]
    command += ["--out-shard-size", str(shard_bytes), "--lora-merge-cache", str(adapters), "--no-write-model-card"]
    command += ["--trust-remote-code"] if trust_remote_code else []
    shown = is_main() and sys.stderr.isatty()
    command += [] if shown else ["--quiet"]
    done = subprocess.run(command, stderr=None if shown else subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if done.returncode != 0:
        words = [line for line in (done.stderr or "").splitlines() if line.strip()]
        why = words[-1] if words else "its message is above"
        raise TrainingError(f"mergekit failed: {why}")
    written.unlink()
