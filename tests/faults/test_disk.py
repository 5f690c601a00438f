"""A full disk: one line, exit code 1, nothing half-written passes as whole, and with room again the same result.

`RLIMIT_FSIZE` makes every write beyond a size fail with EFBIG, in Python, in safetensors, torch and pyarrow alike; on
Linux, where the rights are there, a file system of a few hundred KiB is really filled.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from infalign.cli import main
from infalign.runtime.artifacts import disk_errors, whole_folder, write_whole
from infalign.training.checkpoints import defect, newest_whole
from tests.e2e.experiment import tiny_experiment
from tests.e2e.test_kill import policy_of, table_of
from tests.tiny import tiny_tokenizer

resource = pytest.importorskip("resource")
LINE = "make room and run the same command again; what was finished is kept\n"
SHARD = "00000.parquet"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


REWARD = """
import resource
from pathlib import Path

HERE = Path(__file__).parent


def reward(completion_ids, trainer_state=None, **_):
    if trainer_state is not None and (HERE / "limit").exists():
        step, size = map(int, (HERE / "limit").read_text().split())
        if trainer_state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return [sum(ids) + 0.01 * ids[0] for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A recipe with a finished calibration in `out`, and all of an uninterrupted training in `whole`.

    The file `limit` beside the reward says from which training step on no larger file can be written.
    """
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "filling.py").write_text(REWARD)
    keys = tiny_experiment(folder) | {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 5}
    keys |= {"reward": f"{folder / 'filling.py'}:reward", "tokens_per_batch": 400, "steps_per_generation": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys | {"per_device_train_batch_size": 4}))
    assert main(command(folder, "calibrate", folder / "out")) == 0
    shutil.copytree(folder / "out", folder / "whole")
    assert main(command(folder, "train", folder / "whole")) == 0
    return folder


def command(folder: Path, verb: str, output: Path, *flags: str) -> list[str]:
    return [verb, "--config", str(folder / "recipe.yaml"), "--output_dir", str(output), *flags]


@pytest.fixture
def output(experiment, tmp_path):
    """A copy of the finished calibration."""
    shutil.copytree(experiment / "out", tmp_path / "out")
    return tmp_path / "out"


def no_room(words: list[str], size: int, capsys) -> None:
    """The command ends with one line and exit code 1 while no file may be larger than `size`."""
    capsys.readouterr()
    with largest_file(size):
        assert main(words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith("infalign: ")]
    assert len(lines) == 1 and lines[0].startswith("infalign: error: ") and lines[0].endswith(LINE)
    assert "File too large" in lines[0]


@pytest.mark.parametrize(("too_large", "there"), [("recipe.json", []), (SHARD, ["plan.json", "prompts.parquet"])])
def test_during_calibration(too_large, there, experiment, tmp_path, capsys):
    """The recipe's record or a shard: what is there is whole, and a rerun makes the table of an uninterrupted run."""
    words = command(experiment, "calibrate", tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in (experiment / "out").rglob("*.*")}
    assert sizes["recipe.json"] < sizes[SHARD] == max(sizes.values())  # or the size below stops something else
    size = sizes[too_large] - 100
    no_room(words, size, capsys)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == sorted(there + ["recipe.json"] * bool(there))
    assert main(words) == 0
    assert table_of(tmp_path / "out") == table_of(experiment / "out")


@pytest.fixture
def limit(experiment):
    """Write down from which step on which size is the largest; gone after the test."""
    path = experiment / "limit"
    yield lambda step, size: path.write_text(f"{step} {size}")
    path.unlink()


@pytest.mark.parametrize("size", [50_000, 150_000], ids=["weights", "optimizer"])
def test_during_a_checkpoint(size, experiment, output, limit, capsys):
    """The third checkpoint does not fit: the second stays, and a rerun goes on from it, bit by bit."""
    words = command(experiment, "train", output)
    limit(2, size)
    no_room(words, resource.RLIM_INFINITY, capsys)
    policy = output / "policy"
    newest, skipped = newest_whole(policy)
    assert newest == policy / "checkpoint-2" and defect(newest) is None
    ((broken, why),) = skipped
    assert broken.name == "checkpoint-3" and "was not written to its end" in why
    assert not (policy / "manifest.json").exists()
    limit(99, 0)
    assert main(words) == 0
    assert f"checkpoint-3 is skipped: {why}" in capsys.readouterr().err
    assert policy_of(output) == policy_of(experiment / "whole")


def test_during_the_final_save(experiment, output, limit, capsys):
    """No manifest, so no policy; a rerun trains again."""
    words = command(experiment, "train", output, "--save_strategy", "no")
    limit(2, 50_000)
    no_room(words, resource.RLIM_INFINITY, capsys)
    assert not (output / "policy" / "manifest.json").exists()
    assert main(command(experiment, "evaluate", output)) == 2
    assert "no finished policy" in capsys.readouterr().err
    limit(99, 0)
    assert main(words) == 0
    assert policy_of(output) == policy_of(experiment / "whole")


def test_during_the_final_save_after_the_last_checkpoint(experiment, output, capsys):
    """A rerun goes on from the checkpoint of the last step: it only saves."""
    words = command(experiment, "train", output)
    assert main(words) == 0
    (output / "policy" / "manifest.json").unlink()
    capsys.readouterr()
    with largest_file(50_000):
        assert main(words) == 1
    assert capsys.readouterr().err.endswith(LINE)
    assert main(words) == 0
    assert policy_of(output) == policy_of(experiment / "whole")


WRITERS = {
    "text": lambda path: path.write_text("a" * 50_000),
    "safetensors": lambda path: save_file({"a": torch.zeros(20_000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(20_000)}, path),
    "many small tensors": lambda path: torch.save([torch.zeros(100) for _ in range(200)], path),
    "parquet": lambda path: pq.write_table(pa.table({"a": torch.randn(20_000).numpy()}), path),
    "tokenizer": lambda path: tiny_tokenizer([f"w{number}" for number in range(3000)]).save_pretrained(path.parent),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_library_ends_with_the_systems_own_error(writer, tmp_path):
    with largest_file(10_000), pytest.raises(OSError, match="File too large") as caught, disk_errors(tmp_path):
        WRITERS[writer](tmp_path / "file")
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("writer", sorted(set(WRITERS) - {"tokenizer"}))
def test_files_and_folders_are_whole_or_not_there(writer, tmp_path):
    with largest_file(10_000):
        with pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "file", WRITERS[writer])
        with pytest.raises(OSError, match="File too large"), whole_folder(tmp_path / "folder") as folder:
            WRITERS[writer](folder / "file")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_as_they_are(tmp_path):
    for error in (RuntimeError("out of memory"), ValueError("x"), FileNotFoundError(2, "gone", "y")):
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
            raise error
        assert caught.value is error
    damaged = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    with pytest.raises(RuntimeError) as caught, disk_errors(tmp_path):  # there is room: the disk is not to blame
        raise damaged
    assert caught.value is damaged
    with pytest.raises(OSError, match="quota") as quota, disk_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")
    assert quota.value.errno == errno.EDQUOT
    assert list(tmp_path.iterdir()) == []


HARNESS = """
import contextlib, io, subprocess, sys
from pathlib import Path

import torch

torch.set_num_threads(int(sys.argv[3]))
from infalign.cli import main

folder = Path(sys.argv[1])
for size in map(int, sys.argv[4:]):
    disk = Path(sys.argv[2]) / str(size)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
    subprocess.run([*mount, "-o", f"size={size}k"], check=True)
    words = ["run", "--config", str(folder / "recipe.yaml"), "--output_dir", str(disk / "out")]
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = main(words)
    lines = [line for line in told.getvalue().splitlines() if line.startswith("infalign: ")]
    print("FULL", size, code, lines, flush=True)
    subprocess.run([*mount, "-o", "remount,size=64m"], check=True)
    assert main(words) == 0
    subprocess.run(["cp", "-r", str(disk / "out"), str(folder / f"full-{size}")], check=True)
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(experiment, tmp_path):
    """`run` on a file system of so many KiB, then with room: each size fails somewhere else, all end alike."""
    alone = ["unshare", "--mount", "--map-root-user"]
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(
            [*alone, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a file system is not allowed here")
    sizes = [8, 24, 160, 420, 1300]
    words = [*alone, sys.executable, "-W", "ignore", "-c", textwrap.dedent(HARNESS), str(experiment), str(tmp_path)]
    numbers = map(str, [torch.get_num_threads(), *sizes])  # another number of threads rounds otherwise
    done = subprocess.run([*words, *numbers], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("FULL ")]
    print("\n".join(told))
    assert len(told) == len(sizes)
    for line in told:
        assert line.endswith("']") and " 1 ['infalign: error: " in line and LINE.strip() in line
    for size in sizes:
        assert table_of(experiment / f"full-{size}") == table_of(experiment / "out")
        assert policy_of(experiment / f"full-{size}") == policy_of(experiment / "whole")
