"""Sweeps: what cells a YAML stands for, one table of all they measured, failures as rows, and no step lost."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from infalign import BestOfN, WorstOfN, optimal_transform, sweep, tilt, transforms, win_rate_limit
from infalign.cli import main
from infalign.evaluation.length import LengthControlled
from infalign.evaluation.matched import Curve, at_equal_kl
from infalign.evaluation.summary import DecoderRow
from infalign.evaluation.sweep import CellResult, common_kls
from infalign.report.key_plot import draw_key, plotted_keys
from infalign.report.sweep_page import remarks, report_sweep
from infalign.runtime.artifacts import at_work, read_json, without_nan, write_json
from infalign.stages.recipe import load_recipe
from infalign.stages.sweep.recipe import cells_of, load_sweep
from infalign.stages.sweep.run import predicted
from infalign.stages.sweep.sources import outside_sources
from infalign.types import InputError, TrainingError
from tests.tiny import tiny_causal

BASE = {"model_name_or_path": "m", "reward": "r.py:reward", "output_dir": "out", "target_kl": 1.0}

CELL = '''
import os, time
import numpy as np
from infalign import CellSamples



def cell(target_kl, seed=1, shift=0.0, pause=0.0, broken="", **_):
    """Gaussian rewards moved by as much as an exact tilt of this KL moves them, and a little more."""
    time.sleep(pause)
    if broken and os.path.exists(broken):
        raise RuntimeError(f"no luck at {target_kl}")
    base = np.random.default_rng(5 + seed).normal(size=(12, 16))
    rng = np.random.default_rng([int(100 * target_kl), seed])
    kl_P = target_kl * np.exp(0.1 * rng.normal(size=12))
    policy = rng.normal(size=(12, 16)) + np.sqrt(2 * kl_P)[:, None] + shift
    return CellSamples([f"p{one}" for one in range(12)], kl_P, policy, base, {"kl": target_kl, "BestOfN(4)": 0.75})
'''

SWEEP = {
    "cell": "own.py:cell",
    "arms": {"better": {"transform": "optimal", "shift": 0.3}, "plain": {"transform": "identity"}},
    "grid": {"target_kl": [0.2, 0.5, 1.2], "seed": [1, 2]},
    "compare_at": [0.3, 1.0, 5.0],
    "eval_n": [1, 2],
}


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(CELL)

    def write(**changes):
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
        return path

    return write


# ---- what a YAML stands for ----


def test_cells_are_arms_times_the_grid():
    cells = cells_of(
        load_sweep(
            {
                **BASE,
                "arms": {"ctrl": {"transform": "optimal"}, "plain": {"transform": "identity", "n": 2}},
                "grid": {"target_kl": [0.5, 1.0], "seed": [1, 2]},
            }
        )
    )
    assert [cell.name for cell in cells] == [
        f"{arm}-target_kl={kl}-seed={seed}" for kl in (0.5, 1.0) for seed in (1, 2) for arm in ("ctrl", "plain")
    ]
    assert {cell.arm for cell in cells} == {"ctrl", "plain"}
    recipes = [cell.recipe for cell in cells]
    assert [(one.target_kl, one.seed, one.transform, one.n) for one in recipes[:2]] == [
        (0.5, 1, "optimal", 4),
        (0.5, 1, "identity", 2),
    ]
    assert recipes[0].output == Path("out/cells").absolute() / "ctrl-target_kl=0.5-seed=1"


def test_without_arms_the_grid_tells_objectives_apart():
    """KL and seed never do; everything else does."""
    cells = cells_of(
        load_sweep({**BASE, "grid": {"transform": ["optimal", "log"], "n": [2, 4], "target_kl": [0.5], "seed": [1]}})
    )
    assert [cell.arm for cell in cells] == [f"transform={t} n={n}" for t in ("optimal", "log") for n in (2, 4)]
    alone = cells_of(load_sweep({**BASE, "grid": {"target_kl": [0.5, 1.0]}}))
    assert [cell.arm for cell in alone] == ["all", "all"]


def test_a_grid_over_beta_replaces_the_target_kl(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    of_recipe = {"recipe": str(tmp_path / "base.yaml"), "output_dir": "out", "grid": {"beta": [0.1, 0.3]}}
    cells = cells_of(load_sweep(of_recipe))
    assert [(cell.recipe.beta, cell.recipe.target_kl) for cell in cells] == [(0.1, None), (0.3, None)]
    arms = {"fixed": {"beta": 0.2}, "steered": {}}
    mixed = cells_of(load_sweep({**BASE, "arms": arms}))
    assert [(cell.recipe.beta, cell.recipe.target_kl) for cell in mixed] == [(0.2, None), (None, 1.0)]
    for unused in ({"grid": {"beta": [0.1, 0.3]}}, {"arms": {"one": {"beta": 0.1}, "two": {"beta": 0.2}}}):
        with pytest.raises(InputError, match="target_kl is given, and every cell has its beta"):
            load_sweep({**BASE, **unused})


def test_names_may_be_in_any_script():
    cells = cells_of(load_sweep({**BASE, "arms": {"最適": {}, "恒等": {"transform": "identity"}}}))
    assert [cell.name for cell in cells] == ["最適", "恒等"]


def test_every_cell_is_measured_under_all_arms_decoders():
    arms = {"four": {"n": 4}, "three": {"n": 3}, "worst": {"procedure": "worst_of_n", "n": 6}}
    cells = cells_of(load_sweep({**BASE, "arms": arms, "eval_n": [1, 4]}))
    assert [cell.recipe.eval_n for cell in cells] == [[1, 4, 3, 6]] * 3


def test_a_recipe_is_read_beside_the_sweep_and_its_paths_are_kept(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yaml").write_text("model_name_or_path: ../m\nreward: r.py:reward\nn: 2\noutput_dir: x\n")
    path = tmp_path / "sweep.yaml"
    path.write_text("recipe: sub/base.yaml\nn: 3\noutput_dir: here\ngrid: {target_kl: [0.5, 1.0]}\n")
    settings = load_sweep(path, {"max_steps": "7"})
    (first, _) = cells_of(settings)
    assert first.recipe.n == 3 and first.recipe.training == {"max_steps": 7}
    assert first.recipe.base_dir == (tmp_path / "sub").absolute() and settings.output == Path("here").absolute()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a sweep needs arms or a grid"),
        ({"grid": {"target_kl": 0.5}}, "grid, target_kl: must be a list of values, got 0.5"),
        ({"grid": {"target_kl": []}}, r"grid, target_kl: must be a list of values, got \[\]"),
        ({"grid": {"target_kl": [0.5, 0.5]}}, "grid, target_kl: has a value twice"),
        ({"grid": {"target_kl": [0.5]}, "arms": {"a": "identity"}}, "arms, a: must be keys of a recipe"),
        ({"grid": {"n": [2]}, "arms": {"a": {"n": 4}}}, "arms, a: n is in the grid, too"),
        ({"grid": {"dataset_name": ["a", "b"]}}, "dataset_name can't be varied"),
        ({"grid": {"output_dir": ["a", "b"]}}, "output_dir can't be varied"),
        ({"grid": {"target_kl": [0.5]}, "compare_at": [0.0]}, r"compare_at must be nats above 0, at most 20, got"),
        ({"grid": {"target_kl": [0.5]}, "reference": "raw"}, "reference 'raw' is none of the arms: all"),
        ({"grid": {"n": [2, 4]}, "reference": "n=3"}, "reference 'n=3' is none of the arms: n=2, n=4"),
        ({"grid": {"transfrom": ["log"]}}, "cell transfrom=log: unknown key transfrom: did you mean 'transform'"),
        ({"grid": {"target_kl": [0.5, "much"]}}, "cell target_kl=much: target_kl"),
        ({"arms": {"a b": {}, "a/b": {}}}, "two cells are called a_b"),
        ({"arms": {"..": {}, "b": {}}}, r"a cell is called \.\., which is no name for a folder"),
        ({"arms": {".hidden": {}}}, r"a cell is called \.hidden"),
        ({"arms": {"long" * 60: {}}}, "a cell's name is above 120 bytes: longlong"),
        ({"arms": {1: {}, "1": {}}}, "arms: 1 is there twice"),
        ({"arms": {True: {}}}, "arms, True: must be a text, because YAML reads it as bool"),
        ({"arms": {"a": {"temperature": 0.7}, "b": {}}}, "temperature can't be varied: cells are compared on the same"),
        ({"grid": {"model_name_or_path": ["a", "b"]}}, "model_name_or_path can't be varied"),
        ({"grid": {"num_processes": [1, 2]}}, "num_processes can't be varied: it is the whole sweep's"),
        ({"grid": {"target_kl": [0.5]}, "compare_at": [60.0]}, "at most 20, got"),
        ({"grid": {"target_kl": [0.5]}, "referense": "a"}, "unknown key referense: did you mean 'reference'"),
        ({"recipe": "nope.yaml", "grid": {"target_kl": [0.5]}}, r"recipe: there is no nope\.yaml"),
        ({"grid": {"target_kl": [0.5]}, "keep_policies": 3}, "keep_policies"),
    ],
)
def test_mistakes_in_a_sweep(changes, words):
    with pytest.raises(InputError, match=words):
        cells_of(load_sweep({**BASE, **changes}))


def test_mistakes_on_the_command_line(own, tmp_path, capsys):
    path = str(own())
    for words, told in [
        (["--output_dir", str(tmp_path / "out"), "--target_kl", "3"], "--target_kl is given, and the sweep varies it"),
        ([], "the recipe lacks output_dir"),
        (["--output_dir", str(tmp_path / "out"), "--cell", "nowhere.py:cell"], "nowhere.py"),
        (["--output_dir", str(tmp_path / "out"), "--reference", "best"], "reference 'best' is none of the arms"),
    ]:
        assert main(["sweep", "--config", path, *words]) == 2
        out = capsys.readouterr()
        assert told in out.err and out.err.count("error") == 1
    assert main(["sweep", "--config", "nowhere.yaml"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_a_sweep_is_refused(own, tmp_path):
    own()
    (tmp_path / "outer.yaml").write_text("recipe: own.yaml\ngrid: {target_kl: [1.0]}\n")
    with pytest.raises(InputError, match=r"own\.yaml is a sweep itself"):
        load_sweep(tmp_path / "outer.yaml")


# ---- what comes out ----


def rows_of(folder):
    with open(folder / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_and_decoder_is_a_row(own, tmp_path, capsys):
    result = sweep(own(), output_dir=str(tmp_path / "out"))
    out, rows = tmp_path / "out", rows_of(tmp_path / "out")
    measured = [row for row in rows if not row["arm"].startswith("base")]
    # Best-of-4 is the recipe's; eval_n adds Best- and Worst-of-1 and 2
    assert len(measured) == 12 * 5 and len(result.cells) == 12
    first = measured[0]
    assert first["cell"] == "better-target_kl=0.2-seed=1" and first["decoder"] == "BestOfN(4)"
    kl = float(first["kl"])
    assert float(first["limit"]) == pytest.approx(float(win_rate_limit(BestOfN(4), kl)), abs=1e-9)
    assert float(first["attainment"]) == pytest.approx((float(first["win"]) - 0.5) / (float(first["limit"]) - 0.5))
    assert (float(first["win_exact"]), float(first["kl_exact"])) == (0.75, 0.2)
    parquet = pq.read_table(out / "sweep.parquet").to_pylist()
    assert [row["cell"] for row in parquet] == [row["cell"] for row in rows]
    assert parquet[0]["win"] == pytest.approx(float(first["win"]))
    shown = capsys.readouterr().out
    assert "[12/12] plain-target_kl=1.2-seed=2: KL" in shown and "reference: plain" in shown
    assert (out / "report" / "frontier-best-of-4.png").stat().st_size > 10_000
    page = (out / "report" / "index.html").read_text()
    assert "ahead of plain by" in page and "12 of 12 cells are finished" in page


def test_the_comparison_is_that_of_the_cells_files(own, tmp_path):
    """Every number again from the cells' own per-prompt files, and outside what was measured a dash."""
    result = sweep(own(), output_dir=str(tmp_path / "out"))
    curves = {}
    for arm in ("better", "plain"):
        for seed in (1, 2):
            tables = [
                pq.read_table(
                    tmp_path / "out" / "cells" / f"{arm}-target_kl={kl}-seed={seed}" / "evaluation/per_prompt.parquet"
                )
                for kl in SWEEP["grid"]["target_kl"]
            ]
            curves.setdefault(arm, {})[seed] = Curve(
                tuple(tables[0]["key"].to_pylist()),
                np.array([table["kl"].to_numpy() for table in tables]),
                np.array([table["reward/BestOfN(4)"].to_numpy() for table in tables]),
            )
    wanted = at_equal_kl(curves, "plain", SWEEP["compare_at"])
    found = {(one.arm, one.at.kl): one for one in result.compared if one.decoder == "BestOfN(4)"}
    for arm, rows in wanted.items():
        for row in rows:
            assert repr(found[arm, row.kl].at) == repr(row)
    assert math.isnan(found["better", 5.0].at.win) and not math.isnan(found["better", 1.0].at.difference_low)
    theory = float(win_rate_limit(BestOfN(4), 1.0)) - tilt(transforms.identity, kl=1.0).win_rate(BestOfN(4))
    assert found["better", 1.0].predicted == pytest.approx(theory, abs=1e-6)


