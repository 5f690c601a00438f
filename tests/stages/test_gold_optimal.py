"""`transform: gold_optimal`: the objective comes from samples that both rewards scored, and a hacked proxy is seen."""

from __future__ import annotations

import json

import numpy as np
import pytest

import infalign
from infalign.cli import main
from infalign.stages.calibrate import calibrate
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.train import train
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment

REWARDS = '''
def proxy(completion_ids, **_):
    return [float(sum(ids)) + 0.01 * ids[0] for ids in completion_ids]


def gold(completion_ids, **_):
    """Gold agrees up to a sum of 220, and likes less and less what has more."""
    return [min(one, 440.0 - one) for one in proxy(completion_ids)]
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gold")
    keys = tiny_experiment(folder)
    (folder / "two.py").write_text(REWARDS)
    keys |= {
        "reward": f"{folder / 'two.py'}:proxy",
        "gold_reward": f"{folder / 'two.py'}:gold",
        "transform": "gold_optimal",
        "num_calibration_samples": 24,
        "eval_samples": 16,
    }
    return folder, keys, infalign.run(keys)


def test_the_curve_is_that_of_samples_scored_by_both(finished):
    folder, keys, result = finished
    out = folder / "out"
    curve = json.loads((out / "calibration" / "judged.json").read_text())
    assert curve["prompts"] == 6 and curve["samples"] == 6 * 24
    experiment = Experiment(load_recipe(keys))
    np.testing.assert_allclose(experiment.objective.transform.h_J, curve["h_J"])
    assert curve["h_J"][-1] < max(curve["h_J"]), "the proxy's top is worth less under gold"
    manifest = json.loads((out / "policy" / "manifest.json").read_text())["parts"]
    assert manifest["transform"] == experiment.objective.label != "JudgedTransform"
    assert len(list((out / "calibration").glob("scores-*"))) == 2
    assert {path.stem for path in (out / "report").glob("*.png")} >= {"judged", "deployment", "transform"}
    assert result["evaluation"].deployment.policy.n == (1, 2, 3, 4, 6, 8)


def test_a_second_run_makes_nothing(finished):
    _, keys, result = finished
    again = infalign.run(keys)
    assert again["drawn"] == 0 and again["trained"] is False
    assert again["evaluation"].as_json() == result["evaluation"].as_json()


def test_another_gold_reward_is_another_objective(finished, tmp_path):
    _, keys, _ = finished
    with pytest.raises(InputError, match="with other settings"):
        infalign.run({**keys, "gold_reward": keys["reward"]})


def test_training_needs_the_gold_scores(finished, tmp_path):
    _, keys, _ = finished
    keys = {**keys, "output_dir": str(tmp_path / "out")}
    calibrate(load_recipe({**keys, "transform": "optimal"}))
    with pytest.raises(InputError, match="gold_optimal needs calibration samples that the gold reward has scored"):
        train(load_recipe(keys))
    assert calibrate(load_recipe(keys))["drawn"] == 0  # scores alone were missing
    assert train(load_recipe(keys))["trained"]


def test_scores_that_are_made_anew_make_the_curve_anew(finished, tmp_path):
    """`--overwrite` scores all samples again: a gold reward that reads a file may say something else by then."""
    folder, keys, _ = finished
    (folder / "sign.txt").write_text("1")
    (folder / "signed.py").write_text(
        "from pathlib import Path\n\n\ndef gold(completion_ids, **_):\n"
        f"    sign = float(Path({str(folder / 'sign.txt')!r}).read_text())\n"
        "    return [sign * (sum(ids) + 0.01 * ids[0]) for ids in completion_ids]\n"
    )
    keys = {**keys, "gold_reward": f"{folder / 'signed.py'}:gold", "output_dir": str(tmp_path / "out")}
    curves = []
    for sign in ("1", "-1"):
        (folder / "sign.txt").write_text(sign)
        experiment = Experiment(load_recipe({**keys, "overwrite": sign == "-1"}))
        _ = experiment.objective
        calibrate(experiment.recipe, experiment)
        curves.append(experiment.judged.h_J)
    assert curves[0][-1] > curves[0][0] and curves[1][-1] < curves[1][0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gold_reward": None}, "gold_optimal needs gold_reward"),
        ({"transform_kwargs": {"shape": "round"}}, "shape: smooth or monotone or free"),
        ({"transform_kwargs": {"degree": 3}}, "got 'degree'"),
        ({"objective": "direct"}, "objective: direct has no transform"),
        ({"num_calibration_samples": 2}, "more than 2 samples of a prompt that both rewards scored"),
    ],
)
def test_mistakes_are_one_line(changes, told, finished, tmp_path):
    _, keys, _ = finished
    changed = {name: value for name, value in {**keys, **changes}.items() if value is not None}
    with pytest.raises(InputError, match=told) as caught:
        infalign.run({**changed, "output_dir": str(tmp_path / "out")})
    assert "\n" not in str(caught.value)


def test_the_dry_run_and_compare(finished, tmp_path, capsys):
    _, keys, _ = finished
    (tmp_path / "recipe.yaml").write_text(json.dumps({**keys, "output_dir": str(tmp_path / "out")}))
    assert main(["run", "--config", str(tmp_path / "recipe.yaml"), "--dry_run"]) == 0
    rng = np.random.default_rng(0)
    for name in ("ours", "theirs"):
        rewards = rng.random((30, 24))
        rows = [
            {
                "prompt": f"prompt {number}",
                "completions": [f"answer {k}" for k in range(24)],
                "rewards": row.tolist(),
                "gold_rewards": np.minimum(row, 1.4 - 2.0 * (row - 0.7)).tolist(),
            }
            for number, row in enumerate(rewards)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert (
        main(
            ["compare", "--policy", str(tmp_path / "ours.jsonl"), "--base", str(tmp_path / "theirs.jsonl"), "--n", "4"]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "policy: deploy Best-of-" in shown and "base: deploy Best-of-" in shown
