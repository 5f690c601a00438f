"""A sweep of real runs: a cell is what `infalign run` makes alone, the base is sampled once, kills lose nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from infalign import run, sweep
from infalign.calibration.table import SampleTable
from infalign.cli import main
from infalign.types import InputError, TrainingError
from tests.e2e.experiment import tiny_experiment
from tests.e2e.kills import killed

ARMS = {
    "optimal": {"transform": "optimal"},
    "raw": {"objective": "raw"},
    "pkpo": {"objective": "pkpo", "n": 2},
    "identity": {"transform": "identity"},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Four objectives at two KLs, one of them aiming at another decoder."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = tiny_experiment(folder)
    del recipe["output_dir"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = folder / "sweep.yaml"
    content = {"recipe": "recipe.yaml", "arms": ARMS, "grid": {"target_kl": [0.1, 0.4]}, "max_steps": 2}
    found.write_text(yaml.safe_dump(content, sort_keys=False))
    return found


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    """The sweep, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return sweep(path, output_dir=str(folder)), folder


def inodes(folder: Path) -> dict[str, int]:
    return {str(one.relative_to(folder)): one.stat().st_ino for one in folder.rglob("*.parquet")}


@pytest.mark.slow
def test_a_cell_is_what_run_makes_alone(whole, path, tmp_path):
    result, _ = whole
    assert [cell.finished for cell in result.cells] == [True] * 8
    base = yaml.safe_load((path.parent / "recipe.yaml").read_text())
    for cell in (result.cells[0], result.cells[1], result.cells[6]):
        keys = {**base, **ARMS[cell.arm], **cell.varied, "max_steps": 2, "output_dir": str(tmp_path / cell.name)}
        evaluation = run(keys)["evaluation"]
        assert evaluation.kl.mean == cell.kl and repr(evaluation.win_rates) == repr(cell.rows)


@pytest.mark.slow
def test_base_samples_are_drawn_once(whole):
    """All cells' tables of the base are the same files; the policies' are not."""
    result, folder = whole
    for name in ("calibration", "evaluation/base"):
        tables = [inodes(folder / "cells" / cell.name / name) for cell in result.cells]
        assert tables[0] and all(table == tables[0] for table in tables)
    policies = [inodes(folder / "cells" / cell.name / "evaluation/policy") for cell in result.cells]
    assert not set(policies[0].values()) & set(policies[1].values())


@pytest.mark.slow
def test_a_cell_keeps_its_own_manifest_and_can_be_reported(whole, capsys):
    result, folder = whole
    cell = folder / "cells" / result.cells[3].name
    manifest = json.loads((cell / "calibration" / "manifest.json").read_text())
    assert manifest["diagnostics"]["cost"] is not None
    assert main(["report", "--output_dir", str(cell)]) == 0
    raw = json.loads((folder / "cells" / result.cells[1].name / "calibration" / "manifest.json").read_text())
    assert raw["diagnostics"]["cost"] is None  # it has no transform


@pytest.mark.slow
def test_per_prompt_rows_average_to_the_table(whole):
    result, folder = whole
    for cell in result.cells:
        table = pq.read_table(folder / "cells" / cell.name / "evaluation/per_prompt.parquet")
        assert table["kl"].to_numpy().mean() == pytest.approx(cell.kl)
        for row in cell.rows:
            assert table[f"{row.judge}/{row.label}"].to_numpy().mean() == pytest.approx(row.mean, abs=1e-12)


@pytest.mark.slow
def test_more_samples_of_a_later_cell_do_not_touch_an_earlier_one(path, tmp_path):
    content = {**yaml.safe_load(path.read_text()), "arms": {}, "grid": {"num_calibration_samples": [4, 8]}}
    more = path.parent / "more.yaml"
    more.write_text(yaml.safe_dump({**content, "target_kl": 0.3}))
    result = sweep(more, output_dir=str(tmp_path / "out"))
    few, many = (tmp_path / "out" / "cells" / cell.name / "calibration" for cell in result.cells)
    parts = json.loads((few / "plan.json").read_text())["parts"]
    tables = [SampleTable.open(one, parts).samples() for one in (few, many)]
    assert {len(rows) for rows in tables[0].values()} == {4} and {len(rows) for rows in tables[1].values()} == {8}
    for key, rows in tables[0].items():
        assert [one.token_ids for one in tables[1][key][:4]] == [one.token_ids for one in rows]


