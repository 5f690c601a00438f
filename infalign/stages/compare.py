"""`infalign evaluate --base a.jsonl --policy b.jsonl`: any two models under any procedure, from files; loads no model.

Both files hold samples of the same prompts, with rewards (or `reward` scores them). One table of samples gives every N,
best and worst, without bias; the length-controlled win rate and, where asked for, a gold reward and a pairwise judge
stand beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.data.columns import parse_columns
from infalign.data.completions import Completions, read_completions
from infalign.data.pairing import Pair, paired
from infalign.evaluation.deployment import Deployment, deployment
from infalign.evaluation.judging import JudgedWins, judge_decoded
from infalign.evaluation.length import Side
from infalign.evaluation.summary import GOLD, PROXY, DecoderRow, decoder_row, decoders
from infalign.report.table import plain_text, win_rate_table
from infalign.rewards.contract import shape_completions
from infalign.runtime.artifacts import write_json
from infalign.runtime.config import check, field_hints
from infalign.runtime.console import notice, say
from infalign.stages.objective import find_procedure
from infalign.stages.recipe import PROCEDURE_KWARGS, key
from infalign.theory.procedures import BUILT_IN, Procedure, takes_n
from infalign.types import InputError

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and how."""

    base: str = key("", "file of the base's samples: prompt, completions[], rewards[], or another tool's", "files")
    policy: str = key("", "file of the policy's samples of the same prompts", "files")
    columns: dict | list[str] | str = key({}, "other names of columns, e.g. prompt=question,rewards=score", "files")
    match: list[str] = key([], "columns that tell equal prompts apart, e.g. answer; unset: they are found", "files")
    split: str | None = key(None, "split of a folder that has several", "files")
    requests: list[str] = key([], "request files of OpenAI batches, which hold the prompts", "files")
    output: str | None = key(None, "JSON file to write the result to", "files")

    procedure: str = key("best_of_n", f"{', '.join(BUILT_IN)}, or path.py:name", "decoder")
    n: int | None = key(None, "candidates that the procedure draws; unset: 4, or as many as there are", "decoder")
    procedure_kwargs: dict = key({}, PROCEDURE_KWARGS, "decoder")
    eval_n: list[int] = key(
        [], "further N of Best-of-N and Worst-of-N; unset: 1, 2, 4, ... up to the samples", "decoder"
    )
    kl: float | None = key(None, "sequence KL in nats, if known: prints the exact limit too", "decoder")

    reward: str | None = key(None, "scores the samples in place of the files' rewards: file.py:name, ...", "reward")
    reward_kwargs: dict = key({}, "its keyword arguments", "reward")
    gold_reward: str | None = key(None, "judges what the reward decodes; unset: the files' gold_rewards", "reward")
    gold_reward_kwargs: dict = key({}, "its keyword arguments", "reward")
    judge: str | None = key(None, "pairwise judge, file.py:name: asked in both orders", "reward")
    judge_kwargs: dict = key({}, "its keyword arguments", "reward")
    judge_samples: int = key(4, "decoded pairs a prompt that the judge sees", "reward")

    confidence: float = key(0.95, "of the intervals", "other")
    seed: int = key(42, "of the bootstrap and of the judged pairs", "other")


@dataclasses.dataclass(frozen=True)
class PairedSamples:
    """The samples of the prompts that both files have, in one order, with the rewards that decode and judge."""

    keys: tuple[str, ...]
    samples: tuple[Pair, ...]  # (policy, base) of each prompt
    rewards: tuple[list[Floats], list[Floats]]
    gold: tuple[list[Floats], list[Floats]] | None

    def lengths(self, side: int) -> list[Floats]:
        """Characters of every completion."""
        return [pair[side].lengths_M.astype(np.float64) for pair in self.samples]


