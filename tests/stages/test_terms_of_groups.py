"""Terms for groups of prompts: who is trained on what, and which win rates are measured on which prompts."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from infalign import BestOfN, WorstOfN, run
from infalign.calibration.table import SampleTable
from infalign.evaluation.winrate import judged_win_rate, win_rate
from infalign.stages.calibrate import calibrate, open_table
from infalign.stages.evaluate import evaluate
from infalign.stages.experiment import Experiment
from infalign.stages.objective import load_objective, load_procedure
from infalign.stages.per_prompt import read_per_prompt
from infalign.stages.recipe import load_recipe
from infalign.stages.term_prompts import assigned
from infalign.stages.train import _dataset, rewards_of
from infalign.stages.win_rates import questions
from infalign.theory.optimum import optimal_transform
from infalign.training.reward import TERMS
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal

LANGUAGES = ("en", "de", "en", "fr")


@pytest.fixture
def keys(tmp_path):
    """Forty prompts, half of them English, a quarter German, a quarter French; two rewards."""
    keys = tiny_experiment(tmp_path, prompts=40)
    path = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "language": LANGUAGES[number % 4]} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = str(keys.pop("reward"))
    for name in ("procedure", "n"):
        del keys[name]
    terms = [
        {"reward": score, "n": 2, "group": "en"},
        {"reward": score, "n": 2, "group": "de"},
        {"reward": score.replace(":reward", ":gold"), "procedure": "worst_of_n", "n": 2},
    ]
    return {**keys, "objectives": terms, "group_column": "language", "num_train_prompts": 20, "num_test_prompts": 16}


def experiment_of(keys, **changes):
    return Experiment(load_recipe({**keys, **changes}))


def by_language(experiment, prompts):
    return [str(prompt.columns["language"]) for prompt in prompts]


def test_an_expert_of_a_group_sees_its_prompts_alone(keys):
    experiment = experiment_of(keys, objective_weights=[0, 1, 0])
    found = assigned(experiment, experiment.splits.train)
    german = [one for one in experiment.splits.train if one.columns["language"] == "de"]
    assert [prompt for prompt, _ in found] == german and len(german) > 1
    assert {numbers for _, numbers in found} == {(0,)}  # of the terms that are trained


def test_a_joint_policy_has_each_prompt_for_its_own_terms(keys):
    experiment = experiment_of(keys)
    found = {prompt.key: numbers for prompt, numbers in assigned(experiment, experiment.splits.train)}
    wanted = {"en": (0, 2), "de": (1, 2), "fr": (2,)}
    assert found == {one.key: wanted[str(one.columns["language"])] for one in experiment.splits.train}


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.25, 0.75), (3, 1), (1, 0)])
def test_a_mix_has_as_many_prompts_of_each_group_as_it_says(keys, shares):
    terms = keys["objectives"][:2]
    experiment = experiment_of({**keys, "objectives": terms}, objective_mix=list(shares))
    there = Counter(by_language(experiment, experiment.splits.train))
    found = Counter(by_language(experiment, [prompt for prompt, _ in assigned(experiment, experiment.splits.train)]))
    one, two = (share / sum(shares) for share in shares)
    total = min(there[name] / share for name, share in (("en", one), ("de", two)) if share)
    assert (found["en"], found["de"], found["fr"]) == (round(one * total), round(two * total), 0)
    # nobody could have more at these shares
    assert any(found[name] == there[name] for name, share in (("en", one), ("de", two)) if share)


def test_without_groups_and_mix_every_prompt_is_for_all(keys):
    terms = [{name: value for name, value in one.items() if name != "group"} for one in keys["objectives"][1:]]
    experiment = experiment_of({**keys, "objectives": terms})
    assert assigned(experiment, experiment.splits.train) is None


def test_the_training_set_says_so(keys):
    experiment = experiment_of(keys)
    calibrate(experiment.recipe, experiment)
    table = open_table(experiment)
    rows = [_dataset(experiment, table, experiment.splits.train)[number] for number in range(20)]
    assert {tuple(row[TERMS]) for row in rows} == {(0, 2), (1, 2), (2,)}
    assert [one.only for one in rewards_of(experiment, table)] == [0, 1, 2]
    assert [one.name for one in rewards_of(experiment, table)][:2] == [
        "BestOfN(2) of score on en", "BestOfN(2) of score on de"
    ]  # fmt: skip


def test_beta_is_a_prompts_and_not_the_sum_over_groups(keys):
    """One prompt is for one of the first two terms, and always for the third."""
    recipe = load_recipe({**keys, "objective_weights": [0.5, 1.0, 2.0]})
    best, worst = (optimal_transform(one(2), kl=0.5).beta for one in (BestOfN, WorstOfN))
    found = load_objective(recipe, load_procedure(recipe))
    assert found.beta == pytest.approx((0.5 + 1.0) / 2 * best + 2.0 * worst)
    assert " on en" in found.label and " on de" in found.label


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_column": "tongue"}, "group 'en': no train prompt has it in the column 'tongue', which is not there"),
        ({"group": "es"}, "group 'es': no train prompt has it in the column 'language', which has de, en, fr"),
    ],
)
def test_a_group_without_prompts_is_one_line(keys, changes, message):
    if group := changes.pop("group", None):
        keys["objectives"][0]["group"] = group
    with pytest.raises(InputError, match=message):
        _ = experiment_of(keys, **changes).splits


@pytest.mark.parametrize("groups", [("en", None), ("en", "en")])
def test_a_mix_needs_a_group_for_each_term_or_none(keys, groups):
    terms = [{**one, "group": group} for one, group in zip(keys["objectives"][1:], groups, strict=True)]
    terms = [{name: value for name, value in one.items() if value is not None} for one in terms]
    with pytest.raises(InputError, match="give each of them a group of its own, or none a group"):
        load_recipe({**keys, "objectives": terms, "objective_mix": [0.5, 0.5]})


def test_what_is_measured(keys):
    asked = questions(experiment_of(keys))
    names = [(one.name, repr(one.decoder)) for one in asked]
    assert len(set(names)) == len(names)
    weights = {name: one.weight for name, one in zip(names, asked, strict=True) if not math.isnan(one.weight)}
    assert weights == {
        ("reward on en", "BestOfN(2)"): 1.0, ("reward on de", "BestOfN(2)"): 1.0, ("gold (2)", "WorstOfN(2)"): 1.0
    }  # fmt: skip
    crossed = {(one.name, repr(one.decoder)) for one in asked if one.chosen_by}
    assert crossed == {
        ("reward chosen by gold (2) on en", "WorstOfN(2)"),
        ("reward chosen by gold (2) on de", "WorstOfN(2)"),
        ("gold (2) chosen by reward", "BestOfN(2)"),
    }


def test_one_objective_asks_for_what_it_always_did(tmp_path):
    found = questions(experiment_of(tiny_experiment(tmp_path), gold_reward=str(tmp_path / "score.py") + ":gold"))
    assert [(one.name, repr(one.decoder), math.isnan(one.weight)) for one in found] == [
        (judge, decoder, True)
        for judge in ("reward", "gold")
        for decoder in ("BestOfN(2)", "BestOfN(1)", "WorstOfN(2)")
    ]


def test_win_rates_of_groups_and_of_what_another_reward_picks(keys, tmp_path):
    """Against the estimators on rewards that are computed here from the samples on disk."""
    policy = tiny_causal(tmp_path / "policy", "llama", seed=5)
    experiment = experiment_of(keys, policy_name_or_path=policy)
    found = evaluate(experiment.recipe, experiment)
    rewards = {}
    for side, path in (("base", experiment.base_path), ("policy", policy)):
        parts = experiment.sampling_parts(path, f"evaluation/{side}")
        rewards[side] = _scores(SampleTable.open(tmp_path / "out" / "evaluation" / side, parts))
    rows = {(row.judge, row.label): row for row in found.win_rates}
    test = experiment.splits.test
    for group, judge in (("en", "reward on en"), ("de", "reward on de")):
        mine = [one.key for one in test if one.columns["language"] == group]
        sides = [[rewards[side][key][0] for key in mine] for side in ("policy", "base")]
        row = rows[judge, "BestOfN(2)"]
        assert row.mean == pytest.approx(win_rate(*sides, BestOfN(2)).mean)
        assert row.group == group and not row.judged_by_another
        picked = [([rewards[side][key][1] for key in mine], [rewards[side][key][0] for key in mine])
                  for side in ("policy", "base")]  # fmt: skip
        row = rows[f"reward chosen by gold (2) on {group}", "WorstOfN(2)"]
        assert row.mean == pytest.approx(judged_win_rate(*picked, WorstOfN(2)).mean)
        assert math.isnan(row.limit) and row.judged_by_another
    written = read_per_prompt(tmp_path / "out")
    for (judge, label), wins_P in written.wins.items():
        inside = [one.columns["language"] == judge[-2:] or " on " not in judge for one in test]
        assert np.isfinite(wins_P).tolist() == inside
        assert np.nanmean(wins_P) == pytest.approx(rows[judge, label].mean)


def _scores(table):
    """(reward, gold) of each prompt's samples, from their tokens."""
    return {
        key: (
            np.array([sum(one.token_ids) + 0.01 * one.token_ids[0] for one in row]),
            np.array([float(max(one.token_ids)) for one in row]),
        )
        for key, row in table.samples().items()
    }


