"""What a result lacks is said with its remedy, and nothing is said that the numbers do not show."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from infalign import BestOfN, win_rate_limit
from infalign.evaluation.shortfall import Rollouts, last_rollouts, shortfall

LIMIT = float(win_rate_limit(BestOfN(4), 1.0))


def measured(share, kl=1.0, half_width=0.01):
    """What of an evaluation is read, with this attainment at this KL."""
    limit = float(win_rate_limit(BestOfN(4), kl))
    mean = 0.5 + share * (limit - 0.5)
    main = SimpleNamespace(mean=mean, low=mean - half_width, high=mean + half_width, limit=limit, attainment=share)
    return SimpleNamespace(main=main, kl=SimpleNamespace(mean=kl))


def rollouts(share, kl=1.0):
    return Rollouts(0.5 + share * (float(win_rate_limit(BestOfN(4), kl)) - 0.5), kl)


def said(evaluation, *given, **keys):
    return " | ".join(shortfall(evaluation, BestOfN(4), *given, **keys))


@pytest.mark.parametrize(
    ("kl", "remedy"),
    [
        (0.23, "KL 0.23 of the 1 nats asked for: raise max_steps or learning_rate"),
        (1.39, "KL 1.39 of the 1 nats asked for: lower learning_rate, or raise max_steps"),
        (1.1, None),
    ],
)
def test_the_kl(kl, remedy):
    found = said(measured(0.97, kl), rollouts(0.97), target_kl=1.0)
    assert found.endswith(remedy) if remedy else "asked for" not in found
    assert "asked for" not in said(measured(0.97, kl), rollouts(0.97))  # a beta was given


def test_prompts_when_those_of_training_do_better_than_chance_allows():
    assert "attainment 0.65 on held-out prompts, 0.81 on those of training" in said(measured(0.65), rollouts(0.81))
    assert "more prompts (num_train_prompts)" in said(measured(0.65), rollouts(0.81))
    assert "more prompts" not in said(measured(0.65, half_width=0.1), rollouts(0.81))  # within twice the error
    assert "more prompts" not in said(measured(0.78), rollouts(0.81))
    assert "more prompts" not in said(measured(0.65), None)


def test_samples():
    line = "K = 16 samples cost up to 0.04 win rate: more of them, or calibration_method: pooled"
    assert said(measured(0.9), rollouts(0.9), count=16, cost=0.042).endswith(line)
    far = said(measured(0.62), rollouts(0.62), count=16, cost=0.042)  # K is the smaller part of what is missing
    assert line in far and far.endswith(
        "the rest of the 0.17 that is missing: more rollouts a step, or more steps at a lower learning_rate"
    )
    assert "samples cost" not in said(measured(0.9), rollouts(0.9), count=512, cost=0.002)
    assert "samples cost" not in said(measured(0.9), rollouts(0.9), count=16)


def test_nothing_is_missing_or_nothing_of_these_explains_it():
    assert said(measured(0.96), rollouts(0.96), target_kl=1.0, count=16, cost=0.04).count("|") == 0
    assert said(measured(0.8), rollouts(0.8), target_kl=1.0).endswith("more steps at a lower learning_rate")
    assert said(measured(float("nan"), 0.001), None) == ""


def test_the_last_fifth_of_the_log_counts():
    log = [{"step": step, "winrate": step / 10, "kl_seq": 1.0} for step in range(1, 11)] + [{"train_runtime": 3.0}]
    assert last_rollouts(log) == Rollouts(pytest.approx(0.95), 1.0)
    assert last_rollouts([{"step": 1, "kl_seq": 0.1}]) is None
