"""A lock of a killed compilation goes; one that somebody holds stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from infalign.runtime.builds import YOUNG, clear_abandoned_locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds PyTorch's lock on an extension."""
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process, lock
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lock_is_removed_once_its_holder_is_killed(holder, tmp_path, capsys):
    process, lock = holder
    assert clear_abandoned_locks(tmp_path) == [] and lock.exists(), "it builds"
    process.kill()
    process.wait()
    assert lock.exists(), "PyTorch leaves it behind"
    assert clear_abandoned_locks(tmp_path) == [lock] and not lock.exists()
    assert f"removed {lock}" in capsys.readouterr().err
    assert clear_abandoned_locks(tmp_path) == []


def test_several_machines_share_the_folder(tmp_path, monkeypatch):
    """What another machine holds can't be seen from here: only an old lock goes."""
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    (tmp_path / "cpu_adam").mkdir()
    lock = tmp_path / "cpu_adam" / "lock"
    lock.touch()
    assert clear_abandoned_locks(tmp_path) == []
    os.utime(lock, (time.time() - YOUNG - 1,) * 2)
    assert clear_abandoned_locks(tmp_path) == [lock]


def test_no_folder_is_no_trouble(tmp_path):
    assert clear_abandoned_locks(tmp_path / "nowhere") == []