@pytest.mark.slow
def test_everything_is_checked_before_the_first_cell(path, tmp_path, capsys):
    for flags, words in (
        (
            {"arms": "{good: {}, bad: {objective: pkpo, n: 4}}"},
            "cell bad-target_kl=0.1: objective pkpo BestOfN(4) needs",
        ),
        ({"arms": "{good: {}, bad: {reward: nowhere.py:build}}"}, "cell bad-target_kl=0.1: "),
        ({"arms": "{good: {}, bad: {transform: nothing}}"}, "cell bad-target_kl=0.1: "),
        ({"grid": "{target_kl: [0.1, -1.0]}", "arms": "{good: {}}"}, "cell good-target_kl=-1.0: "),
    ):
        words_of = [word for name, value in flags.items() for word in (f"--{name}", value)]
        assert main(["sweep", "--config", str(path), "--output_dir", str(tmp_path / "out"), *words_of]) == 2
        out = capsys.readouterr()
        assert words in out.err and out.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_edited_reward_is_noticed(tmp_path):
    keys = {**tiny_experiment(tmp_path), "arms": {"one": {}}, "grid": {"target_kl": [0.1]}}
    sweep(keys)
    score = tmp_path / "score.py"
    score.write_text(score.read_text().replace("sum(ids)", "2.0 * sum(ids)"))
    record = Path(keys["output_dir"]) / "results" / "one-target_kl=0.1.json"
    policy = Path(keys["output_dir"]) / "cells" / "one-target_kl=0.1" / "policy" / "model.safetensors"
    before = record.read_bytes(), policy.read_bytes()
    for changes in ({}, {"eval_n": [1, 4]}):  # what may change alone does not let the other through
        with pytest.raises(InputError, match=r"cell one-target_kl=0.1 was made from something else \(reward"):
            sweep({**keys, **changes})
        assert (record.read_bytes(), policy.read_bytes()) == before


@pytest.mark.slow
def test_other_numbers_to_decode_with_measure_again_and_train_nothing(path, tmp_path):
    flags = {"grid": "{target_kl: [0.1]}", "arms": "{optimal: {}}", "output_dir": str(tmp_path / "out")}
    first = sweep(path, **flags)
    policy = tmp_path / "out" / "cells" / first.cells[0].name / "policy" / "model.safetensors"
    made = policy.stat().st_mtime_ns
    again = sweep(path, eval_n=["1", "4"], **flags)
    assert policy.stat().st_mtime_ns == made
    assert {row.label for row in again.cells[0].rows} > {"BestOfN(4)", "WorstOfN(4)"}


@pytest.mark.slow
def test_without_weights_the_rest_stays(path, tmp_path):
    out = tmp_path / "out"
    flags = {"grid": "{target_kl: [0.1]}", "arms": "{optimal: {}}", "keep_policies": "false"}
    result = sweep(path, output_dir=str(out), **flags)
    policy = out / "cells" / result.cells[0].name / "policy"
    assert not list(policy.rglob("*.safetensors")) and (policy / "manifest.json").exists()
    assert repr(sweep(path, output_dir=str(out), **flags).cells) == repr(result.cells)
    with pytest.raises(InputError, match="can't be measured again, because its weights are gone"):
        sweep(path, output_dir=str(out), eval_n=["1", "4"], **flags)
    assert main(["report", "--output_dir", str(policy.parent)]) == 0


