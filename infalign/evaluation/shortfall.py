"""What a result lacks, and what to change: the KL that was reached, too few prompts, too few calibration samples.

Each has its own remedy, so each is compared with the number that shows it: the KL with the one that was asked for, the
held-out attainment with that on the prompts of training, the rest with what K samples are expected to cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infalign.evaluation.limits import attainment, limit_at
from infalign.evaluation.summary import Evaluation
from infalign.theory.procedures import Procedure

LAST = 0.2  # share of the steps whose rollouts count as those of the trained policy
KL_APART = 0.15  # of the KL asked for
NOTICEABLE = 0.05  # in attainment, beyond twice its standard error
COSTLY = 0.01  # in win rate
ENOUGH = 0.95  # attainment from which on nothing is missing
LONGER = "more rollouts a step, or more steps at a lower learning_rate"


@dataclass(frozen=True)
class Rollouts:
    """The procedure's win rate of the last rollouts against the calibration samples, and their sequence KL in nats."""

    win_rate: float
    kl: float

    def attainment(self, procedure: Procedure) -> float:
        """Of the limit at the rollouts' KL; NaN where that is too small to tell."""
        return attainment(self.win_rate, limit_at(procedure, self.kl), self.kl)


def last_rollouts(log: Sequence[Mapping[str, Any]]) -> Rollouts | None:
    """From a training log's rows; None where it has no win rates.

    >>> last_rollouts([{"step": 1, "winrate": 0.5, "kl_seq": 0.0}, {"step": 10, "winrate": 0.75, "kl_seq": 0.5}])
    Rollouts(win_rate=0.75, kl=0.5)
    """
    rows = [row for row in log if "winrate" in row and "kl_seq" in row]
    if not rows:
        return None
    since = (1.0 - LAST) * rows[-1]["step"]
    last = [row for row in rows if row["step"] > since]
    return Rollouts(*(float(np.mean([row[name] for row in last])) for name in ("winrate", "kl_seq")))


def kl_missed(kl: float, target_kl: float | None) -> list[str]:
    """A sentence where the KL is not the one that was asked for.

    >>> kl_missed(0.23, 1.0)
    ['KL 0.23 of the 1 nats asked for: raise max_steps or learning_rate']
    """
    if target_kl is None or abs(kl - target_kl) <= KL_APART * target_kl:
        return []
    remedy = "raise max_steps or learning_rate" if kl < target_kl else "lower learning_rate, or raise max_steps"
    return [f"KL {kl:.2f} of the {target_kl:g} nats asked for: {remedy}"]


def shortfall(
    evaluation: Evaluation,
    procedure: Procedure,
    rollouts: Rollouts | None,
    *,
    target_kl: float | None = None,
    count: int | None = None,
    cost: float | None = None,
) -> list[str]:
    """Sentences on what the result lacks and what to change; first the attainment on both kinds of prompts.

    Args:
        evaluation: on held-out prompts.
        procedure: the evaluation's.
        rollouts: on the prompts of training.
        target_kl: nats that were asked for; None where beta was given.
        count: K, calibration samples of a prompt.
        cost: win rate that K samples are expected to lose; None where that is not known.
    """
    main, kl = evaluation.main, evaluation.kl.mean
    ours = float("nan") if rollouts is None else rollouts.attainment(procedure)
    both, causes = [], []
    if np.isfinite([ours, main.attainment]).all():
        both.append(
            f"attainment {main.attainment:.2f} on held-out prompts, {ours:.2f} on those of training (its last rollouts "
            "against the calibration samples)"
        )
    causes += kl_missed(kl, target_kl)
    if not main.attainment < ENOUGH:  # NaN where the KL is too small to tell
        return both + causes
    # of the attainment: that of the win rate over what the limit is above one half
    error = (main.high - main.low) / (2 * 1.96) / (main.limit - 0.5)
    if ours - main.attainment > max(NOTICEABLE, 2.0 * error):
        causes.append("held-out prompts do worse than those of training: more prompts (num_train_prompts)")
    if cost is not None and cost > COSTLY:
        causes.append(
            f"K = {count} samples cost up to {cost:.2f} win rate: more of them, or calibration_method: pooled"
        )
        unexplained = main.limit - main.mean - cost > max(cost, NOTICEABLE * (main.limit - 0.5))
        causes += [f"the rest of the {main.limit - main.mean:.2f} that is missing: {LONGER}"] if unexplained else []
    if not causes:
        causes.append(f"neither the KL nor prompts nor calibration samples explain what is missing: {LONGER}")
    return both + causes
