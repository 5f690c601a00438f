"""Ensembles and sums of calibrated rewards, against loops by the definition; and the invariance that sums are for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from infalign.rewards.calibrated_sum import sums_in
from infalign.rewards.combine import mean, minimum, pessimistic, weighted_sum
from infalign.rewards.loader import load_reward
from infalign.types import InputError, RewardError, prompt_key

SCORES = {"a": [1.0, 4.0, None, -2.0], "b": [3.0, 0.0, 5.0, -2.0], "c": [2.0, 2.0, 1.0, 7.0]}
CALL = {"prompts": ["p"] * 4, "completions": ["w", "x", "y", "z"], "completion_ids": [[1]] * 4}
SOURCE = """
def a(completions, **_):
    return {a}

async def b(completions, **_):
    return {b}

def build(factor):
    return lambda completions, **_: [None if one is None else factor * one for one in {c}]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE.format(**{name: repr(row) for name, row in SCORES.items()}))
    return tmp_path


def members(*weights):
    found = [{"reward": "mine.py:a"}, "mine.py:b", {"reward": "mine.py:build", "reward_kwargs": {"factor": 10.0}}]
    if weights:
        found[1] = {"reward": "mine.py:b"}
        found = [{**one, "weight": weight} for one, weight in zip(found, weights, strict=True)]
    return found


def by_hand(join):
    """Over the completions that every member scored."""
    rows = zip(SCORES["a"], SCORES["b"], [10.0 * value for value in SCORES["c"]], strict=True)
    return [np.nan if None in row else join(row) for row in rows]


def penalised(row):
    average = sum(row) / 3
    return average - 0.7 * (sum((value - average) ** 2 for value in row) / 3) ** 0.5


@pytest.mark.parametrize(
    ("name", "options", "join"),
    [("mean", {}, lambda row: sum(row) / 3), ("minimum", {}, min), ("pessimistic", {"penalty": 0.7}, penalised)],
)
def test_ensembles(folder, name, options, join):
    spec, kwargs = f"infalign.rewards.combine:{name}", {"members": members(), **options}
    reward = load_reward(spec, kwargs, base_dir=folder)
    np.testing.assert_allclose(reward(**CALL), by_hand(join))
    assert reward.name == name


def test_a_penalty_of_nothing_is_the_mean_and_members_that_agree_cost_none():
    alike = [lambda completions, **_: [1.0, 2.0], lambda completions, **_: [1.0, 2.0]]
    apart = [lambda completions, **_: [1.0, 2.0], lambda completions, **_: [5.0, 0.0]]
    call = (["p"] * 2, ["x", "y"])
    assert pessimistic(alike, penalty=3.0)(*call).tolist() == [1.0, 2.0]
    np.testing.assert_allclose(pessimistic(apart, penalty=0)(*call), mean(apart)(*call))
    np.testing.assert_allclose(pessimistic(apart, penalty=1.0)(*call), minimum(apart)(*call))  # of two: mean - std


def test_a_member_that_fails_is_an_error_or_no_score():
    def gone(completions, **_):
        raise ConnectionError("gone")

    kwargs = {"members": [lambda completions, **_: [1.0] * len(completions), gone]}
    with pytest.raises(RewardError, match=r"reward 'gone' failed 2 times in a row \(ConnectionError: gone\)"):
        load_reward("infalign.rewards.combine:mean", kwargs, retries=1, backoff=0.001)(["p"], ["x"])
    masked = load_reward("infalign.rewards.combine:mean", kwargs, retries=0, on_error="mask")
    assert np.isnan(masked(["p"], ["x"])).all()


def test_fingerprints_follow_the_members(folder):
    def fingerprint(name="mean", **changes):
        kwargs = {"members": members(), **changes}
        return load_reward(f"infalign.rewards.combine:{name}", kwargs, base_dir=folder).fingerprint

    before = [fingerprint(), fingerprint("minimum"), fingerprint("pessimistic"), fingerprint("pessimistic", penalty=2)]
    before += [fingerprint(members=members()[:2]), fingerprint("weighted_sum")]
    before.append(fingerprint("weighted_sum", members=members(1, 1, 2)))
    assert fingerprint() == before[0] and len(set(before)) == 7
    (folder / "mine.py").write_text((folder / "mine.py").read_text() + "\n# changed\n")
    assert fingerprint() != before[0]


# --- sums of calibrated rewards -------------------------------------------------------------------------------------

REFERENCES = {"p": [[0.0, 1.0, 1.0, 6.0], [9.0, -1.0, None, 3.0]], "q": [[2.0], [0.0, 5.0]]}


def quantile(value, reference):
    """C by its definition."""
    known = [one for one in reference if one is not None]
    return sum((one < value) + 0.5 * (one == value) for one in known) / len(known)


