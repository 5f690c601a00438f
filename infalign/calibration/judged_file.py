"""What a proxy's quantiles are worth under gold, as a file in a calibration's folder: for the report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from infalign.calibration.judged import JudgedCurve
from infalign.runtime.artifacts import read_json, without_nan, write_json

FILE = "judged.json"


def write_curve(folder: Path, curve: JudgedCurve) -> None:
    """Write a curve into a calibration's folder."""
    plain = {**asdict(curve), "h_J": curve.h_J.tolist(), "error_J": curve.error_J.tolist()}
    write_json(folder / FILE, without_nan(plain))


def read_curve(folder: Path) -> JudgedCurve | None:
    """The curve in a calibration's folder, None without one.

    Raises:
        InputError: the file is damaged.
    """
    if not (folder / FILE).exists():
        return None
    content: dict[str, Any] = read_json(folder / FILE, "the curve of gold_optimal")
    arrays = {name: np.array(content[name], dtype=np.float64) for name in ("h_J", "error_J")}  # null is NaN
    return JudgedCurve(**{**content, **arrays})
