"""The headline's cells: exact values beside sampled ones, and who is ahead at equal KL."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from infalign import BestOfN, WorstOfN, sweep, win_rate

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import headline

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "seed": 0,
    "num_calibration_samples": 32,
    "num_generations": 8,
    "max_steps": 30,
    "learning_rate": 0.1,
    "eval_samples": 128,
    "eval_n": [1, 4],
    "n": 4,
}


@pytest.mark.parametrize(
    "keys", [{}, {"objective": "raw"}, {"objective": "direct", "procedure": "worst_of_n"}], ids=str
)
def test_exact_values_stand_beside_sampled_ones(keys):
    found = headline.cell(target_kl=0.5, **SMALL, **keys)
    assert found.exact["kl"] == pytest.approx(float(np.mean(found.kl_P)))
    for procedure in (BestOfN(1), BestOfN(4), WorstOfN(4)):
        sampled = win_rate(found.policy_PM, found.base_PM, procedure)
        assert found.exact[repr(procedure)] == pytest.approx(sampled.mean, abs=0.05)


def test_all_cells_of_a_seed_have_the_same_base():
    ours, theirs = (headline.cell(target_kl=kl, **{**SMALL, "max_steps": 1}).base_PM for kl in (0.5, 1.0))
    np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(ours, headline.cell(target_kl=0.5, **{**SMALL, "max_steps": 1, "seed": 1}).base_PM)


def test_the_sweep_runs_for_a_few_steps(tmp_path):
    flags = {"max_steps": "2", "num_calibration_samples": "64", "eval_samples": "8"}
    grid = "{target_kl: [0.5, 1.0], seed: [0]}"
    result = sweep(RECIPES / "headline.yaml", output_dir=str(tmp_path / "out"), grid=grid, **flags)
    assert len(result.cells) == 46 and all(cell.finished for cell in result.cells)
    few = {"raw", "pkpo", "iama", "par", "grpo", "identity", "log", "direct", "offline", "qrpo", "tup", "ipo", "bonbon"}
    assert few <= set(result.arms)
    assert all("WorstOfN(4)" in cell.exact and "BestOfN(4)" in cell.exact for cell in result.cells)


@pytest.mark.slow
def test_the_optimum_is_ahead_of_every_rival_at_equal_kl(tmp_path):
    """Best-of-4 at 1 nat, exact: over identity 6.4 points in theory, 5.5 to 6.5 over two seeds; over raw 1.8 to 2.1."""
    wins = {}
    for name, keys in {
        "optimal": {},
        "identity": {"transform": "identity"},
        "log": {"transform": "log"},
        "raw": {"objective": "raw"},
    }.items():
        settings = {**SMALL, "num_calibration_samples": 256, "num_generations": 64, "max_steps": 300}
        found = headline.cell(target_kl=1.0, **settings, **keys)
        assert found.exact["kl"] == pytest.approx(1.0, rel=0.06)
        wins[name] = found.exact["BestOfN(4)"]
    assert wins["optimal"] - wins["identity"] > 0.04
    assert wins["optimal"] - wins["log"] > 0.05
    assert wins["optimal"] - wins["raw"] > 0.008
