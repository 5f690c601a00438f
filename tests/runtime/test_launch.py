"""Launching: every file of launch/ is what its name says; a verb executes itself again with the right words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from infalign.cli import VERBS, main
from infalign.runtime import launch
from infalign.stages.recipe import load_recipe
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch"
FILES = {  # name: distributed type, processes, on the CPU, precision, fields of its own
    "single_gpu": ("NO", 1, False, "bf16", {}),
    "multi_gpu": ("MULTI_GPU", 8, False, "bf16", {}),
    "zero1": ("DEEPSPEED", 8, False, "bf16", {"zero_stage": 1, "zero3_init_flag": False}),
    "zero2": ("DEEPSPEED", 8, False, "bf16", {"zero_stage": 2, "offload_param_device": "none"}),
    "zero3": ("DEEPSPEED", 8, False, "bf16", {"zero_stage": 3, "offload_optimizer_device": "none"}),
    "zero3_offload": (
        "DEEPSPEED", 8, False, "bf16",
        {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"},
    ),
    "fsdp2": ("FSDP", 8, False, "bf16", {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
    "cpu_ddp": ("MULTI_GPU", 2, True, "no", {}),
    "cpu_zero2": ("DEEPSPEED", 2, True, "no", {"zero_stage": 2}),
    "cpu_zero3": ("DEEPSPEED", 2, True, "no", {"zero_stage": 3}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", launch.EXPECTED):
        monkeypatch.delenv(name, raising=False)


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_every_file(name):
    kind, processes, use_cpu, precision, own = FILES[name]
    found = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (found.distributed_type, found.num_processes, found.use_cpu) == (kind, processes, use_cpu)
    assert (found.mixed_precision, found.num_machines, found.machine_rank) == (precision, 1, 0)
    fields = {**found.deepspeed_config, **found.fsdp_config}
    assert own.items() <= fields.items()
    assert bool(found.deepspeed_config) == (kind == "DEEPSPEED") and bool(found.fsdp_config) == (kind == "FSDP")
    if fields.get("zero_stage") == 3:  # sharded from the start, saved whole
        assert fields["zero3_init_flag"] is True and fields["zero3_save_16bit_model"] is True
    if kind == "DEEPSPEED":
        assert fields["deepspeed_multinode_launcher"] == "standard"


def test_the_list_is_whole_and_every_file_says_what_it_is_for():
    assert launch.names() == sorted(FILES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        first, second, third = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:3]
        assert first.startswith("# ") and second.startswith("# ") and not third.startswith("#")
        assert f"`{name}.yaml`" in readme


@pytest.mark.parametrize("name", ["slurm_one_node.sh", "slurm_multi_node.sh"])
def test_slurm_files_only_call_the_command_line(name):
    path = FOLDER / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert "#SBATCH --signal=TERM@120" in text and "#SBATCH --requeue" in text
    assert 'infalign run --config "$1" --accelerate_config zero3' in text
    assert not {"grep", "sed", "awk", "yq", "python"} & set(text.split()), "a Slurm file parses nothing"


def test_the_slurm_file_of_several_machines_gives_every_machine_its_words(tmp_path):
    """Run with stand-ins for Slurm's commands and for infalign, which writes its words down."""
    stand_ins = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',
        "infalign": 'printf "%s\\n" "$@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(FOLDER / "slurm_multi_node.sh"), "my recipe.yaml", "--seed", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:3] == ["run", "--config", "my recipe.yaml"] and words[-2:] == ["--seed", "3"]
    flags, rest = launch.take_flags(words[1:])
    assert rest == ["--config", "my recipe.yaml", "--seed", "3"]
    planned = launch.plan(flags)
    assert planned is not None and planned.processes == 8
    assert flags["machine_rank"] == "1" and flags["main_process_ip"] == "node-a" and flags["num_machines"] == "2"


# --- words and plans --------------------------------------------------------------------------------------------------


def test_the_command():
    planned = launch.plan({"accelerate_config": "zero3", "num_processes": "4", "gpu_ids": "0,1,2,3"})
    assert planned is not None
    assert planned.command("train", ["--config", "r.yaml", "--seed=1"]) == [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "zero3.yaml"),
        "--num_processes", "4", "--gpu_ids", "0,1,2,3", "-m", "infalign", "train", "--config", "r.yaml", "--seed=1",
    ]  # fmt: skip
    assert planned.environment() == {launch.EXPECTED: "4"}


