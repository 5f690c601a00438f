r"""Several processes: a verb executes itself again through `accelerate launch`.

`infalign train --accelerate_config zero3 --num_processes 8 --config r.yaml` becomes

    python -m accelerate.commands.launch --config_file launch/zero3.yaml --num_processes 8 \
        -m infalign train --config r.yaml

after the recipe has been read, so that a mistake in it is one line and exit code 2 and not one traceback a process.
A process that a launcher started (WORLD_SIZE is in its environment) never launches again.

Each process checks that as many were started as were asked for (`check_started`): accelerate's MULTI_CPU and `"NO"`
start one, whatever `num_processes` says, and nobody would notice.

This module imports neither torch nor accelerate.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil

from infalign.runtime.builds import clear_abandoned_locks
from infalign.runtime.config import nearest, read_yaml
from infalign.runtime.console import notice
from infalign.runtime.distributed import world_size
from infalign.types import InputError

FLAGS = {
    "accelerate_config": "launch on several processes: a name in launch/ (zero3, ...) or the path of a YAML file",
    "num_processes": "processes on all machines together; unset: the file's",
    "num_machines": "machines; unset: the file's",
    "machine_rank": "this machine's number, from 0",
    "main_process_ip": "address of machine 0",
    "main_process_port": "a free port there (one machine: 0 finds one)",
    "gpu_ids": "which GPUs of this machine: all, or 0,1,2",
}
EXPECTED = "INFALIGN_EXPECTED_PROCESSES"
_LEAST = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}

_PR_SET_PDEATHSIG = 1  # of Linux' prctl
_STAGES: dict[str, Literal["zero1", "zero2", "zero3"]] = {"1": "zero1", "2": "zero2", "3": "zero3"}


@dataclass(frozen=True)
class Launch:
    """A checked launch: accelerate's file, the flags for it (in its words), and what they come to."""

    path: Path
    flags: Mapping[str, str]
    processes: int
    use_cpu: bool

    def command(self, verb: str, words: Sequence[str]) -> list[str]:
        """The command line that starts `infalign VERB WORDS...` on every process."""
        given = [word for name, value in self.flags.items() for word in (f"--{name}", value)]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self.path), *given]
        stay = ["--use_cpu"] if self.use_cpu and not any(_name(word) == "use_cpu" for word in words) else []
        return [*launcher, "-m", "infalign", verb, *words, *stay]

    def environment(self) -> dict[str, str]:
        """What the processes need to know: how many they should be, and that DeepSpeed stays on the CPU."""
        return {EXPECTED: str(self.processes)} | ({"DS_ACCELERATOR": "cpu"} if self.use_cpu else {})

    def start(self, verb: str, words: Sequence[str]) -> None:
        """Become the launcher: does not return."""
        command = self.command(verb, words)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], command, {**os.environ, **self.environment()})


def keys_of(recipe: Path) -> dict[str, str]:
    """The launch flags that a recipe sets as keys, as TRL's YAMLs do; none inside a launcher, which has had them."""
    if "WORLD_SIZE" in os.environ or not recipe.is_file():
        return {}
    return {name: str(value) for name, value in read_yaml(recipe).items() if name in FLAGS and value is not None}


