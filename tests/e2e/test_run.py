"""`run` on a tiny model: what it writes, that a second run makes nothing anew, and what may change without loss."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import infalign
from infalign.cli import main
from infalign.generation.hf import HFSampler
from infalign.stages.calibrate import calibrate
from infalign.stages.evaluate import evaluate
from infalign.stages.experiment import Experiment
from infalign.stages.generate import generate
from infalign.stages.recipe import load_recipe
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    keys = {**tiny_experiment(folder), "gold_reward": f"{folder / 'score.py'}:gold"}
    return folder, keys, infalign.run(keys)


def test_it_writes_everything(finished):
    folder, _, result = finished
    out = folder / "out"
    for name in (
        "recipe.json", "calibration/manifest.json", "policy/manifest.json", "policy/model.safetensors",
        "policy/training_log.json", "evaluation.json", "report/index.html",
    ):  # fmt: skip
        assert (out / name).is_file(), name
    assert result["drawn"] == 6 * 12 + 2 * 4 * 8 and result["trained"]
    assert not list(out.rglob("*.tmp"))


def test_the_evaluation_says_what_it_measured(finished):
    folder, _, result = finished
    written = json.loads((folder / "out" / "evaluation.json").read_text())
    rows = {(row["label"], row["judge"]): row for row in written["win_rates"]}
    assert set(rows) == {
        (f"{kind}({n})", judge) for kind in ("BestOfN", "WorstOfN") for n in (1, 2) for judge in ("reward", "gold")
    } - {("WorstOfN(1)", judge) for judge in ("reward", "gold")}
    main_row = rows["BestOfN(2)", "reward"]
    assert written["main"]["mean"] == main_row["mean"] == result["evaluation"].main.mean
    assert 0 <= main_row["low"] <= main_row["mean"] <= main_row["high"] <= 1
    assert main_row["limit"] == pytest.approx(
        float(infalign.win_rate_limit(infalign.BestOfN(2), written["kl"]["mean"]))
    )
    assert rows["BestOfN(2)", "gold"]["limit"] is None


def test_the_win_rate_is_that_of_the_stored_rewards(finished):
    """Recomputed by hand from the Parquet tables."""
    folder, keys, result = finished
    experiment = Experiment(load_recipe(keys))
    from infalign.calibration.table import SampleTable  # noqa: PLC0415

    sides = {}
    for side in ("policy", "base"):
        plan = json.loads((folder / "out" / "evaluation" / side / "plan.json").read_text())
        table = SampleTable.open(folder / "out" / "evaluation" / side, plan["parts"])
        rewards = table.rewards(experiment.reward.fingerprint)
        sides[side] = [rewards[prompt.key] for prompt in experiment.splits.test]
        drawn = table.samples()
        for prompt in experiment.splits.test:
            expected = [sum(s.token_ids) + 0.01 * s.token_ids[0] for s in drawn[prompt.key]]
            np.testing.assert_allclose(rewards[prompt.key], expected)
    by_hand = infalign.win_rate(sides["policy"], sides["base"], infalign.BestOfN(2))
    assert result["evaluation"].main.mean == pytest.approx(by_hand.mean)


def test_a_second_run_makes_nothing(finished, monkeypatch):
    _, keys, result = finished

    def refuse(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("infalign.stages.experiment.load_policy", refuse)
    again = infalign.run(keys)
    assert again["drawn"] == 0 and again["trained"] is False
    assert again["evaluation"].as_json() == result["evaluation"].as_json()


def test_the_same_recipe_elsewhere_gives_the_same_numbers(finished, tmp_path):
    _, keys, result = finished
    again = infalign.run({**keys, "output_dir": str(tmp_path / "elsewhere")})
    assert again["evaluation"].kl == result["evaluation"].kl
    assert again["evaluation"].as_json()["main"] == result["evaluation"].as_json()["main"]


def test_more_samples_and_prompts_append(finished, tmp_path):
    """A larger table starts with the smaller one's samples; only what is missing is drawn."""
    folder, keys, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    larger = {**keys, "output_dir": str(tmp_path / "out"), "num_calibration_samples": 15, "num_train_prompts": 7}
    assert calibrate(load_recipe(larger))["drawn"] == 6 * 3 + 15
    fresh = calibrate(load_recipe({**larger, "output_dir": str(tmp_path / "fresh")}))
    assert fresh["drawn"] == 7 * 15
    samples = []
    for name in ("out", "fresh"):
        from infalign.stages.calibrate import open_table  # noqa: PLC0415

        table = open_table(Experiment(load_recipe({**larger, "output_dir": str(tmp_path / name)})))
        samples.append({key: [(s.index, s.token_ids) for s in rows] for key, rows in table.samples().items()})
    assert samples[0] == samples[1]


