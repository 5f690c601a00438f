"""From a recipe's `strategy` to the object, and what `evaluate` measures of it on its own samples."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from infalign import BestOfN
from infalign.decoding.adaptive import Adaptive
from infalign.decoding.by_procedure import ByProcedure
from infalign.decoding.early_rejection import EarlyRejection
from infalign.decoding.majority_vote import MajorityVote
from infalign.decoding.rejection import Rejection
from infalign.decoding.replay import Pool
from infalign.evaluation.compute import procedure_point, strategy_point
from infalign.evaluation.summary import PROXY
from infalign.rewards.scoring import score_samples
from infalign.runtime.artifacts import without_nan
from infalign.stages.evaluate import evaluate
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.scored_samples import Contest, Measured, ScoredSamples, compute_facts, cut_short
from infalign.stages.strategy import load_strategy
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment

OWN = """
from infalign.decoding.strategy import Choose, Draw


class First:
    def __init__(self, count=1):
        self.n = self.width = count

    def __repr__(self):
        return f"First({self.n})"

    def step(self, seen):
        return Choose(0) if seen.candidates else Draw(self.n)


first = First(2)
number = 3


def last_word(text):
    return text.split()[-1] if text.split() else None


def no_strategy():
    return "none"
"""


def loaded(tmp_path, **keys):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "r.yaml").write_text(json.dumps({"n": 8, **keys}))
    return load_strategy(load_recipe(tmp_path / "r.yaml"), BestOfN(8))


@pytest.mark.parametrize(
    ("strategy", "kwargs", "expected"),
    [
        ("procedure", {}, ByProcedure(BestOfN(8))),
        ("rejection", {"threshold": 0.9}, Rejection(8, 0.9)),
        ("rejection", {"threshold": 0.9, "n": 3, "at_once": 2}, Rejection(3, 0.9, at_once=2)),
        ("early_rejection", {"check_tokens": 16, "keep": 0.25}, EarlyRejection(BestOfN(8), 16, 0.25)),
        ("adaptive", {"cost": 0.1}, Adaptive(8, 0.1)),
    ],
)
def test_built_ins_take_n_or_the_procedure(tmp_path, strategy, kwargs, expected):
    assert loaded(tmp_path, strategy=strategy, strategy_kwargs=kwargs) == expected


def test_ones_own(tmp_path):
    assert repr(loaded(tmp_path, strategy="own.py:first")) == "First(2)"
    assert repr(loaded(tmp_path, strategy="own.py:First", strategy_kwargs={"count": 5})) == "First(5)"
    vote = loaded(tmp_path, strategy="majority_vote", strategy_kwargs={"answer": "own.py:last_word"})
    assert isinstance(vote, MajorityVote) and vote.extract("so it is") == "is" and vote.n == 8


@pytest.mark.parametrize(
    ("strategy", "kwargs", "message"),
    [
        ("rejecton", {}, r"strategy 'rejecton' is unknown; did you mean 'rejection'\?|strategy 'rejecton' is unknown"),
        ("rejection", {}, r"strategy 'rejection' needs more than strategy_kwargs \{\}"),
        ("rejection", {"treshold": 0.9}, "strategy 'rejection' does not take strategy_kwargs {'treshold': 0.9}"),
        ("procedure", {"keep": 0.5}, "strategy 'procedure' does not take strategy_kwargs"),
        ("adaptive", {"cost": -1}, "strategy 'adaptive': cost must be a finite number >= 0; got -1"),
        ("own.py:no_strategy", {}, "strategy 'own.py:no_strategy' gave str, which lacks n, width, step"),
        ("majority_vote", {"answer": "own.py:number"}, "must name a function that maps a completion to its answer"),
    ],
)
def test_mistakes_are_named(tmp_path, strategy, kwargs, message):
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, strategy=strategy, strategy_kwargs=kwargs)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    keys = tiny_experiment(folder)
    keys |= {"policy_name_or_path": str(keys["model_name_or_path"]), "eval_samples": 10, "kl_samples": 2}
    keys |= {"strategy": "early_rejection", "strategy_kwargs": {"check_tokens": 2, "keep": 0.5}, "n": 4}
    recipe = load_recipe(keys)
    return recipe, evaluate(recipe)


def test_evaluation_holds_the_compute_of_its_own_samples(evaluated):
    recipe, result = evaluated
    written = json.loads((recipe.output / "evaluation.json").read_text())["compute"]
    assert written == without_nan(dataclasses.asdict(result.compute))
    assert [(row["side"], row["n"]) for row in written["curves"]] == [
        (side, n) for side in ("base", "policy") for n in (1, 2, 3, 4)
    ]
    base = [row for row in written["curves"] if row["side"] == "base"]
    assert [row["tokens"] for row in base] == pytest.approx([n * result.base.tokens for n in (1, 2, 3, 4)])
    early = {row["side"]: row for row in written["decoder"]}
    for side in ("base", "policy"):
        full = next(row for row in written["curves"] if row["side"] == side and row["n"] == 4)
        assert early[side]["label"] == "EarlyRejection(procedure=BestOfN(4), check_tokens=2, keep=0.5)"
        assert early[side]["tokens"] < full["tokens"] and 4 <= early[side]["reward_calls"] <= 6
    assert written["match"]["win"] + 0.2 >= 0.5 and written["match"]["largest"] == 9


def test_facts_are_those_of_the_tables(evaluated):
    """Recomputed from the samples on disk, beginnings scored anew by hand."""
    recipe, result = evaluated
    experiment = Experiment(recipe)
    prompts = list(experiment.splits.test)
    sampler = experiment.sampler(experiment.base_path, "evaluation/base")
    assert experiment.tokenizer is sampler.tokenizer
    row = next(one for one in result.compute.curves if one.side == "base" and one.n == 2)
    from infalign.calibration.table import SampleTable  # noqa: PLC0415

    stored = {}
    for side in ("base", "policy"):
        parts = experiment.sampling_parts(
            experiment.judged_path if side == "policy" else experiment.base_path, f"evaluation/{side}"
        )
        stored[side] = SampleTable.open(recipe.output / "evaluation" / side, parts)
    drawn = {side: table.samples() for side, table in stored.items()}
    rewards = {side: table.rewards(experiment.reward.fingerprint) for side, table in stored.items()}
    contests = [
        Contest(p, *(Pool(drawn[side][p.key], rewards[side][p.key]) for side in ("base", "policy"))) for p in prompts
    ]
    assert row.mean == pytest.approx(procedure_point(contests, "base", BestOfN(2)).win.mean)
    base, policy = (ScoredSamples(drawn[side], {PROXY: rewards[side]}) for side in ("base", "policy"))
    assert compute_facts(experiment, Measured(prompts, base, policy)).curves == result.compute.curves
    cut_rewards = [
        Contest(one.prompt, *(_with_beginnings(table) for table in (one.base, one.policy))) for one in contests
    ]
    early = strategy_point(cut_rewards, "policy", EarlyRejection(BestOfN(4), 2, 0.5), seed=recipe.seed)
    assert dataclasses.asdict(early.row) == pytest.approx(dataclasses.asdict(result.compute.decoder[1]))
    sample = next(one for one in drawn["base"][prompts[0].key] if len(one.token_ids) > 2)
    cut = cut_short(sample, 2, experiment.tokenizer)
    assert cut.token_ids == sample.token_ids[:2] and not cut.finished and cut.token_logps.size == 2
    by_hand = sum(cut.token_ids) + 0.01 * cut.token_ids[0]
    assert score_samples(experiment.reward, [prompts[0]], [cut])[0] == pytest.approx(by_hand)
    assert cut_short(sample, len(sample.token_ids), experiment.tokenizer) is sample
    assert np.isfinite(by_hand)


def _with_beginnings(table):
    """The reward of the first two tokens, written down once more."""
    rewards = [sum(one.token_ids[:2]) + 0.01 * one.token_ids[0] for one in table.samples]
    return dataclasses.replace(table, beginnings={2: np.array(rewards)})


def test_a_mistake_is_told_before_anything_is_sampled(evaluated, tmp_path):
    recipe, _ = evaluated
    other = dataclasses.replace(recipe, output_dir=str(tmp_path / "new"), strategy_kwargs={})
    with pytest.raises(InputError, match="strategy 'early_rejection' needs more than"):
        evaluate(other)
    assert not (tmp_path / "new").exists()


def test_early_rejection_must_leave_something_to_save():
    keys = {"strategy": "early_rejection", "strategy_kwargs": {"check_tokens": 12}, "max_completion_length": 12}
    with pytest.raises(InputError, match="check_tokens is 12 and completions have 12 tokens at most"):
        load_strategy(load_recipe(keys), BestOfN(4))