def take_flags(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The launch flags among a verb's words, and the other words.

    >>> take_flags(["--accelerate_config", "zero3", "--config", "r.yaml", "--num-processes=8"])
    ({'accelerate_config': 'zero3', 'num_processes': '8'}, ['--config', 'r.yaml'])

    Raises:
        InputError: a launch flag without a value, with several, or given twice.
    """
    flags: dict[str, str] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name = _name(word)
        if name not in FLAGS:
            rest.append(word)
            continue
        values = [word.partition("=")[2]] if "=" in word else []
        while "=" not in word and left and not left[0].startswith("--"):
            values.append(left.pop(0))
        if name in flags:
            raise InputError(f"--{name} is given twice: keep one")
        if len(values) != 1 or not values[0]:
            raise InputError(f"--{name} takes one value, got {' '.join(values) or 'none'}: {FLAGS[name]}")
        flags[name] = values[0]
    return flags, rest


def _name(word: str) -> str:
    """`num_processes` of `--num-processes=8`; "" of a word that is no flag."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def plan(flags: Mapping[str, str]) -> Launch | None:
    """What the launch flags ask for; None when there are none, or when a launcher has started this process already.

    Raises:
        InputError: flags without --accelerate_config, an unknown file, numbers that can't be, or a missing package.
    """
    if not flags:
        return None
    numbers = _numbers(flags)
    if "WORLD_SIZE" in os.environ:
        notice(f"{', '.join(f'--{name}' for name in flags)} ignored: a launcher has started this process already")
        _check_count(numbers.get("num_processes", world_size()))
        return None
    name = flags.get("accelerate_config")
    if name is None:
        raise InputError(
            f"--{next(iter(flags))} needs a launch file: give --accelerate_config NAME (one of {', '.join(names())}, "
            "or the path of an accelerate YAML), or leave it out to run one process"
        )
    path = find_config(name)
    settings = read_yaml(path)
    processes = _check_file(path, settings, numbers)
    _check_machines(path, settings, flags, numbers, processes)
    given = {name: flags[name] for name in FLAGS if name in flags and name != "accelerate_config"}
    return Launch(path, given, processes, use_cpu=bool(settings.get("use_cpu")))


def _numbers(flags: Mapping[str, str]) -> dict[str, int]:
    """The flags that are numbers, checked."""
    numbers: dict[str, int] = {}
    for name, least in _LEAST.items():
        if name not in flags:
            continue
        text = flags[name]
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise InputError(f"--{name} must be a whole number from {least}, got {text!r}")
        numbers[name] = int(text)
    if numbers.get("main_process_port", 0) > 65535:
        raise InputError(f"--main_process_port must be at most 65535, got {flags['main_process_port']}")
    ids = flags.get("gpu_ids", "all")
    if ids != "all" and not all(one.isascii() and one.isdigit() for one in ids.split(",")):
        raise InputError(f"--gpu_ids must be all or numbers with commas (0,1,2), got {ids!r}")
    return numbers


def _check_file(path: Path, settings: Mapping[str, Any], numbers: Mapping[str, int]) -> int:
    """The number of processes that file and flags ask for; the file is accelerate's and its packages are there."""
    kind = str(settings.get("distributed_type", "")).upper()
    if not kind:
        raise InputError(f"{path} is no accelerate file: it has no distributed_type (see `accelerate config`)")
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise InputError(f"{path.name} needs DeepSpeed: pip install 'infalign[deepspeed]'")
    if "num_processes" in numbers:
        return numbers["num_processes"]
    if kind == "NO":  # accelerate starts one, whatever the file says
        return 1
    count = _whole(path, settings, "num_processes", -1)
    if count < 1:
        raise InputError(f"{path} does not say num_processes: give --num_processes")
    return count


def _whole(path: Path, settings: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = settings.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{path}: {name} must be a whole number, got {value!r}")
    return value


def _check_machines(
    path: Path, settings: Mapping[str, Any], flags: Mapping[str, str], numbers: Mapping[str, int], processes: int
) -> None:
    """Several machines: their processes come out even, each has a number, and all know where machine 0 is."""
    held = {"num_machines": 1, "machine_rank": 0, "main_process_port": 0}
    machines, rank, port = (numbers.get(name, _whole(path, settings, name, held[name])) for name in held)
    if rank >= machines:
        raise InputError(f"--machine_rank must be below the number of machines ({machines}), got {rank}")
    if machines == 1:
        return
    if processes % machines:
        raise InputError(
            f"{processes} processes can't be shared evenly by {machines} machines: --num_processes counts those of "
            f"all machines, e.g. {machines * max(1, processes // machines)}"
        )
    if not (flags.get("main_process_ip") or settings.get("main_process_ip")) or not port:
        raise InputError(
            f"{machines} machines need --main_process_ip and --main_process_port (not 0): the address of machine 0 "
            "and a free port there, the same on every machine"
        )


def find_config(name: str) -> Path:
    """The launch file behind a name or a path.

    Raises:
        InputError: there is none; the nearest name and all names are given.
    """
    path = Path(name).expanduser()
    found = [path, *(folder / f"{name}.yaml" for folder in config_folders())]
    for one in found:
        if one.is_file():
            return one.resolve()
    raise InputError(
        f"--accelerate_config {name!r} is unknown{nearest(name, names())} "
        f"(one of {', '.join(names())}, or the path of an accelerate YAML)"
    )


def config_folders() -> list[Path]:
    """Where the launch files lie: in the wheel, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [package / "share" / "launch", package.parent / "launch"]


def names() -> list[str]:
    """The names that `--accelerate_config` knows."""
    return sorted({path.stem for folder in config_folders() for path in folder.glob("*.yaml")})


def check_started() -> None:
    """As many processes run as the command that launched them asked for, be it infalign or accelerate.

    Raises:
        InputError: another number (accelerate starts one for MULTI_CPU and for `"NO"`, whatever num_processes says).
    """
    expected = os.environ.get(EXPECTED, "")
    if expected.isdigit():
        _check_count(int(expected))
        return
    wanted = _asked_of_accelerate()
    if wanted is not None:
        raise InputError(
            f"{wanted} processes were asked for and 1 started: `accelerate launch` starts one with --cpu, MULTI_CPU or "
            "NO, whatever --num_processes says; on CPUs: infalign VERB --accelerate_config cpu_ddp --num_processes N"
        )


def join(use_cpu: bool = False, wait: timedelta | None = None) -> None:
    """Under a launcher, set up the process group (once) so that ranks can wait for each other.

    `wait` is how long; None is the backend's own limit (ten minutes on GPUs), which is short where one rank measures.

    On Linux a rank is told to end (SIGTERM) when its launcher is killed, which could not tell it. A lock that a killed
    run left on DeepSpeed's compiled ops goes first: everyone would wait for it.
    """
    if world_size() > 1:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and os.environ.get("LOCAL_RANK", "0") == "0":
            clear_abandoned_locks()
        from accelerate import PartialState  # noqa: PLC0415 - imports torch

        PartialState(cpu=use_cpu, **({} if wait is None else {"timeout": wait}))


def _asked_of_accelerate() -> str | None:
    """How many processes `accelerate launch` was asked for where it started this one alone; None: no more than that.

    It gives several processes an address to meet at, and one process none.
    """
    if "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    try:
        parent = psutil.Process(os.getppid())
        words, before = parent.cmdline(), parent.environ()
    except psutil.Error:
        return None
    if not any("accelerate" in word for word in words[:4]) or "MASTER_ADDR" in before:
        return None  # the cluster's, not accelerate's
    count = re.search(r"--num[_-]processes[= ](\d+)", " ".join(words))
    return count[1] if count else "several"


def _check_count(expected: int) -> None:
    if expected != world_size():
        raise InputError(
            f"{expected} processes were asked for and {world_size()} started: the launch file's distributed_type must "
            "be MULTI_GPU (on CPUs too, with use_cpu: true), DEEPSPEED or FSDP; MULTI_CPU and NO start one process"
        )


def sharding() -> Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]:
    """How the launcher's environment says that training is split."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return _STAGES.get(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), "ddp")
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "ddp"
