"""`infalign env`: versions, devices and what is switched off, for a bug report."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import trl
from packaging.version import Version

from infalign.models.loading import cache_folder
from infalign.runtime.artifacts import versions
from infalign.runtime.console import say
from infalign.training.trainer import TESTED_TRL


def env() -> dict[str, Any]:
    """Print and return what a bug report needs."""
    version = Version(trl.__version__)
    found: dict[str, Any] = {
        **versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count())] or ["cpu"],
        "model cache": str(cache_folder()),
        "fast path": "on" if f"{version.major}.{version.minor}" in TESTED_TRL else f"off: TRL not in {TESTED_TRL}",
        "telemetry": "off" if os.environ.get("HF_HUB_DISABLE_TELEMETRY") else "as the libraries set it",
    }
    width = max(map(len, found))
    for name, value in found.items():
        say(f"{name:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
    return found
