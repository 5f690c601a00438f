"""How far a merge of a sweep's policies is from the mixture of their logits, measured on the test prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from infalign.merging.gap import merge_gap
from infalign.merging.plan import DAM, MIXTURE, MergePlan, methods
from infalign.models.mixture import LogitMixture
from infalign.stages.experiment import Experiment
from infalign.stages.sweep.draws import draw

GAP_SAMPLES = "gap_samples"
"""The fact that says on how many completions of each test prompt a merge's gap was looked for."""


def mixture_weights(plan: MergePlan) -> dict[str, float] | None:
    """The mixture that a merge approximates, a weight for each model; None where it has none.

    Where weights are divided by their sum, so are these. Methods of task vectors add them to the base, `lambda` times:
    what they do not add up to is the base's, and may be negative. slerp goes from its base to the other by `t`. DAM,
    whose coefficients are learned, is meant to have all of its parents alike.
    """
    if plan.method == DAM:
        return {one.model: 1.0 / len(plan.parents) for one in plan.parents}
    shared = plan.yaml.get("parameters") or {}
    if plan.method == "slerp" and plan.base is not None:
        others = [one.model for one in plan.parents if one.model != plan.base]
        t = shared.get("t")
        if len(others) != 1 or not _is_number(t):
            return None
        return {plan.base: 1.0 - float(t), others[0]: float(t)}
    of_tasks = plan.base is not None and plan.method not in ("linear", MIXTURE)
    weights: dict[str, float] = {}
    for one in plan.parents:
        if of_tasks and one.model == plan.base:  # its task vector is zero
            continue
        weight = one.parameters.get("weight", shared.get("weight"))
        if not _is_number(weight):
            return None
        weights[one.model] = float(weight)
    total = sum(weights.values())
    if _divides(plan, shared):
        if not total:
            return None
        weights = {name: weight / total for name, weight in weights.items()}
    if not of_tasks:
        return weights
    scale = shared.get("lambda", 1.0)
    if not _is_number(scale):
        return None
    assert plan.base is not None
    tasks = {name: float(scale) * weight for name, weight in weights.items()}
    rest = 1.0 - sum(tasks.values())
    return tasks | ({plan.base: rest} if abs(rest) > 1e-12 else {})


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _divides(plan: MergePlan, shared: Mapping[str, Any]) -> bool:
    """Whether a method divides weights by their sum."""
    if plan.method == MIXTURE:
        return False
    method = methods()[plan.method]
    return bool(shared.get("normalize", method.normalizes)) if "normalize" in method.shared | method.own else True


def gap_facts(experiment: Experiment, plan: MergePlan, samples: int) -> dict[str, float]:
    """`merge_gap` and `sequence_gap` with their errors, and `mixture_kl`, in nats; empty where a merge has no mixture.

    A mixture of logits is no distance from itself, and has its sequence gap alone.

    Args:
        experiment: of the cell; its judged policy is the merge.
        plan: with folders in place of names.
        samples: completions of the mixture on each test prompt.
    """
    weights = mixture_weights(plan)
    if weights is None or not all(Path(name).is_dir() for name in weights):
        return {}
    mixture = LogitMixture(tuple(experiment.model(name) for name in weights), tuple(weights.values()))
    rows, completions = draw(experiment, mixture, experiment.splits.test, samples, "gap")
    found = merge_gap(
        mixture, experiment.model(experiment.judged_path), rows, completions, experiment.model(experiment.base_path)
    )
    own = {} if plan.method == MIXTURE else {"merge_gap": found.gap, "merge_gap_error": found.error}
    facts: Mapping[str, float] = {
        **own,
        "sequence_gap": found.sequence_gap,
        "sequence_gap_error": found.sequence_error,
        "mixture_kl": found.from_base,
    }
    return {name: value for name, value in facts.items() if not math.isnan(value)}
