"""Whatever a plug-in does to what it is given changes neither what is scored next, nor what is kept, nor others."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from infalign.calibration.table import SampleTable
from infalign.decoding.strategy import Choose, Draw
from infalign.rewards.combine import mean, minimum, weighted_sum
from infalign.rewards.judge import both_orders
from infalign.rewards.length_control import LengthControlled
from infalign.rewards.loader import load_reward
from infalign.rewards.scoring import score_samples
from infalign.runtime.calls import own_copy
from infalign.stages.calibrate import calibrate
from infalign.stages.recipe import load_recipe
from infalign.training.reward import CTRLReward
from infalign.types import Prompt, Sample, prompt_key
from tests.decoding.toys import Told, run
from tests.e2e.experiment import tiny_experiment

CASES = Path(__file__).parents[1] / "cases"


def chat(text):
    return [{"role": "user", "content": text}]


def given():
    """What three completions of one prompt are scored on: the same prompt object and the same column objects."""
    prompt, facts = chat("why"), {"steps": [1, 2], "source": {"name": "a"}}
    return {
        "prompts": [prompt] * 3,
        "completions": [[{"role": "assistant", "content": word}] for word in ("x", "yy", "yy")],
        "completion_ids": [[1], [2, 3], [2, 3]],
        "facts": [facts] * 3,
        "marks": [({"deep": [0]},)] * 3,
        "array": [np.zeros(2)] * 3,
        "tensor": [torch.zeros(2)] * 3,
        "tags": [{"a"}] * 3,
    }


def size(prompts, completions, completion_ids, facts, marks, array, tensor, tags, **_):
    """A sum over everything that can be reached, which then is all changed."""
    scores = []
    for row in range(len(prompts)):
        turns, fact = [*prompts[row], *completions[row]], facts[row]
        score = len(prompts[row]) + sum(len(turn["content"]) for turn in turns) + sum(completion_ids[row])
        score += sum(fact["steps"]) + len(fact) + len(fact["source"]) + sum(marks[row][0]["deep"])
        scores.append(float(score + array[row].sum() + tensor[row].sum() + len(tags[row])))
        prompts[row].append(completions[row][0])
        prompts[row][0]["content"] += " really"
        completions[row][0]["content"] += "!"
        completion_ids[row].append(9)
        fact["steps"].append(5)
        fact["source"]["more"] = fact["more"] = 1
        marks[row][0]["deep"].append(7)
        array[row] += 1
        tensor[row] += 1
        tags[row].add("b")
    prompts.clear(), facts.clear()
    return scores


# turns, characters, ids, steps, facts, source, marks, array, tensor, tags
EXPECTED = [1.0 + 4 + 1 + 3 + 2 + 1 + 0 + 0 + 0 + 1, *[1.0 + 5 + 5 + 3 + 2 + 1 + 0 + 0 + 0 + 1] * 2]


def unchanged(before, after):
    np.testing.assert_equal({**after, "tensor": [t.numpy() for t in after["tensor"]]},
                            {**before, "tensor": [t.numpy() for t in before["tensor"]]})  # fmt: skip


async def later(**arguments):
    return size(**arguments)


@pytest.mark.parametrize("options", [{}, {"timeout": 30.0}, {"strip_reasoning": ("<think>", "</think>")}])
@pytest.mark.parametrize("function", [size, later])
def test_a_reward_that_changes_everything_changes_nothing(function, options):
    reward, arguments, before = load_reward(function, **options), given(), copy.deepcopy(given())
    assert reward(**arguments).tolist() == EXPECTED
    unchanged(before, arguments)
    assert reward(**arguments).tolist() == EXPECTED


def test_a_further_attempt_sees_what_the_first_one_saw():
    tries = []

    def fails_once(**arguments):
        found = size(**arguments)
        tries.append(found)
        if len(tries) == 1:
            raise ConnectionError("server gone")
        return found

    assert load_reward(fails_once, backoff=0.0)(**given()).tolist() == EXPECTED
    assert tries == [EXPECTED, EXPECTED]


def references(_, columns):
    """Two members' scores of base samples."""
    return [np.array([9.0, 30.0])] * 2


def test_the_members_of_a_reward_do_not_see_what_another_did():
    twice = [size, size]
    for reward in (mean(twice), minimum(twice)):
        assert load_reward(reward)(**given()).tolist() == EXPECTED
    total = weighted_sum(twice)
    total.bind(references)
    assert load_reward(total)(**given()).tolist() == [1.0, 1.0, 1.0]  # each member: between 9 and 30, C = 1/2
    controlled = LengthControlled(size, coefficient=1.0)  # one word each, whatever the member made of it
    assert load_reward(controlled)(**given()).tolist() == [score - 1.0 for score in EXPECTED]


def test_training_sees_what_calibration_saw():
    """TRL hands `CTRLReward` its own rows, and keeps them for the loss and the logs."""
    arguments, before = given(), copy.deepcopy(given())
    reward = CTRLReward(size, lambda u: u)
    for _ in range(2):
        found = reward(**arguments, ref_rewards=[[EXPECTED[0], 0.0, 99.0, 98.0]] * 3, trainer_state=object())
        assert found == [(1 + 0.5) / 4, 2 / 4, 2 / 4]
        unchanged(before, arguments)