def test_another_reward_draws_nothing(finished, tmp_path):
    folder, keys, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    other = {**keys, "output_dir": str(tmp_path / "out"), "reward": f"{folder / 'score.py'}:gold"}
    assert calibrate(load_recipe(other))["drawn"] == 0


def test_more_evaluation_samples_append(finished, tmp_path):
    folder, keys, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    found = evaluate(
        load_recipe({**keys, "output_dir": str(tmp_path / "out"), "eval_samples": 10, "eval_n": [1, 2, 8]})
    )
    assert found.drawn == 2 * 4 * 2
    assert {row.n for row in found.win_rates} == {1, 2, 8}


def test_generate_picks_the_best(finished, tmp_path):
    _, keys, _ = finished
    path = generate(load_recipe({**keys, "n": 4}), output=str(tmp_path / "chosen.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        rewards = [candidate["reward"] for candidate in row["candidates"]]
        assert len(rewards) == 4 and row["reward"] == max(rewards)
        assert row["completion"] == row["candidates"][row["chosen"]]["completion"]


def test_generate_goes_on_where_it_was_killed(finished, tmp_path, monkeypatch):
    """The second batch fails; run again, only what is missing is decoded, and the file is that of one run."""
    _, keys, _ = finished
    recipe = load_recipe({**keys, "tokens_per_batch": 30})
    whole = generate(recipe, output=str(tmp_path / "whole.jsonl")).read_text()
    drawn = []

    def count(self, requests, plain=HFSampler.sample):
        drawn.append(len(requests))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return plain(self, requests)

    monkeypatch.setattr(HFSampler, "sample", count)
    path = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(recipe, output=str(path))
    assert not path.exists() and len(drawn) == 2
    first = drawn[0]
    assert generate(recipe, output=str(path)).read_text() == whole
    assert sum(drawn[2:]) == 4 * 2 - first
    assert [file.name for file in tmp_path.iterdir() if "parts" in file.name] == []


def test_generate_for_a_file_of_prompts(finished, tmp_path):
    _, keys, _ = finished
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\na dog ran\n")
    path = generate(load_recipe(keys), prompts=str(prompts), output=str(tmp_path / "chosen.jsonl"))
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == ["the cat", "a dog ran"]


def test_the_report_needs_only_the_folder(finished, capsys):
    folder, _, _ = finished
    assert main(["report", "--output_dir", str(folder / "out")]) == 0
    assert "report: " in capsys.readouterr().out


def test_dry_run_writes_nothing(finished, tmp_path, capsys):
    _, keys, _ = finished
    found = infalign.run({**keys, "output_dir": str(tmp_path / "dry")}, dry=True)
    assert not (tmp_path / "dry").exists()
    assert found["tokens"]["calibrate"] >= 6 * 12 * 5
    out = capsys.readouterr().out
    assert (
        "one prompt as the model sees it" in out
        and "data_format: chat makes it the user's turn" in out
        and "recipe is valid: 6 train, 0 validation, 4 test" in out
    )


def test_validation_and_best_checkpoint(tmp_path):
    keys = {
        **tiny_experiment(tmp_path), "num_validation_prompts": 2, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "winrate",
        "num_train_prompts": 4, "save_total_limit": 2,
    }  # fmt: skip
    found = infalign.run(keys)
    assert found["trained"]
    log = json.loads((tmp_path / "out" / "policy" / "training_log.json").read_text())
    assert [row["step"] for row in log if "eval_winrate" in row] == [1, 2]
    best = max((row for row in log if "eval_winrate" in row), key=lambda row: row["eval_winrate"])
    state = json.loads((tmp_path / "out" / "policy" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_metric"] == best["eval_winrate"]


def test_a_reward_that_sometimes_gives_none(tmp_path):
    keys = tiny_experiment(tmp_path)
    found = infalign.run(
        {**keys, "reward": f"{tmp_path / 'score.py'}:sometimes", "reward_on_error": "mask", "eval_samples": 16}
    )
    assert 0 < found["evaluation"].main.mean < 1


@pytest.mark.parametrize("method", ["midrank", "pooled"])
@pytest.mark.parametrize("aim", [{"target_kl": 0.3}, {"beta": 0.2}], ids=["kept", "beta"])
def test_the_direct_objective_from_the_calibration_to_the_page(method, aim, tmp_path):
    keys = {name: value for name, value in tiny_experiment(tmp_path).items() if name not in ("target_kl", "beta")}
    found = infalign.run({**keys, **aim, "objective": "direct", "calibration_method": method})
    assert found["trained"] and 0 < found["evaluation"].main.mean < 1
    assert "direct objective" in (tmp_path / "out" / "policy" / "README.md").read_text()
    assert "direct objective" in found["report"].read_text()


def test_the_run_and_the_page_say_what_limited_it(tmp_path, capsys):
    found = infalign.run({**tiny_experiment(tmp_path), "target_kl": 3.0, "learning_rate": 1e-6})
    said = capsys.readouterr().out
    line = "of the 3 nats asked for: raise max_steps or learning_rate"
    assert line in said and line in found["report"].read_text()


def test_several_objectives_from_the_recipe_to_the_page(tmp_path, capsys):
    keys = tiny_experiment(tmp_path)
    score = str(keys.pop("reward"))
    del keys["procedure"]
    terms = [{"reward": score}, {"reward": score.replace(":reward", ":gold"), "procedure": "worst_of_n", "weight": 0.5}]
    keys |= {"num_validation_prompts": 2, "eval_strategy": "steps", "eval_steps": 1}
    found = infalign.run({**keys, "objectives": terms})
    rows = {(row.label, row.judge): row for row in found["evaluation"].win_rates}
    assert rows["BestOfN(2)", "reward"].weight == 1.0 and rows["WorstOfN(2)", "gold (2)"].weight == 0.5
    assert np.isnan(rows["BestOfN(1)", "reward"].weight) and 0 < rows["WorstOfN(2)", "gold (2)"].limit < 1
    said = capsys.readouterr().out
    assert "BestOfN(2), 2 objectives" in said and "what was trained for, all at once" in said
    log = json.loads((tmp_path / "out" / "policy" / "training_log.json").read_text())
    logged = {name for row in log for name in row}
    assert {"eval_winrate/BestOfN(2) of score", "winrate/WorstOfN(2) of gold (2)"} <= logged
    page, card = found["report"].read_text(), (tmp_path / "out" / "policy" / "README.md").read_text()
    assert "trained for several at once" in page and (tmp_path / "out" / "report" / "limit.png").exists()
    assert "0.5 \N{MULTIPLICATION SIGN} WorstOfN(2) of gold (2)" in card
    again = infalign.run({**keys, "objectives": terms})
    assert again["drawn"] == 0 and not again["trained"]
    other = [terms[0], {**terms[1], "weight": 1.0}]
    with pytest.raises(InputError, match="was trained for something else"):
        evaluate(load_recipe({**keys, "objectives": other}))
