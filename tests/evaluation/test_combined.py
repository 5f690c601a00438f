"""Mix or merge: retention, the choice of a candidate, paired differences and time, against arithmetic by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from infalign.evaluation.combined import Combination, Origin, as_rows, axes_of, combine, in_validation
from infalign.evaluation.sweep import CellResult, PerPrompt, judged_decoders
from infalign.report.combined_page import weak_experts
from tests.stages.test_sweep import row_of

ONE, TWO = ("reward", "BestOfN(4)"), ("harmless", "WorstOfN(4)")
KEYS = tuple(f"prompt {number}" for number in range(400))
CHOOSES = np.array([in_validation(key, 0.5) for key in KEYS])


def row(axis, weight):
    found = vars(row_of(0.9)) | {"judge": axis[0], "label": axis[1], "weight": weight}
    return type(row_of(0.9))(**found)


def cell(arm, weights, seed=1, seconds=10.0, **facts):
    rows = tuple(row(axis, weight) for axis, weight in zip((ONE, TWO), weights, strict=True))
    return CellResult(f"{arm}-{seed}", arm, seed, {"target_kl": 0.5, "seed": seed}, {}, seconds=seconds, kl=0.4,
                      rows=rows, facts=facts)  # fmt: skip


def wins(one, two, noise=0.0, seed=0):
    """Per-prompt wins: constants, or other ones where candidates are chosen (a pair: chosen on, measured on)."""
    rng = np.random.default_rng(seed)
    rows = {}
    for axis, value in ((ONE, one), (TWO, two)):
        first, second = value if isinstance(value, tuple) else (value, value)
        rows[axis] = np.where(CHOOSES, first, second) + noise * rng.normal(size=len(KEYS))
    return PerPrompt(KEYS, np.full(len(KEYS), 0.4), rows)


ORIGINS = {
    "helpful": Origin("helpful", "helpful"),
    "harmless": Origin("harmless", "harmless"),
    "both": Origin("joint", "both"),
    "merged .3": Origin("merged", "merged .3", ("helpful-1", "harmless-1"), trained=False),
    "merged .7": Origin("merged", "merged .7", ("helpful-1", "harmless-1"), trained=False),
}
WEIGHTS = {"helpful": (1, 0), "harmless": (0, 1), "both": (0.5, 0.5), "merged .3": (1, 1), "merged .7": (1, 1)}
CASE = {
    "helpful": wins(0.9, 0.5),
    "harmless": wins(0.4, 0.8),
    "both": wins(0.7, 0.65),
    "merged .3": wins((0.9, 0.60), (0.8, 0.59)),  # fine where it is chosen, poor where it is measured
    "merged .7": wins((0.6, 0.85), (0.6, 0.75)),
}


def combined(case, reference="joint", weights=WEIGHTS, seeds=(1,), **changes):
    cells = [cell(arm, weights[arm], seed) for seed in seeds for arm in case]
    prompts = {one.name: case[one.arm] for one in cells}
    origins = {one.name: ORIGINS[one.arm] for one in cells}
    options = {"share": 0.5, "confidence": 0.95, "seed": 0, **changes}
    found = combine(cells, prompts, origins, reference, **options)
    return found.axes, {one.family: one for one in found.families}


def test_half_of_the_prompts_choose_by_their_keys_alone():
    assert 150 < CHOOSES.sum() < 250
    assert [in_validation(key, 0.5) for key in reversed(KEYS)] == CHOOSES[::-1].tolist()
    assert not any(in_validation(key, 1e-9) for key in KEYS)


def test_retention_is_what_is_kept_of_the_expert():
    axes, found = combined(CASE)
    assert [(axis.judge, axis.decoder, axis.expert) for axis in axes] == [(*ONE, "helpful"), (*TWO, "harmless")]
    assert [one.mean for one in found["joint"].retentions] == pytest.approx([0.2 / 0.4, 0.15 / 0.3])
    assert found["joint"].score.mean == pytest.approx(0.5)
    assert found["helpful"].retentions[0].mean == pytest.approx(1.0)
    assert found["helpful"].score.mean == pytest.approx(0.0)  # nothing of the other term
    assert found["harmless"].score.mean == pytest.approx(-0.25)  # below the base


def test_the_best_is_chosen_on_other_prompts_than_it_is_measured_on():
    _, found = combined(CASE)
    assert found["merged"].arm == "merged .3" and found["merged"].candidates == 2
    assert found["merged"].validated == pytest.approx(1.0)
    assert found["merged"].score.mean == pytest.approx(min(0.1 / 0.4, 0.09 / 0.3))
    assert [one.mean for one in found["merged"].wins] == pytest.approx([0.60, 0.59])


def test_differences_are_paired():
    """Two arms with the same noise differ by a constant: an unpaired interval would be as wide as their own."""
    noisy = {
        "helpful": wins(0.9, 0.5), "harmless": wins(0.4, 0.8),
        "both": wins(0.70, 0.68, 0.3), "merged .3": wins(0.72, 0.70, 0.3),
    }  # fmt: skip
    _, found = combined(noisy)
    own, apart = found["merged"].score, found["merged"].difference
    assert own.high - own.low > 0.1
    assert apart.low > 0 and apart.high - apart.low < 0.05
    assert found["joint"].difference.mean == 0.0


def test_intervals_cover_the_truth():
    """The score of many draws of prompts lies in its interval about as often as it says."""
    truth, hits, draws = 0.5, 0, 60
    for seed in range(draws):
        case = {
            "helpful": wins(0.9, 0.5, 0.1, 3 * seed), "harmless": wins(0.4, 0.8, 0.1, 3 * seed + 1),
            "both": wins(0.7, 0.9, 0.1, 3 * seed + 2),
        }  # fmt: skip
        case["merged .3"] = case["both"]
        _, found = combined(case)
        hits += found["joint"].score.low <= truth <= found["joint"].score.high
    assert hits >= 0.85 * draws  # 60 draws at .95: below 51 with a chance under 1e-3


def test_time_is_that_of_all_candidates_and_their_parents_once():
    _, found = combined(CASE)
    assert found["joint"].seconds == 10.0
    assert found["merged"].seconds == 40.0


def test_seeds_are_averaged_where_all_arms_have_them():
    cells = [cell(arm, WEIGHTS[arm], seed) for seed in (1, 2) for arm in CASE]
    cells = [one for one in cells if one.name != "both-2"]
    prompts = {one.name: CASE[one.arm] for one in cells}
    prompts |= {"helpful-2": wins(0.6, 0.5)}  # would change everything
    found = combine(cells, prompts, {one.name: ORIGINS[one.arm] for one in cells}, "joint",
                    share=0.5, confidence=0.95, seed=0)  # fmt: skip
    assert {one.family: one.score.mean for one in found.families}["joint"] == pytest.approx(0.5)


def test_without_experts_the_least_win_rate_counts():
    case = {name: CASE[name] for name in ("both", "merged .3", "merged .7")}
    axes, found = combined(case)
    assert [axis.expert for axis in axes] == ["", ""]
    assert math.isnan(found["joint"].retentions[0].mean)
    assert found["joint"].score.mean == pytest.approx(0.65)


def test_an_expert_that_won_nothing_gives_no_retention():
    axes, found = combined({**CASE, "harmless": wins(0.4, 0.51)})
    assert math.isnan(found["joint"].retentions[1].mean) and math.isnan(found["joint"].score.mean)
    assert found["joint"].retentions[0].mean == pytest.approx(0.5)
    line, chosen = weak_experts(Combination(axes, (), tuple(found.values())))
    assert "harmless, the expert of Worst-of-4, harmless, wins 0.510 there: nothing to keep" in line
    assert chosen.startswith("merged: chosen by the least win rate")


def test_where_retention_is_not_known_the_least_win_rate_chooses():
    """An expert that happens to win nothing on the prompts that choose: not the first arm of the file."""
    case = {**CASE, "harmless": wins(0.4, (0.515, 0.8)), "merged .3": wins(0.55, 0.51), "merged .7": wins(0.9, 0.95)}
    axes, found = combined(case)
    assert found["merged"].arm == "merged .7" and math.isnan(found["merged"].validated)
    assert found["merged"].score.mean == pytest.approx(min(0.4 / 0.4, 0.45 / 0.3))
    assert any(
        "chosen by the least win rate" in one for one in weak_experts(Combination(axes, (), tuple(found.values())))
    )


def test_every_point_of_the_grid_has_its_own_experts():
    """With a further key in the grid the cells' arms are called by it; where an expert failed there is no score."""
    cells, prompts, origins = [], {}, {}
    for rate in (1, 2, 3):
        for arm, content in CASE.items():
            if (rate, arm) == (3, "harmless"):
                continue
            one = cell(arm, WEIGHTS[arm])
            name = f"{arm}-{rate}"
            cells.append(replace(one, name=name, arm=f"{arm} rate={rate}", varied={"rate": rate, "seed": 1}))
            prompts[name], origins[name] = content, replace(ORIGINS[arm], parents=())
    found = combine(cells, prompts, origins, "joint", share=0.5, confidence=0.95, seed=0)
    assert [axis.expert for axis in found.axes] == ["helpful", "harmless"]
    scores = {(one.at["rate"], one.family): one.score.mean for one in found.families}
    assert scores[1, "joint"] == scores[2, "joint"] == pytest.approx(0.5)
    assert math.isnan(scores[3, "joint"])
    joint = [one for one in found.families if one.family == "joint"]
    assert [one.difference.mean for one in joint[:2]] == [0.0, 0.0]


