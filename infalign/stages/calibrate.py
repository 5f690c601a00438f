"""`infalign calibrate`: K samples of the base policy for every train and validation prompt, with their rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.diagnostics import Diagnostics, duplicate_rate, tie_rate, uniformity
from infalign.calibration.few_samples import expected_cost
from infalign.calibration.judged import JudgedCurve
from infalign.calibration.judged_file import write_curve
from infalign.calibration.table import SampleTable, Wanted
from infalign.rewards.calibrated_sum import members_to_score
from infalign.rewards.loader import Reward
from infalign.rewards.scoring import columns_digest, noise_line
from infalign.runtime.artifacts import fingerprint, write_manifest
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import is_main
from infalign.stages.experiment import CALIBRATION, Experiment
from infalign.stages.imported import check_imported, take_rewards
from infalign.stages.judged import GOLD_OPTIMAL
from infalign.stages.output import SAMPLES, clear_if_stale, forget_scores, leaves_nothing
from infalign.stages.recipe import Recipe, require_plain
from infalign.stages.sampling import fill, table_rewards
from infalign.theory.objective import Objective
from infalign.types import InputError, Prompt, Sample


@leaves_nothing(SAMPLES)
def calibrate(recipe: Recipe, experiment: Experiment | None = None) -> dict[str, Any]:
    """Sample, score and describe; what is there already is reused, what is missing is added.

    Returns:
        `drawn` (samples drawn now), `diagnostics` and `folder`.

    Raises:
        InputError: the recipe does not fit itself, its data, or what the folder holds.
    """
    require_plain(recipe)
    experiment = experiment or Experiment(recipe)
    experiment.claim_output()
    _, rewards = experiment.objective, experiment.calibrated_rewards  # their mistakes come before anything is made
    prompts = calibration_prompts(experiment)
    table = open_table(experiment)
    count = recipe.num_calibration_samples
    wanted = [Wanted(prompt, experiment.prompt_ids[prompt.key], count) for prompt in prompts]
    drawn = 0
    members = [member for reward in rewards for member in members_to_score(reward)]
    forget_scores(table, [*members, *rewards], recipe.overwrite)
    if recipe.calibration_samples:
        check_imported(experiment, wanted)
        drawn += fill(
            table,
            wanted,
            [],
            lambda: experiment.sampler(experiment.base_path, CALIBRATION),
            max_tokens=recipe.max_completion_length,
            tokens_per_batch=recipe.tokens_per_batch,
            title="calibrate",
        )
        take_rewards(experiment, table, wanted)
    for scoring in filter(None, (members, rewards)):  # a sum needs its members' scores of all samples
        drawn += fill(
            table,
            wanted,
            scoring,
            lambda: experiment.sampler(experiment.base_path, CALIBRATION),
            max_tokens=recipe.max_completion_length,
            tokens_per_batch=recipe.tokens_per_batch,
            title="calibrate",
            asks=experiment.asks,
            look=see_noise if is_main() else None,
        )
    experiment.renew_objective()
    diagnostics = describe(experiment, table, prompts, experiment.objective)
    parts = calibration_parts(experiment)
    if is_main():
        more = {"diagnostics": dataclasses.asdict(diagnostics), "prompts": len(prompts), "samples_per_prompt": count}
        write_manifest(table.folder, "calibration", parts, **more)
        experiment.record()
        _tell(diagnostics, drawn)
        if experiment.judged is not None:
            write_curve(table.folder, experiment.judged)
            _tell_judged(experiment.judged)
    return {"drawn": drawn, "diagnostics": diagnostics, "folder": table.folder}


def calibration_prompts(experiment: Experiment) -> list[Prompt]:
    """The prompts that need reference rewards: train and validation; for a sum of calibrated rewards also test."""
    splits, sums = experiment.splits, any(members_to_score(reward) for reward in experiment.rewards)
    return [*splits.train, *splits.validation, *(splits.test if sums else ())]


def open_table(experiment: Experiment) -> SampleTable:
    """The calibration table of an experiment."""
    folder = experiment.recipe.output / "calibration"
    parts = experiment.sampling_parts(experiment.base_path, CALIBRATION)
    clear_if_stale(folder, parts, experiment.recipe.overwrite)
    return SampleTable.open(folder, parts)


def calibration_parts(experiment: Experiment) -> dict[str, Any]:
    """What a calibration depends on; training records it, so that a changed calibration makes a policy stale."""
    prompts, ids, reward = calibration_prompts(experiment), experiment.prompt_ids, experiment.reward
    rows = sorted((prompt.key, ids[prompt.key], columns_digest(reward, prompt)) for prompt in prompts)
    others = [
        [one.name, one.fingerprint, sorted((prompt.key, columns_digest(one, prompt)) for prompt in prompts)]
        for one in experiment.calibrated_rewards[1:]
    ]
    return {
        "sampling": fingerprint(experiment.sampling_parts(experiment.base_path, CALIBRATION)),
        "prompts": fingerprint(rows),
        "num_calibration_samples": experiment.recipe.num_calibration_samples,
        "reward": f"{reward.name} {reward.fingerprint}",
        **({"other rewards": fingerprint(others)} if others else {}),
        **group_parts(experiment, prompts),
    }


def group_parts(experiment: Experiment, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Which prompts are of which group, where terms have groups."""
    if not any(term.group for term in experiment.terms):
        return {}
    column = experiment.recipe.group_column
    return {"groups": fingerprint(sorted((prompt.key, str(prompt.columns.get(column, ""))) for prompt in prompts))}