def test_the_trainers_own_three_are_handed_on_as_they_are():
    state, seen = object(), {}

    def function(completions, trainer_state, log_extra, log_metric):
        seen.update(state=trainer_state, extra=log_extra, metric=log_metric)
        return [0.0] * len(completions)

    load_reward(function)(["p"], ["c"], trainer_state=state, log_extra=print, log_metric=max)
    assert seen == {"state": state, "extra": print, "metric": max} and seen["state"] is state


def test_a_judge_that_changes_its_answers_is_asked_about_the_same_ones_again():
    def longer(prompts, firsts, seconds):
        verdicts = [float(len(a[0]["content"]) > len(b[0]["content"])) for a, b in zip(firsts, seconds, strict=True)]
        for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
            prompt.append(first[0])
            first[0]["content"], second[0]["content"] = "", "much longer"
        return verdicts

    prompt = chat("why")
    firsts, seconds = ([[{"role": "assistant", "content": text}]] * 2 for text in ("long", "s"))
    verdicts = both_orders(longer, [prompt] * 2, firsts, seconds)
    assert verdicts.shown_first_B.tolist() == verdicts.shown_second_B.tolist() == [1.0, 1.0]
    assert prompt == chat("why") and firsts[0][0]["content"] == "long" and seconds[0][0]["content"] == "s"


def test_builders_get_their_own_arguments():
    def build(weights, options):
        weights.append(3), options["deep"].pop("a")
        return lambda completions, **_: [float(sum(weights))] * len(completions)

    kwargs = {"weights": [1, 2], "options": {"deep": {"a": 1}}}
    first, second = load_reward(build, kwargs), load_reward(build, kwargs)
    assert first(["p"], ["c"]).tolist() == second(["p"], ["c"]).tolist() == [6.0]
    assert kwargs == {"weights": [1, 2], "options": {"deep": {"a": 1}}} and first.fingerprint == second.fingerprint


def test_a_strategy_that_changes_its_prompt_is_scored_on_the_data():
    class Appends:
        n = width = 2

        def step(self, seen):
            seen.prompt.content.append({"role": "user", "content": "more"})
            seen.prompt.columns["facts"].append(1)
            seen.rewards_N[:] = 5.0
            return Choose(1) if len(seen.candidates) == 2 else Draw(1)

    prompt = Prompt(chat("why"), prompt_key(chat("why")), {"facts": [0]})

    def score(prompts, samples):
        return np.array([float(len(one.content) + len(one.columns["facts"])) for one in prompts])

    found = run(Appends(), Told(["a", "b"]), score, given=[prompt])[0]
    assert found.rewards_N.tolist() == [2.0, 2.0] and found.prompt.content == chat("why")


def test_the_reported_case_scores_all_alike():
    """The reward builds the conversation that it scores: two messages, for every sample, in every call."""
    reward = load_reward("appends.py:reward", base_dir=CASES)
    prompt = Prompt(chat("why"), prompt_key(chat("why")))
    samples = [Sample(prompt.key, index, (1,), np.zeros(1, dtype=np.float32), "so", True) for index in range(4)]
    for _ in range(2):
        assert score_samples(reward, [prompt] * 4, samples).tolist() == [2.0] * 4
    assert prompt.content == chat("why")


REWARD = """
def reward(prompts, completions, completion_ids, facts, **_):
    scores = []
    for prompt, completion, ids, known in zip(prompts, completions, completion_ids, facts):
        prompt.append(completion[0])
        known["seen"].append(1)
        scores.append(1000.0 * len(prompt) + 100000.0 * len(known["seen"]) + sum(ids))
    return scores
"""


def test_a_calibration_keeps_the_data_as_it_was(tmp_path):
    """On a real model, in batches: two messages and one entry for every sample of every prompt."""
    keys = tiny_experiment(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    rows = [{"prompt": chat(row["prompt"]), "facts": {"seen": [0]}} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "score.py").write_text(REWARD)
    calibrate(load_recipe(keys))
    folder = next((tmp_path / "out" / "calibration").glob("scores-*"))
    plan = json.loads((folder.parent / "plan.json").read_text())
    table = SampleTable.open(folder.parent, plan["parts"])
    samples = table.samples()
    for key, rewards in table.rewards(folder.name.removeprefix("scores-")).items():
        assert (rewards - [sum(sample.token_ids) for sample in samples[key]]).tolist() == [202000.0] * 12


def test_copies_keep_what_they_are_copies_of():
    class Named(dict):
        pass

    value = {"a": Named(b=[1, (2, [3])]), "f": len, "none": None, "class": list}
    found = own_copy(value)
    assert found == value and type(found["a"]) is Named
    found["a"]["b"][1][1].append(4)
    assert value["a"]["b"] == [1, (2, [3])]