def test_terms_are_compared_under_their_own_decoders():
    """At equal KL: neither every N of a further term nor what another reward picks."""
    other, crossed = ("harmless", "BestOfN(4)"), ("harmless chosen by reward", "BestOfN(4)")
    cells = []
    for arm in ("helpful", "harmless"):
        one = replace(cell(arm, WEIGHTS[arm]), procedure="BestOfN(4)")
        more = (row(other, math.nan), replace(row(crossed, math.nan), chosen_by="reward"))
        cells.append(replace(one, rows=(*one.rows, *more)))
    assert judged_decoders(cells, ["BestOfN(4)", "WorstOfN(4)"]) == [ONE, TWO]


def test_sweeps_that_combine_nothing_have_no_such_table():
    cells = [cell(arm, WEIGHTS[arm]) for arm in ("helpful", "harmless")]
    origins = {one.name: ORIGINS[one.arm] for one in cells}
    assert combine(cells, {one.name: CASE[one.arm] for one in cells}, origins, "helpful",
                   share=0.5, confidence=0.95, seed=0).families == ()  # fmt: skip
    assert [axis.expert for axis in axes_of(cells, origins)[0]] == ["helpful", "harmless"]


def test_rows_of_the_table():
    axes, found = combined(CASE)
    row = next(one for one in as_rows(Combination(axes, (), tuple(found.values()))) if one["family"] == "merged")
    assert row["arm"] == "merged .3" and row["target_kl"] == 0.5
    assert row["win WorstOfN(4), harmless"] == pytest.approx(0.59)
    assert row["retention BestOfN(4), reward"] == pytest.approx(0.25)


