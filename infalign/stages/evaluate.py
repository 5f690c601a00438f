"""`infalign evaluate`: fresh samples of base and policy on held-out prompts; win rates, KL, the limit, attainment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infalign.calibration.diagnostics import tie_rate
from infalign.calibration.table import SampleTable, Wanted
from infalign.evaluation.deployment import Deployment, deployment
from infalign.evaluation.judging import JudgedWins, judge_decoded
from infalign.evaluation.limits import Estimate, attainment, cluster_mean, tie_limit
from infalign.evaluation.summary import GOLD, PROXY, DecoderRow, Evaluation, SequenceKL, Ties
from infalign.generation.likelihood import sequence_kl
from infalign.report.table import number, plain_text, win_rate_table
from infalign.rewards.loader import Reward
from infalign.runtime.artifacts import fingerprint, read_manifest, write_json, write_whole
from infalign.runtime.console import Progress, notice, say
from infalign.runtime.distributed import barrier, is_main, my_share
from infalign.stages.experiment import Experiment
from infalign.stages.forgetting import measure_texts, text_files
from infalign.stages.objective import load_procedures
from infalign.stages.output import SAMPLES, clear_if_stale, forget_scores, leaves_nothing
from infalign.stages.per_prompt import write_per_prompt
from infalign.stages.recipe import Recipe, require_plain
from infalign.stages.sampling import fill, table_rewards
from infalign.stages.scored_samples import Measured, ScoredSamples, compute_facts, examples
from infalign.stages.strategy import load_strategy
from infalign.stages.win_rates import measure_win_rates
from infalign.theory.objective import differing
from infalign.theory.procedures import Procedure
from infalign.types import InputError, Prompt, Sample

KL_PROMPTS = 16  # prompts whose completions are compared at a time


@leaves_nothing(SAMPLES)
def evaluate(recipe: Recipe, experiment: Experiment | None = None) -> Evaluation:
    """Measure, and write `evaluation.json` beside the sample tables.

    Raises:
        InputError: no policy, too few samples for the procedure, or a folder of another recipe.
    """
    require_plain(recipe)
    experiment = experiment or Experiment(recipe)
    check_samples(recipe)
    load_strategy(recipe, experiment.procedure)  # its mistakes are told before anything is sampled
    text_files(experiment)
    experiment.claim_output()
    judged = experiment.judged_path
    _check_trained_for(experiment)
    prompts = list(experiment.splits.test)
    base, drawn_base = _sample(experiment, experiment.base_path, "base", prompts)
    policy, drawn_policy = _sample(experiment, judged, "policy", prompts)
    conditional_PM, log_ratio_PM = _measure_kl(experiment, policy, prompts)
    kl, log_ratio = cluster_mean(list(conditional_PM)), cluster_mean(list(log_ratio_PM))
    measured = _scored(experiment, base, policy, prompts)
    kls = {prompt.key: float(row.mean()) for prompt, row in zip(prompts, conditional_PM, strict=True)}
    with np.errstate(over="ignore"):  # rewards near the largest float: their mean is infinite, and shown as absent
        rows, per_prompt = measure_win_rates(experiment, measured, kls)
        result = summarise(experiment, measured, rows, kl, log_ratio)
    if is_main():
        write_per_prompt(recipe.output, per_prompt)
        write_json(recipe.output / "evaluation.json", result.as_json())
        experiment.record()
    barrier()
    return dataclasses.replace(result, drawn=drawn_base + drawn_policy)


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


def check_samples(recipe: Recipe) -> None:
    """Enough samples and prompts for every decoder asked for.

    Raises:
        InputError: naming what to raise or lower.
    """
    if recipe.num_test_prompts < 1:
        raise InputError(f"num_test_prompts must be at least 1 to evaluate, got {recipe.num_test_prompts}")
    needed = max([*(procedure.n for procedure in load_procedures(recipe)), *recipe.eval_n])
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
    rewards = list(_judges(experiment).values())
    forget_scores(table, rewards, recipe.overwrite)
    drawn = fill(
        table,
        [Wanted(prompt, experiment.prompt_ids[prompt.key], recipe.eval_samples) for prompt in prompts],
        rewards,
        lambda: experiment.sampler(path, purpose),
        max_tokens=recipe.max_completion_length,
        tokens_per_batch=recipe.tokens_per_batch,
        title=f"evaluate: {side}",
        asks=experiment.asks,
    )
    return table, drawn


def _measure_kl(
    experiment: Experiment, policy: SampleTable, prompts: list[Prompt]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sequence KL of policy against base, (P, samples) each: conditional and k1; cached beside the samples.

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
    conditional, log_ratio = (
        table[name].to_numpy().reshape(len(prompts), count) for name in ("conditional", "log_ratio")
    )
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
    """The first M rewards of every prompt with enough scores; the others are counted and left out.

    A prompt needs the scores of the rewards that it is for, and of the gold one.
    """
    count, judges = experiment.recipe.eval_samples, _judges(experiment)
    sides = [_scored_samples(experiment, table, prompts, count) for table in (base, policy)]
    needed = candidates_needed(experiment)
    drawn = Measured(prompts, *sides)
    kept = [
        prompt
        for prompt in prompts
        if all(
            drawn.enough(prompt.key, judge, needed)
            for judge, reward in judges.items()
            if judge == GOLD or experiment.is_for(reward, prompt)
        )
    ]
    if not kept:
        raise InputError(f"no test prompt has {needed} scored samples on both sides: look at the reward")
    if len(kept) < len(prompts):
        notice(f"{len(prompts) - len(kept)} of {len(prompts)} test prompts have too few scores and are left out")
    return Measured(kept, *sides)


def candidates_needed(experiment: Experiment) -> int:
    """The most that any decoder of the table draws."""
    return max([*(term.procedure.n for term in experiment.terms), *experiment.recipe.eval_n])


def _scored_samples(experiment: Experiment, table: SampleTable, prompts: list[Prompt], count: int) -> ScoredSamples:
    samples = table.samples()
    scores = {
        judge: {key: row[:count] for key, row in table_rewards(table, reward, prompts).items()}
        for judge, reward in _judges(experiment).items()
    }
    return ScoredSamples({prompt.key: samples[prompt.key][:count] for prompt in prompts}, scores)


def _judges(experiment: Experiment) -> dict[str, Reward]:
    """Everything that scores samples: the recipe's reward, the other terms' by name, and the gold one."""
    others = {reward.name: reward for reward in experiment.rewards[1:]}
    gold = {} if experiment.gold is None else {GOLD: experiment.gold}
    return {PROXY: experiment.reward, **others, **gold}


def summarise(
    experiment: Experiment, measured: Measured, rows: Sequence[DecoderRow], kl: Estimate, log_ratio: Estimate
) -> Evaluation:
    """Everything that was measured, beside its rows of win rates."""
    recipe, procedure = experiment.recipe, experiment.procedure
    measured = measured.with_scores(PROXY, candidates_needed(experiment))
    keys = measured.keys
    main = next(row for row in rows if row.label == repr(procedure) and row.judge == PROXY)
    base_rewards = [measured.base.rewards[key] for key in keys]
    tied = tie_limit(procedure, base_rewards, kl.mean)
    return Evaluation(
        # the first term decodes, also where another one alone is trained for
        **{**experiment.objective.record(), "procedure": repr(procedure)},
        target_kl=recipe.target_kl,
        reward=experiment.reward.name,
        gold_reward=experiment.gold.name if experiment.gold else None,
        prompts=len(keys),
        samples=recipe.eval_samples,
        confidence=recipe.confidence,
        seed=recipe.seed,
        kl=SequenceKL(kl.mean, kl.error, log_ratio.mean, log_ratio.error),
        win_rates=tuple(rows),
        ties=Ties(tied, attainment(main.mean, tied, kl.mean), tie_rate(base_rewards)),
        base=measured.base.facts(keys),
        policy=measured.policy.facts(keys),
        examples=examples(procedure, measured),
        compute=compute_facts(experiment, measured),
        deployment=_deployment(experiment, measured),
        pairwise=_judged(recipe, procedure, measured),
        texts=measure_texts(experiment),
    )


def _deployment(experiment: Experiment, measured: Measured) -> Deployment | None:
    """Which N to deploy under the gold reward; None without one, or for a decoder that does not seek the best."""
    if experiment.gold is None or experiment.procedure.monotone != "increasing":
        return None
    measured = measured.with_scores(GOLD, candidates_needed(experiment))
    policy, base = (side.side(measured.keys, GOLD, PROXY) for side in (measured.policy, measured.base))
    recipe = experiment.recipe
    return deployment(policy, base, experiment.procedure, recipe.confidence, recipe.seed)


def _judged(recipe: Recipe, procedure: Procedure, measured: Measured) -> JudgedWins | None:
    """The recipe's pairwise judge over decoded pairs (rank 0 asks it), None without one."""
    if recipe.judge is None or not is_main():
        return None
    policy, base = measured.policy, measured.base
    ours, theirs = ([[one.text for one in side.samples[key]] for key in measured.keys] for side in (policy, base))
    return judge_decoded(
        recipe.judge,
        recipe.judge_kwargs,
        measured.prompts,
        (ours, theirs),
        ([policy.rewards[key] for key in measured.keys], [base.rewards[key] for key in measured.keys]),
        procedure,
        count=recipe.judge_samples,
        confidence=recipe.confidence,
        seed=recipe.seed,
        base_dir=recipe.base_dir,
    )