def test_what_theory_predicts_of_an_arm():
    recipe = load_recipe({**BASE, "transform": "optimal", "n": 4})
    for decoder in (BestOfN(4), BestOfN(8), WorstOfN(2)):
        wanted = optimal_transform(BestOfN(4), kl=0.5).win_rate(decoder)
        assert predicted(recipe, decoder, 0.5) == pytest.approx(float(wanted), abs=1e-9)
    direct = load_recipe({**BASE, "objective": "direct", "n": 4})
    assert predicted(direct, BestOfN(4), 1.0) == pytest.approx(0.941123, abs=1e-5)
    assert math.isnan(predicted(load_recipe({**BASE, "objective": "raw"}), BestOfN(4), 1.0))
    # moved along the line of logits, the Best-of-8 policy that BoNBoN aims at is the tilt of log u with that KL
    bonbon = load_recipe({**BASE, "solver": "offline", "loss": "bonbon", "num_generations": 8})
    log_tilt = predicted(load_recipe({**BASE, "transform": "log"}), BestOfN(4), 0.25)
    assert predicted(bonbon, BestOfN(4), 0.25) == pytest.approx(log_tilt, abs=1e-9)
    above = {"solver": "offline", "loss": "tup"}
    fixed = load_recipe({**BASE, **above, "loss_kwargs": {"threshold": 0.5}})  # its KL is log 2, whatever is asked for
    assert predicted(load_recipe({**BASE, **above}), BestOfN(4), 1.0) == pytest.approx(0.754, abs=5e-4)
    assert math.isnan(predicted(fixed, BestOfN(4), 1.0))


