"""Under `accelerate launch`, two CPU processes share the work and end with what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from infalign.calibration.table import SampleTable
from tests.e2e.experiment import tiny_experiment

LAUNCH = Path(__file__).parents[2] / "launch" / "cpu_ddp.yaml"


def tables(folder: Path) -> dict[str, list]:
    """Every sample and reward under an output folder."""
    found = {}
    for name in ("calibration", "evaluation/base", "evaluation/policy"):
        plan = json.loads((folder / name / "plan.json").read_text())
        table = SampleTable.open(folder / name, plan["parts"])
        samples = table.samples()
        found[name] = sorted((s.key, s.index, s.token_ids) for rows in samples.values() for s in rows)
    return found


@pytest.mark.slow
def test_two_processes_run_the_recipe(tmp_path):
    keys = {**tiny_experiment(tmp_path), "per_device_train_batch_size": 4}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    found = {}
    for name, start in (
        ("two", ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH), "-m", "infalign"]),
        ("one", ["-m", "infalign"]),
    ):
        recipe = tmp_path / f"{name}.yaml"
        batch = 4 if name == "two" else 8
        values = {**keys, "output_dir": str(tmp_path / name), "per_device_train_batch_size": batch}
        recipe.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-W", "ignore", *start, "run", "--config", str(recipe)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report: ") == 1, "only rank 0 speaks"
        found[name] = done.stdout
    two, one = tables(tmp_path / "two"), tables(tmp_path / "one")
    assert two["calibration"] == one["calibration"]
    assert two["evaluation/base"] == one["evaluation/base"]
    logs = [json.loads((tmp_path / name / "policy" / "training_log.json").read_text()) for name in ("two", "one")]
    first = [next(row for row in log if "reward/calibrated" in row) for log in logs]
    assert first[0]["reward/calibrated"] == pytest.approx(first[1]["reward/calibrated"], abs=1e-6)
    kls = [json.loads((tmp_path / name / "evaluation.json").read_text())["kl"]["mean"] for name in ("two", "one")]
    np.testing.assert_allclose(kls[0], kls[1], atol=0.05)
    prompts_seen = next(row["num_tokens"] for row in logs[0] if "num_tokens" in row)
    assert prompts_seen == next(row["num_tokens"] for row in logs[1] if "num_tokens" in row), "world size is not 2"