def tell(result: Evaluation) -> None:
    """Print the final table: what was measured, with intervals, the limit at the measured KL, and attainment."""
    kl = result.kl
    say()
    say(f"{result.procedure}, reward {result.reward}: policy against base on {result.prompts} held-out prompts")
    say(f"  sequence KL {kl.mean:.3f} ± {kl.error:.3f} nats (from log-ratios alone {kl.k1:.3f} ± {kl.k1_error:.3f})")
    say()
    for line in plain_text(win_rate_table(result.win_rates, result.procedure, result.confidence)):
        say(line)
    say()
    limit = "limit: the most that any method reaches at this KL with a reward that never ties;"
    if any(row.weight > 0 for row in result.win_rates):
        say("  * what was trained for, all at once; each row has the limit of a policy for it alone.")
        say(f"    {limit}")
    else:
        say(f"  * the recipe's decoder. {limit}")
    say(
        f"    with this reward's ties ({result.ties.tie_rate:.0%}): {result.ties.tie_limit:.3f}, "
        f"attainment {number(result.ties.tie_attainment, 2)}."
    )
    if result.pairwise:
        say(f"  {result.pairwise}")
    for one in result.texts:
        say(f"  {one}")
    if result.deployment is not None:
        say(f"  under the gold reward {result.gold_reward}, against the base decoded by {result.deployment.opponent}:")
        say(f"    base: {result.deployment.base}")
        say(f"    policy: {result.deployment.policy}")