def test_the_untrained_base_with_more_samples(own, tmp_path):
    """By simulation: the best of eight against the best of four, uniform rewards; its KL as a policy."""
    sweep(own(), output_dir=str(tmp_path / "out"))
    row = next(row for row in rows_of(tmp_path / "out") if row["arm"] == "base x2" and row["decoder"] == "BestOfN(4)")
    draws = np.random.default_rng(0).random((200_000, 12))
    assert float(row["win"]) == pytest.approx((draws[:, :8].max(1) > draws[:, 8:].max(1)).mean(), abs=0.005)
    u = (np.arange(10_000) + 0.5) / 10_000
    assert float(row["kl"]) == pytest.approx((2 * u * np.log(2 * u)).mean(), abs=1e-4)


def test_a_failure_is_a_row_and_is_tried_again(own, tmp_path, capsys):
    path = own(arms={"good": {}, "bad": {"broken": str(tmp_path / "trap")}}, grid={"target_kl": [0.3, 0.9]})
    (tmp_path / "trap").write_text("")
    with pytest.raises(
        TrainingError, match=r"2 of 4 cells failed \(first: bad-target_kl=0.3: RuntimeError: no luck at 0.3"
    ):
        sweep(path, output_dir=str(tmp_path / "out"))
    failed = [row for row in rows_of(tmp_path / "out") if row["error"]]
    assert [row["cell"] for row in failed] == ["bad-target_kl=0.3", "bad-target_kl=0.9"] and failed[0]["win"] == ""
    assert "no luck at 0.3" in (tmp_path / "out" / "logs" / "bad-target_kl=0.3.log").read_text()
    assert "no luck at 0.3" in (tmp_path / "out" / "report" / "index.html").read_text()
    assert main(["sweep", "--config", str(path), "--output_dir", str(tmp_path / "out")]) == 1
    (tmp_path / "trap").unlink()
    capsys.readouterr()
    result = sweep(path, output_dir=str(tmp_path / "out"))
    assert all(cell.finished for cell in result.cells) and not any(row["error"] for row in rows_of(tmp_path / "out"))
    assert "4 cells, 2 finished" in capsys.readouterr().out