def load_comparison(flags: Mapping[str, Any]) -> Comparison:
    """A checked comparison from flags.

    Raises:
        InputError: everything that is wrong with them, at once.
    """
    comparison = Comparison(**check({}, flags, field_hints(Comparison)))
    problems = [
        f"--{name} FILE is needed: samples as JSONL" for name in ("base", "policy") if not getattr(comparison, name)
    ]
    for name in ("n", "judge_samples"):
        if getattr(comparison, name) is not None and getattr(comparison, name) < 1:
            problems.append(f"{name} must be at least 1, got {getattr(comparison, name)}")
    if any(one < 1 for one in comparison.eval_n):
        problems.append(f"eval_n must be positive integers, got {comparison.eval_n}")
    if not 0 < comparison.confidence < 1:
        problems.append(f"confidence must be between 0 and 1, got {comparison.confidence}")
    if comparison.kl is not None and not comparison.kl >= 0:
        problems.append(f"kl must be nats of at least 0, got {comparison.kl}")
    if not 0 <= comparison.seed < 2**32:
        problems.append(f"seed must be between 0 and 2**32 - 1, got {comparison.seed}")
    for name in ("base", "policy"):
        file, written = Path(getattr(comparison, name)), Path(comparison.output or "")
        if comparison.output and file.exists() and written.exists() and file.samefile(written):
            problems.append(f"--output {comparison.output} is --{name}'s file, which would be lost: name another one")
    if problems:
        raise InputError("; ".join(problems))
    return comparison


def read_pairs(comparison: Comparison) -> list[Pair]:
    """The samples of the prompts that both files have.

    Raises:
        InputError: a file that can't be read, or no prompt in common.
    """
    keep = bool(comparison.reward or comparison.gold_reward or comparison.judge)
    renamed = parse_columns(comparison.columns)
    policy, base = (
        read_completions(name, columns=renamed, split=comparison.split, requests=comparison.requests, keep_texts=keep)
        for name in (comparison.policy, comparison.base)
    )
    for file in (policy, base):
        for note in file.notes:
            say(f"{file.name}: {note}")
    found = paired(policy, base, comparison.match)
    for file, count in zip((policy, base), found.alone, strict=True):
        if count:
            total = count + len(found.pairs)
            notice(f"{count} of {total} prompts in {file.name} are not in the other file and are left out")
    if found.told_apart:
        say(f"rows of equal prompts are told apart by {', '.join(map(repr, found.told_apart))}")
    if found.unclear:
        names = " ".join(found.unclear)
        notice(f"rows of equal prompts are taken as samples of one prompt; if not: --match {names} tells them apart")
    elif found.joined and not found.told_apart and not (policy.single and base.single):
        say(f"{found.joined} rows have the prompt of another row: they are taken as further samples of it")
    return found.pairs


def choose_n(comparison: Comparison, pairs: Sequence[Pair]) -> int:
    """How many candidates are decoded: as asked, else 4, or as many scored samples as half of the prompts have."""
    if comparison.n is not None:
        return comparison.n
    # by prompt, the side with fewer scored samples; samples without rewards are all scored later
    counts = [
        min(len(side) if side.rewards_M is None else int(np.count_nonzero(~np.isnan(side.rewards_M))) for side in pair)
        for pair in pairs
    ]
    least = max(1, int(np.median(counts)))
    if least == 1:
        notice("one completion a prompt: only N = 1, the plain win rate, can be measured")
    return min(4, least)


def load_table(comparison: Comparison, pairs: Sequence[Pair], procedure: Procedure) -> PairedSamples:
    """The samples of the prompts that both files have and the procedure can decode.

    Raises:
        InputError: no rewards and nothing to score with, or too few samples everywhere.
    """
    keys = [pair[0].prompt.key for pair in pairs]
    rewards = [_scores(comparison, [pair[side] for pair in pairs], side) for side in (0, 1)]
    gold = _gold(comparison, pairs)
    if gold is not None:  # a sample that one of the two does not score is left out
        for proxy, judge in (
            (row, other) for side in (0, 1) for row, other in zip(rewards[side], gold[side], strict=True)
        ):
            unscored = np.isnan(proxy) | np.isnan(judge)
            proxy[unscored] = judge[unscored] = np.nan
    return _with_enough(PairedSamples(tuple(keys), tuple(pairs), (rewards[0], rewards[1]), gold), procedure)