def reference_rewards(experiment: Experiment, table: SampleTable, reward: Reward) -> dict[str, NDArray[np.float64]]:
    """The first K reference rewards of every prompt that a reward is for (a table may hold more), NaN for no score.

    Raises:
        InputError: prompts without any score, or with fewer samples than K (calibrate was not finished).
    """
    count = experiment.recipe.num_calibration_samples
    prompts = [one for one in calibration_prompts(experiment) if experiment.is_for(reward, one)]
    rewards = table_rewards(table, reward, prompts)
    missing = [prompt for prompt in prompts if len(rewards.get(prompt.key, ())) < count]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(prompts)} prompts lack calibration samples in {table.folder} "
            f"(first: {str(missing[0].content)[:80]!r}): run `infalign calibrate` with this recipe"
        )
    found = {prompt.key: rewards[prompt.key][:count] for prompt in prompts}
    silent = [prompt for prompt in prompts if np.isnan(found[prompt.key]).all()]
    if silent:
        raise InputError(
            f"reward {reward.name!r} gave no score to any sample of {len(silent)} of {len(prompts)} prompts "
            f"(first: {str(silent[0].content)[:80]!r}): fix the reward, or leave these prompts out"
        )
    return found


def describe(experiment: Experiment, table: SampleTable, prompts: list[Prompt], objective: Objective) -> Diagnostics:
    """The diagnostics of a finished table."""
    count = experiment.recipe.num_calibration_samples
    rewards, *_ = [reference_rewards(experiment, table, reward) for reward in experiment.rewards]
    prompts = [prompt for prompt in prompts if prompt.key in rewards]
    rows = [rewards[prompt.key] for prompt in prompts]
    samples = table.samples()
    kept = [samples[prompt.key][:count] for prompt in prompts]
    flat = [sample for row in kept for sample in row]
    # no transform, no quantiles to miss; under another judge the cost is not known
    known = experiment.recipe.objective == "transform" and experiment.recipe.transform != GOLD_OPTIMAL
    kl = objective.kl if known else None
    cost = None if kl is None else expected_cost(objective.transform, objective.procedure, count, kl)
    return Diagnostics(
        prompts=len(prompts),
        samples=len(flat),
        duplicates=duplicate_rate([[sample.text for sample in row] for row in kept]),
        ties=tie_rate(rows),
        clipped=float(np.mean([not sample.finished for sample in flat])),
        unscored=float(np.mean([np.isnan(row).mean() for row in rows])),
        uniformity=uniformity(rows, seed=experiment.recipe.seed),
        cost=cost,
        cost_kl=kl,
    )


def see_noise(
    reward: Reward, prompts: Sequence[Prompt], samples: Sequence[Sample], rewards_B: NDArray[np.float64]
) -> None:
    """Ask a reward once more about what it has just scored, and tell of other answers; arguments as `noise_line`'s."""
    line = noise_line(reward, prompts, samples, rewards_B)
    if line is not None:
        notice(line)


def _tell_judged(curve: JudgedCurve) -> None:
    """One line on what the proxy's quantiles are worth under gold, and where they begin to be worth less."""
    J = curve.h_J.size
    top = int(np.argmax(curve.h_J))
    say(
        f"  under the gold reward a sample of the proxy's lowest, middle and highest quantile beats the decoded base "
        f"{curve.h_J[0]:.1%}, {curve.h_J[J // 2]:.1%} and {curve.h_J[-1]:.1%} of the time"
    )
    fall = curve.h_J[top] - curve.h_J[-1]
    if fall > 2.0 * max(curve.error_J[top], curve.error_J[-1]) and top < J - 1:
        say(f"  above quantile {(top + 0.5) / J:.2f} the proxy misleads: what it likes more, gold likes less")


def _tell(diagnostics: Diagnostics, drawn: int) -> None:
    new = f"{drawn} drawn now" if drawn else "all of them cached"
    say(f"calibration: {diagnostics.samples} base samples on {diagnostics.prompts} prompts ({new})")
    say(
        f"  duplicates {diagnostics.duplicates:.1%}   ties {diagnostics.ties:.1%}   cut at the length limit "
        f"{diagnostics.clipped:.1%}   unscored {diagnostics.unscored:.1%}   uniformity p = {diagnostics.uniformity:.2f}"
    )
    if diagnostics.cost is not None:
        say(f"  expected cost of this K: {diagnostics.cost:.3f} win rate at KL {diagnostics.cost_kl:.2f} nats")
    for warning in diagnostics.warnings():
        notice(warning)