def test_changed_cells_are_refused_and_new_ones_are_added(own, tmp_path, capsys):
    out = str(tmp_path / "out")
    sweep(own(grid={"target_kl": [0.3, 0.9]}), output_dir=out)
    sweep(own(grid={"target_kl": [0.3, 0.6, 0.9]}), output_dir=out)
    assert "6 cells, 4 finished" in capsys.readouterr().out
    changed = own(grid={"target_kl": [0.3]}, arms={"better": {"shift": 0.5}, "plain": {}})
    with pytest.raises(InputError, match=r"better-target_kl=0.3 was made with other settings .*shift: 0.3 -> 0.5"):
        sweep(changed, output_dir=out)
    before = rows_of(tmp_path / "out")[0]["win"]
    result = sweep(changed, output_dir=out, overwrite=True)
    assert [cell.keys["shift"] for cell in result.cells if cell.arm == "better"] == [0.5]
    assert rows_of(tmp_path / "out")[0]["win"] != before


def test_a_cell_that_returns_something_else_is_told(own, tmp_path):
    path = own(cell="own2.py:cell", grid={"target_kl": [0.3]}, arms={})
    (tmp_path / "own2.py").write_text("def cell(**keys):\n    return 1.0\n")
    with pytest.raises(TrainingError, match=r"the cell function returned float, not infalign\.CellSamples"):
        sweep(path, output_dir=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("keys=['p0', 'p0', 'p2']", "name a prompt twice"),
        ("kl_P=[0.1, 0.2]", r"kl_P must be 3 finite numbers, one a key, got \(2,\)"),
        ("kl_P=[0.1, 0.2, float('nan')]", "kl_P must be 3 finite numbers"),
        ("policy_PM=np.zeros((2, 8))", r"policy_PM must have 3 rows of samples, got \(2, 8\)"),
        ("base_PM=np.zeros(3)", r"base_PM must have 3 rows of samples, got \(3,\)"),
        ("policy_PM=np.zeros((3, 2))", r"BestOfN\(4\) needs 4 scored samples a prompt"),
    ],
)
def test_samples_that_do_not_fit_each_other(own, tmp_path, changes, words):
    path = own(cell="own3.py:cell", grid={"target_kl": [0.3]}, arms={})
    parts = "keys=['p0', 'p1', 'p2'], kl_P=[0.1] * 3, policy_PM=np.zeros((3, 8)), base_PM=np.zeros((3, 8))"
    (tmp_path / "own3.py").write_text(
        "import numpy as np\nfrom infalign import CellSamples\n\n\ndef cell(**keys):\n"
        f"    return CellSamples(**{{**dict({parts}), **dict({changes})}})\n"
    )
    with pytest.raises(TrainingError, match=words):
        sweep(path, output_dir=str(tmp_path / "out"))


def test_an_output_folder_of_something_else_is_refused(own, tmp_path):
    for name, words in (("recipe.json", "is an experiment's"), ("notes.txt", "is not empty and not a sweep's")):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(InputError, match=words):
            sweep(own(), output_dir=str(folder))
        assert [one.name for one in folder.iterdir()] == [name]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: give a folder"):
        sweep(own(), output_dir=str(tmp_path / "file"))


def test_an_edited_cell_function_is_noticed(own, tmp_path):
    path = own(grid={"target_kl": [0.3]}, arms={})
    sweep(path, output_dir=str(tmp_path / "out"))
    (tmp_path / "own.py").write_text(CELL.replace("+ shift", "- shift"))
    with pytest.raises(InputError, match=r"cell target_kl=0\.3 was made from something else"):
        sweep(path, output_dir=str(tmp_path / "out"))
    assert sweep(path, output_dir=str(tmp_path / "out"), overwrite=True).cells[0].finished


def test_another_base_is_told_and_left_out(own, tmp_path):
    """The cells of one arm were measured against other samples of the base."""
    (tmp_path / "own4.py").write_text(CELL.replace("default_rng(5 + seed)", "default_rng(5 + seed + int(10 * shift))"))
    result = sweep(own(cell="own4.py:cell"), output_dir=str(tmp_path / "out"))
    assert "better: measured against another base or reward than plain, and left out" in result.lacking
    assert {one.arm for one in result.compared} == {"plain"}


def test_a_failed_cell_may_be_changed(own, tmp_path):
    (tmp_path / "trap").write_text("")
    path = own(arms={"bad": {"broken": str(tmp_path / "trap")}}, grid={"target_kl": [0.3]})
    with pytest.raises(TrainingError, match="no luck"):
        sweep(path, output_dir=str(tmp_path / "out"))
    assert sweep(own(arms={"bad": {}}, grid={"target_kl": [0.3]}), output_dir=str(tmp_path / "out")).cells[0].finished


def test_a_lost_measurement_is_made_again(own, tmp_path):
    sweep(own(), output_dir=str(tmp_path / "out"))
    lost = tmp_path / "out" / "cells" / "plain-target_kl=0.5-seed=1" / "evaluation" / "per_prompt.parquet"
    before = lost.read_bytes()
    lost.unlink()
    sweep(own(), output_dir=str(tmp_path / "out"))
    assert pq.read_table(lost).equals(pq.read_table(io.BytesIO(before)))


