"""`infalign evaluate`: fresh samples of base and policy on held-out prompts; win rates, KL, the limit, attainment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infalign.calibration.diagnostics import tie_rate
from infalign.calibration.table import SampleTable, Wanted
from infalign.evaluation.limits import Estimate, attainment, cluster_mean, tie_limit
from infalign.evaluation.summary import GOLD, PROXY, decoder_row, decoders
from infalign.generation.likelihood import sequence_kl
from infalign.runtime.artifacts import fingerprint, read_manifest, without_nan, write_json, write_whole
from infalign.runtime.console import Progress, notice
from infalign.runtime.distributed import barrier, is_main, my_share
from infalign.stages.experiment import Experiment
from infalign.stages.filling import fill, table_rewards
from infalign.stages.judging import judge_decoded
from infalign.stages.measured import Measured, sample_facts
from infalign.stages.output import SAMPLES, clear_if_stale, forget_scores, leaves_nothing
from infalign.stages.recipe import Recipe, require_plain
from infalign.stages.strategy import load_strategy
from infalign.theory.objective import differing
from infalign.theory.procedures import Procedure
from infalign.types import InputError, Prompt, Sample

KL_PROMPTS = 16  # prompts whose completions are compared at a time


@leaves_nothing(SAMPLES)
def evaluate(recipe: Recipe, experiment: Experiment | None = None) -> dict[str, Any]:
    """Measure, and write `evaluation.json` beside the sample tables.

    Returns:
        The content of `evaluation.json`, and `drawn`, how many samples were drawn now.

    Raises:
        InputError: no policy, too few samples for the procedure, or a folder of another recipe.
    """
    require_plain(recipe)
    experiment = experiment or Experiment(recipe)
    check_samples(recipe, experiment.procedure)
    load_strategy(recipe, experiment.procedure)  # its mistakes are told before anything is sampled
    experiment.claim_output()
    judged = experiment.judged_path
    _check_trained_for(experiment)
    prompts = list(experiment.splits.test)
    base, drawn_base = _sample(experiment, experiment.base_path, "base", prompts)
    policy, drawn_policy = _sample(experiment, judged, "policy", prompts)
    kl, log_ratio = _measure_kl(experiment, policy, prompts)
    measured = _scored(experiment, base, policy, prompts)
    with np.errstate(over="ignore"):  # rewards near the largest float: their mean is infinite, and shown as absent
        result = summarise(experiment, measured, kl, log_ratio, prompts)
        result = without_nan(result | sample_facts(experiment, prompts, measured))
    if is_main():
        write_json(recipe.output / "evaluation.json", result)
        experiment.record()
    barrier()
    return {**result, "drawn": drawn_base + drawn_policy}


def _check_trained_for(experiment: Experiment) -> None:
    """The folder's own policy is judged by what it was trained for; `eval_n` gives further N beside it."""
    if experiment.recipe.policy_name_or_path:
        return
    manifest = read_manifest(experiment.policy_path, "policy") or {"parts": {}}
    trained_for, now = manifest["parts"], experiment.objective.record()
    found = [f"{name}: {trained_for[name]} -> {now[name]}" for name in differing(trained_for, now)]
    if found:
        raise InputError(
            f"{experiment.policy_path} was trained for something else ({'; '.join(found)}): evaluate it with its own "
            "recipe (other N: eval_n), or name it with --policy_name_or_path"
        )


def check_samples(recipe: Recipe, procedure: Procedure) -> None:
    """Enough samples and prompts for every decoder asked for.

    Raises:
        InputError: naming what to raise or lower.
    """
    if recipe.num_test_prompts < 1:
        raise InputError(f"num_test_prompts must be at least 1 to evaluate, got {recipe.num_test_prompts}")
    needed = max([procedure.n, *recipe.eval_n])
    if recipe.eval_samples < needed:
        raise InputError(
            f"eval_samples is {recipe.eval_samples}, but {needed} candidates are drawn (n and eval_n): raise "
            "eval_samples, or lower n or eval_n"
        )


def _sample(experiment: Experiment, path: str, side: str, prompts: list[Prompt]) -> tuple[SampleTable, int]:
    recipe = experiment.recipe
    folder = recipe.output / "evaluation" / side
    purpose = f"evaluation/{side}"
    parts = experiment.sampling_parts(path, purpose)
    clear_if_stale(folder, parts, recipe.overwrite)
    table = SampleTable.open(folder, parts)
    rewards = [reward for reward in (experiment.reward, experiment.gold) if reward is not None]
    forget_scores(table, rewards, recipe.overwrite)
    drawn = fill(
        table,
        [Wanted(prompt, experiment.prompt_ids[prompt.key], recipe.eval_samples) for prompt in prompts],
        rewards,
        lambda: experiment.sampler(path, purpose),
        max_tokens=recipe.max_completion_length,
        tokens_per_batch=recipe.tokens_per_batch,
        title=f"evaluate: {side}",
    )
    return table, drawn


