"""What an evaluation says, in plain words, and no more than its interval allows."""

from __future__ import annotations

import math
from typing import Literal

from infalign.evaluation.summary import GOLD, PROXY, DecoderRow, Evaluation
from infalign.report.names import procedure_name

Outcome = Literal["better", "unclear", "worse", "unknown"]


def outcome(low: float, high: float) -> Outcome:
    """What an interval of a win rate says about policy against base.

    >>> outcome(0.51, 0.6), outcome(0.5, 0.6), outcome(0.4, 0.49), outcome(float("nan"), float("nan"))
    ('better', 'unclear', 'worse', 'unknown')
    """
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    if low > 0.5:
        return "better"
    return "worse" if high < 0.5 else "unclear"


def headline(evaluation: Evaluation) -> str:
    """The main result as one or two sentences.

    Args:
        evaluation: what was measured.
    """
    main = evaluation.main
    share = f"{_percent(main.mean)} % of the time {interval(main.low, main.high)}"
    cost = f"at {evaluation.kl.mean:.2f} nats"
    verb, rest = {
        "better": ("beats its base", ""),
        "worse": ("loses to its base: it wins", ""),
        "unclear": ("wins", ": the interval includes 50 %, so this is no evidence that it is better or worse"),
        "unknown": ("wins", ": there is no interval (too few prompts), so this is no evidence either way"),
    }[outcome(main.low, main.high)]
    subject = f"Decoded by {evaluation.procedure}, the policy {verb} {share} {cost}{rest}"
    return f"{subject}. {_against_limit(evaluation)}"


def _against_limit(evaluation: Evaluation) -> str:
    main = evaluation.main
    if math.isnan(main.attainment):
        return "This KL is too small to compare with the limit."
    limit = _percent(main.limit)
    text = f"The most that any method reaches there is {limit} %: attainment {main.attainment:.2f}."
    if main.attainment > 1.0:
        text += " Above 1 is sampling error: of the win rate, or of the KL."
    return text


def remarks(evaluation: Evaluation) -> list[str]:
    """Further sentences that a reader of the headline needs: confidence, ties, regret, the gold judge."""
    main, ties = evaluation.main, evaluation.ties
    found = [
        f"{100 * evaluation.confidence:g} % intervals over {evaluation.prompts} held-out prompts, "
        f"{evaluation.samples} samples a prompt and side; "
        "both sides are decoded by the same procedure and ties count one half."
    ]
    if ties.tie_rate >= 0.005 and not math.isnan(ties.tie_attainment):
        found.append(
            f"Two base samples of a prompt have equal rewards with probability {_percent(ties.tie_rate)} %. "
            f"With these ties the limit is {_percent(ties.tie_limit)} %: attainment {ties.tie_attainment:.2f}."
        )
    if main.kind == "worst_of_n" and not math.isnan(main.regret_ratio):
        found.append(
            f"Worst-of-N win rates crowd at 100 %, so look at the regret ratio: the policy loses "
            f"{main.regret_ratio:.2f} times as often as the best possible one."
        )
    if trained := [row for row in evaluation.win_rates if not math.isnan(row.weight)]:
        parts = [f"{row.weight:g} \u00d7 {_percent(row.mean)} % ({_term(row, evaluation)})" for row in trained]
        found.append(f"It was trained for several at once, of which this is the first: {' + '.join(parts)}.")
    gold = [row for row in evaluation.win_rates if row.judge == GOLD and row.label == main.label]
    found += [_gold(row, evaluation.gold_reward) for row in gold]
    if evaluation.deployment is not None:
        found.append(f"Under the gold reward, of the policy {evaluation.deployment.policy}.")
    return found


def _term(row: DecoderRow, evaluation: Evaluation) -> str:
    """`Worst-of-4 of toxicity`."""
    return f"{procedure_name(row.label)} of {evaluation.reward if row.judge == PROXY else row.judge}"


def _gold(row: DecoderRow, name: str | None) -> str:
    means = {
        "better": "the gold judge prefers the policy",
        "worse": "the gold judge prefers the base, so the training reward may have been exploited",
        "unclear": "the interval includes 50 %, no evidence either way",
        "unknown": "without an interval",
    }[outcome(row.low, row.high)]
    share = f"{_percent(row.mean)} % {interval(row.low, row.high)}"
    return f"Judged by the gold reward {name}, it wins {share}: {means}."


def interval(low: float, high: float) -> str:
    """An interval of shares in per cent.

    >>> interval(0.66, 0.761), interval(float("nan"), float("nan"))
    ('[66.0, 76.1]', '[no interval]')
    """
    return "[no interval]" if math.isnan(low) or math.isnan(high) else f"[{_percent(low)}, {_percent(high)}]"


def _percent(value: float) -> str:
    return f"{100.0 * value:.1f}"
