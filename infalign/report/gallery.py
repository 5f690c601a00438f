"""Every plot that the findings allow, each with a caption that says how to read it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.judged import JudgedCurve
from infalign.evaluation.summary import Evaluation
from infalign.report.calibration_plot import COVERAGE, draw_calibration, held_out_ranks
from infalign.report.compute_plot import COMPUTE_CAPTION, draw_compute
from infalign.report.deployment_plot import DEPLOYMENT_CAPTION, draw_deployment
from infalign.report.evaluation_plot import draw_rewards, draw_win_rates
from infalign.report.findings import Findings
from infalign.report.judged_plot import draw_judged
from infalign.report.limit_plot import Point, draw_limit
from infalign.report.page import Plot
from infalign.report.style import to_png
from infalign.report.training_plot import draw_training
from infalign.report.transform_plot import draw_transform
from infalign.theory.judged import JudgedTransform
from infalign.theory.objective import Objective

Floats = NDArray[np.float64]


def draw_all(found: Findings, objective: Objective | None, seed: int = 0) -> list[Plot]:
    """The plots of a page, in its order.

    Args:
        found: what a run left on disk.
        objective: None when it is not known: then there is no limit curve and no transform.
        seed: of the random order of ties in the calibration plot.
    """
    return [
        *_of_evaluation(found, objective),
        *_of_training(found, objective),
        *_of_objective(objective, found.judged),
        *_of_calibration(found, seed),
    ]


def measured_point(evaluation: Evaluation, aim: tuple[float, float] | None = None) -> Point:
    """The point of the limit plot, from what was measured; both of its intervals have the evaluation's confidence."""
    main, kl, ties = evaluation.main, evaluation.kl, evaluation.ties
    width = NormalDist().inv_cdf(0.5 + evaluation.confidence / 2) * kl.error
    tied = ties.tie_limit if ties.tie_rate >= 0.005 else None
    return Point(max(kl.mean, 0.0), width, main.mean, main.low, main.high, tied, aim)


def _of_evaluation(found: Findings, objective: Objective | None) -> Iterator[Plot]:
    evaluation = found.evaluation
    if evaluation is None:
        return
    if objective is not None:
        aim = None if objective.kl is None or objective.win_rate is None else (objective.kl, objective.win_rate)
        if isinstance(objective.policy, JudgedTransform):  # whose win rate is gold's
            aim = objective.policy.kl, objective.policy.proxy_win_rate()
        point = measured_point(evaluation, aim)
        yield Plot("limit", "evaluation", _limit_caption(point), to_png(draw_limit(objective.procedure, point)))
    yield Plot(
        "win_rates",
        "evaluation",
        "Dots are win rates with their intervals, upright ticks the limit at the measured KL; the decoder in bold was "
        "trained for. Left of the dashed line the base is better.",
        to_png(draw_win_rates(evaluation.win_rates, evaluation.procedure)),
    )
    if evaluation.compute is not None and evaluation.compute.curves:
        yield Plot("compute", "evaluation", COMPUTE_CAPTION, to_png(draw_compute(evaluation.compute)))
    if evaluation.deployment is not None:
        plot = draw_deployment(evaluation.deployment)
        yield Plot("deployment", "evaluation", DEPLOYMENT_CAPTION, to_png(plot))
    if found.rewards:
        yield Plot(
            "rewards",
            "evaluation",
            "Rewards of single samples on the test prompts, before any decoding; dashed lines are means. "
            "Decoding decides which samples count: a small shift here can be a large win rate, or the reverse.",
            to_png(draw_rewards(found.rewards["base"], found.rewards["policy"], evaluation.reward)),
        )


def _limit_caption(point: Point) -> str:
    aimed = ""
    if point.aim is not None:
        place = f"({point.aim[0]:.2f} nats, {100 * point.aim[1]:.1f} %)"
        aimed = f" The trained transform's exact optimum lies beyond the plot {place}"
        if point.shows_aim:
            aimed = f" The diamond is where the trained transform's exact optimum lies {place}"
        aimed += "; a point left of it has not used the KL that β allows."
    tied = " The orange mark is the limit with this reward's ties." if point.tie_limit is not None else ""
    return (
        "Up is better, left is cheaper. The solid curve is the most that any method reaches at a KL; dashed and dotted "
        f"curves are the exact optima of other transforms. Bars are intervals.{tied}{aimed}"
    )


def _of_training(found: Findings, objective: Objective | None) -> Iterator[Plot]:
    if found.log:
        target = None if objective is None else objective.kl
        caption = (
            "On training prompts unless said otherwise. A calibrated reward of ½ (dashed) is the base policy; its mean "
            "is the win rate of single samples. The KL is that of whole completions: flat means that training settled."
        )
        yield Plot("training", "training", caption, to_png(draw_training(found.log, target)), wide=True)


def _of_objective(objective: Objective | None, judged: JudgedCurve | None) -> Iterator[Plot]:
    if judged is not None:
        caption = (
            "How often a sample at a quantile of the reward beats the base's decoded one under the gold reward, with "
            "its standard error. Where it falls (right of the dotted line) the reward misleads, and the "
            "transform falls with it."
        )
        plot = draw_judged(judged.h_J, judged.error_J)
        yield Plot("judged", "objective", caption, to_png(plot))
    if objective is not None and objective.policy is not None:
        caption = (
            "Left: what a completion earns at each quantile of the base policy's rewards. Right: how often the optimal "
            f"policy for it draws each quantile, against the base's 1; it lies at {objective.policy.kl:.2f} nats."
        )
        plot = draw_transform(objective.transform, objective.policy.density)
        yield Plot("transform", "objective", caption, to_png(plot))


def _of_calibration(found: Findings, seed: int) -> Iterator[Plot]:
    ranks = held_out_ranks(found.references, seed) if found.references else None
    if ranks is not None:
        caption = (
            "Each prompt's second half of base samples, ranked among its first half (ties in random order). Flat is "
            f"right; a slope or a bow means that the halves were not drawn alike. {COVERAGE:.0%} of bars end in the "
            f"grey band when nothing is wrong. {ranks.values} samples, {ranks.prompts} prompts."
        ).replace("%", " %")
        yield Plot("calibration", "objective", caption, to_png(draw_calibration(ranks)))