def _measure_kl(experiment: Experiment, policy: SampleTable, prompts: list[Prompt]) -> tuple[Estimate, Estimate]:
    """Sequence KL of policy against base: (conditional, k1), clustered by prompt; cached beside the samples.

    Groups of prompts are shared out over the processes, and each is written as soon as it is measured.
    """
    recipe = experiment.recipe
    count = min(recipe.kl_samples, recipe.eval_samples)
    names = [(prompt.key, index) for prompt in prompts for index in range(count)]
    identity = [policy.parts, experiment.sampling_parts(experiment.base_path, "kl"), names]
    folder = recipe.output / "evaluation" / f"kl-{fingerprint(identity)}"
    groups = {
        folder / f"{start:06d}.parquet": prompts[start : start + KL_PROMPTS]
        for start in range(0, len(prompts), KL_PROMPTS)
    }
    missing = [path for path in my_share(list(groups)) if not path.exists()]
    if missing:
        samples = policy.samples()
        with Progress("evaluate: KL", sum(len(groups[path]) for path in missing), "prompts") as progress:
            for path in missing:
                drawn = [sample for prompt in groups[path] for sample in samples[prompt.key][:count]]
                _write_kl(experiment, drawn, path)
                progress.advance(len(groups[path]))
    barrier()
    table = pa.concat_tables([pq.read_table(path) for path in groups])
    columns = (table[name].to_numpy().reshape(len(prompts), count) for name in ("conditional", "log_ratio"))
    conditional, log_ratio = (cluster_mean(list(column)) for column in columns)
    return conditional, log_ratio


def _write_kl(experiment: Experiment, samples: list[Sample], path: Path) -> None:
    log_ratios, conditionals = sequence_kl(
        experiment.model(experiment.judged_path),
        experiment.model(experiment.base_path),
        [experiment.prompt_ids[sample.key] for sample in samples],
        [sample.token_ids for sample in samples],
        temperature=experiment.recipe.temperature,
    )
    rows = {
        "key": [sample.key for sample in samples],
        "index": [sample.index for sample in samples],
        "conditional": conditionals.tolist(),
        "log_ratio": log_ratios.tolist(),
    }
    write_whole(path, lambda temporary: pq.write_table(pa.table(rows), temporary))


def _scored(experiment: Experiment, base: SampleTable, policy: SampleTable, prompts: list[Prompt]) -> Measured:
    """The first M rewards of every prompt with enough scores; the others are counted and left out."""
    count = experiment.recipe.eval_samples
    tables = {"base": base, "policy": policy}
    judges = {"": experiment.reward, "_gold": experiment.gold}
    found: dict[str, Any] = {}
    for side, table in tables.items():
        for suffix, judge in judges.items():
            rows = None if judge is None else table_rewards(table, judge, prompts)
            found[side + suffix] = None if rows is None else {p.key: rows[p.key][:count] for p in prompts}
    needed = max([experiment.procedure.n, *experiment.recipe.eval_n])
    given = [rows for rows in found.values() if rows is not None]
    keys = tuple(p.key for p in prompts if all(np.isfinite(rows[p.key]).sum() >= needed for rows in given))
    if not keys:
        raise InputError(f"no test prompt has {needed} scored samples on both sides: look at the reward")
    if len(keys) < len(prompts):
        notice(f"{len(prompts) - len(keys)} of {len(prompts)} test prompts have too few scores and are left out")
    samples = {side: _first(table.samples(), keys, count) for side, table in tables.items()}
    return Measured(keys=keys, **found, base_samples=samples["base"], policy_samples=samples["policy"])


def _first(samples: Mapping[str, list[Sample]], keys: Sequence[str], count: int) -> dict[str, list[Sample]]:
    return {key: samples[key][:count] for key in keys}


def summarise(
    experiment: Experiment, measured: Measured, kl: Estimate, log_ratio: Estimate, prompts: list[Prompt]
) -> dict[str, Any]:
    """Win rates under the recipe's procedure and every N asked for, with limits at the measured KL."""
    recipe, procedure = experiment.recipe, experiment.procedure
    rows = [
        decoder_row(
            measured.side("policy", judge),
            measured.side("base", judge),
            decoder,
            judge,
            kl=kl.mean,
            confidence=recipe.confidence,
            seed=recipe.seed,
        )
        for judge in ([PROXY] if experiment.gold is None else [PROXY, GOLD])
        for decoder in decoders(procedure, recipe.eval_n)
    ]
    main = next(row for row in rows if row.label == repr(procedure) and row.judge == PROXY)
    base_rewards = [measured.base[key] for key in measured.keys]
    tied = tie_limit(procedure, base_rewards, kl.mean)
    return {
        **experiment.objective.record(),
        "target_kl": recipe.target_kl,
        "reward": experiment.reward.name,
        "gold_reward": experiment.gold.name if experiment.gold else None,
        "prompts": len(measured.keys),
        "samples": recipe.eval_samples,
        "confidence": recipe.confidence,
        "seed": recipe.seed,
        "kl": {"mean": kl.mean, "error": kl.error, "k1": log_ratio.mean, "k1_error": log_ratio.error},
        "win_rates": [asdict(row) for row in rows],
        "main": {
            **asdict(main),
            "tie_limit": tied,
            "tie_attainment": attainment(main.mean, tied, kl.mean),
            "tie_rate": tie_rate(base_rewards),
        },
        "pairwise": _judged(recipe, procedure, measured, prompts),
    }


def _judged(recipe: Recipe, procedure: Procedure, measured: Measured, prompts: list[Prompt]) -> dict[str, Any] | None:
    """The recipe's pairwise judge over decoded pairs (rank 0 asks it), None without one."""
    if recipe.judge is None or not is_main():
        return None
    by_key = {prompt.key: prompt for prompt in prompts}
    texts = [
        [[one.text for one in samples[key]] for key in measured.keys]
        for samples in (measured.policy_samples, measured.base_samples)
    ]
    rewards = [[side[key] for key in measured.keys] for side in (measured.policy, measured.base)]
    return judge_decoded(
        recipe.judge,
        recipe.judge_kwargs,
        [by_key[key] for key in measured.keys],
        (texts[0], texts[1]),
        (rewards[0], rewards[1]),
        procedure,
        count=recipe.judge_samples,
        confidence=recipe.confidence,
        seed=recipe.seed,
        base_dir=recipe.base_dir,
    )
