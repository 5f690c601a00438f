"""Plots of forgetting: the cross-task matrix, and accuracy while a task is learned again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from infalign.evaluation.forgotten import ForgetResult, Forgotten
from infalign.report.style import INK, LINES, MUTED, new_figure, percent, styled


@styled()
def draw_matrix(result: ForgetResult, labels: str, examples: int) -> Figure:
    """Accuracy on each task (columns) of the model that forgot each task (rows), rows that are alike side by side.

    Args:
        result: of the verb.
        labels, examples: which forgetting.
    """
    rows = [one for one in result.forgotten if (one.labels, one.examples) == (labels, examples)]
    rows = [rows[at] for at in result.order[f"{labels} {examples}"]]
    # the columns follow the rows, so that a task and the model that forgot it meet on the diagonal
    columns = [one.task for one in rows]
    columns += [task.name for task in result.tasks if task.name not in columns]
    values = np.array([[one.accuracies[name].mean for name in columns] for one in rows])
    height = 2.4 + 0.5 * len(rows)
    figure, (axes,) = new_figure(size=(max(5.0, 2.6 + 0.85 * len(columns)), height))
    image = axes.imshow(values, cmap="RdBu", vmin=0.0, vmax=1.0, aspect="auto")
    axes.grid(False)
    for (row, column), value in np.ndenumerate(values):
        own = columns[column] == rows[row].task
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center",
            color="white" if abs(value - 0.5) > 0.35 else INK, fontweight="bold" if own else "normal",
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [one.task for one in rows])
    axes.set_xlabel("accuracy on")
    axes.set_ylabel("forgot")
    axes.set_title(f"{labels} labels, {examples} examples")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


@styled()
def draw_relearning(found: Sequence[Forgotten]) -> Figure:
    """Accuracy on each forgotten task against the number of true labels it is trained on again.

    Args:
        found: models with `relearned`.
    """
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, axes = new_figure(lines, columns, size=(3.6 * columns, 3.1 * lines))
    for place, one in zip(axes, found, strict=False):
        _curves(place, one)
    for empty in axes[len(found) :]:
        empty.set_visible(False)
    return figure


def _curves(axes, one: Forgotten) -> None:
    after = one.accuracies[one.task]
    sources = list(dict.fromkeys(point.source for point in one.relearned))
    for at, source in enumerate(sources):
        points = sorted((point for point in one.relearned if point.source == source), key=lambda point: point.examples)
        x = [0, *(point.examples for point in points)]
        shown = [after, *(point.accuracy for point in points)]
        name = "the task itself" if source == one.task else source
        axes.plot(x, [point.mean for point in shown], "o-", color=LINES[at % len(LINES)], markersize=4, label=name)
        axes.fill_between(
            x, [point.low for point in shown], [point.high for point in shown],
            color=LINES[at % len(LINES)], alpha=0.15, linewidth=0,
        )  # fmt: skip
    fresh = sorted(one.learned, key=lambda point: point.examples)
    if fresh:
        means = [point.accuracy.mean for point in fresh]
        axes.plot([point.examples for point in fresh], means, "s-", color=MUTED, markersize=4, label="the base")
    axes.axhline(one.before[one.task].mean, color=MUTED, linewidth=1.0, linestyle="--", label="before forgetting")
    axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_ylim(0.0, 1.02)
    percent(axes.yaxis)
    axes.set_title(one.task)
    axes.set_xlabel("true labels of")
    axes.legend(fontsize=8)
