"""`infalign evaluate`: fresh samples of base and policy on held-out prompts; win rates, KL, the limit, attainment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infalign.calibration.diagnostics import duplicate_rate, tie_rate
from infalign.calibration.table import SampleTable, Wanted
from infalign.evaluation.limits import Estimate, attainment, cluster_mean, regret_ratio, tie_limit
from infalign.evaluation.winrate import WinRate, judged_win_rate, tied_weights, win_rate
from infalign.generation.likelihood import sequence_kl
from infalign.runtime.artifacts import differences, fingerprint, read_manifest, without_nan, write_json, write_whole
from infalign.runtime.console import Progress, notice, say
from infalign.runtime.distributed import barrier, is_main, my_share
from infalign.stages.experiment import Experiment
from infalign.stages.filling import fill
from infalign.stages.objective import describe_transform
from infalign.stages.output import clear_if_stale
from infalign.stages.recipe import Recipe, require_plain
from infalign.theory.optimum import win_rate_limit
from infalign.theory.procedures import BestOfN, Procedure, WorstOfN
from infalign.types import InputError, Prompt, Sample

EXAMPLES = 8
KL_PROMPTS = 16  # prompts whose completions are compared at a time


@dataclass(frozen=True)
class Measured:
    """Everything that was sampled and scored, by prompt key; (M,) arrays in sample order, NaN for no score."""

    keys: tuple[str, ...]
    base: Mapping[str, NDArray[np.float64]]
    policy: Mapping[str, NDArray[np.float64]]
    base_gold: Mapping[str, NDArray[np.float64]] | None
    policy_gold: Mapping[str, NDArray[np.float64]] | None


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
    experiment.claim_output()
    judged = experiment.judged_path
    _check_trained_for(experiment)
    prompts = list(experiment.splits.test)
    base, drawn_base = _sample(experiment, experiment.base_path, "base", prompts)
    policy, drawn_policy = _sample(experiment, judged, "policy", prompts)
    kl, log_ratio = _measure_kl(experiment, policy, prompts)
    measured = _scored(experiment, base, policy, prompts)
    with np.errstate(over="ignore"):  # rewards near the largest float: their mean is infinite, and shown as absent
        result = summarise(experiment, measured, kl, log_ratio)
        result = without_nan(result | _sample_facts(experiment, base, policy, prompts, measured))
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
    now = {
        "procedure": repr(experiment.procedure),
        "transform": describe_transform(experiment.recipe, experiment.transform),
        "beta": float(f"{experiment.beta:.6g}"),
    }
    found = differences({name: manifest["parts"].get(name) for name in now}, now)
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
    drawn = fill(
        table,
        [Wanted(prompt, experiment.prompt_ids[prompt.key], recipe.eval_samples) for prompt in prompts],
        [reward for reward in (experiment.reward, experiment.gold) if reward is not None],
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
            rows = None if judge is None else table.rewards(judge.fingerprint)
            found[side + suffix] = None if rows is None else {p.key: rows[p.key][:count] for p in prompts}
    needed = max([experiment.procedure.n, *experiment.recipe.eval_n])
    given = [rows for rows in found.values() if rows is not None]
    keys = tuple(p.key for p in prompts if all(np.isfinite(rows[p.key]).sum() >= needed for rows in given))
    if not keys:
        raise InputError(f"no test prompt has {needed} scored samples on both sides: look at the reward")
    if len(keys) < len(prompts):
        notice(f"{len(prompts) - len(keys)} of {len(prompts)} test prompts have too few scores and are left out")
    return Measured(keys=keys, **found)


def summarise(experiment: Experiment, measured: Measured, kl: Estimate, log_ratio: Estimate) -> dict[str, Any]:
    """Win rates under the recipe's procedure and every N asked for, with limits at the measured KL."""
    recipe, procedure = experiment.recipe, experiment.procedure
    procedures = [procedure, *(kind(n) for kind in (BestOfN, WorstOfN) for n in recipe.eval_n)]
    procedures = list(dict.fromkeys(procedures))
    rows = [_row(measured, one, kl.mean, recipe, judge) for judge in _judges(experiment) for one in procedures]
    main = next(row for row in rows if row["label"] == repr(procedure) and row["judge"] == "reward")
    base_rewards = [measured.base[key] for key in measured.keys]
    tied = tie_limit(procedure, base_rewards, kl.mean)
    return {
        "procedure": repr(procedure),
        "transform": describe_transform(recipe, experiment.transform),
        "beta": float(f"{experiment.beta:.6g}"),
        "target_kl": recipe.target_kl,
        "reward": experiment.reward.name,
        "gold_reward": experiment.gold.name if experiment.gold else None,
        "prompts": len(measured.keys),
        "samples": recipe.eval_samples,
        "confidence": recipe.confidence,
        "seed": recipe.seed,
        "kl": {"mean": kl.mean, "error": kl.error, "k1": log_ratio.mean, "k1_error": log_ratio.error},
        "win_rates": rows,
        "main": {
            **main,
            "tie_limit": tied,
            "tie_attainment": attainment(main["mean"], tied, kl.mean),
            "tie_rate": tie_rate(base_rewards),
        },
    }


def _judges(experiment: Experiment) -> list[str]:
    return ["reward"] if experiment.gold is None else ["reward", "gold"]