def test_a_function_that_exits_is_a_failure(own, tmp_path):
    (tmp_path / "own5.py").write_text("import sys\n\n\ndef cell(**keys):\n    sys.exit(3)\n")
    with pytest.raises(TrainingError, match="SystemExit: 3"):
        sweep(own(cell="own5.py:cell", grid={"target_kl": [0.3]}, arms={}), output_dir=str(tmp_path / "out"))


def test_kls_outside_of_what_was_measured_are_told(own, tmp_path, capsys):
    result = sweep(own(compare_at=[5.0]), output_dir=str(tmp_path / "out"))
    both = "nats plain and another objective were not both measured (measured: better 0.19 to 1.25, plain"
    assert f"around 5 {both}" in result.lacking
    assert "outside of the grid's target_kl, 0.2 to 1.2" in capsys.readouterr().err
    partly = sweep(own(compare_at=[0.05, 0.5]), output_dir=str(tmp_path / "out"))
    assert f"around 0.05 {both}" in partly.lacking
    assert {one.at.kl for one in partly.compared if not math.isnan(one.at.difference)} == {0.5}
    assert "nan" not in (tmp_path / "out" / "report" / "index.html").read_text().split("</style>")[1].split("<h2>")[0]


def test_common_kls():
    def cell(arm, kl):
        return CellResult(f"{arm}{kl}", arm, 1, {}, {}, kl=kl)

    assert common_kls([cell("a", 0.2), cell("a", 1.0), cell("b", 0.251), cell("b", 0.808)]) == [0.26, 0.45, 0.8]
    assert common_kls([cell("a", 0.2), cell("b", 1.0)]) == [] == common_kls([])


def test_one_kl_only_says_why_nothing_is_compared(own, tmp_path, capsys):
    result = sweep(own(grid={"target_kl": [0.5]}, compare_at=[]), output_dir=str(tmp_path / "out"))
    assert result.compared == () and "give the grid several target_kl" in result.lacking
    assert "No comparison at equal KL" in capsys.readouterr().out
    assert "No comparison at equal KL" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_the_report_verb_shows_a_sweep(own, tmp_path, capsys):
    sweep(own(), output_dir=str(tmp_path / "out"))
    page = tmp_path / "out" / "report" / "index.html"
    before = page.read_bytes()
    page.unlink()
    assert main(["report", "--output_dir", str(tmp_path / "out")]) == 0
    assert page.read_bytes() == before == report_sweep(tmp_path / "out").read_bytes()


def test_a_dry_run_writes_nothing(own, tmp_path, capsys):
    assert sweep(own(), output_dir=str(tmp_path / "out"), dry_run=True) is None
    assert "a sweep of 12 cells of 2 objectives" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_dry_run_knows_what_is_finished(own, tmp_path, capsys):
    out = str(tmp_path / "out")
    sweep(own(grid={"target_kl": [0.2, 0.5]}), output_dir=out)
    (tmp_path / "out" / "cells" / "plain-target_kl=0.5" / "evaluation" / "per_prompt.parquet").unlink()
    before = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    capsys.readouterr()
    sweep(own(grid={"target_kl": [0.2, 0.5, 1.2]}), output_dir=out, dry_run=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "target_kl=" in line]
    assert [line.endswith("finished") for line in lines] == [True, True, True, False, False, False]
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == before
    # what the sweep would refuse its dry run refuses, too
    with pytest.raises(InputError, match="was made with other settings"):
        sweep(own(grid={"target_kl": [0.2, 0.5]}, eval_n=[1, 4]), output_dir=out, dry_run=True)
    (tmp_path / "own.py").write_text(CELL.replace("and a little more", "and more"))
    with pytest.raises(InputError, match="was made from something else"):
        sweep(own(grid={"target_kl": [0.2, 0.5]}), output_dir=out, dry_run=True)
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == before


def test_two_arms_of_the_same_keys_are_refused():
    with pytest.raises(InputError, match="the arms 'a' and 'b' have the same keys: leave one out"):
        cells_of(load_sweep({**BASE, "arms": {"a": {"n": 2}, "b": {"n": 2}}}))


def test_a_misspelt_key_of_the_grid_is_named(tmp_path):
    keys = {name: value for name, value in BASE.items() if name != "target_kl"}
    for grid, words in [
        ({"target_k": [0.3, 0.8]}, "unknown key target_k: did you mean 'target_kl'"),
        ({"target_kl": [1.0], "objective": ["direct", "dirct"]}, "dirct"),
    ]:
        with pytest.raises(InputError, match=words):
            cells_of(load_sweep({**keys, "arms": {"a": {"n": 2}, "b": {"n": 4}}, "grid": grid, "reference": "b"}))


def test_a_flag_is_the_value_that_the_recipe_reads():
    """The same value in the YAML and as a flag is the same cell."""
    plain = {**BASE, "arms": {"a": {"transform": "log"}}, "max_steps": 80, "learning_rate": 2e-4, "eval_n": [1, 2]}
    given = {"max_steps": "80", "learning_rate": "2e-4", "num_test_prompts": "24", "eval_n": ["1", "2"]}
    (by_yaml,) = cells_of(load_sweep({**plain, "num_test_prompts": 24}))
    (by_flag,) = cells_of(load_sweep(plain, given))
    assert by_flag.keys == by_yaml.keys


