"""infalign: make a language model better *as it will be decoded* (InfAlign-CTRL, arXiv:2412.19792).

Calibrate a reward against samples of the base policy, transform it for the inference procedure (Best-of-N, Worst-of-N,
...), run KL-regularised RL, and measure inference-time win rates beside the exact limit.

Dimension key, used as suffixes on names throughout (`rewards_PK` is prompts x reference samples):

    P prompts          K reference samples per prompt     G policy samples per prompt in training
    N candidates a procedure draws                        M evaluation samples per prompt
    Q points of a quantile grid    T tokens    V vocabulary    B batch    J reward levels    S models merged

Importing this module loads no torch: every public name is fetched on first use. It switches the telemetry of the
libraries off unless the environment already says otherwise (a library that is imported before it has made up its mind).
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

for _name, _value in {"HF_HUB_DISABLE_TELEMETRY": "1", "TRACKIO_TELEMETRY": "0"}.items():
    os.environ.setdefault(_name, _value)

_HOME = {
    "BestOfN": "infalign.theory.procedures",
    "WorstOfN": "infalign.theory.procedures",
    "KthOfN": "infalign.theory.procedures",
    "RandomN": "infalign.theory.procedures",
    "SoftBestOfN": "infalign.theory.procedures",
    "TopOfN": "infalign.theory.procedures",
    "BottomOfN": "infalign.theory.procedures",
    "PessimisticOfN": "infalign.theory.procedures",
    "Procedure": "infalign.theory.procedures",
    "optimal_transform": "infalign.theory.optimum",
    "win_rate_limit": "infalign.theory.optimum",
    "tilt": "infalign.theory.tilted",
    "calibrate": "infalign.calibration.quantile",
    "win_rate": "infalign.evaluation.winrate",
    "WinRate": "infalign.evaluation.winrate",
    "CTRLReward": "infalign.training.reward",
    "CTRLConfig": "infalign.training.config",
    "CTRLTrainer": "infalign.training.trainer",
    "InputError": "infalign.types",
    "RewardError": "infalign.types",
    "run": "infalign.stages.run",
    "with_references": "infalign.stages.references",
    "sweep": "infalign.stages.sweep.run",
    "CellSamples": "infalign.evaluation.sweep",
}
_MODULES = {"transforms": "infalign.theory.transforms"}

__all__ = [
    "BestOfN",
    "BottomOfN",
    "CTRLConfig",
    "CTRLReward",
    "CTRLTrainer",
    "CellSamples",
    "InputError",
    "KthOfN",
    "PessimisticOfN",
    "Procedure",
    "RandomN",
    "RewardError",
    "SoftBestOfN",
    "TopOfN",
    "WinRate",
    "WorstOfN",
    "calibrate",
    "optimal_transform",
    "run",
    "sweep",
    "tilt",
    "transforms",
    "win_rate",
    "win_rate_limit",
    "with_references",
]

if TYPE_CHECKING:
    from infalign.calibration.quantile import calibrate
    from infalign.evaluation.sweep import CellSamples
    from infalign.evaluation.winrate import WinRate, win_rate
    from infalign.stages.references import with_references
    from infalign.stages.run import run
    from infalign.stages.sweep.run import sweep
    from infalign.theory import transforms
    from infalign.theory.optimum import optimal_transform, win_rate_limit
    from infalign.theory.procedures import (
        BestOfN,
        BottomOfN,
        KthOfN,
        PessimisticOfN,
        Procedure,
        RandomN,
        SoftBestOfN,
        TopOfN,
        WorstOfN,
    )
    from infalign.theory.tilted import tilt
    from infalign.training.config import CTRLConfig
    from infalign.training.reward import CTRLReward
    from infalign.training.trainer import CTRLTrainer
    from infalign.types import InputError, RewardError


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'infalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
