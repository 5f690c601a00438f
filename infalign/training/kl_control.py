"""A KL that is kept: beta follows the measured sequence KL until it is the one that was asked for.

The beta of an optimum reaches its KL when calibration is exact, the steps suffice and nothing else moves the policy.
With few samples, few steps or ties it does not. So log beta is steered: down where the KL stays below the target, up
where it runs above.

Steering must not wind up: a policy needs many steps to reach its KL, and a beta that falls all that time is too small
when it gets there. So what is compared with the target is not the KL now but where its trend leads. A KL that will
reach the target before training ends is left alone; one that will run over it within a few steps is braked before it
does.

How far beta has to move for a KL that is off by a few per cent differs by a factor of eighty between objectives: a
per cent of beta is 6.6 per cent of the KL for the optimal transform of Best-of-32 at 1 nat, and .08 for that of
Worst-of-4 at 2.2 nats. So the speed is divided by this sensitivity, which theory knows (`sensitivity`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from infalign.theory.optimum import LARGEST_KL, optimal_transform
from infalign.theory.tilted import tilt
from infalign.training.baselines import Baseline, start
from infalign.training.direct import Direct
from infalign.types import InputError

WINDOW = 8.0
"""Generations of rollouts that the running mean and the trend of the KL look back on; fewer in a short run."""
SOON = 2.0
"""Windows ahead: a KL that is expected above the target by then is braked."""
LATER = 0.5
"""Of the generations left: how far ahead a KL below the target is followed. A trend flattens: half, not all of them."""
TRAVEL = 4.0
"""How far log beta may move in a whole run: e^4 is a factor of 55. A short run moves more in a generation, up to"""
FASTEST = 0.1
"""this much: the KL of one generation is noisy, and the policy follows beta late."""
USUAL = 2.0
"""Sensitivity at which these speeds hold: that of a normal reward, whose KL is proportional to 1 / beta^2."""
STRONG = math.log(1.0)
"""A beta that holds any policy. Braking may go up to it where the start is far below: the optimum for Worst-of-N at 2
nats is 1e-6, and a policy that is not there yet runs past it."""
FARTHEST = math.log(5.0)
"""How far log beta may get from where it starts, where theory knows the start; less sensitive objectives up to"""
WIDEST = 4.0
"""times as far."""
STEP = 1.02
"""Around a KL, for the derivative."""
FARTHEST_UNKNOWN = math.log(100.0)
"""Where it does not: objectives on raw rewards start from what Gaussian ones would need."""


@dataclass
class KLControl:
    """Steers log beta: `update` after each generation of rollouts, `beta` for the next one.

    Args:
        target: sequence KL in nats that is to be kept.
        start: log of the beta that it starts from.
        generations: of rollouts in the whole run.
        log_beta: of the next generation.
        kl, trend, seen: running mean of what was measured, its change for each generation, and of how many.
        farthest: how far log beta may get from `start`.
        sensitivity: by how many per cent the KL falls where beta rises by one.

    >>> control = KLControl(target=1.0, start=0.0, generations=100, log_beta=0.0)
    >>> for _ in range(40): control.update(0.2)  # stays far below: beta falls
    >>> control.beta < 0.5
    True
    """

    target: float
    start: float
    generations: int
    log_beta: float
    kl: float = 0.0
    trend: float = 0.0
    seen: int = 0
    farthest: float = FARTHEST
    sensitivity: float = USUAL

    @property
    def beta(self) -> float:
        """The KL coefficient of the next generation."""
        return math.exp(self.log_beta)

    def update(self, kl: float) -> None:
        """Take note of a generation's mean sequence KL, and move beta for the next one."""
        self.seen += 1
        window = max(3.0, min(WINDOW, self.generations / 10))
        before = self.kl
        self.kl += max(1.0 / window, 1.0 / self.seen) * (kl - self.kl)  # a plain mean until the window is full
        if self.seen > 1:
            self.trend += max(1.0 / window, 1.0 / (self.seen - 1)) * (self.kl - before - self.trend)
        if self.seen < window:
            return
        soon = self.kl + SOON * window * self.trend
        at_the_end = self.kl + max(SOON * window, LATER * (self.generations - self.seen)) * self.trend
        expected = soon if soon > self.target else min(at_the_end, self.target)
        # in logs, because KL and beta are about inversely proportional; one estimate counts for no more than a factor e
        error = math.log(max(expected, 1e-3 * self.target) / self.target)
        gain = USUAL / self.sensitivity
        speed = min(FASTEST, TRAVEL / self.generations * gain)
        moved = self.log_beta + speed * max(-1.0, min(1.0, error))
        far = self.farthest * max(1.0, min(WIDEST, gain))
        self.log_beta = max(self.start - far, min(max(self.start + far, STRONG), moved))

    def verdict(self, kl: float | None = None) -> str:
        """What to do about a KL that is not the target at the end, in one line; empty within 15 %.

        Args:
            kl: of the trained policy, where it was measured; else that of the last rollouts.
        """
        kl = self.kl if kl is None else kl
        if abs(kl - self.target) <= 0.15 * self.target:
            return ""
        reached = f"training ended at a sequence KL of {kl:.2f} nats, target_kl is {self.target:g}: "
        if kl < self.target:
            return reached + "raise max_steps (or num_train_epochs), or learning_rate"
        return reached + "lower learning_rate, or raise max_steps (or num_train_epochs)"


def sensitivity(objective: Any, kl: float) -> float:
    """`-d log KL / d log beta` of the exact policies that an objective aims at, around `kl` nats.

    Args:
        objective: a transform, `Direct` or a `Baseline` (with normal base rewards).
        kl: nats.

    Returns:
        The sensitivity, and `USUAL` where the objective has no such policies.

    >>> from infalign import BestOfN, WorstOfN
    >>> hot, cold = (sensitivity(optimal_transform(one, kl=1.0), 1.0) for one in (BestOfN(16), WorstOfN(4)))
    >>> round(hot, 1), round(cold, 1)
    (5.0, 0.2)
    """
    at = (max(kl / STEP, LARGEST_KL * 1e-6), min(kl * STEP, LARGEST_KL))
    try:
        betas = [_beta_of(objective, one) for one in at]
    except InputError:
        return USUAL
    return math.log(at[1] / at[0]) / max(1e-9, math.log(betas[0] / betas[1]))


def _beta_of(objective: Any, kl: float) -> float:
    """The beta whose policy has this KL."""
    if isinstance(objective, Direct):
        return float(optimal_transform(objective.procedure, kl=kl).beta)
    if isinstance(objective, Baseline):
        return float(tilt(start(objective.name, objective.procedure, kl), kl=kl).beta)
    return float(tilt(objective, kl=kl).beta)
