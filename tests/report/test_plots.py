"""The plots' numbers, and that every shape of input can be drawn."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from infalign.evaluation.summary import DecoderRow, ordered_labels
from infalign.report.calibration_plot import draw_calibration, held_out_ranks
from infalign.report.evaluation_plot import draw_rewards, draw_win_rates
from infalign.report.limit_plot import Point, comparisons, draw_limit, kl_grid, tilted_win_rates
from infalign.report.style import to_png
from infalign.report.theory_plot import draw_theory
from infalign.report.training_plot import draw_training
from infalign.runtime.artifacts import from_plain
from infalign.theory.optimum import optimal_transform, win_rate_limit
from infalign.theory.procedures import BestOfN, KthOfN, WorstOfN
from infalign.theory.tilted import tilt
from infalign.theory.transforms import identity, log


def test_ranks_of_exchangeable_rewards_are_flat_even_with_ties():
    rng = np.random.default_rng(0)
    for rewards_PK in (rng.normal(size=(2000, 40)), rng.integers(0, 3, (2000, 40)).astype(float)):
        found = held_out_ranks(list(rewards_PK))
        assert found.values == 2000 * 20
        assert np.mean(np.abs(found.heights - 1.0) <= found.band) >= 0.8


def test_band_is_the_spread_of_heights_over_replications():
    rng = np.random.default_rng(1)
    heights = np.array([held_out_ranks(list(rng.normal(size=(20, 8))), seed).heights for seed in range(400)])
    band = held_out_ranks(list(rng.normal(size=(20, 8)))).band
    assert heights.shape[1] == 5  # h + 1 slots of h = 4 references
    assert 1.96 * heights.std() == pytest.approx(band, rel=0.06)


def test_rewards_drawn_differently_leave_the_band():
    rng = np.random.default_rng(2)
    rewards_PK = rng.normal(size=(200, 40)) + np.where(np.arange(40) >= 20, 0.8, 0.0)
    found = held_out_ranks(list(rewards_PK))
    assert found.heights[-1] > 1.0 + 2 * found.band


def test_ranks_leave_out_missing_scores():
    assert held_out_ranks([np.array([np.nan, 1.0])]) is None
    assert held_out_ranks([np.array([np.nan, 1.0, 2.0, 3.0, 4.0])]).values == 2


def test_kl_grid_spans_twice_the_measured_kl():
    assert kl_grid(0.42)[[0, -1]] == pytest.approx([0.0, 0.84])
    assert kl_grid(0.0)[-1] == pytest.approx(0.1)
    assert kl_grid(0.4, 0.9)[-1] == pytest.approx(0.99)
    assert kl_grid(15.0)[-1] == 20.0


@pytest.mark.parametrize("procedure", [BestOfN(4), WorstOfN(4), KthOfN(2, 4), BestOfN(1)], ids=repr)
def test_no_comparison_is_above_the_limit(procedure):
    kl_Q = kl_grid(0.5, count=5)
    for _, transform, _ in comparisons(procedure):
        assert (tilted_win_rates(transform, procedure, kl_Q) <= win_rate_limit(procedure, kl_Q) + 1e-9).all()
    assert tilted_win_rates(identity, procedure, kl_Q)[0] == 0.5


@pytest.mark.parametrize("procedure", [BestOfN(4), WorstOfN(4), KthOfN(2, 4), BestOfN(1)], ids=repr)
def test_limit_plot_draws_the_measured_point(procedure):
    point = Point(0.4, 0.05, 0.7, 0.6, 0.78, tie_limit=0.75, aim=(0.5, 0.8))
    axes = draw_limit(procedure, point).axes[0]
    drawn = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert [[0.4, 0.7]] in drawn and [[0.4, 0.75]] in drawn and [[0.5, 0.8]] in drawn
    draw_limit(procedure, Point(0.0, float("nan"), 0.5, float("nan"), float("nan")))


def test_aim_beyond_the_plot_is_not_drawn():
    assert Point(0.4, 0.05, 0.7, 0.6, 0.78, aim=(0.8, 0.9)).shows_aim
    beyond = Point(0.05, 0.01, 0.6, 0.5, 0.7, aim=(1.3, 0.96))
    assert not beyond.shows_aim
    drawn = [line.get_xydata().tolist() for line in draw_limit(BestOfN(4), beyond).axes[0].get_lines()]
    assert [[1.3, 0.96]] not in drawn


def test_win_rates_are_ordered_by_decoder_and_n():
    measured = {"judge": "reward", "mean": 0.6, "low": 0.5, "high": 0.7, "limit": 0.8}
    rows = [
        from_plain(DecoderRow, {"label": label, "kind": kind, "n": n, **measured})
        for label, kind, n in (
            ("WorstOfN(2)", "worst_of_n", 2),
            ("KthOfN(2, 4)", "kth_of_n", 4),
            ("BestOfN(8)", "best_of_n", 8),
            ("BestOfN(1)", "best_of_n", 1),
            ("BestOfN(2)", "best_of_n", 2),
        )
    ]
    wanted = ["BestOfN(1)", "BestOfN(2)", "BestOfN(8)", "KthOfN(2, 4)", "WorstOfN(2)"]
    assert ordered_labels(rows) == wanted
    axes = draw_win_rates(rows, "KthOfN(2, 4)").axes[0]
    assert [label.get_fontweight() == "bold" for label in axes.get_yticklabels()] == [False, False, False, True, False]


@pytest.mark.parametrize("log", [[{"step": 1, "kl_seq": 0.1}], [{"step": 1, "loss": 0.2}, {"train_runtime": 3.0}]])
def test_sparse_logs_can_be_drawn(log):
    assert len(to_png(draw_training(log))) > 5000


def test_constant_rewards_can_be_drawn():
    assert len(to_png(draw_rewards(np.ones(8), np.ones(8), "constant"))) > 5000


def test_figures_are_reproducible():
    ranks = held_out_ranks([np.arange(8.0)])
    assert to_png(draw_calibration(ranks)) == to_png(draw_calibration(ranks))


def test_theory_plot_is_written_whole(tmp_path):
    path = tmp_path / "theory.png"
    draw_theory(BestOfN(2), optimal_transform(BestOfN(2), kl=0.5), [tilt(identity, kl=0.5), tilt(log, kl=0.5)], path)
    assert matplotlib.image.imread(path)[..., :3].std() > 0.03
    assert [found.name for found in tmp_path.iterdir()] == ["theory.png"]
