"""A user's mistake under a launcher is told once, and a launcher that starts too few processes is found out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from tests.e2e.experiment import tiny_experiment

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--cpu"]


def launched(launcher: list[str], *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "-m", *words]
    names = {"OMP_NUM_THREADS": "1", **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE", "RANK")}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**kept, **names},
        timeout=200,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("infalign: error:")]


def test_a_mistake_that_every_rank_finds_is_told_once_under_torchrun():
    done = launched(TORCHRUN, "infalign", "train", "--config", "nowhere.yaml")
    assert done.returncode != 0
    assert told(done) == ["infalign: error: no recipe at nowhere.yaml: give --config the path of a YAML file"]


@pytest.mark.slow
def test_a_mistake_that_the_connected_ranks_find_is_told_once(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**tiny_experiment(tmp_path), "normalize_advantages": True}))
    done = launched(TORCHRUN, "infalign", "train", "--config", str(recipe))
    assert done.returncode != 0
    assert len(told(done)) == 1 and "normalize_advantages=True: rescales" in told(done)[0]


SAYS = "import os; from infalign.runtime.distributed import first_to_say; print(first_to_say(os.environ['TEXT']))"


def test_a_mistake_of_one_rank_alone_is_told(tmp_path):
    """Whichever rank it is; the same text a second time is not, and without a launcher all is."""

    def says(text: str, **environment: str) -> str:
        names = {**os.environ, "TMPDIR": str(tmp_path), "TEXT": text, **environment}
        return subprocess.run(
            [sys.executable, "-c", SAYS], capture_output=True, text=True, env=names, check=True
        ).stdout

    second, first = {"WORLD_SIZE": "2", "RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}
    found = [says("a", **second), says("a", **first), says("b", **second), says("a"), says("a")]
    assert [one.strip() for one in found] == ["True", "False", "True", "True", "True"]
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    says("c", **first)
    assert len(list(tmp_path.iterdir())) == 1, "old files go"


def test_accelerate_that_starts_one_process_is_found_out():
    done = launched([*ACCELERATE, "--num_processes", "2"], "infalign", "train", "--config", "nowhere.yaml")
    assert done.returncode != 0
    [line] = told(done)
    assert line.startswith("infalign: error: 2 processes were asked for and 1 started: `accelerate launch` starts one")


@pytest.mark.parametrize(("count", "environment"), [("1", {}), ("1", {"MASTER_ADDR": "10.0.0.1"})])
def test_one_process_may_be_asked_for(count, environment):
    """A cluster may say where to meet, whatever accelerate starts."""
    words = ("infalign", "train", "--config", "nowhere.yaml")
    done = launched([*ACCELERATE, "--num_processes", count], *words, **environment)
    assert told(done) == ["infalign: error: no recipe at nowhere.yaml: give --config the path of a YAML file"]


WAITS = """
import sys, time
from datetime import timedelta
from infalign.runtime.distributed import barrier, is_main
from infalign.runtime.launch import join

join(use_cpu=True, wait=timedelta(seconds=float(sys.argv[1])))
barrier()
if is_main():
    time.sleep(float(sys.argv[2]))
barrier()
print("together")
"""


@pytest.mark.slow
def test_ranks_wait_as_long_as_they_are_told(tmp_path):
    """Where one rank measures for long, the others must not give up on it; torchrun ends the one that sleeps."""
    (tmp_path / "waits.py").write_text(WAITS)
    run = [sys.executable, *["-m", *TORCHRUN], str(tmp_path / "waits.py")]
    plain = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE", "RANK")}
    patient, not_patient = (
        subprocess.run([*run, wait, sleep], capture_output=True, text=True, env=plain, timeout=300, check=False)
        for wait, sleep in (("200", "6"), ("3", "200"))
    )
    assert patient.returncode == 0 and patient.stdout.count("together") == 2, patient.stderr[-2000:]
    assert not_patient.returncode != 0 and "together" not in not_patient.stdout
