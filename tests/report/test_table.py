"""One table of win rates for the terminal, Markdown and the page: what it shows, and what it leaves out."""

from __future__ import annotations

import math

import numpy as np

from infalign.evaluation.length import Side
from infalign.evaluation.summary import GOLD, PROXY, DecoderRow, decoder_row, decoders
from infalign.evaluation.winrate import judged_win_rate, win_rate
from infalign.report.table import ABSENT, markdown, plain_text, win_rate_table
from infalign.runtime.artifacts import from_plain
from infalign.theory.optimum import win_rate_limit
from infalign.theory.procedures import BestOfN, WorstOfN

RNG = np.random.default_rng(5)
OURS, THEIRS = (list(RNG.normal(shift, 1, (6, 8)).round(1)) for shift in (0.5, 0.0))
LENGTHS = [list(RNG.integers(5, 30, (6, 8)).astype(float)) for _ in range(2)]


def rows(judge=PROXY, kl=0.3):
    gold = [[-row for row in side] for side in (OURS, THEIRS)] if judge == GOLD else (OURS, THEIRS)
    policy, base = Side(OURS, gold[0], LENGTHS[0]), Side(THEIRS, gold[1], LENGTHS[1])
    return [
        decoder_row(policy, base, decoder, judge, kl=kl, confidence=0.9, seed=1)
        for decoder in decoders(BestOfN(4), [4, 1, 2])
    ]


def test_rows_are_what_the_estimators_say():
    first = rows()[0]
    exact, limit = win_rate(OURS, THEIRS, BestOfN(4), 0.9, 1), win_rate_limit(BestOfN(4), 0.3)
    assert (first.label, first.n, first.mean, first.low, first.high) == (
        "BestOfN(4)",
        4,
        exact.mean,
        exact.low,
        exact.high,
    )
    assert first.limit == limit and math.isclose(first.attainment, (exact.mean - 0.5) / (limit - 0.5))
    assert math.isclose(first.regret_ratio, (1 - exact.mean) / (1 - limit))
    gold = rows(GOLD)[0]
    judged = judged_win_rate((OURS, [-row for row in OURS]), (THEIRS, [-row for row in THEIRS]), BestOfN(4), 0.9, 1)
    assert gold.mean == judged.mean and math.isclose(gold.mean, 1 - exact.mean) and math.isnan(gold.limit)


def test_decoders_come_once_and_in_order():
    assert decoders(BestOfN(4), [4, 1]) == [BestOfN(4), BestOfN(1), WorstOfN(4)]  # Worst-of-1 is Best-of-1
    shown = [row[0] for row in win_rate_table(rows(), "BestOfN(4)", 0.9).rows]
    assert shown == ["one sample", "Best-of-2", "Best-of-4", "Worst-of-2", "Worst-of-4"]


def test_columns_that_say_nothing_are_left_out():
    full = win_rate_table([*rows(), *rows(GOLD)], "BestOfN(4)", 0.9)
    assert full.heads[:4] == ("decoder", "judge", "win rate", "90 % interval") and len(full.marked) == 2
    assert [row[4] for row in full.rows if row[1] == GOLD] == [ABSENT] * 5
    assert "judge" not in win_rate_table(rows(), "BestOfN(4)", 0.9).heads
    assert {"limit", "attainment", "regret ratio"}.isdisjoint(win_rate_table(rows(kl=None), "BestOfN(4)", 0.9).heads)


def test_text_and_markdown_say_the_same():
    table = win_rate_table(rows(), "BestOfN(4)", 0.9)
    text, marked = plain_text(table), markdown(table).splitlines()
    assert text[3].startswith("* Best-of-4 ") and marked[4].startswith("| **Best-of-4** |")
    for cells, line, written in zip(table.rows, text[1:], marked[2:], strict=True):
        assert all(cell in line and cell in written for cell in cells)


def test_what_json_lacks_is_not_known():
    given = {"label": "BestOfN(1)", "kind": "best_of_n", "n": 1, "judge": "reward", "mean": 0.6, "low": None}
    row = from_plain(DecoderRow, given)
    assert row.mean == 0.6
    assert all(map(math.isnan, (row.low, row.high, row.limit, row.base_reward, row.length_controlled.mean)))
    table = win_rate_table([row], "BestOfN(1)", 0.95)
    assert (table.heads, table.rows) == (("decoder", "win rate"), (("one sample", "0.600"),))
