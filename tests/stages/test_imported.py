"""`calibration_samples`: base samples of a file become the calibration, with what the file knows of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infalign.rewards.loader import Reward
from infalign.stages.calibrate import calibrate, open_table
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.run import run
from infalign.stages.train import train
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import CLOSE

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "good", "bad", "moon"]
COUNT = 8


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    found = tiny_experiment(folder)
    return {
        **found,
        "reward": f"{folder / 'score.py'}:reward",
        "num_calibration_samples": COUNT,
        "solver": "offline",
        "max_steps": 2,
    }


@pytest.fixture(scope="module")
def rows(keys):
    """A row of distinct texts for every prompt of the data, rewarded as the recipe's reward does."""
    tokenizer = AutoTokenizer.from_pretrained(keys["model_name_or_path"])
    rng = np.random.default_rng(0)
    found = []
    for line in Path(keys["dataset_name"]).read_text().splitlines():
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(COUNT)]
        ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id][:5] for text in texts]
        rewards = [sum(one) + 0.01 * one[0] for one in ids]
        found.append({"prompt": json.loads(line)["prompt"], "completions": texts, "rewards": rewards})
    return found


def recipe(keys, tmp_path, rows, **changes):
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"calibration_samples": str(tmp_path / "samples.jsonl"), "output_dir": str(tmp_path / "out")}
    return load_recipe({**keys, **given, **changes})


def summed(model_path, prompt_ids, ids):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    both = torch.tensor([[*prompt_ids, *ids]])
    with torch.no_grad():
        logps = model(both).logits.log_softmax(-1)[0, :-1].gather(-1, both[0, 1:, None])[:, 0]
    return float(logps[len(prompt_ids) - 1 :].sum())


def test_a_file_becomes_the_calibration(keys, rows, tmp_path, monkeypatch):
    asked = []
    plain = Reward.__call__
    monkeypatch.setattr(
        Reward, "__call__", lambda self, **given: asked.append(len(given["completions"])) or plain(self, **given)
    )
    made = recipe(keys, tmp_path, rows[::-1])  # in any order
    result = calibrate(made)
    experiment = Experiment(made)
    prompts = experiment.splits.train
    assert result["drawn"] == len(prompts) * COUNT
    assert sum(asked) <= 16, "the file's rewards are confirmed by a few, and the rest is not asked about"
    table = open_table(experiment)
    by_prompt = {row["prompt"]: row for row in rows}
    samples, rewards = table.samples(), table.rewards(experiment.reward.fingerprint)
    for prompt in prompts:
        row = by_prompt[prompt.content]
        for one, text in zip(samples[prompt.key], row["completions"], strict=True):
            assert one.text.split() == text.split()[:5] and len(one.token_ids) <= 5
            assert one.finished == (len(text.split()) < 5)
        assert rewards[prompt.key].tolist() == row["rewards"]
    first = samples[prompts[0].key][0]
    plainly = summed(keys["model_name_or_path"], experiment.prompt_ids[prompts[0].key], first.token_ids)
    assert float(first.token_logps.sum()) == pytest.approx(plainly, abs=CLOSE)
    assert train(made)["steps"] == 2
    assert calibrate(made)["drawn"] == 0


def test_names_of_other_tools_and_a_row_a_sample(keys, rows, tmp_path):
    other = [
        {"prompt": row["prompt"], "ref_completions": row["completions"], "ref_rewards": row["rewards"]} for row in rows
    ]
    single = [
        {"prompt": row["prompt"], "completion": text, "reward": reward}
        for row in rows
        for text, reward in zip(row["completions"], row["rewards"], strict=True)
    ]
    found = []
    for name, given in (("plain", rows), ("qrpo", other), ("single", single)):
        (tmp_path / name).mkdir()
        made = recipe(keys, tmp_path / name, given)
        calibrate(made)
        experiment = Experiment(made)
        found.append(
            {key: row.tolist() for key, row in open_table(experiment).rewards(experiment.reward.fingerprint).items()}
        )
    assert found[0] == found[1] == found[2]


def test_samples_without_rewards_are_scored(keys, rows, tmp_path):
    bare = [{"prompt": row["prompt"], "completions": row["completions"]} for row in rows]
    made = recipe(keys, tmp_path, bare)
    calibrate(made)
    experiment = Experiment(made)
    rewards = open_table(experiment).rewards(experiment.reward.fingerprint)
    by_prompt = {row["prompt"]: row["rewards"] for row in rows}
    for prompt in experiment.splits.train:
        assert rewards[prompt.key] == pytest.approx(by_prompt[prompt.content])


def test_log_probabilities_of_the_file_are_taken_and_checked(keys, rows, tmp_path):
    experiment = Experiment(recipe(keys, tmp_path, rows))
    tokenizer = experiment.tokenizer
    right = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id][:5] for text in row["completions"]]
        right.append({**row, "logps": [summed(keys["model_name_or_path"], prompt, one) for one in ids]})
    made = recipe(keys, tmp_path, right, output_dir=str(tmp_path / "right"))
    calibrate(made)
    assert train(made)["steps"] == 2
    wrong = [{**row, "logps": [value - 1.0 for value in row["logps"]]} for row in right]
    made = recipe(keys, tmp_path, wrong, output_dir=str(tmp_path / "wrong"))
    calibrate(made)
    with pytest.raises(InputError, match=r"at step 0 the log-probabilities of the cached samples .* are off by 1 nats"):
        train(made)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: {**row, "rewards": [one + 1e3 for one in row["rewards"]]}, "are not those of reward 'score'"),
        (lambda row: {**row, "completions": row["completions"][:-1], "rewards": row["rewards"][:-1]}, "first: 7 of '"),
        (lambda row: {**row, "prompt": "another"}, "fewer than num_calibration_samples 8 completions"),
        (lambda row: {**row, "logps": [1.0] * COUNT}, r"logps\[0\] must be log-probabilities in nats, none above 0"),
        (lambda row: {**row, "logps": [[-1.0] * 9] * COUNT}, "9 log-probabilities: give one for each token"),
    ],
)
def test_what_does_not_fit_is_one_line(change, told, keys, rows, tmp_path):
    with pytest.raises(InputError, match=told) as caught:
        calibrate(recipe(keys, tmp_path, [change(row) for row in rows]))
    assert "\n" not in str(caught.value)


def test_files_and_settings_that_can_not_be(keys, rows, tmp_path):
    missing = {**keys, "calibration_samples": str(tmp_path / "nothing.jsonl"), "output_dir": str(tmp_path / "out")}
    for dry in (True, False):
        with pytest.raises(InputError, match=r"calibration_samples '.*nothing.jsonl': no such file"):
            run(missing, dry=dry)
    with pytest.raises(InputError, match=r"without log-probabilities, at temperature 0\.7"):
        calibrate(recipe(keys, tmp_path, rows, temperature=0.7))
    calibrate(recipe(keys, tmp_path, rows, output_dir=str(tmp_path / "first")))
    with pytest.raises(InputError, match=r"samples drawn with other settings \(samples: "):
        calibrate(recipe(keys, tmp_path, rows[::-1], output_dir=str(tmp_path / "first")))
