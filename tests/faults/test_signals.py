"""SIGTERM in the middle of a training: a whole checkpoint, one line, exit code 143; run again, the same policy."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from infalign.cli import main
from infalign.training.checkpoints import defect, newest_whole
from tests.e2e.experiment import tiny_experiment
from tests.e2e.test_kill import policy_of

ROOT = Path(__file__).parents[2]
REWARD = """
import time
from pathlib import Path

HERE = Path(__file__).parent


def reward(completion_ids, trainer_state=None, **_):
    if trainer_state is not None and trainer_state.global_step == 4 and (HERE / "hold").exists():
        (HERE / "reached").touch()
        while (HERE / "hold").exists():
            time.sleep(0.01)
    return [sum(ids) + 0.01 * ids[0] for ids in completion_ids]
"""


def start(folder: Path, output: Path, *launcher: str) -> subprocess.Popen:
    """`infalign train` in a process of its own."""
    words = [*(launcher or ("-m", "infalign")), *command(folder, "train", output)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def command(folder: Path, verb: str, output: Path) -> list[str]:
    return [verb, "--config", str(folder / "recipe.yaml"), "--output_dir", str(output)]


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err[-3000:]
    return out, err


def wait_until_reached(folder: Path, process: subprocess.Popen) -> None:
    """Until the reward is held at its marked step."""
    limit = time.monotonic() + 120
    while not (folder / "reached").exists():
        assert process.poll() is None and time.monotonic() < limit, "the training ended or never came so far"
        time.sleep(0.01)


def start_and_terminate(folder: Path, output: Path, *launcher: str) -> subprocess.Popen:
    """The same, with a SIGTERM while the fifth step waits for its rewards (the first of a generation of two steps)."""
    (folder / "hold").touch()
    (folder / "reached").unlink(missing_ok=True)
    process = start(folder, output, *launcher)
    try:
        wait_until_reached(folder, process)
        process.send_signal(signal.SIGTERM)
        time.sleep(3.0 if launcher else 0.2)  # a launcher hands it on
    finally:
        (folder / "hold").unlink()
    return process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe with two steps a generation, and its calibration in `out`."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "marked.py").write_text(REWARD)
    keys = tiny_experiment(folder) | {"reward": f"{folder / 'marked.py'}:reward", "max_steps": 8}
    keys |= {"per_device_train_batch_size": 4, "steps_per_generation": 2, "save_strategy": "no"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    assert main(command(folder, "calibrate", folder / "out")) == 0
    return folder


@pytest.fixture
def outputs(folder, tmp_path):
    """Two copies of the calibration: for the training that is stopped, and the one that is not."""
    return [shutil.copytree(folder / "out", tmp_path / name) for name in ("stopped", "whole")]


def test_sigterm_saves_a_checkpoint_and_a_rerun_ends_with_the_same_policy(folder, outputs, capsys):
    stopped, whole = outputs
    process = start_and_terminate(folder, stopped)
    out, err = finish(process, 143)
    line = "stopped by SIGTERM at step 5 of 8, a checkpoint is saved: run the same command again to continue"
    assert [one for one in out.splitlines() if one.startswith("infalign")] == [f"infalign: {line}"]
    assert "Traceback" not in err and "infalign" not in err
    newest, skipped = newest_whole(stopped / "policy")
    assert newest == stopped / "policy" / "checkpoint-5" and defect(newest) is None and not skipped
    assert not (stopped / "policy" / "manifest.json").exists()
    assert main(command(folder, "train", stopped)) == main(command(folder, "train", whole)) == 0
    assert "continuing from checkpoint-5" in capsys.readouterr().out
    assert policy_of(stopped) == policy_of(whole)


@pytest.mark.slow
def test_sigterm_to_a_launcher_reaches_both_processes(folder, outputs):
    """Slurm's way: the launcher gets the signal, hands it on, and waits for the checkpoint."""
    stopped, whole = outputs
    file = str(ROOT / "launch" / "cpu_ddp.yaml")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", file, "-m", "infalign")
    finish(start(folder, whole, *launcher))
    process = start_and_terminate(folder, stopped, *launcher)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0, "a scheduler must see that it did not end"
    assert out.count("infalign: stopped by SIGTERM at step ") == 1, (out, err[-3000:])
    newest, skipped = newest_whole(stopped / "policy")
    assert newest is not None and defect(newest) is None and not skipped
    assert (newest / "rollouts-1.safetensors").exists(), "one process trained, not two"
    out, _ = finish(start(folder, stopped, *launcher))
    assert f"continuing from {newest.name}" in out
    found, expected = (load_file(output / "policy" / "model.safetensors") for output in outputs)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is Linux' to tell")
def test_processes_end_with_their_launcher(folder, outputs):
    """SIGKILL to the launcher, which can hand nothing on: its processes save and end, and a rerun finishes."""
    stopped, _ = outputs
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / "cpu_ddp.yaml"),
        "-m",
        "infalign",
    )
    (folder / "hold").touch()
    (folder / "reached").unlink(missing_ok=True)
    process = start(folder, stopped, *launcher)
    try:
        wait_until_reached(folder, process)
        workers = children(process.pid)
        assert len(workers) == 2
        process.kill()
        process.wait()
    finally:
        (folder / "hold").unlink()
    limit = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < limit, "processes without a launcher go on"
        time.sleep(0.1)
    assert not (stopped / "policy" / "manifest.json").exists(), "they trained to the end"
    finish(start(folder, stopped, *launcher))
    assert (stopped / "policy" / "manifest.json").exists()