def test_launch_keys_of_a_recipe(tmp_path, monkeypatch):
    """As in TRL's YAMLs; flags win, the recipe itself knows nothing of them, and a launched process leaves them."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("accelerate_config: zero2\nnum_processes: 4\nseed: 7\n")
    assert launch.keys_of(recipe) == {"accelerate_config": "zero2", "num_processes": "4"}
    started = []
    monkeypatch.setattr(
        launch.Launch, "start", lambda self, verb, words: started.append((self, verb, words)) or sys.exit(0)
    )
    with pytest.raises(SystemExit):
        main(["train", "--config", str(recipe), "--num_processes", "2"])
    planned, verb, words = started[0]
    assert planned.path.stem == "zero2" and planned.processes == 2
    assert (verb, words) == ("train", ["--config", str(recipe)])
    assert load_recipe(recipe).seed == 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.keys_of(recipe) == {}


def test_a_cpu_file_keeps_every_library_on_the_cpu():
    planned = launch.plan({"accelerate_config": str(FOLDER / "cpu_zero2.yaml")})
    assert planned is not None
    assert planned.environment() == {launch.EXPECTED: "2", "DS_ACCELERATOR": "cpu"}
    assert planned.command("run", ["--config", "r.yaml"])[-1] == "--use_cpu"
    assert planned.command("run", ["--use-cpu", "true"])[-2:] == ["--use-cpu", "true"]


def test_without_launch_flags_nothing_changes():
    assert launch.plan({}) is None
    assert launch.take_flags(["--config", "r.yaml", "--num_generations", "4"])[0] == {}


def test_a_file_without_several_processes_starts_one(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text('distributed_type: "NO"\nnum_processes: 8\n')  # as TRL's single_gpu.yaml
    planned = launch.plan({"accelerate_config": str(path)})
    assert planned is not None and planned.processes == 1


MACHINES = {"accelerate_config": "zero3", "num_machines": "2"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": "8"}, "--num_processes needs a launch file: give --accelerate_config NAME"),
        (
            {"accelerate_config": "zero"},
            r"'zero' is unknown: did you mean 'zero\d'\? \(one of cpu_ddp, .*zero3_offload",
        ),
        ({"accelerate_config": "zero3", "num_processes": "two"}, "must be a whole number from 1, got 'two'"),
        ({"accelerate_config": "zero3", "num_processes": "-1"}, "must be a whole number from 1, got '-1'"),
        ({"accelerate_config": "zero3", "machine_rank": "1"}, r"below the number of machines \(1\), got 1"),
        ({"accelerate_config": "zero3", "main_process_port": "70000"}, "must be at most 65535, got 70000"),
        ({"accelerate_config": "zero3", "gpu_ids": "0,x"}, "--gpu_ids must be all or numbers with commas"),
        ({**MACHINES, "num_processes": "9"}, "9 processes can't be shared evenly by 2 machines.* e.g. 8"),
        ({**MACHINES, "main_process_port": "2345"}, "2 machines need --main_process_ip and --main_process_port"),
        ({**MACHINES, "main_process_ip": "a"}, "2 machines need --main_process_ip and --main_process_port"),
    ],
)
def test_flags_that_can_not_be(flags, message):
    with pytest.raises(InputError, match=message):
        launch.plan(flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: 2\n", "is no accelerate file: it has no distributed_type"),
        ("distributed_type: MULTI_GPU\n", "does not say num_processes: give --num_processes"),
        ("distributed_type: MULTI_GPU\nnum_processes: two\n", "num_processes must be a whole number, got 'two'"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nnum_machines: a\n", "num_machines must be a whole number"),
        ("- 1\n", "must hold `key: value` lines"),
    ],
)
def test_files_that_can_not_be(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        launch.plan({"accelerate_config": str(tmp_path / "mine.yaml")})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accelerate_config", "--config", "r.yaml"], "--accelerate_config takes one value, got none"),
        (["--num_processes", "2", "4"], "--num_processes takes one value, got 2 4"),
        (["--num_processes="], "--num_processes takes one value, got none"),
        (["--num_processes", "2", "--num-processes=2"], "--num_processes is given twice: keep one"),
    ],
)
def test_words_that_can_not_be(words, message):
    with pytest.raises(InputError, match=message):
        launch.take_flags(words)


# --- inside a launcher ------------------------------------------------------------------------------------------------


def test_inside_a_launcher_nothing_is_launched_again(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.plan({"accelerate_config": "zero3"}) is None
    assert "--accelerate_config ignored: a launcher has started this process" in capsys.readouterr().err
    assert launch.plan({"accelerate_config": "zero3", "num_processes": "2"}) is None
    with pytest.raises(InputError, match="8 processes were asked for and 2 started"):
        launch.plan({"accelerate_config": "zero3", "num_processes": "8"})


def test_the_number_of_processes_is_checked(monkeypatch):
    launch.check_started()
    monkeypatch.setenv(launch.EXPECTED, "2")
    with pytest.raises(InputError, match=r"2 processes were asked for and 1 started.*MULTI_CPU and NO start one"):
        launch.check_started()
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_started()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp2"),
    ],
)
def test_how_training_is_split(environment, expected, monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.sharding() == expected


# --- from the command line --------------------------------------------------------------------------------------------


class Replaced(Exception):
    """The process has become another one."""


@pytest.fixture
def replaced(monkeypatch):
    """What the process would have become: (command, environment)."""
    became = []

    def execve(_path, command, environment):
        became.append((command, environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    return became


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tiny_experiment(tmp_path)))
    return str(path)


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.launches])
def test_a_verb_executes_itself_again(verb, recipe, replaced):
    if verb == "reward-model":  # it has keys of its own
        keys = {name: yaml.safe_load(Path(recipe).read_text())[name] for name in ("model_name_or_path", "output_dir")}
        Path(recipe).write_text(yaml.safe_dump({**keys, "dataset_name": "pairs.jsonl", "use_cpu": True}))
    if verb == "sweep":
        keys = yaml.safe_load(Path(recipe).read_text())
        Path(recipe).write_text(yaml.safe_dump({**keys, "grid": {"seed": [1, 2]}}))
    if verb == "merge":
        models = [{"model": name, "parameters": {"weight": 1.0}} for name in ("one", "two")]
        plan = {"merge_method": "linear", "models": models, "output_dir": "out", "use_cpu": True}
        Path(recipe).write_text(yaml.safe_dump(plan))
    if verb == "forget":
        keys = {"model_name_or_path": "m", "tasks": {"a": {"path": "a.jsonl"}}, "output_dir": "out", "use_cpu": True}
        Path(recipe).write_text(yaml.safe_dump(keys))
    with pytest.raises(Replaced):
        main([verb, "--accelerate_config", "cpu_ddp", "--num_processes", "3", "--config", recipe, "--debug"])
    [(command, environment)] = replaced
    assert command[command.index("infalign") :] == ["infalign", verb, "--config", recipe, "--debug", "--use_cpu"]
    assert command[command.index("--num_processes") + 1] == "3" == environment[launch.EXPECTED]


def test_mistakes_in_the_recipe_come_before_the_launch(recipe, replaced, capsys):
    assert main(["train", "--accelerate_config", "cpu_ddp", "--config", recipe, "--lerning_rate", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not replaced


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "infalign", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)


@pytest.mark.slow
def test_multi_cpu_is_found_out(recipe, tmp_path):
    trap = tmp_path / "trap.yaml"
    trap.write_text((FOLDER / "cpu_ddp.yaml").read_text().replace("type: MULTI_GPU", "type: MULTI_CPU"))
    done = launched("calibrate", "--accelerate_config", str(trap), "--config", recipe)
    assert done.returncode != 0 and "2 processes were asked for and 1 started" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_train_on_two_processes(name, recipe, tmp_path):
    if "zero" in name:
        import deepspeed  # noqa: F401, PLC0415 - a missing install fails, it does not skip
    assert main(["calibrate", "--config", recipe]) == 0
    done = launched("train", "--accelerate_config", name, "--config", recipe, "--per_device_train_batch_size", "4")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("policy: ") == 1, "only rank 0 speaks"
    base, policy = (sum(one.numel() for one in load_file(path).values()) for path in (
        tmp_path / "model" / "model.safetensors", tmp_path / "out" / "policy" / "model.safetensors",
    ))  # fmt: skip
    assert base == policy, "the saved policy is whole"


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_without_the_interpreters_end(processes, tmp_path):
    """What aborts while the interpreter is taken apart can't fail a rank that is done; `atexit` has run, all is out."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import atexit, os, sys\n"
        "from infalign.runtime.distributed import end_process\n"
        "class Aborts:\n"
        "    def __del__(self):\n"
        "        os._exit(134)\n"
        "atexit.register(print, 'at exit')\n"
        "sys.modules['kept to the end'] = Aborts()\n"
        "print('done')\n"
        "end_process(3)\n"
    )
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": str(processes)}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (3 if processes == 2 else 134)
    assert done.stdout.split("\n") == ["done", "at exit", ""]