@pytest.mark.slow
def test_a_dry_run_counts_the_base_samples_once(path, tmp_path, capsys):
    assert sweep(path, output_dir=str(tmp_path / "out"), dry_run=True) is None
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "target_kl=" in line]
    tokens = {line[0]: int(line[1].replace(",", "")) for line in lines}
    assert tokens["optimal-target_kl=0.1"] > tokens["raw-target_kl=0.1"] == tokens["identity-target_kl=0.4"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_table(path, whole, tmp_path):
    _, folder = whole
    work = f"sweep({str(path)!r}, output_dir={str(tmp_path / 'killed')!r})"
    assert killed(tmp_path, "from infalign.stages.sweep.run import sweep", work, 10, 4.0, shortest=0.5) >= 5
    read = [pq.read_table(one / "sweep.parquet") for one in (folder, tmp_path / "killed")]
    tables = [table.drop_columns(["seconds"]).to_pylist() for table in read]
    assert json.dumps(tables[0]) == json.dumps(tables[1])


@pytest.mark.slow
def test_a_sweep_over_the_weights_of_two_objectives(tmp_path, capsys):
    """Experts, and policies of both, each measured and compared under both terms; an expert is its term's own run."""
    keys = tiny_experiment(tmp_path)
    score = str(keys.pop("reward"))
    del keys["procedure"], keys["target_kl"]
    terms = [{"reward": score}, {"reward": score.replace(":reward", ":gold"), "procedure": "worst_of_n"}]
    weights = {"best": [1, 0], "worst": [0, 1], "both": [0.5, 0.5]}
    arms = {name: {"objective_weights": one} for name, one in weights.items()}
    out = tmp_path / "sweep"
    plan = {**keys, "objectives": terms, "arms": arms, "grid": {"target_kl": [0.1, 0.5]}, "reference": "both"}
    result = sweep({**plan, "output_dir": str(out), "compare_at": [0.001, 0.002]})
    assert [cell.error for cell in result.cells] == [""] * 6
    measured = [{(row.judge, row.label) for row in cell.rows} for cell in result.cells]
    assert all({("reward", "BestOfN(2)"), ("gold (2)", "WorstOfN(2)")} <= one for one in measured)
    assert {(one.judge, one.decoder) for one in result.compared} == {
        ("reward", "BestOfN(2)"),
        ("gold (2)", "WorstOfN(2)"),
    }
    assert (out / "report" / "frontier-worst-of-2-gold-2.png").exists()
    weighted = [[row.weight for row in cell.rows if row.weight > 0] for cell in result.cells]
    assert weighted == [[1.0], [1.0], [0.5, 0.5]] * 2
    said = capsys.readouterr().out
    assert "Decoded by Worst-of-2, judged by gold (2); reference: both" in said

    # the second term's expert: its reward alone, by the direct objective, from the same base samples
    alone = {**keys, "reward": terms[1]["reward"], "procedure": "worst_of_n", "objective": "direct"}
    found = run({**alone, "target_kl": 0.5, "output_dir": str(tmp_path / "alone")})["evaluation"]
    (cell,) = [one for one in result.cells if one.name == "worst-target_kl=0.5"]
    assert found.kl.mean == pytest.approx(cell.kl, abs=1e-9)
    row = next(row for row in cell.rows if (row.judge, row.label) == ("gold (2)", "WorstOfN(2)"))
    assert found.main.mean == pytest.approx(row.mean, abs=1e-9)


@pytest.mark.slow
def test_mix_or_merge(tmp_path, capsys):
    """Merges, a mixture of logits and training on from a merge are arms; parents' weights stay as long as needed."""
    keys = tiny_experiment(tmp_path)
    score = str(keys.pop("reward"))
    del keys["procedure"], keys["target_kl"]
    terms = [{"reward": score}, {"reward": score.replace(":reward", ":gold"), "procedure": "worst_of_n"}]

    def models(weight):
        pairs = (("best", weight), ("worst", 1 - weight))
        return [{"model": name, "parameters": {"weight": one}} for name, one in pairs]

    arms = {
        "linear": {"family": "merge", "merge": {"merge_method": "linear", "models": models(0.25)}},
        "best": {"objective_weights": [1, 0]},
        "worst": {"objective_weights": [0, 1]},
        "mix": {"objective_mix": [0.5, 0.5]},
        "logits": {"family": "merge", "merge": {"merge_method": "logit_mixture", "models": models(0.5)}},
        "on": {"initial_weights": "linear", "objective_weights": [0.5, 0.5]},
    }
    out = tmp_path / "sweep"
    plan = {**keys, "objectives": terms, "arms": arms, "grid": {"target_kl": [0.3]}, "reference": "mix",
            "output_dir": str(out)}  # fmt: skip
    result = sweep(plan)
    assert [cell.error for cell in result.cells] == [""] * 6
    weights = [
        load_file(out / "cells" / f"{name}-target_kl=0.3" / "policy" / "model.safetensors")
        for name in ("best", "worst", "linear")
    ]
    for name, value in weights[2].items():
        wanted = 0.25 * weights[0][name].double() + 0.75 * weights[1][name].double()
        np.testing.assert_allclose(value.double().numpy(), wanted.numpy(), atol=1e-6)
    by_arm = {cell.arm: cell for cell in result.cells}
    assert by_arm["linear"].facts["merge_gap"] >= 0 and "merge_gap" not in by_arm["logits"].facts
    assert by_arm["linear"].transform == "merge: linear"
    assert {one.family: one.candidates for one in result.combination.families}["merge"] == 2
    assert [axis.expert for axis in result.combination.axes] == ["best", "worst"]
    assert (out / "report" / "pareto.png").exists()
    head = (out / "combined.csv").read_text().splitlines()[0]
    assert '"sequence_gap"' in head and '"score"' in head  # what some families have, all rows have
    assert "Mix or merge, target_kl 0.3" in capsys.readouterr().out
    assert repr(sweep(plan).combination) == repr(result.combination)  # found again, nothing is made

    # another expert makes another merge, and is not made unasked
    changed = {**plan, "arms": {**arms, "worst": {"objective_weights": [0, 1], "learning_rate": 2e-3}}}
    with pytest.raises(InputError, match="was made with other settings"):
        sweep(changed)

    # without weights a later merge of the same experts is told why it can't be made
    lean = {**plan, "output_dir": str(tmp_path / "lean"), "keep_policies": False}
    first = sweep({**lean, "arms": {name: arms[name] for name in ("linear", "best", "worst")}, "reference": "best"})
    assert [cell.error for cell in first.cells] == [""] * 3
    assert not list((tmp_path / "lean").rglob("model.safetensors"))
    with pytest.raises(TrainingError, match="the weights of best, which it is made from, are gone"):
        sweep(
            {**lean, "arms": {name: arms[name] for name in ("linear", "best", "worst", "logits")}, "reference": "best"}
        )


@pytest.mark.slow
def test_a_failed_cell_keeps_its_policy_when_only_its_measurement_changes(path, tmp_path):
    out = tmp_path / "out"
    flags = {"grid": "{target_kl: [0.1]}", "arms": "{optimal: {}}", "output_dir": str(out)}
    sweep(path, **flags)
    record, policy = out / "results" / "optimal-target_kl=0.1.json", out / "cells" / "optimal-target_kl=0.1" / "policy"
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, "error": "no space left"}))
    made = (policy / "model.safetensors").stat().st_mtime_ns
    again = sweep(path, eval_n=["1", "4"], **flags)
    assert again.cells[0].finished and (policy / "model.safetensors").stat().st_mtime_ns == made
    assert {row.label for row in again.cells[0].rows} > {"BestOfN(4)", "WorstOfN(4)"}


