"""Two processes under cpu_ddp, cpu_zero2 and cpu_zero3: exact resume, invariance, failures on one rank.

One launch per file does all checks (`worker.py`): starting and DeepSpeed's first compilation are what takes the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_causal

ROOT = Path(__file__).parents[2]
CHECKS = [
    "resume",
    "resume_buffered",
    "resume_lora",
    "resume_offline",
    "offline_invariance",
    "sharded_rollouts",
    "padded_batches",
    "evaluate",
    "reward_fails_on_one_rank",
    "reward_of_a_group_fails_on_one_rank",
    "wrong_count_on_one_rank",
    "reward_is_late_on_one_rank",
    "nan_loss_on_one_rank",
    "nan_loss_stays",
    "non_finite_weights_are_not_saved",
    "invariance",
    "groups_over_ranks",
    "interpolated",
]
SHARDING = {"cpu_ddp": "none", "cpu_zero2": "zero2", "cpu_zero3": "zero3"}
TIME_OUT = 420  # seconds: a rank that waits for ever fails the test

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=SHARDING)
def launched(request, tmp_path_factory):
    """The launch file's name and what the worker wrote under it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_causal(folder / "model", "llama")
    file = ROOT / "launch" / f"{request.param}.yaml"
    start = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command = [*start, str(Path(__file__).parent / "worker.py"), str(folder), *CHECKS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIME_OUT, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return request.param, folder


def result(launched, check):
    return json.loads((launched[1] / f"{check}.json").read_text())


@pytest.mark.parametrize("check", ["resume", "resume_buffered", "resume_lora", "resume_offline"])
def test_resumed_equals_uninterrupted_bit_by_bit(check, launched):
    found = result(launched, check)
    assert found["processes"] == 2, "the launcher started one process"
    assert found["sharding"] == SHARDING[launched[0]]
    assert found["steps"] == 6
    assert found["moved"] > 1e-4, "training moves no weight"
    assert found["differing"] == []
    assert found["same_log"]
    assert abs(found["kl"][0]) < 1e-4


@pytest.mark.parametrize(
    ("check", "alone"),
    [("invariance", "whole_batch"), ("groups_over_ranks", "whole_groups"), ("offline_invariance", "whole_offline")],
)
def test_two_processes_train_like_one(check, alone, launched, one_process):
    """Eight rollouts, 4 + 4 on two processes: losses and weights with SGD, in float64 (ZeRO-3: float32)."""
    losses, weights, _ = one_process[alone]
    found = result(launched, check)
    assert found["dtype"] == ("torch.float32" if launched[0] == "cpu_zero3" else "torch.float64")
    assert max(abs(loss) for loss in losses) > 1e-2, "a loss of zero compares nothing"
    np.testing.assert_allclose(found["losses"], losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.load(launched[1] / check / "weights.npy"), weights, atol=1e-5, rtol=0)


def test_two_processes_move_the_weights_like_one(launched, one_process):
    """To where the KL of samples on both is the target; sharded weights stay where training left them."""
    found = result(launched, "interpolated")
    if launched[0] == "cpu_zero3":
        assert found["weight"] is None
        return
    _, weights, weight = one_process["whole_interpolated"]
    assert weight != 1.0 and found["weight"] == pytest.approx(weight, abs=1e-4)
    np.testing.assert_allclose(np.load(launched[1] / "interpolated" / "weights.npy"), weights, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses, weights and place on the line from the base of one process with a batch of eight."""
    folder, checks = (
        tmp_path_factory.mktemp("one"),
        ["whole_batch", "whole_groups", "whole_interpolated", "whole_offline"],
    )
    tiny_causal(folder / "model", "llama")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "worker.py"), str(folder), *checks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIME_OUT, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    told = {check: json.loads((folder / f"{check}.json").read_text()) for check in checks}
    return {
        check: (one["losses"], np.load(folder / check / "weights.npy"), one["weight"]) for check, one in told.items()
    }


def test_held_out_evaluation_of_an_odd_number_of_prompts(launched):
    metrics = result(launched, "evaluate")["metrics"]
    assert metrics[0] == metrics[1]
    assert 0 < metrics[0]["eval_winrate"] < 1


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("reward_fails_on_one_rank", "RewardError: rank 1: reward 'fails' failed once"),
        ("reward_of_a_group_fails_on_one_rank", "RewardError: rank 1: reward 'fails_early' failed once"),
        ("wrong_count_on_one_rank", "RewardError: rank 1: reward 'short' returned 3 values for 4 completions"),
        ("reward_is_late_on_one_rank", "RewardError: rank 1: reward 'late' failed once (TimeoutError"),
        ("nan_loss_stays", "TrainingError: 3 steps in a row"),
        ("non_finite_weights_are_not_saved", "TrainingError: the policy's weights are not finite"),
    ],
)
def test_one_failing_rank_stops_all_with_one_message(check, message, launched):
    found = result(launched, check)
    assert found["errors"][0].startswith(message)
    assert found["errors"][1].startswith("PeerError"), "the other rank is silent"
    assert found["seconds"] < 60


def test_rollouts_of_sharded_weights_keep_step(launched):
    found = result(launched, "sharded_rollouts")
    assert len(found["True"]) == 2
    np.testing.assert_allclose(found["False"], found["True"], rtol=1e-6)


def test_padded_batches_train_alike(launched):
    found = result(launched, "padded_batches")
    assert len(found["1"]) == 3 and found["8"] == pytest.approx(found["1"], abs=1e-6)


def test_a_step_with_a_nan_loss_is_left_out(launched):
    assert result(launched, "nan_loss_on_one_rank") == {"skipped": 1, "finite": True, "steps": 3}


def test_weights_that_are_not_finite_leave_no_file(launched):
    assert result(launched, "non_finite_weights_are_not_saved")["files"] == []
