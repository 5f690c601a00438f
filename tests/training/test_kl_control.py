"""Steering of beta: on policies that follow it late and with noise, at its bounds, and in the trainer."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import optimize

from infalign import BestOfN, WorstOfN, optimal_transform, transforms
from infalign.calibration.few_samples import beta_for_kl
from infalign.training.baselines import Baseline
from infalign.training.config import CTRLConfig
from infalign.training.direct import Direct
from infalign.training.kl_control import USUAL, KLControl, sensitivity
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


def settled_by(sensitivity: float, known: float, seed: int, steps: int = 400) -> float:
    """Root mean square of log KL / target over the last half, of a policy whose KL is (beta_0 / beta)^sensitivity."""
    rng, kl, seen = np.random.default_rng(seed), 0.0, []
    start = math.log(0.1) + 0.3 / sensitivity  # the KL would settle a quarter below the target
    control = KLControl(1.0, start, steps, start, sensitivity=known)
    for _ in range(steps):
        kl += (min(20.0, (0.1 / control.beta) ** sensitivity) - kl) / 12
        seen.append(math.log(max(kl, 0.01)))
        control.update(kl * (1 + 0.1 * rng.normal()))
    return float(np.sqrt(np.mean(np.square(seen[steps // 2 :]))))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("value", [0.1, 0.4, 1.0, 2.8, 5.0, 6.6])
def test_sensitive_and_sluggish_objectives_are_kept_alike(value, seed):
    assert settled_by(value, value, seed) < 0.12


@pytest.mark.parametrize(("value", "worse"), [(0.1, 0.15), (10.0, 0.15)])
def test_without_the_sensitivity_they_are_not(value, worse):
    assert settled_by(value, USUAL, 0) > worse


@pytest.mark.parametrize(
    ("transform", "phi"),
    [
        (transforms.identity, lambda u: u),
        (transforms.log, np.log),
        (optimal_transform(BestOfN(8), kl=0.7), optimal_transform(BestOfN(8), kl=0.7)),
        (optimal_transform(WorstOfN(4), kl=0.7), optimal_transform(WorstOfN(4), kl=0.7)),
    ],
    ids=["identity", "log", "BestOfN(8)", "WorstOfN(4)"],
)
def test_sensitivity_of_a_fixed_transform(transform, phi):
    """By sums over a fine grid: KL of weights exp(phi / beta), at betas around the one that gives .7 nats."""
    values = phi((np.arange(400_000) + 0.5) / 400_000)

    def kl(beta: float) -> float:
        weights = np.exp((values - values.max()) / beta)
        weights /= weights.mean()
        return float(np.mean(weights * np.log(np.maximum(weights, 1e-300))))

    beta = optimize.brentq(lambda one: kl(one) - 0.7, 1e-3, 10.0)
    slope = -(math.log(kl(beta * 1.001)) - math.log(kl(beta / 1.001))) / (2 * math.log(1.001))
    assert sensitivity(transform, 0.7) == pytest.approx(slope, rel=0.02)


def test_sensitivity_of_the_others():
    """Near the base KL is proportional to 1 / beta^2, for everybody; direct follows the optimum, not its transform."""
    for one in (transforms.identity, transforms.log, Direct(BestOfN(4)), Baseline("par", BestOfN(4))):
        assert sensitivity(one, 1e-4) == pytest.approx(2.0, rel=0.03)
    assert sensitivity(Baseline("raw", BestOfN(4)), 1.5) == pytest.approx(2.0, rel=0.01)
    betas = [optimal_transform(BestOfN(16), kl=one).beta for one in (0.99, 1.01)]
    slope = math.log(1.01 / 0.99) / math.log(betas[0] / betas[1])
    assert sensitivity(Direct(BestOfN(16)), 1.0) == pytest.approx(slope, rel=0.02)
    assert sensitivity(lambda u: np.zeros_like(np.asarray(u)), 1.0) == USUAL  # aims at no policy with a KL


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