def _row(measured: Measured, procedure: Procedure, kl: float, recipe: Recipe, judge: str) -> dict[str, Any]:
    found = _win_rate(measured, procedure, recipe, judge)
    bounded = judge == "reward"  # a gold judge is not what decodes: the limit does not hold for it
    limit = float(win_rate_limit(procedure, max(kl, 0.0))) if bounded else float("nan")
    return {
        "label": repr(procedure),
        "kind": procedure.name,
        "n": procedure.n,
        "judge": judge,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "limit": limit,
        "attainment": attainment(found.mean, limit, kl),
        "regret_ratio": regret_ratio(found.mean, limit),
        "policy_reward": _decoded_reward(measured, "policy", judge, procedure),
        "base_reward": _decoded_reward(measured, "base", judge, procedure),
    }


def _decoded_reward(measured: Measured, side: str, judge: str, procedure: Procedure) -> float:
    """The mean reward of what the decoder picks; with a binary reward and Best-of-N this is pass@N, unbiased."""
    proxy: Mapping[str, NDArray[np.float64]] = getattr(measured, side)
    judged: Mapping[str, NDArray[np.float64]] = proxy if judge == "reward" else getattr(measured, f"{side}_gold")
    means = []
    for key in measured.keys:
        scored = np.isfinite(proxy[key]) & np.isfinite(judged[key])
        means.append(float(tied_weights(proxy[key][scored], procedure) @ judged[key][scored]))
    return float(np.mean(means))


def _win_rate(measured: Measured, procedure: Procedure, recipe: Recipe, judge: str) -> WinRate:
    ours, theirs = ([side[key] for key in measured.keys] for side in (measured.policy, measured.base))
    if judge == "reward":
        return win_rate(ours, theirs, procedure, recipe.confidence, recipe.seed)
    assert measured.policy_gold is not None and measured.base_gold is not None
    gold, base_gold = ([side[key] for key in measured.keys] for side in (measured.policy_gold, measured.base_gold))
    return judged_win_rate((ours, gold), (theirs, base_gold), procedure, recipe.confidence, recipe.seed)


def _sample_facts(
    experiment: Experiment, base: SampleTable, policy: SampleTable, prompts: list[Prompt], measured: Measured
) -> dict[str, Any]:
    """What the samples look like: mean reward, length, cut and duplicate shares, and a few side by side."""
    drawn = {"base": base.samples(), "policy": policy.samples()}
    rewards = {"base": measured.base, "policy": measured.policy}
    count = experiment.recipe.eval_samples
    facts: dict[str, Any] = {}
    for side, samples in drawn.items():
        rows = [samples[key][:count] for key in measured.keys]
        flat = [sample for row in rows for sample in row]
        facts[side] = {
            "reward": float(np.nanmean(np.concatenate([rewards[side][key] for key in measured.keys]))),
            "tokens": float(np.mean([len(sample.token_ids) for sample in flat])),
            "clipped": float(np.mean([not sample.finished for sample in flat])),
            "duplicates": duplicate_rate([[sample.text for sample in row] for row in rows]),
        }
    shown = [prompt for prompt in prompts if prompt.key in set(measured.keys)][:EXAMPLES]
    facts["examples"] = [_example(experiment, prompt, drawn, rewards) for prompt in shown]
    return facts


def _example(
    experiment: Experiment, prompt: Prompt, drawn: dict[str, dict[str, list[Sample]]], rewards: dict[str, Any]
) -> dict[str, Any]:
    """One prompt with what the decoder picks from the first n samples of either side."""
    found: dict[str, Any] = {"prompt": prompt.content}
    for side, samples in drawn.items():
        scores = rewards[side][prompt.key]
        scored = np.flatnonzero(np.isfinite(scores))[: experiment.procedure.n]
        chosen = scored[int(experiment.procedure.select(scores[scored][None], np.random.default_rng(0))[0])]
        found[side] = {
            "decoded": {"text": samples[prompt.key][chosen].text, "reward": float(scores[chosen])},
            "samples": [
                {"text": samples[prompt.key][row].text, "reward": float(scores[row])} for row in scored.tolist()
            ],
        }
    return found


def tell(result: Mapping[str, Any]) -> None:
    """Print the final table: what was measured, with intervals, the limit at the measured KL, and attainment."""
    kl, main = result["kl"], result["main"]
    interval = f"{100 * result['confidence']:g} % interval"
    say()
    say(
        f"{result['procedure']}, reward {result['reward']}: policy against base on {result['prompts']} held-out prompts"
    )
    say(
        f"  sequence KL {kl['mean']:.3f} ± {kl['error']:.3f} nats "
        f"(from log-ratios alone {kl['k1']:.3f} ± {kl['k1_error']:.3f})"
    )
    say()
    heads = ("judge", "win rate", interval, "limit", "attainment", "regret ratio", "decoded reward")
    say(f"  {'decoder':<16}" + "".join(f"{head:<{width}}" for head, width in zip(heads, _WIDTHS, strict=True)).rstrip())
    for row in result["win_rates"]:
        mark = "*" if row["label"] == result["procedure"] else " "
        between = f"[{row['low']:.3f}, {row['high']:.3f}]"
        bounds = (_shown(row["limit"], 3), _shown(row["attainment"], 2), _shown(row["regret_ratio"], 1))
        rewards = f"{_shown(row['base_reward'], 3)} -> {_shown(row['policy_reward'], 3)}"
        cells = (row["judge"], f"{row['mean']:.3f}", between, *bounds, rewards)
        say(
            f"{mark} {row['label']:<16}"
            + "".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()
        )
    say()
    say("  * the recipe's decoder. limit: the most that any method reaches at this KL with a reward that never ties;")
    say(
        f"    with this reward's ties ({main['tie_rate']:.0%}): {main['tie_limit']:.3f}, "
        f"attainment {_shown(main['tie_attainment'], 2)}."
    )


_WIDTHS = (9, 10, 18, 8, 12, 14, 18)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