@pytest.mark.slow
def test_languages_are_terms(tmp_path, capsys):
    """A term for each language with one reward; DAM learns from the experts' own answers; what was forgotten."""
    keys = tiny_experiment(tmp_path, prompts=40)
    path = Path(str(keys["dataset_name"]))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**one, "language": "de" if number % 2 else "en"} for number, one in enumerate(rows)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on a mat"}\n{"text": "a dog ran"}\n')
    score = str(keys.pop("reward"))
    del keys["procedure"], keys["target_kl"]
    pair = [{"model": "en", "data": "own"}, {"model": "de", "data": "own"}]
    out = tmp_path / "sweep"
    plan = {
        **keys, "num_train_prompts": 16, "num_test_prompts": 16, "group_column": "language", "max_steps": 3,
        "objectives": [{"reward": score, "group": "en"}, {"reward": score, "group": "de"}],
        "held_out_texts": {"tales": str(tmp_path / "texts.jsonl")},
        "arms": {
            "en": {"objective_weights": [1, 0]},
            "de": {"objective_weights": [0, 1]},
            "both": {},
            "dam": {"merge": {"merge_method": "dam", "models": pair, "parameters": {"steps": 3}}},
        },
        "grid": {"target_kl": [0.2]}, "reference": "both", "output_dir": str(out),
    }  # fmt: skip
    result = sweep(plan)
    assert [cell.error for cell in result.cells] == [""] * 4
    axes = result.combination.axes
    assert [(one.judge, one.expert) for one in axes] == [("reward on en", "en"), ("reward on de", "de")]
    by_arm = {cell.arm: cell for cell in result.cells}
    assert all("lost on tales" in cell.facts for cell in result.cells)
    assert by_arm["dam"].facts["experts_kl"] == pytest.approx((by_arm["en"].kl + by_arm["de"].kl) / 2)
    own = [json.loads(line) for line in (out / "cells" / "dam-target_kl=0.2" / "own-0.jsonl").read_text().splitlines()]
    assert len(own) == 16 and any(one["completion"] for one in own)
    said = capsys.readouterr().out
    assert "Best-of-2, reward on de" in said and "lost on tales" in said
    page = (out / "report" / "index.html").read_text()
    assert "What nobody was trained for" in page and "reward on en" in page


