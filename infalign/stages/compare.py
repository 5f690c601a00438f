"""`infalign evaluate --base a.jsonl --policy b.jsonl`: any two models under any procedure, from files; loads no model.

Both files hold samples of the same prompts, with rewards (or `reward` scores them). One table of samples gives every N,
best and worst, without bias; the length-controlled win rate and, where asked for, a gold reward and a pairwise judge
stand beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infalign.evaluation.length import Side
from infalign.evaluation.summary import GOLD, PROXY, decoder_row, decoders, row_from_json
from infalign.report.table import plain_text, win_rate_table
from infalign.runtime.artifacts import without_nan, write_json
from infalign.runtime.console import say
from infalign.stages.comparison import Comparison, Table, choose_n, load_table, read_pairs
from infalign.stages.judging import judge_decoded, judge_line
from infalign.stages.objective import find_procedure
from infalign.theory.procedures import Procedure
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
    policy, base = (
        Side(table.rewards[side], (table.gold or table.rewards)[side], table.lengths(side)) for side in (0, 1)
    )
    judge, level, seed = GOLD if table.gold else PROXY, asked.confidence, asked.seed
    rows = [
        decoder_row(policy, base, decoder, judge, kl=asked.kl or None, confidence=level, seed=seed)
        for decoder in _decoders(asked, procedure, least)
    ]
    result: dict[str, Any] = {
        "procedure": repr(procedure),
        "prompts": len(table.keys),
        "samples": {"policy": _counts(table, 0), "base": _counts(table, 1), "least": least},
        "judged_by": judge,
        "confidence": asked.confidence,
        "seed": asked.seed,
        "kl": asked.kl,
        "win_rates": [dataclasses.asdict(row) for row in rows],
        "judge": _judged(asked, table, procedure),
    }
    if output is not None:
        write_json(output, without_nan(result))
    return result


def _decoders(asked: Comparison, procedure: Procedure, least: int) -> list[Procedure]:
    sizes = asked.eval_n or [2**power for power in range(12) if 2**power <= least]
    most = max([procedure.n, *sizes])
    if most > least:
        raise InputError(f"{most} candidates are drawn, but a prompt has {least} scored samples: lower n or eval_n")
    return decoders(procedure, sizes)


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
    rows = [row_from_json(row) for row in result["win_rates"]]
    for line in plain_text(win_rate_table(rows, result["procedure"], result["confidence"])):
        say(line)
    longer = rows[0].length_controlled.longer
    say()
    way = "longer" if longer >= 0 else "shorter"
    say(
        f"  * the decoder asked for; its answers are {abs(longer):.0f} characters {way} than the base's. At equal "
        "length: by logistic regression on the difference."
    )
    if result["judge"]:
        say(f"  {judge_line(result['judge'])}")
    if asked.output:
        say(f"  written to {asked.output}")