def _with_enough(table: PairedSamples, procedure: Procedure) -> PairedSamples:
    """The prompts with `procedure.n` scored samples on both sides."""
    counts = np.array([[(~np.isnan(row)).sum() for row in side] for side in table.rewards]).min(0)
    kept = np.flatnonzero(counts >= procedure.n).tolist()
    if not any(row.size and not np.isnan(row).all() for side in table.rewards for row in side):
        raise InputError("no sample has a score: look at the rewards, or at what --reward returns")
    if not kept:
        raise InputError(
            f"no prompt has the {procedure.n} scored samples a side that {procedure!r} needs: draw more, or lower n"
        )
    if len(kept) == len(counts):
        return table
    notice(f"{len(counts) - len(kept)} of {len(counts)} prompts have fewer than {procedure.n} scored samples: left out")

    def picked(sides: tuple[list[Floats], list[Floats]]) -> tuple[list[Floats], list[Floats]]:
        return [sides[0][number] for number in kept], [sides[1][number] for number in kept]

    return PairedSamples(
        keys=tuple(table.keys[number] for number in kept),
        samples=tuple(table.samples[number] for number in kept),
        rewards=picked(table.rewards),
        gold=None if table.gold is None else picked(table.gold),
    )


def _scores(comparison: Comparison, samples: Sequence[Completions], side: int) -> list[Floats]:
    """The rewards of one side: the file's, or those of the reward that was named."""
    if comparison.reward is not None:
        return _scored(comparison.reward, comparison.reward_kwargs, samples)
    rows = [one.rewards_M for one in samples if one.rewards_M is not None]
    if len(rows) < len(samples):
        file = (comparison.policy, comparison.base)[side]
        raise InputError(
            f"{len(samples) - len(rows)} of {len(samples)} prompts in {file} have no rewards: add them (rewards, "
            "scores), name their column (--columns rewards=NAME), or score with --reward"
        )
    return rows