def bound(functions, weights, references=REFERENCES):
    reward = load_reward(weighted_sum([{"reward": f, "weight": w} for f, w in zip(functions, weights, strict=True)]))
    tables = {prompt_key(name): [np.array(row, dtype=float) for row in rows] for name, rows in references.items()}
    sums_in(reward)[0].bind(lambda prompt, columns: tables[prompt_key(prompt)])
    return reward


def listed(values):
    return lambda completions, **_: values


def test_a_sum_of_quantiles_by_hand():
    prompts, first, second = ["p", "q", "p", "p"], [1.0, 3.0, 7.0, 2.0], [3.0, 4.0, -5.0, None]
    found = bound([listed(first), listed(second)], [2.0, -0.5])(prompts, ["x"] * 4)
    expected = [
        np.nan if two is None else 2.0 * quantile(one, REFERENCES[p][0]) - 0.5 * quantile(two, REFERENCES[p][1])
        for p, one, two in zip(prompts, first, second, strict=True)
    ]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("grow", [lambda r: 1e4 * r - 7, np.exp, lambda r: r**3, np.arctan], ids=range(4))
def test_scales_do_not_matter(member, grow):
    """Any increasing map of a member's score changes nothing; adding raw scores would."""
    rng = np.random.default_rng(0)
    raw, references = rng.normal(size=(2, 9)).round(1), rng.normal(size=(2, 20)).round(1)

    def total(raw, references):
        return bound([listed(list(row)) for row in raw], [1.0, 0.3], {"p": references})(["p"] * 9, ["x"] * 9)

    before = total(raw, references)
    raw[member], references[member] = grow(raw[member]), grow(references[member])
    np.testing.assert_array_equal(total(raw, references), before)
    assert len(set(before)) > 4


def test_its_mean_over_the_base_samples_is_half_the_weights():
    rows = np.random.default_rng(1).normal(size=(2, 50))
    reward = bound([listed(list(rows[0])), listed(list(rows[1]))], [1.0, 3.0], {"p": rows})
    assert reward(["p"] * 50, ["x"] * 50).mean() == pytest.approx(2.0)


def test_a_member_without_any_reference_gives_no_score():
    reward = bound([listed([1.0, 1.0]), listed([1.0, 1.0])], [1, 1], {"p": [[1.0], [None]], "q": [[1.0], [1.0]]})
    np.testing.assert_array_equal(reward(["p", "q"], ["x", "x"]), [np.nan, 1.0])


def test_without_base_samples_it_is_an_error():
    reward = load_reward(weighted_sum([listed([1.0])]))
    with pytest.raises(InputError, match=r"it adds quantiles among base samples, and there are none here: .*calibrate"):
        reward(["p"], ["x"])


def test_sums_are_found_inside_other_rewards_and_not_inside_sums():
    inner = weighted_sum([listed([1.0])])
    assert sums_in(load_reward(mean([inner, listed([1.0])]))) == [inner]
    assert sums_in(load_reward(listed([1.0]))) == []
    with pytest.raises(InputError, match="a member is a weighted sum itself"):
        weighted_sum([inner])


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("mean", {"members": []}, r"mean: members is a list of rewards, .* got \[\]"),
        ("mean", {"members": "mine.py:a"}, "members is a list of rewards"),
        (
            "mean",
            {"members": [{"spec": "mine.py:a"}]},
            "member 0 does not take 'spec'; its keys are reward, reward_kwa",
        ),
        ("mean", {"members": ["mine.py:a", {"weight": 1}]}, "member 1 has no `reward`"),
        ("mean", {"members": ["mine.py:zz"]}, "has no 'zz'"),
        ("weighted_sum", {"members": members(1, "2", 3)}, "the weight of member 1 is a finite number, got '2'"),
        (
            "weighted_sum",
            {"members": members(1, float("inf"), 3)},
            "the weight of member 1 is a finite number, got inf",
        ),
        ("pessimistic", {"members": members(), "penalty": -1}, "penalty is a number, 0 or more, got -1"),
        ("pessimistic", {"members": ["mine.py:a"]}, "give two or more"),
        ("mean", {}, "missing 1 required positional argument: 'members'"),
    ],
)
def test_refused_when_loaded(folder, name, kwargs, words):
    with pytest.raises(InputError, match=words):
        load_reward(f"infalign.rewards.combine:{name}", kwargs, base_dir=folder)


def test_kwargs_that_a_recipe_can_hold(folder):
    """Members as YAML or JSON give them."""
    kwargs = json.loads(json.dumps({"members": members()}))
    assert load_reward("infalign.rewards.combine:mean", kwargs, base_dir=folder).counts["calls"] == 0
