"""The final table of `infalign evaluate`: what was measured, intervals, the limit at the measured KL, the judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infalign.evaluation.summary import row_from_json
from infalign.report.table import number, plain_text, win_rate_table
from infalign.runtime.console import say
from infalign.stages.judging import judge_line


def tell(result: Mapping[str, Any]) -> None:
    """Print the final table: what was measured, with intervals, the limit at the measured KL, and attainment."""
    kl, main = result["kl"], result["main"]
    say()
    say(
        f"{result['procedure']}, reward {result['reward']}: policy against base on {result['prompts']} held-out prompts"
    )
    say(
        f"  sequence KL {kl['mean']:.3f} ± {kl['error']:.3f} nats "
        f"(from log-ratios alone {kl['k1']:.3f} ± {kl['k1_error']:.3f})"
    )
    say()
    rows = [row_from_json(row) for row in result["win_rates"]]
    for line in plain_text(win_rate_table(rows, result["procedure"], result["confidence"])):
        say(line)
    say()
    say("  * the recipe's decoder. limit: the most that any method reaches at this KL with a reward that never ties;")
    say(
        f"    with this reward's ties ({main['tie_rate']:.0%}): {main['tie_limit']:.3f}, "
        f"attainment {number(main['tie_attainment'], 2)}."
    )
    if result.get("pairwise"):
        say(f"  {judge_line(result['pairwise'])}")