def _gold(comparison: Comparison, pairs: Sequence[Pair]) -> tuple[list[Floats], list[Floats]] | None:
    """The gold rewards of both sides, None when nobody gave any."""
    sides = ([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    if comparison.gold_reward is not None:
        spec, kwargs = comparison.gold_reward, comparison.gold_reward_kwargs
        return _scored(spec, kwargs, sides[0]), _scored(spec, kwargs, sides[1])
    given = tuple([one.gold_M for one in side if one.gold_M is not None] for side in sides)
    missing = 2 * len(pairs) - sum(map(len, given))
    if missing == 2 * len(pairs):
        return None
    if missing:
        raise InputError(f"{missing} rows have no gold_rewards and others have: give them all, or none")
    return given[0], given[1]


def _scored(spec: str, kwargs: Mapping[str, Any], samples: Sequence[Completions]) -> list[Floats]:
    """Rewards of all samples, prompt by prompt."""
    from infalign.rewards.loader import load_reward  # noqa: PLC0415 - files with rewards load none

    reward = load_reward(spec, kwargs, base_dir=Path())
    found: list[Floats] = []
    for one in samples:
        assert one.texts is not None  # kept where something scores them
        prompts = [one.prompt.content] * len(one.texts)
        columns = {name: [value] * len(prompts) for name, value in one.prompt.columns.items()}
        ids = [[] for _ in prompts]  # made elsewhere: token ids are not known
        found.append(reward(prompts, shape_completions(prompts, list(one.texts)), ids, **columns))
    return found


@dataclasses.dataclass(frozen=True)
class Compared:
    """What two files of samples say; the content of the JSON that is written.

    Attributes:
        procedure: the one asked for; `win_rates` has a row for every decoder.
        prompts, samples: prompts of both files; mean samples of each side, and the `least` scored ones of any prompt.
        judged_by: `PROXY` or `GOLD`.
        confidence, seed, kl: as asked for.
        judge: a pairwise judge's word.
        deployment: gold wins against N, where gold rewards judge.
    """

    procedure: str
    prompts: int
    samples: dict[str, float]
    judged_by: str
    confidence: float
    seed: int
    kl: float | None
    win_rates: list[DecoderRow]
    judge: JudgedWins | None
    deployment: Deployment | None = None


def compare(comparison: Comparison) -> Compared:
    """Win rates of the policy's samples against the base's under the procedure and every N that they allow.

    Returns:
        What was measured; also written to `comparison.output`.

    Raises:
        InputError: files that do not fit, too few samples, or no rewards and nothing to score with.
    """
    output = (
        Path(comparison.output).expanduser().absolute() if comparison.output else None
    )  # plug-ins may change the folder
    pairs = read_pairs(comparison)
    counts = comparison.procedure in BUILT_IN and takes_n(comparison.procedure)
    n = choose_n(comparison, pairs) if counts else comparison.n
    procedure = find_procedure(comparison.procedure, n, comparison.procedure_kwargs, Path())
    table = load_table(comparison, pairs, procedure)
    del pairs
    least = min(int((~np.isnan(row)).sum()) for side in table.rewards for row in side)
    policy, base = (
        Side(table.rewards[side], (table.gold or table.rewards)[side], table.lengths(side)) for side in (0, 1)
    )
    judge, level, seed = GOLD if table.gold else PROXY, comparison.confidence, comparison.seed
    result = Compared(
        procedure=repr(procedure),
        prompts=len(table.keys),
        samples={"policy": _counts(table, 0), "base": _counts(table, 1), "least": least},
        judged_by=judge,
        confidence=level,
        seed=seed,
        kl=comparison.kl,
        win_rates=[
            decoder_row(policy, base, decoder, judge, kl=comparison.kl, confidence=level, seed=seed)
            for decoder in _decoders(comparison, procedure, least)
        ],
        judge=_judged(comparison, table, procedure),
        deployment=deployment(policy, base, procedure, level, seed)
        if table.gold and procedure.monotone == "increasing"
        else None,
    )
    if output is not None:
        write_json(output, dataclasses.asdict(result))
    return result


def _decoders(comparison: Comparison, procedure: Procedure, least: int) -> list[Procedure]:
    sizes = comparison.eval_n or [2**power for power in range(12) if 2**power <= least]
    most = max([procedure.n, *sizes])
    if most > least:
        raise InputError(f"{most} candidates are drawn, but a prompt has {least} scored samples: lower n or eval_n")
    return decoders(procedure, sizes)


def _judged(comparison: Comparison, table: PairedSamples, procedure: Procedure) -> JudgedWins | None:
    if comparison.judge is None:
        return None
    return judge_decoded(
        comparison.judge,
        comparison.judge_kwargs,
        [pair[0].prompt for pair in table.samples],
        ([pair[0].texts or () for pair in table.samples], [pair[1].texts or () for pair in table.samples]),
        table.rewards,
        procedure,
        count=comparison.judge_samples,
        confidence=comparison.confidence,
        seed=comparison.seed,
    )


def _counts(table: PairedSamples, side: int) -> float:
    return float(np.mean([len(pair[side]) for pair in table.samples]))


def tell(comparison: Comparison, result: Compared) -> None:
    """Print what was measured: a line for every decoder."""
    say(
        f"{result.procedure}, {comparison.policy} against {comparison.base}: {result.prompts} prompts, at least "
        f"{result.samples['least']} scored samples a side"
    )
    say()
    for line in plain_text(win_rate_table(result.win_rates, result.procedure, result.confidence)):
        say(line)
    longer = result.win_rates[0].length_controlled.longer
    say()
    way = "longer" if longer >= 0 else "shorter"
    say(
        f"  * the decoder asked for; its answers are {abs(longer):.0f} characters {way} than the base's. At equal "
        "length: by logistic regression on the difference."
    )
    if result.judged_by == GOLD:
        named = "the gold_rewards of the files" if comparison.gold_reward is None else comparison.gold_reward
        no_limit = (
            "" if comparison.kl is None else "; the limit holds for the reward that decodes, so there is none here"
        )
        say(f"    judged by {named}{no_limit}.")
    if result.deployment is not None:
        say(f"  judged so, against the base decoded by {result.deployment.opponent}:")
        say(f"    base: {result.deployment.base}")
        say(f"    policy: {result.deployment.policy}")
    if result.judge:
        say(f"  {result.judge}")
    if comparison.output:
        say(f"  written to {comparison.output}")


def compare_verb(comparison: Comparison) -> None:
    """Compare, and print what was measured."""
    tell(comparison, compare(comparison))
