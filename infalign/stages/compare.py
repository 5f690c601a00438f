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

from infalign.evaluation.length import Side, decoded_reward, length_controlled_win_rate
from infalign.evaluation.limits import attainment, regret_ratio
from infalign.evaluation.winrate import WinRate, judged_win_rate, win_rate
from infalign.runtime.artifacts import without_nan, write_json
from infalign.runtime.console import say
from infalign.stages.comparison import Comparison, Table, choose_n, load_table, read_pairs
from infalign.stages.judging import judge_decoded, judge_line
from infalign.stages.objective import find_procedure
from infalign.theory.optimum import win_rate_limit
from infalign.theory.procedures import BestOfN, Procedure, WorstOfN
from infalign.types import InputError


def compare(asked: Comparison) -> dict[str, Any]:
    """Win rates of the policy's samples against the base's under the procedure and every N that they allow.

    Returns:
        What was measured; also written to `asked.output`.

    Raises:
        InputError: files that do not fit, too few samples, or no rewards and nothing to score with.
    """
    output = Path(asked.output).expanduser().absolute() if asked.output else None  # plug-ins may change the folder
    pairs = read_pairs(asked)
    procedure = find_procedure(asked.procedure, choose_n(asked, pairs), asked.procedure_kwargs, Path())
    table = load_table(asked, pairs, procedure)
    del pairs
    least = min(int((~np.isnan(row)).sum()) for side in table.rewards for row in side)
    procedures = _procedures(asked, procedure, least)
    sides = [Side(table.rewards[side], (table.gold or table.rewards)[side], table.lengths(side)) for side in (0, 1)]
    rows = [_row(asked, table, one, sides) for one in procedures]
    result: dict[str, Any] = {
        "procedure": repr(procedure),
        "prompts": len(table.keys),
        "samples": {"policy": _counts(table, 0), "base": _counts(table, 1), "least": least},
        "judged_by": "gold" if table.gold else "reward",
        "confidence": asked.confidence,
        "seed": asked.seed,
        "kl": asked.kl,
        "win_rates": rows,
        "judge": _judged(asked, table, procedure),
    }
    if output is not None:
        write_json(output, without_nan(result))
    return result


def _procedures(asked: Comparison, procedure: Procedure, least: int) -> list[Procedure]:
    sizes = asked.eval_n or [2**power for power in range(12) if 2**power <= least]
    most = max([procedure.n, *sizes])
    if most > least:
        raise InputError(f"{most} candidates are drawn, but a prompt has {least} scored samples: lower n or eval_n")
    return list(dict.fromkeys([procedure, *(kind(size) for kind in (BestOfN, WorstOfN) for size in sizes)]))


def _row(asked: Comparison, table: Table, procedure: Procedure, sides: Sequence[Side]) -> dict[str, Any]:
    found = _win_rate(asked, table, procedure)
    controlled = length_controlled_win_rate(sides[0], sides[1], procedure, asked.confidence, asked.seed)
    bounded = table.gold is None and asked.kl is not None
    limit = float(win_rate_limit(procedure, asked.kl)) if bounded and asked.kl else float("nan")
    return {
        "label": repr(procedure),
        "kind": procedure.name,
        "n": procedure.n,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "length_controlled": dataclasses.asdict(controlled),
        "limit": limit,
        "attainment": attainment(found.mean, limit, asked.kl or 0.0),
        "regret_ratio": regret_ratio(found.mean, limit),
        "policy_reward": decoded_reward(sides[0], procedure),
        "base_reward": decoded_reward(sides[1], procedure),
    }


def _win_rate(asked: Comparison, table: Table, procedure: Procedure) -> WinRate:
    ours, theirs = table.rewards
    if table.gold is None:
        return win_rate(ours, theirs, procedure, asked.confidence, asked.seed)
    return judged_win_rate((ours, table.gold[0]), (theirs, table.gold[1]), procedure, asked.confidence, asked.seed)


def _judged(asked: Comparison, table: Table, procedure: Procedure) -> dict[str, Any] | None:
    if asked.judge is None:
        return None
    return judge_decoded(
        asked.judge,
        asked.judge_kwargs,
        [pair[0].prompt for pair in table.samples],
        ([pair[0].texts or () for pair in table.samples], [pair[1].texts or () for pair in table.samples]),
        table.rewards,
        procedure,
        count=asked.judge_samples,
        confidence=asked.confidence,
        seed=asked.seed,
    )


def _counts(table: Table, side: int) -> float:
    return float(np.mean([len(pair[side]) for pair in table.samples]))


def tell(asked: Comparison, result: Mapping[str, Any]) -> None:
    """Print what was measured: a line for every decoder."""
    say(
        f"{result['procedure']}, {asked.policy} against {asked.base}: {result['prompts']} prompts, at least "
        f"{result['samples']['least']} scored samples a side"
    )
    say()
    level = f"{100 * result['confidence']:g} %"
    heads = ["win rate", f"{level} interval", "at equal length", f"{level} interval", "decoded reward"]
    heads += ["limit", "attainment"] if asked.kl is not None else []
    say(f"  {'decoder':<18}" + "".join(f"{head:<{_WIDTH}}" for head in heads).rstrip())
    for row in result["win_rates"]:
        controlled: Mapping[str, Any] = row["length_controlled"]
        cells = [
            f"{row['mean']:.3f}",
            f"[{_shown(row['low'], 3)}, {_shown(row['high'], 3)}]",
            _shown(controlled["mean"], 3),
            f"[{_shown(controlled['low'], 3)}, {_shown(controlled['high'], 3)}]",
            f"{row['base_reward']:.3f} -> {row['policy_reward']:.3f}",
        ]
        cells += [_shown(row["limit"], 3), _shown(row["attainment"], 2)] if asked.kl is not None else []
        mark = "*" if row["label"] == result["procedure"] else " "
        say(f"{mark} {row['label']:<18}" + "".join(f"{cell:<{_WIDTH}}" for cell in cells).rstrip())
    main = result["win_rates"][0]["length_controlled"]
    say()
    say(
        f"  * the decoder asked for; its answers are {abs(main['longer']):.0f} characters "
        f"{'longer' if main['longer'] >= 0 else 'shorter'} than the base's. At equal length: by logistic regression on "
        "the difference."
    )
    if result["judge"]:
        say(f"  {judge_line(result['judge'])}")
    if asked.output:
        say(f"  written to {asked.output}")


_WIDTH = 18


def _shown(value: float, digits: int) -> str:
    return "-" if value != value else f"{value:.{digits}f}"
