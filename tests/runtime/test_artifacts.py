"""Artifacts: whole or not at all, and known by what they depend on."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from infalign.runtime.artifacts import (
    at_work,
    differences,
    fingerprint,
    read_json,
    read_manifest,
    sweep_temporaries,
    whole_folder,
    write_json,
    write_manifest,
    write_whole,
)
from infalign.runtime.console import Progress, clock
from infalign.runtime.seeds import stream, uniforms
from infalign.types import InputError


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert json.loads(path.read_text()) == {"value": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with whole_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), whole_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("new")
        raise RuntimeError("stop")
    assert (tmp_path / "f" / "x").read_text() == "old"
    with whole_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "f" / "x").read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["f"]


def test_leftovers_are_swept(tmp_path):
    (tmp_path / ".a.parquet.1234.tmp").write_text("half")
    (tmp_path / ".b.5678.tmp").mkdir()
    (tmp_path / "kept").write_text("whole")
    sweep_temporaries(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]


def test_manifest(tmp_path):
    assert read_manifest(tmp_path, "policy") is None
    write_manifest(tmp_path, "policy", {"beta": 0.1}, steps=3)
    manifest = read_manifest(tmp_path, "policy")
    assert manifest["fingerprint"] == fingerprint({"beta": 0.1}) and manifest["steps"] == 3
    assert "torch" in manifest["versions"]
    with pytest.raises(InputError, match="holds a 'policy', not a 'calibration'"):
        read_manifest(tmp_path, "calibration")
    write_json(tmp_path / "manifest.json", {**manifest, "format": 99})
    with pytest.raises(InputError, match="has format 99"):
        read_manifest(tmp_path, "policy")
    (tmp_path / "manifest.json").write_text('{"half')
    with pytest.raises(InputError, match=r"manifest .* is damaged"):
        read_manifest(tmp_path, "policy")


def test_differences_name_what_differs():
    assert differences({"a": 1, "b": [1, 2], "gone": 1}, {"a": 1, "b": [1, 3], "new": "x"}) == [
        "b: [1, 2] -> [1, 3]", "gone: 1 -> null", 'new: null -> "x"',
    ]  # fmt: skip
    assert read_json.__doc__


def test_streams_differ_in_every_name_and_nothing_else():
    base = uniforms(0, "k", 1, 50)
    for other in (uniforms(1, "k", 1, 50), uniforms(0, "l", 1, 50), uniforms(0, "k", 2, 50)):
        assert np.abs(np.corrcoef(base, other)[0, 1]) < 0.6 and not np.array_equal(base, other)
    np.testing.assert_array_equal(base, uniforms(0, "k", 1, 50))
    assert stream(0, "a", "bc").random() != stream(0, "ab", "c").random()


def test_streams_are_uniform():
    values = np.concatenate([uniforms(7, f"key{i}", j, 20) for i in range(50) for j in range(20)])
    assert np.abs(np.sort(values) - (np.arange(values.size) + 0.5) / values.size).max() < 0.012


def test_progress_says_what_was_done(capsys):
    with Progress("work", 3, "pieces", done=1) as progress:
        progress.advance(2)
    assert "work: 2 pieces in" in capsys.readouterr().out
    with Progress("", 1) as progress:
        progress.advance()
    assert capsys.readouterr().out == ""
    assert clock(3600) == "1h00m"


def test_two_processes_never_work_in_one_folder(tmp_path):
    """The second is refused with the first one's number; when the first is killed, its lock goes with it."""
    code = "import sys, time; from pathlib import Path; from infalign.runtime.artifacts import at_work\n"
    code += "with at_work(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        with pytest.raises(InputError, match=rf"pid {first.pid}\) is at work in .*out"), at_work(tmp_path / "out"):
            pass
        with at_work(tmp_path / "another"):
            pass
    finally:
        first.kill()
        first.wait()
    with at_work(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()
