"""The final table of `infalign evaluate`: what was measured, intervals, the limit at the measured KL, the judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infalign.runtime.console import say
from infalign.stages.judging import judge_line


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
    heads = ("judge", "win rate", interval, "limit", "attainment", "regret ratio", "decoded reward", "at equal length")
    say(f"  {'decoder':<16}" + "".join(f"{head:<{width}}" for head, width in zip(heads, _WIDTHS, strict=True)).rstrip())
    for row in result["win_rates"]:
        mark = "*" if row["label"] == result["procedure"] else " "
        between = f"[{row['low']:.3f}, {row['high']:.3f}]"
        bounds = (_shown(row["limit"], 3), _shown(row["attainment"], 2), _shown(row["regret_ratio"], 1))
        rewards = f"{_shown(row['base_reward'], 3)} -> {_shown(row['policy_reward'], 3)}"
        controlled = _shown(row.get("length_controlled", {}).get("mean"), 3)
        cells = (row["judge"], f"{row['mean']:.3f}", between, *bounds, rewards, controlled)
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
    if result.get("pairwise"):
        say(f"  {judge_line(result['pairwise'])}")


_WIDTHS = (9, 10, 18, 8, 12, 14, 20, 16)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