def test_a_short_training_is_told_beside_the_comparison(own, tmp_path, capsys):
    """Cells far from what is possible say so, and who is ahead has its interval, the reference too."""
    result = sweep(own(compare_at=[0.5], reference="better"), output_dir=str(tmp_path / "out"))
    out = capsys.readouterr().out
    assert "better wins most" in out and "ahead of plain by" in out and "it is the reference" in out

    def attained(share):
        return [replace(cell, rows=tuple(replace(row, attainment=share) for row in cell.rows)) for cell in result.cells]

    assert not any("is possible at their KL" in line for line in remarks(replace(result, cells=tuple(attained(0.9)))))
    cells = attained(0.5)
    cells[0] = replace(cells[0], notes=("KL 0.04 of the 0.3 nats asked for: raise max_steps",))
    short = replace(result, cells=tuple(cells))
    lines = remarks(short)
    assert any("12 of 12 cells reach 0.50 to 0.50 of what is possible at their KL" in line for line in lines)
    assert "1 of 12 cells have notes on what limited them." in lines
    write_json(tmp_path / "out" / "sweep.json", without_nan(asdict(short)))
    page = report_sweep(tmp_path / "out").read_text()
    assert f"KL 0.04 of the 0.3 nats asked for: raise max_steps (<code>{cells[0].name}</code>)" in page


