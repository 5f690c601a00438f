"""The command line as a user meets it: fast help, one line for a mistake, exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from infalign.cli import VERBS, Verb, main
from infalign.runtime import launch
from infalign.theory.procedures import BUILT_IN


def test_help_is_fast_and_names_every_verb():
    """In CPU seconds: the clock also counts what runs beside it."""
    spent = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "infalign", "--help"], capture_output=True, text=True, check=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert all(verb in done.stdout for verb in VERBS)
    assert min(spent) < 0.5


@pytest.mark.parametrize("module", ["infalign", "infalign.cli"])
def test_both_modules_are_the_command_line(module):
    """`python -m infalign.cli` did nothing and ended with 0, also under accelerate."""
    command = [sys.executable, "-m", module, "run", "--config", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "infalign: error: no recipe at nowhere.yaml: give --config the path of a YAML file\n"


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"theory", "env", "reward"}))
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    own = {
        "reward-model": "--freeze_backbone",
        "compare": "--policy",
        "sweep": "--compare_at",
        "merge": "--base_model",
        "forget": "--forget_examples",
    }.get(verb, "--num_calibration_samples")
    assert VERBS[verb].help in out and own in out


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"theory", "env", "reward"}))
def test_help_shows_how_to_launch_the_verbs_that_can_be(verb, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    shown = [name for name in launch.FLAGS if f"--{name} " in out]
    alone = ("report", "serve", "compare")
    assert shown == (list(launch.FLAGS) if verb not in alone else [])
    assert ("zero3_offload" in out) == (verb not in alone)


def test_theory_prints_the_table(capsys):
    assert main(["theory", "--procedure", "best_of_n", "--n", "4", "--kl", "1"]) == 0
    out = capsys.readouterr().out
    for number in (
        "0.9411",
        "0.9351",
        "0.9192",
        "0.8770",
        "0.8631",
    ):  # to be read to four digits
        assert number in out


def test_theory_as_json_and_plot(capsys, tmp_path):
    plot = tmp_path / "theory.png"
    assert main(["theory", "--procedure", "worst_of_n", "--n", "4", "--kl", "1", "--json", "--plot", str(plot)]) == 0
    rows = {row["transform"]: row for row in json.loads(capsys.readouterr().out)["transforms"]}
    assert rows["optimal"]["win_rate"] == pytest.approx(0.992948, abs=1e-6)
    assert rows["identity"]["win_rate"] == pytest.approx(0.974457, abs=1e-6)
    assert rows["log"]["win_rate"] == pytest.approx(0.985875, abs=1e-6)
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown verb 'trian': did you mean 'train'?"),
        (["run"], "give a recipe: infalign run --config RECIPE.yaml"),
        (["run", "--config", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (
            ["theory", "--procedure", "best_of", "--kl", "1"],
            "procedure 'best_of' is unknown: did you mean 'best_of_n'?",
        ),
        (["theory", "--kl", "1", "--beta", "1"], "give exactly one of"),
        (["theory"], "give exactly one of"),
        (["theory", "--kl", "-1"], "kl"),
        (["theory", "--n", "4.5", "--kl", "1"], "argument --n: invalid int value: '4.5'"),
        (["theory", "--procedur", "best_of_n"], "unrecognized arguments: --procedur"),
        (["theory", "--procedure", "kth_of_n", "--kl", "1"], "procedure kth_of_n needs procedure_kwargs: {k: 2}"),
        (
            ["theory", "--procedure", "random_n", "--pmf", "0.5", "0.5", "--n", "8"],
            "random_n takes no n, got 8: pmf says",
        ),
        (["theory", "--procedure", "nowhere.py:p"], "; paths are relative to the working directory"),
        (["reward", "check", "nowhere.py:r"], "; paths are relative to the working directory"),
        (["theory", "--procedure", "kth_of_n", "--k", "9", "--kl", "1"], "9"),
        (["theory", "--procedure", "top_of_n", "--kl", "1"], "procedure top_of_n needs procedure_kwargs: {k: 2}"),
        (["theory", "--procedure", "bottom_of_n", "--k", "9", "--kl", "1"], "k must be at most n"),
        (
            ["theory", "--procedure", "pessimistic_of_n", "--procedure_kwargs", "{beta: -1}", "--kl", "1"],
            "beta must be a finite number > 0 (small: BestOfN, large: plain sampling); got -1",
        ),
        (["theory", "--kl", "1", "--plot", "x.pdf"], "--plot writes a PNG, got 'x.pdf'"),
        (["env", "x"], "env takes no arguments, got x"),
        (["train", "--accelerate_config", "zero33"], "'zero33' is unknown: did you mean 'zero3'? (one of cpu_ddp, "),
        (["train", "--num_processes", "2"], "--num_processes needs a launch file: give --accelerate_config NAME"),
        (["train", "--accelerate_config", "cpu_ddp", "--num_processes", "0"], "a whole number from 1, got '0'"),
        (["report", "--accelerate_config", "zero3"], "report runs in one process: leave --accelerate_config out"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("infalign: error: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["run", "compare", "theory"])
def test_help_names_every_procedure(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert ", ".join(BUILT_IN) in " ".join(capsys.readouterr().out.split())


def test_a_verb_is_a_row(capsys, monkeypatch):
    """Its line in the overview, its help, its options, and what it tells come from the row."""
    row = Verb("the folders", "recipe:recipe_folders", recipe="", arguments="")
    monkeypatch.setitem(VERBS, "folders", row)
    assert main(["folders"]) == 0
    assert main(["--help"]) == 0
    assert "  folders       the folders\n" in capsys.readouterr().out
    assert main(["folders", "--help"]) == 0
    assert "usage: infalign folders" in capsys.readouterr().out


def test_theory_takes_a_procedure_of_ones_own(tmp_path, capsys):
    (tmp_path / "own.py").write_text("from infalign import KthOfN\ndef second(n):\n    return KthOfN(2, n)\n")
    own = ["--procedure", f"{tmp_path}/own.py:second", "--procedure_kwargs", "{n: 8}"]
    assert main(["theory", *own, "--kl", "1"]) == 0
    mine = capsys.readouterr().out
    assert main(["theory", "--procedure", "kth_of_n", "--k", "2", "--n", "8", "--kl", "1"]) == 0
    assert mine == capsys.readouterr().out and "KthOfN(2, 8)" in mine


@pytest.mark.parametrize(
    ("name", "own", "shown"),
    [
        ("top_of_n", ["--k", "2"], "TopOfN(2, 4)"),
        ("bottom_of_n", ["--k", "2", "--n", "8"], "BottomOfN(2, 8)"),
        ("pessimistic_of_n", ["--procedure_kwargs", "{beta: 0.1}"], "PessimisticOfN(4, 0.1)"),
    ],
)
def test_theory_of_procedures_that_keep_one_of_several_ranks(name, own, shown, capsys):
    """The optimum leads the table, of transforms whose signs fit the procedure."""
    assert main(["theory", "--procedure", name, *own, "--kl", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["procedure"] == shown and found["transforms"][0]["transform"] == "optimal"
    assert found["transforms"][0]["win_rate"] > found["transforms"][1]["win_rate"] > 0.5


def test_a_recipe_of_nearly_that_name_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("n: 4\n")
    for given, near in {"mime.yaml": "mine.yaml", "mine.yml": "mine.yaml", f"{tmp_path}/mimes": "mine.yaml"}.items():
        assert main(["run", "--config", given]) == 2
        assert capsys.readouterr().err == f"infalign: error: no recipe at {given}: did you mean {near}?\n"
    assert main(["run", "--config", "quickstrt"]) == 2
    assert "no recipe at quickstrt: did you mean " in (told := capsys.readouterr().err)
    assert told.endswith("recipes/quickstart.yaml?\n")


def test_python_and_the_command_line_quiet_the_libraries():
    """bitsandbytes says on every CPU which kernel it lacks; what the user has set stays."""
    code = (
        "import logging, os, infalign; infalign.run; print(logging.getLogger('bitsandbytes').level, "
        "os.environ['TRANSFORMERS_VERBOSITY'], os.environ['TOKENIZERS_PARALLELISM'])"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["40", "error", "true"]


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown verb"):
        main(["trian", "--debug"])


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("infalign ")
