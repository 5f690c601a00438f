"""Win rate against compute as it is drawn and said: the evaluation's numbers, and no more than they tell."""

from __future__ import annotations

import json

import matplotlib.image
import numpy as np
import pytest

from infalign.evaluation.compute import Compute
from infalign.report.compute_plot import compute_table, draw_compute, saving
from infalign.report.style import to_png
from infalign.runtime.artifacts import from_plain
from infalign.stages.recipe import Recipe
from infalign.stages.report import report
from tests.report.artifacts import write_run

MATCH = {
    "n": 2.5,
    "low": 1.9,
    "high": 3.4,
    "largest": 15,
    "win": 0.7,
    "base_tokens": 60.0,
    "policy_tokens": 50.0,
    "tokens": 150.0,
}


def row(side, n, mean, tokens, label=None, **more):
    found = {"side": side, "label": label or f"BestOfN({n})", "n": n, "mean": mean, "low": mean - 0.05}
    return {**found, "high": mean + 0.05, "tokens": tokens, "reward_calls": float(n if n > 1 else 0), **more}


CURVES = [
    row("base", 1, 0.5, 60.0),
    row("base", 2, 0.66, 120.0),
    row("policy", 1, 0.7, 50.0),
    row("policy", 2, 0.8, 100.0),
]
ADAPTIVE = [row(side, 16, 0.8, 300.5, "Adaptive(n=16, cost=0.1)", reward_calls=5.2) for side in ("base", "policy")]


def compute(**changes):
    return from_plain(Compute, {"curves": CURVES, "decoder": [], "problem": "", "match": MATCH, **changes})


def drawn(content):
    axes = draw_compute(content).axes[0]
    return {tuple(point) for line in axes.get_lines() for point in np.asarray(line.get_xydata()).tolist()}, axes


def test_every_decoder_is_drawn_where_it_was_measured():
    points, axes = drawn(compute(decoder=ADAPTIVE))
    assert {(one["tokens"], one["mean"]) for one in (*CURVES, *ADAPTIVE)} <= points
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < 50 and high > 300.5
    arrow = next(text for text in axes.texts if text.get_text() == "")
    assert arrow.xy == (150.0, 0.7) and arrow.xyann == (50.0, 0.7)


@pytest.mark.parametrize(
    "changes",
    [
        {"match": None},
        {"match": {**MATCH, "n": None, "high": None, "tokens": None}},
        {"match": {**MATCH, "n": 1.0, "tokens": 60.0, "policy_tokens": 70.0}},
        {"curves": [{**one, "low": None, "high": None} for one in CURVES]},
        {"curves": [row("base", 1, 0.5, 3.0), row("policy", 1, 0.5, 2.0)]},
    ],
)
def test_whatever_was_not_measured_is_not_drawn(changes):
    points, axes = drawn(compute(**changes))
    assert all(np.isfinite(point).all() for point in points)
    assert ("match" not in changes) or not [text for text in axes.texts if text.get_text() == ""]
    assert to_png(draw_compute(compute(**changes)))[:4] == b"\x89PNG"


def test_the_sentence_is_the_match():
    assert saving(compute()) == (
        "One policy sample wins 70.0 % against one base sample and takes 50 tokens. To win as often, the base needs "
        "Best-of-N with N about 2.5 [1.9, 3.4]: 150 tokens, 3.0 times as many, and 2.5 reward calls where the policy "
        "needs none."
    )
    beyond = saving(compute(match={**MATCH, "n": None, "high": None, "tokens": None}))
    assert beyond.endswith("The base does not win as often by Best-of-15, the most that these samples can tell.")
    assert "[1.9, more than 15]" in saving(compute(match={**MATCH, "high": None}))
    assert "[no interval]" in saving(compute(match={**MATCH, "low": None, "high": None}))
    assert saving(compute(match=None)) == ""
    assert saving(compute(match=None, problem="too few")) == "The recipe's decoder is not shown: too few."


def test_the_table_holds_every_decoder_once():
    table = compute_table(compute(decoder=[CURVES[1], ADAPTIVE[1]]))
    assert [cells[0] for cells in table.rows] == [
        "base, one sample", "base, Best-of-2", "policy, one sample", "policy, Best-of-2",
        "policy, Adaptive(n=16, cost=0.1)",
    ]  # fmt: skip
    assert table.rows[1] == ("base, Best-of-2", "0.660", "0.610 to 0.710", "120.0", "2.0")
    assert table.marked == (1, 4)


def test_the_page_says_what_training_saves(tmp_path):
    folder = write_run(tmp_path)
    html = report(Recipe(output_dir=str(folder))).read_text(encoding="utf-8")
    written = json.loads((folder / "evaluation.json").read_text())
    assert saving(from_plain(Compute, written["compute"])).replace("'", "&#39;") in html
    assert "What every decoder spends" in html
    assert matplotlib.image.imread(folder / "report" / "compute.png").shape[1] > 600
    del written["compute"]  # of an earlier infalign
    (folder / "evaluation.json").write_text(json.dumps(written))
    older = report(Recipe(output_dir=str(folder))).read_text(encoding="utf-8")
    assert "What every decoder spends" not in older