def test_warnings_of_a_cell_are_its_notes(own, tmp_path, capsys):
    own()
    text = CELL.replace(
        "time.sleep(pause)", "from infalign.runtime.console import notice; notice('tied'); notice('tied')"
    )
    (tmp_path / "own.py").write_text(text)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "grid": {"target_kl": [0.5]}, "compare_at": []}))
    result = sweep(path, output_dir=str(tmp_path / "out"))
    assert [cell.notes for cell in result.cells] == [("tied",), ("tied",)]
    assert "    tied\n" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_ten_instants_it_ends_with_the_same_table(own, tmp_path):
    """SIGKILL at random instants of a sweep of 12 cells; what counts is all but the seconds."""
    path = own(pause=0.15)
    command = [sys.executable, "-m", "infalign", "sweep", "--config", str(path), "--output_dir"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    rng = np.random.default_rng(0)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(10):
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, env=environment, text=True
        )
        process.stdout.readline()  # it has begun
        time.sleep(float(rng.uniform(0.0, 1.0)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, env=environment)
    tables = []
    for folder in ("whole", "killed"):
        rows = rows_of(tmp_path / folder)
        tables.append([{name: value for name, value in row.items() if name != "seconds"} for row in rows])
    assert tables[0] == tables[1]
    whole, killed = (read_json(tmp_path / one / "sweep.json", "a sweep")["compared"] for one in ("whole", "killed"))
    assert json.dumps(whole) == json.dumps(killed)


# ---- several processes make one sweep ----


def test_two_processes_share_a_sweep(own, tmp_path):
    """Each makes its seed at the same time; both leave one table, which is that of one process."""
    path = own(pause=0.1)
    command = [sys.executable, "-m", "infalign", "sweep", "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    shared = [*command, "--output_dir", str(tmp_path / "shared"), "--only"]
    both = [subprocess.Popen([*shared, f"*seed={seed}"], env=environment, stdout=subprocess.PIPE) for seed in (1, 2)]
    said = [process.communicate()[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("a sweep of 12 cells, 6 for this process" in one for one in said)
    assert [f"seed={other}: KL" in one for one, other in zip(said, (2, 1), strict=True)] == [False, False]
    inodes = {file: file.stat().st_ino for file in (tmp_path / "shared" / "cells").rglob("*") if file.is_file()}
    sweep(path, output_dir=str(tmp_path / "shared"))  # nothing is left to do but the table
    assert inodes == {file: file.stat().st_ino for file in inodes}
    sweep(path, output_dir=str(tmp_path / "alone"))
    tables = [
        [{name: value for name, value in row.items() if name != "seconds"} for row in rows_of(tmp_path / folder)]
        for folder in ("shared", "alone")
    ]
    assert tables[0] == tables[1]


def test_some_cells_only(own, tmp_path, capsys):
    out = str(tmp_path / "out")
    sweep(own(), output_dir=out, only=["better-*seed=1", "plain-target_kl=0.5-seed=2"], dry_run=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "target_kl=" in line]
    ours = {line[0] for line in lines if line[-1] != "elsewhere"}
    assert ours == {*(f"better-target_kl={kl}-seed=1" for kl in (0.2, 0.5, 1.2)), "plain-target_kl=0.5-seed=2"}
    sweep(own(), output_dir=out, only=["better-*seed=1", "plain-target_kl=0.5-seed=2"])
    assert {folder.name for folder in (tmp_path / "out" / "cells").iterdir()} == ours
    assert {row["cell"] for row in rows_of(tmp_path / "out") if not row["arm"].startswith("base")} == ours
    sweep(own(), output_dir=out, only=["plain-*"], dry_run=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "target_kl=" in line]
    assert {line[0] for line in lines if line[-1] == "finished"} == ours


def test_a_pattern_that_no_cell_has(own, tmp_path, capsys):
    assert main(["sweep", "--config", str(own()), "--output_dir", str(tmp_path / "out"), "--only", "beter*"]) == 2
    assert "only: no cell is called 'beter*'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cell_has_one_process(own, tmp_path, capsys):
    """One that another process is at is left to it; the others are made."""
    out = tmp_path / "out"
    busy = "plain-target_kl=0.5-seed=1"
    with at_work(out / "cells" / busy):
        sweep(own(), output_dir=str(out), only=["plain-target_kl=0.5*"])
    assert f"{busy}: another process is at it" in capsys.readouterr().out
    assert {folder.name for folder in (out / "cells").iterdir()} == {"plain-target_kl=0.5-seed=2"}


def test_a_cell_that_another_process_has_finished_meanwhile_is_found(own, tmp_path):
    """Both wanted all of seed 1: what the other one made while this one was at work is not made again."""
    path = own(pause=0.4)
    command = [sys.executable, "-m", "infalign", "sweep", "--config", str(path), "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [
        subprocess.Popen([*command, "--only", "*seed=1"], env=environment, stdout=subprocess.PIPE) for _ in range(2)
    ]
    said = [process.communicate()[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    result = sweep(path, output_dir=str(tmp_path / "out"), only=["*seed=1"])
    assert sum(cell.finished for cell in result.cells) == 6 and all("cells, 6 for this process" in one for one in said)


def test_who_shares_a_sweep_and_who_does_not_keep_each_other_out(own, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sweep", "--config", str(own()), "--output_dir", str(out)]
    with at_work(out, shared=True):
        assert main(words) == 2
        assert "is at work in" in capsys.readouterr().err and not (out / "cells").exists()
        assert main([*words, "--only", "plain-target_kl=0.5-seed=2"]) == 0
    with at_work(out):
        assert main([*words, "--only", "plain-target_kl=0.5-seed=2"]) == 2


# ---- trained for N, decoded with another; what a key does ----


def test_trained_for_n_and_decoded_with_another(own, tmp_path):
    """Every box again from the table: measured means over seeds, and exact policies at the measured KL."""
    arms = {
        "two": {"transform": "optimal", "n": 2},
        "four": {"transform": "optimal", "n": 4},
        "one": {"transform": "identity", "n": 4},
        "raw": {"objective": "raw", "n": 4},
        "direct": {"objective": "direct", "n": 4},
    }
    result = sweep(own(arms=arms, reference="one", eval_n=[1, 2, 8]), output_dir=str(tmp_path / "out"))
    boxes = {(box.target_kl, box.trained, box.decoded): box for box in result.transfers}
    assert {box.kind for box in result.transfers} == {"optimal"}, "direct was trained for one N alone"
    assert set(boxes) == {(kl, n, other) for kl in (0.2, 0.5, 1.2) for n in (1, 2, 4) for other in (1, 2, 4, 8)}
    rows = rows_of(tmp_path / "out")
    for (target, n, other), box in boxes.items():
        arm = {1: "one", 2: "two", 4: "four"}[n]
        mine = [
            row
            for row in rows
            if (row["arm"], row["decoder"], row["target_kl"]) == (arm, f"BestOfN({other})", f"{target:g}")
        ]
        assert len(mine) == 2
        assert box.win == pytest.approx(np.mean([float(row["win"]) for row in mine]))
        kl = np.mean([float(row["kl"]) for row in mine])
        policy = tilt(transforms.identity, kl=kl) if n == 1 else optimal_transform(BestOfN(n), kl=kl)
        assert box.exact == pytest.approx(float(policy.win_rate(BestOfN(other))), abs=1e-6)
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "Trained for N, decoded with another" in page
    assert (tmp_path / "out" / "report" / "transfer-bestofn-optimal.png").stat().st_size > 10_000


def test_one_n_has_no_such_matrix(own, tmp_path):
    result = sweep(own(), output_dir=str(tmp_path / "out"))
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert result.transfers == () and "Trained for N" not in page and "What a key does" not in page


def test_a_key_with_three_values_has_a_plot(own, tmp_path):
    sweep(
        own(grid={"target_kl": [0.5], "shift": [0.0, 0.2, 0.4], "pause": [0.0, 0.001]}, arms={"a": {}, "b": {"n": 2}}),
        output_dir=str(tmp_path / "out"),
        reference="a shift=0.0 pause=0.0",
    )
    report = tmp_path / "out" / "report"
    assert (report / "by-shift.png").stat().st_size > 10_000 and not (report / "by-pause.png").exists()
    assert "What a key does" in (report / "index.html").read_text()


def test_lines_of_a_keys_plot():
    """One line for cells that differ in the key alone; means over seeds; limits without a value are not drawn."""
    cells = [
        CellResult(f"{k}{s}", f"direct num={k} other={g}", s, {"num": k, "other": g, "target_kl": 1.0, "flag": True},
                   {}, procedure="BestOfN(4)", rows=(row_of(0.1 * k + 0.01 * s),))
        for k in (1, 2, 30) for g in (5, 6) for s in (0, 1)
    ]  # fmt: skip
    assert plotted_keys(cells) == ["num"]
    (axes,) = draw_key(cells, "num").axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert sorted(lines) == ["direct other=5", "direct other=6"]
    np.testing.assert_allclose(lines["direct other=5"].get_xydata(), [[1, 0.105], [2, 0.205], [30, 3.005]])
    assert axes.get_xscale() == "log"
    # with two targets, each has its lines; numbers sort by value
    more = [replace(cell, varied={**cell.varied, "target_kl": 0.5}) for cell in cells]
    arms = [replace(cell, arm=cell.arm.replace("other=6", "other=16")) for cell in [*cells, *more]]
    labels = [text.get_text() for text in draw_key(arms, "num").axes[0].get_legend().get_texts()]
    assert labels == [f"direct other={other}, {kl} nats" for other in (5, 16) for kl in ("0.5", "1")]


def row_of(attained: float) -> DecoderRow:
    known = LengthControlled(*[math.nan] * 6)
    return DecoderRow("BestOfN(4)", "best_of_n", 4, "reward", 0.8, 0.7, 0.9, known, 0.9, attained, 1.0, 1.0, 0.0)


def merging(*names, **keys):
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    return {"merge": {"merge_method": "linear", "models": models}, **keys}


def mixing(*names):
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    return {"merge": {"merge_method": "logit_mixture", "models": models}}


def test_a_merge_is_made_after_its_parents():
    arms = {"all": merging("two", "late"), "one": {}, "late": merging("one", "two"), "two": {"learning_rate": 1e-5}}
    arms["on"] = {"initial_weights": "all"}
    cells = cells_of(load_sweep({**BASE, "arms": arms, "grid": {"target_kl": [0.5, 1.0]}, "output_dir": "o"}))
    assert [cell.arm for cell in cells] == ["one", "two", "late", "all", "on"] * 2
    late, on = cells[7], cells[9]
    assert dict(late.parents) == {"one": "one-target_kl=1.0", "two": "two-target_kl=1.0"}
    assert dict(on.parents) == {"all": "all-target_kl=1.0"}
    assert on.recipe.training["initial_weights"].endswith("/o/cells/all-target_kl=1.0/policy")


def test_a_cell_is_another_one_when_its_parents_are():
    arms = {"one": {}, "two": {"learning_rate": 1e-5}, "both": merging("one", "two"), "again": merging("both", "one")}
    plan = {**BASE, "arms": arms, "grid": {"target_kl": [0.5]}}
    before, after = (
        {cell.arm: cell.keys for cell in cells_of(load_sweep({**plan, **keys}))}
        for keys in ({}, {"arms": {**arms, "two": {"learning_rate": 2e-5}}})
    )
    assert before["one"] == after["one"]
    assert before["both"]["merge"] == after["both"]["merge"] and before["both"] != after["both"]
    assert before["again"] != after["again"]  # through its parent
    measured = {cell.arm: cell.keys for cell in cells_of(load_sweep({**plan, "eval_samples": 80}))}
    assert measured["both"]["parents"] == before["both"]["parents"]  # how it is measured does not change a policy
    told = {cell.arm: cell.keys for cell in cells_of(load_sweep({**plan, "logging_steps": 7}))}
    assert told["both"]["parents"] == before["both"]["parents"]  # nor does what it writes down


def test_what_a_merge_takes_from_outside_is_known_by_its_content(tmp_path):
    model = tiny_causal(tmp_path / "model", seed=1)
    (tmp_path / "data.jsonl").write_text('{"text": "a cat"}\n')
    models = [{"model": "one", "data": "own"}, {"model": model, "data": str(tmp_path / "data.jsonl")}]
    dam = {"merge_method": "dam", "models": models}
    found = [outside_sources(dam, {"one"}, tmp_path)]
    (tmp_path / "data.jsonl").write_text('{"text": "a dog"}\n')
    found.append(outside_sources(dam, {"one"}, tmp_path))
    tiny_causal(tmp_path / "model", seed=2)
    found.append(outside_sources(dam, {"one"}, tmp_path))
    assert len({one["models"] for one in found}) == 3
    assert outside_sources(merging("one", "base")["merge"], {"one"}, tmp_path) == {}


def test_a_familys_name_has_no_key_of_the_grid():
    """Experts and families are found at each point of the grid, which all arms share."""
    arms = {"one": {}, "both": merging("one", "base", family="merged")}
    cells = cells_of(load_sweep({**BASE, "arms": arms, "grid": {"learning_rate": [1e-5, 2e-5]}, "target_kl": 0.5}))
    assert [cell.arm for cell in cells if cell.plain_arm == "one"] == [
        "one learning_rate=1e-05",
        "one learning_rate=2e-05",
    ]
    assert {(cell.plain_arm, cell.family) for cell in cells} == {("one", "one"), ("both", "merged")}


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (
            {"one": {}, "m": merging("one", "tow"), "two": {"n": 2}},
            "m: merge: 'tow' is no arm, no folder and no Hub id: did you mean 'two'",
        ),
        ({"m": merging("m", "base")}, "m: merge: it names itself"),
        ({"a": merging("b"), "b": merging("a")}, "arms a, b: each is made from another of them"),
        ({"one": {}, "m": merging("one", n=2)}, "m: a merge is not trained: leave n out"),
        ({"one": {}, "m": {"merge": "linear"}}, "m: merge: must be what `infalign merge` takes"),
        ({"one": {}, "m": {"merge": {"merge_method": "logit_mixtrue"}}}, "m: merge: merge_method 'logit_mixtrue' is "
         "unknown"),
        ({"one": {"family": "two"}, "two": {"n": 2}}, "one: family 'two' is an arm"),
        ({"one": {"family": 3}}, "one: family must be a name, got 3"),
        ({"base": {}, "m": merging("base", "base")}, "arms, base: in a merge this is the base policy"),
        ({"one": {}, "x": mixing("one", "base"), "m": merging("x", "one")}, "m: merge: .x. is a mixture of logits"),
        ({"one": {}, "x": mixing("one", "base"), "m": {"initial_weights": "x"}}, "'x' is a mixture of logits, "
         "which has no weights to train"),
        ({"one": {}, "m": {"merge": {"merge_method": "dam", "models": [{"model": "one", "data": "nowhere.jsonl"},
         {"model": "base", "data": "own"}]}}}, "m: merge: data 'nowhere.jsonl': no such file"),
    ],
)  # fmt: skip
def test_mistakes_in_merges_of_arms(arms, words):
    with pytest.raises(InputError, match=words):
        cells_of(load_sweep({**BASE, "arms": arms, "grid": {"target_kl": [0.5]}}))


def test_merges_are_for_arms_of_runs(own):
    with pytest.raises(InputError, match="merge belongs to an arm"):
        load_sweep({**BASE, "grid": {"target_kl": [0.5]}, **merging("one")})
    with pytest.raises(InputError, match="the sweep's own function makes all cells, and an arm has merge"):
        load_sweep(own(arms={"one": {}, "m": merging("one")}))
    for name, value in (("validation_share", 1.0), ("gap_samples", -1)):
        with pytest.raises(InputError, match=f"{name} must be"):
            load_sweep({**BASE, "grid": {"target_kl": [0.5]}, name: value})