def test_terms_for_other_prompts_are_compared_on_them():
    """Half of the prompts are for each term; what stands elsewhere is not known, and nobody misses it."""
    mine = np.arange(len(KEYS)) % 2 == 0

    def split(one):
        return PerPrompt(KEYS, one.kl_P, {
            axis: np.where(mine if axis == ONE else ~mine, value, np.nan) for axis, value in one.wins.items()
        })  # fmt: skip

    _, found = combined({arm: split(one) for arm, one in CASE.items()})
    _, whole = combined(CASE)
    for family, one in found.items():
        assert one.score.mean == pytest.approx(whole[family].score.mean)
        assert [kept.mean for kept in one.retentions] == pytest.approx([kept.mean for kept in whole[family].retentions])
    noisy = {arm: split(wins(0.9 - 0.1 * place, 0.6 + 0.1 * place, 0.3, place)) for place, arm in enumerate(CASE)}
    _, found = combined(noisy)
    test = ~CHOOSES & mine
    values = noisy["both"].wins[ONE][test]
    one = found["joint"].wins[0]
    assert one.mean == pytest.approx(values.mean())
    assert one.high - one.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(test.sum()), rel=0.15)


def test_a_group_of_few_prompts_has_an_interval():
    """Four prompts of four hundred: a draw over all of them would often have none."""
    few = np.isin(np.arange(len(KEYS)), np.flatnonzero(~CHOOSES)[:4])
    case = {}
    for place, arm in enumerate(CASE):
        one = wins(0.9 - 0.1 * place, 0.6 + 0.1 * place, 0.1, place)
        case[arm] = replace(one, wins={ONE: one.wins[ONE], TWO: np.where(few | CHOOSES, one.wins[TWO], np.nan)})
    _, found = combined(case)
    own = found["joint"].wins[1]
    assert own.low < own.mean < own.high


def test_what_nobody_was_trained_for_stands_beside():
    third, crossed = ("kind", "BestOfN(4)"), ("harmless chosen by reward", "BestOfN(4)")
    cells = []
    for arm in CASE:
        one = cell(arm, WEIGHTS[arm])
        more = (row(third, 1.0 if "merged" in arm else 0.0), replace(row(crossed, math.nan), chosen_by="reward"))
        cells.append(replace(one, rows=(*one.rows, *more)))
    values = {third: np.where(CHOOSES, 0.1, 0.55), crossed: np.where(CHOOSES, 0.2, 0.45)}
    prompts = {one.name: replace(CASE[one.arm], wins={**CASE[one.arm].wins, **values}) for one in cells}
    found = combine(cells, prompts, {one.name: ORIGINS[one.arm] for one in cells}, "joint",
                    share=0.5, confidence=0.95, seed=0)  # fmt: skip
    assert [(one.judge, one.decoder) for one in found.axes] == [ONE, TWO]
    assert [(one.judge, one.decoder) for one in found.beside] == [third, crossed]
    joint = next(one for one in found.families if one.family == "joint")
    assert [one.mean for one in joint.beside] == pytest.approx([0.55, 0.45])
    assert joint.score.mean == pytest.approx(0.5)  # that of the two terms
    row_ = next(one for one in as_rows(found) if one["family"] == "joint")
    assert row_["win BestOfN(4), harmless chosen by reward"] == pytest.approx(0.45)
