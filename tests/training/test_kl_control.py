"""Steering of beta: on policies that follow it late and with noise, at its bounds, and in the trainer."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from infalign import BestOfN, WorstOfN, optimal_transform
from infalign.calibration.few_samples import beta_for_kl
from infalign.training.config import CTRLConfig
from infalign.training.kl_control import KLControl
from infalign.types import InputError
from tests.tiny import tiny_causal
from tests.training.test_trainer import config, trainer


def steered(start: float, steps: int, slowness: float, noise: float = 0.1, seed: int = 0) -> tuple[float, float, float]:
    """A policy whose KL creeps towards 0.1 / beta^1.2: (mean KL of the last fifth, the largest KL, beta)."""
    rng, control, kl, seen = np.random.default_rng(seed), made(1.0, start, steps), 0.0, []
    for _ in range(steps):
        settled = 0.1 / control.beta**1.2
        kl += (settled - kl) / slowness
        seen.append(kl)
        control.update(kl + noise * rng.normal())
    return float(np.mean(seen[-max(1, steps // 5) :])), max(seen), control.beta


def made(target: float, beta: float, steps: int) -> KLControl:
    return KLControl(target, math.log(beta), steps, math.log(beta))


RIGHT = 0.1 ** (1 / 1.2)  # the beta that settles at 1 nat


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("wrong", [0.5, 0.7, 1.0, 1.5, 2.0])
@pytest.mark.parametrize(("steps", "slowness"), [(400, 10), (400, 40), (1000, 100), (100, 8)])
def test_the_kl_comes_to_the_target_and_stays(steps, slowness, wrong, seed):
    """From a beta half or twice the right one, within 15 %; without steering it would be off by a factor of 2.3."""
    last, highest, _ = steered(wrong * RIGHT, steps, slowness, seed=seed)
    assert last == pytest.approx(1.0, abs=0.15)
    assert highest < 1.35 * max(1.0, (0.1 / (wrong * RIGHT) ** 1.2) if wrong < 1 else 1.0)


def test_it_does_not_wind_up():
    """A slow policy on its way to the target is left alone: beta hardly moves while the KL still rises."""
    control = made(1.0, 0.1, 200)
    for step in range(60):
        control.update(1.0 - math.exp(-step / 40))  # settles at the target
    assert control.beta == pytest.approx(0.1, rel=0.2)


def test_what_will_run_over_is_braked_before_it_does():
    control, kl = made(1.0, 0.1, 400), 0.0
    while kl < 0.9:
        kl += 0.05
        control.update(kl)
    assert control.beta > 0.1


@pytest.mark.parametrize("start", [0.1, 1e-6])
def test_beta_has_bounds(start):
    """A factor of five down; up as far, or to 1, which holds any policy."""
    for kl, bound in ((0.0, start / 5), (50.0, max(5 * start, 1.0))):
        control = made(1.0, start, 50)
        for _ in range(500):
            control.update(kl)
        assert control.beta == pytest.approx(bound)


def test_an_overshoot_is_braked_at_once_and_given_back():
    """A KL that runs past its target raises beta by .1 a generation, also in a long run; below it, beta comes back."""
    control = made(1.0, 0.01, 1000)
    for step in range(60):
        control.update(0.05 * step)
    braked = control.log_beta
    assert braked - math.log(0.01) > 1.5  # at a thousandth of 4 a generation it would be .1
    for _ in range(100):
        control.update(0.7)
    assert math.log(0.01) <= control.log_beta < braked - 0.3


def test_a_negative_or_missing_kl_is_no_catastrophe():
    control = made(1.0, 0.1, 100)
    for _ in range(20):
        control.update(-0.5)  # log-ratios are noisy: a mean of them may be negative
    assert math.isfinite(control.beta) and control.beta < 0.1


def test_its_state_goes_through_json():
    rng, first = np.random.default_rng(0), made(0.5, 0.2, 60)
    for _ in range(20):
        first.update(rng.uniform(0, 1))
    again = KLControl(**json.loads(json.dumps(dataclasses.asdict(first))))
    for _ in range(20):
        kl = rng.uniform(0, 1)
        first.update(kl)
        again.update(kl)
    assert first == again


def test_the_end_is_told():
    control = made(1.0, 0.1, 10)
    for kl, words in ((0.3, "raise max_steps"), (1.05, ""), (2.0, "lower learning_rate")):
        control.kl = kl
        assert words in control.verdict() and bool(words) == bool(control.verdict())


@pytest.mark.parametrize(("count", "wanted"), [(8, 0.22), (16, 0.40), (64, 0.82)])
def test_few_samples_reach_less_than_they_aim_at(count, wanted):
    """The KL of a table of logits trained on K samples at the optimum's beta (recipes/LOG.md, 2026-11-26)."""
    transform = optimal_transform(BestOfN(4), kl=1.0)
    reached = next(kl for kl in np.linspace(0.05, 1.0, 96) if beta_for_kl(transform, count, kl) < transform.beta)
    assert reached == pytest.approx(wanted, abs=0.04)


def test_many_samples_need_the_optimums_own_beta():
    for procedure in (BestOfN(4), WorstOfN(2)):
        transform = optimal_transform(procedure, kl=0.5)
        assert beta_for_kl(transform, 4096, 0.5) == pytest.approx(transform.beta, rel=0.05)


def test_the_trainer_steers(tmp_path):
    """A target far above what a step reaches: beta falls; far below: it rises. Every rank sees the same KL."""
    model = tiny_causal(tmp_path / "model", "llama")
    ends = []
    for rate, target in ((1e-5, 5.0), (3e-2, 0.01)):
        subject = trainer(model, tmp_path / str(target), max_steps=14, learning_rate=rate, beta=0.3, target_kl=target)
        subject.train()
        betas = [row["beta"] for row in subject.state.log_history if "beta" in row]
        assert betas[:3] == pytest.approx([0.3] * 3)
        ends.append(betas[-1])
    assert ends[0] == pytest.approx(0.3 * math.exp(-1.1)) and ends[1] > 0.3  # at full speed, .1 a generation


def test_settings_that_fight_are_refused(tmp_path):
    with pytest.raises(InputError, match="target_kl steers beta, and beta_start lets it come down by itself"):
        CTRLConfig(**config(tmp_path, target_kl=0.5, beta_start=1.0))
    with pytest.raises(InputError, match="target_kl must be above 0"):
        CTRLConfig(**config(tmp_path, target_kl=0.0))