VERIFIER = '''
def strict(completion_ids, answer, **_):
    """Reads a column that prompts of other groups lack; it is never asked about them."""
    assert None not in answer, answer
    return [float(sum(ids) % (7 + int(one))) for ids, one in zip(completion_ids, answer)]


def silent(completion_ids, language, **_):
    """Has nothing to say about other groups."""
    return [float(sum(ids)) if one == "de" else None for ids, one in zip(completion_ids, language)]
'''


@pytest.mark.parametrize("name", ["strict", "silent"])
def test_a_reward_of_a_group_is_not_asked_elsewhere(keys, tmp_path, name):
    path = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "answer": 3} if row["language"] == "de" else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "verifier.py").write_text(VERIFIER)
    first = keys["objectives"][0]
    terms = [first, {"reward": f"{tmp_path / 'verifier.py'}:{name}", "n": 2, "group": "de"}]
    recipe = {**keys, "objectives": terms, "num_test_prompts": 12, "num_validation_prompts": 8,
              "eval_strategy": "steps", "eval_steps": 1}  # fmt: skip
    found = run(recipe)["evaluation"]
    rows = {row.judge: row for row in found.win_rates if row.weight > 0}
    assert set(rows) == {"reward on en", f"{name} on de"}
    assert all(0 < row.mean < 1 for row in rows.values())
    crossed = [row.judge for row in found.win_rates if row.chosen_by]
    assert crossed == [f"{name} chosen by reward on de"]  # the verifier has nothing to choose by on the others
    log = json.loads((tmp_path / "out" / "policy" / "training_log.json").read_text())
    assert any(f"eval_winrate/BestOfN(2) of {name} on de" in row for row in log)


def test_other_groups_make_another_policy(keys, tmp_path):
    recipe = {**keys, "objective_weights": [1, 0, 0], "target_kl": 0.5}
    run(recipe)
    path = tmp_path / "prompts.jsonl"
    path.write_text(path.read_text().replace('"de"', '"xx"').replace('"en"', '"de"').replace('"xx"', '"en"'))
    with pytest.raises(InputError, match="groups"):
        run(recipe)
