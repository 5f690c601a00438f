"""Every failure of a reward at a random step on a random one of two processes: all stop, or all go on, alike."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_rewards import BROKEN, FAILURES, SILENT, message_of
from tests.tiny import tiny_causal

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `worker.py` wrote: one launch for all failures."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_causal(folder / "model", "llama")
    start = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--config_file"]
    words = [*start, str(ROOT / "launch" / "cpu_ddp.yaml"), str(Path(__file__).parent / "worker.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "faults.json").read_text())


def test_both_ranks_and_several_steps_were_hit(found):
    assert {one["rank"] for one in found.values()} == {0, 1}
    assert len({one["step"] for one in found.values()}) > 1


@pytest.mark.parametrize("kind", [*FAILURES, *BROKEN])
def test_error_stops_all_with_one_message(kind, found):
    one = found[f"{kind}, error"]
    where = "" if one["rank"] == 0 else "rank 1: "
    assert re.match(f"RewardError: {where}reward 'mine' {message_of(kind, 4)}", one["errors"][0]), one["errors"]
    assert one["errors"][1].startswith("PeerError: "), "the other rank is silent"
    assert one["newest"] == f"checkpoint-{one['step']}"
    assert one["seconds"] < 30


@pytest.mark.parametrize("kind", [*FAILURES, *SILENT])
def test_mask_goes_on_alike(kind, found):
    one = found[f"{kind}, mask"]
    assert one["errors"] == [None, None] and one["finite"] and one["alike"]
    assert [share > 0 for share in one["unscored"]] == [number == one["step"] for number in range(3)], one