@pytest.fixture
def merged_plan(tmp_path):
    """Two experts with rewards in files of their own, and a mixture of them; a cell takes seconds."""
    keys = tiny_experiment(tmp_path)
    for name in ("procedure", "target_kl", "reward"):
        del keys[name]
    for name, body in (("x", "float(sum(ids))"), ("y", "float(max(ids))")):
        source = f"def reward(completion_ids, **_):\n    return [{body} for ids in completion_ids]\n"
        (tmp_path / f"{name}.py").write_text(source)
    terms = [{"reward": f"{tmp_path / name}.py:reward"} for name in "xy"]
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", "two")]
    arms = {
        "one": {"objective_weights": [1, 0]},
        "two": {"objective_weights": [0, 1]},
        "both": {"merge": {"merge_method": "linear", "models": models}},
    }
    grid = {"target_kl": [0.3]}
    return {**keys, "objectives": terms, "arms": arms, "grid": grid, "output_dir": str(tmp_path / "sweep")}


def weights_of(out, name):
    return (Path(out) / "cells" / f"{name}-target_kl=0.3" / "policy" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_merge_of_other_parents_is_made_anew(merged_plan, tmp_path):
    plan, out = merged_plan, merged_plan["output_dir"]
    sweep(plan)
    before = weights_of(out, "both")
    (tmp_path / "y.py").write_text(
        "def reward(completion_ids, **_):\n    return [-float(max(x)) for x in completion_ids]\n"
    )
    with pytest.raises(InputError, match="was made from something else"):
        sweep(plan)
    again = sweep(plan, overwrite=True)
    assert [cell.error for cell in again.cells] == [""] * 3
    assert weights_of(out, "both") != before
    weights = [
        load_file(out + f"/cells/{name}-target_kl=0.3/policy/model.safetensors") for name in ("one", "two", "both")
    ]
    for name, value in weights[2].items():
        wanted = (weights[0][name].double() + weights[1][name].double()) / 2
        np.testing.assert_allclose(value.double().numpy(), wanted.numpy(), atol=1e-6)

    # measured again, a cell still says what its policy cost
    wider = sweep(plan, eval_n=["1", "2", "4"])
    assert all(cell.finished for cell in wider.cells)
    for cell in wider.cells:
        spent = json.loads((Path(out) / "cells" / cell.name / "spent.json").read_text())
        assert cell.seconds > spent > 0
    more = sweep(plan, eval_n=["1", "2", "4"], gap_samples=4)
    assert {cell.arm: cell.facts.get("gap_samples") for cell in more.cells} == {"one": None, "two": None, "both": 4.0}


@pytest.mark.slow
def test_a_failed_merge_can_be_made_later(merged_plan, tmp_path, monkeypatch):
    """Its parents' weights stay until it is made; those that are gone are made again when asked."""
    plan, out = {**merged_plan, "keep_policies": False}, Path(merged_plan["output_dir"])

    def fails(*_, **__):
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("infalign.stages.sweep.cells.merge", fails)
        with pytest.raises(TrainingError, match="1 of 3 cells failed"):
            sweep(plan)
    assert len(list(out.rglob("policy/model.safetensors"))) == 2
    with monkeypatch.context() as patched:  # merged, and fails when it is measured; then its parents change
        patched.setattr("infalign.stages.sweep.cells.evaluate", fails)
        with pytest.raises(TrainingError, match="1 of 3 cells failed"):
            sweep(plan)
    (tmp_path / "y.py").write_text(
        "def reward(completion_ids, **_):\n    return [-float(max(x)) for x in completion_ids]\n"
    )
    assert [cell.error for cell in sweep(plan, overwrite=True).cells] == [""] * 3
    assert not list(out.rglob("policy/model.safetensors"))
    record = out / "results" / "both-target_kl=0.3.json"
    record.unlink()
    with pytest.raises(TrainingError, match="the weights of one, which it is made from, are gone"):
        sweep(plan)
    assert [cell.error for cell in sweep(plan, overwrite=True).cells] == [""] * 3


@pytest.mark.slow
def test_other_texts_are_measured_and_nothing_is_trained(merged_plan, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the cat sat on a mat"}\n')
    plan = {**merged_plan, "held_out_texts": {"tales": str(texts)}}
    before = {cell.arm: cell.facts["lost on tales"] for cell in sweep(plan).cells}
    policy = Path(plan["output_dir"]) / "cells" / "one-target_kl=0.3" / "policy" / "model.safetensors"
    made = policy.stat().st_mtime_ns
    texts.write_text('{"text": "dog ran on"}\n')
    after = {cell.arm: cell.facts["lost on tales"] for cell in sweep(plan).cells}
    assert all(after[arm] != before[arm] for arm in before) and policy.stat().st_mtime_ns == made
