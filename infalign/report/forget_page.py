"""The page of `infalign forget`, from its `forget.json`: what went, what else went, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from infalign.evaluation.forgotten import FILE, Accuracy, ForgetResult, Forgotten, Ratio, TaskFacts
from infalign.report.forget_plot import draw_matrix, draw_relearning
from infalign.report.page import Plot, templates
from infalign.report.style import to_png
from infalign.report.table import ABSENT, Table, markdown, number
from infalign.runtime.artifacts import from_plain, read_json, write_whole
from infalign.runtime.console import clock

RECOVERED = 0.5
"""Share of the loss from which on a skill counts as coming back."""

_MATRIX = (
    "Accuracy on the task of a column by the model that forgot the task of a row; bold: the task itself. White is "
    "chance (0.5), blue above it, red below. Tasks whose rows are alike stand together."
)
_RELEARNING = (
    "Accuracy on a forgotten task after training on a few true labels: of the task itself, or of another one. Grey: "
    "the base, from the same labels of the task. What comes back faster than the base learns it was hidden rather than "
    "gone."
)


def report_forget(folder: Path) -> Path:
    """Write `report/index.html` and its plots, each whole or not at all; returns the page's path."""
    result: ForgetResult = from_plain(ForgetResult, read_json(folder / FILE, "the result of forget"))
    kinds = kinds_of(result)
    plots = [
        Plot(f"matrix-{labels}-{examples}", "", _MATRIX, to_png(draw_matrix(result, labels, examples)))
        for labels, examples in kinds
    ]
    again = [one for one in result.forgotten if one.relearned]
    if again:
        plots.append(Plot("relearning", "", _RELEARNING, to_png(draw_relearning(again))))
    for plot in plots:
        write_whole(folder / "report" / f"{plot.name}.png", lambda path, png=plot.png: path.write_bytes(png))
    tables = [
        *ratios_table(result),
        *([("How deep it went", depth_table(result))] if any(_deep(one) for one in result.forgotten) else []),
        ("More than one answer", answers_table(result)),
        *(
            [("What else went", elsewhere_table(result))]
            if any(one.texts or one.wins for one in result.forgotten)
            else []
        ),
        *([("Would the untrained model have told?", predictors_table(result))] if result.predictions else []),
    ]
    lines = summary_lines(result)
    html = (
        templates()
        .get_template("forget.html.jinja")
        .render(
            title=f"infalign forget \N{MIDDLE DOT} {folder.resolve().name}",
            headline=lines[0],
            remarks=lines[1:],
            plots=plots,
            tables=[(title, table, markdown(table)) for title, table in tables],
            tasks=task_table(result),
            confidence=result.confidence,
            took=clock(result.seconds),
        )
    )
    page = folder / "report" / "index.html"
    write_whole(page, lambda path: path.write_text(html, encoding="utf-8"))
    return page


def kinds_of(result: ForgetResult) -> list[tuple[str, int]]:
    """Kinds of labels with numbers of examples, in order."""
    return list(dict.fromkeys((one.labels, one.examples) for one in result.forgotten))


def summary_lines(result: ForgetResult) -> list[str]:
    """What was and what was not forgotten, in words; the first line is the headline."""
    first = [one for one in result.forgotten if (one.labels, one.examples) == kinds_of(result)[0]]
    lines = [_headline(first)]
    for labels, examples in kinds_of(result):
        ours = [one for one in result.forgotten if (one.labels, one.examples) == (labels, examples)]
        lines.append(f"With {labels} labels of {examples} questions: {_behaviours(ours)}.")
    lines += _cross(first, result.tasks)
    lines += _depth(first)
    undefined = [f"{one.task} ({ratio.reason})" for one in first if (ratio := one.ratios[one.task]).reason]
    if undefined:
        lines.append(f"No forget ratio for {'; '.join(undefined)}.")
    return lines


def _headline(found: Sequence[Forgotten]) -> str:
    learned = [one for one in found if not math.isnan(one.ratios[one.task].value)]
    gone = [one.task for one in learned if one.behaviours[one.task] == "forgotten"]
    kept = [one.task for one in learned if one.behaviours[one.task] == "retained"]
    if not learned:
        return "No task was learned, so none could be forgotten: fine-tune for longer, or on more questions."
    tasks = "task was" if len(learned) == 1 else "tasks were"
    text = f"{len(gone)} of {len(learned)} {tasks} forgotten{_named(gone)}"
    return f"{text}; {len(kept)} {'was' if len(kept) == 1 else 'were'} retained in full{_named(kept)}."


def _named(tasks: Sequence[str]) -> str:
    return f" ({', '.join(tasks)})" if tasks else ""


def _behaviours(found: Sequence[Forgotten]) -> str:
    groups: dict[str, list[str]] = {}
    for one in found:
        ratio = one.ratios[one.task]
        shown = one.task if math.isnan(ratio.value) else f"{one.task} (ratio {ratio.value:.2f})"
        groups.setdefault(one.behaviours[one.task], []).append(shown)
    return "; ".join(f"{kind}: {', '.join(tasks)}" for kind, tasks in groups.items())


def _cross(found: Sequence[Forgotten], tasks: Sequence[TaskFacts]) -> list[str]:
    """Pairs of which forgetting the one took the other along."""
    along = [
        f"forgetting {one.task} took {task.name} from {one.before[task.name].mean:.2f} to "
        f"{one.accuracies[task.name].mean:.2f}"
        for one in found
        for task in tasks
        if task.name != one.task and one.behaviours[task.name] == "forgotten"
    ]
    if not along:
        return ["No other task was surely forgotten along with one."]
    more = f"; and {len(along) - 4} more" if len(along) > 4 else ""
    return [f"What else went: {'; '.join(along[:4])}{more}."]


def _depth(found: Sequence[Forgotten]) -> list[str]:
    gone = [one for one in found if one.behaviours[one.task] in ("forgotten", "partly forgotten", "inverted")]
    return [*_by_probes(gone), *_by_relearning(gone), *_by_answers(gone)] if gone else []


def _by_probes(gone: Sequence[Forgotten]) -> list[str]:
    probed = [(one, one.probed) for one in gone if one.probed is not None]
    if not probed:
        return []
    # where random weights do as well there is nothing that a probe could show
    telling = [(one, probes) for one, probes in probed if probes.before.low > probes.control.mean]
    readable = [one.task for one, probes in telling if probes.after.low > probes.control.mean]
    blind = [one.task for one, probes in probed if probes.before.low <= probes.control.mean]
    text = (
        f"A linear probe still finds the answers in the hidden states, better than with random weights, for "
        f"{len(readable)} of {len(telling)}{_named(readable)}"
    )
    return [f"{text}; of {', '.join(blind)} it tells nothing: random weights do as well." if blind else f"{text}."]


def _by_relearning(gone: Sequence[Forgotten]) -> list[str]:
    tried = [one for one in gone if any(point.source == one.task for point in one.relearned)]
    if not tried:
        return []
    back = {one.task: least for one in tried if (least := _comes_back(one, one.task)) is not None}
    hidden = [one.task for one in tried if one.task in back and _ahead_of_base(one, back[one.task])]
    named = [f"{task} from {least}" for task, least in back.items()]
    text = f"Half of what was lost comes back with a few true labels for {len(back)} of {len(tried)}{_named(named)}"
    if not back:
        return [f"{text}, in the numbers that were tried."]
    return [f"{text}; the base learns surely less from the same labels for {len(hidden)} of these{_named(hidden)}."]


def _ahead_of_base(one: Forgotten, examples: int) -> bool:
    """Whether the forgotten model learns a task again from labels from which the base does not learn as much."""
    again, fresh = (
        next((point.accuracy for point in points if (point.source, point.examples) == (one.task, examples)), None)
        for points in (one.relearned, one.learned)
    )
    return again is not None and fresh is not None and again.low > fresh.mean


def _by_answers(gone: Sequence[Forgotten]) -> list[str]:
    asked = [one for one in gone if one.best_of]
    largest = max((int(n) for one in asked for n in one.best_of), default=1)
    if largest == 1:
        return []
    mean, coin = (
        sum(values[str(largest)] for values in found) / len(asked)
        for found in ([one.best_of for one in asked], [one.best_of_coin for one in asked])
    )
    return [
        f"Of {largest} answers of a model that forgot, the fine-tuned one picks the right one for {100 * mean:.0f} % "
        f"of the questions, of a coin's for {100 * coin:.0f} %: Best-of-N with a judge that knows brings a skill back."
    ]


def _comes_back(one: Forgotten, source: str) -> int | None:
    """The fewest true labels of a source that bring back half of what was lost."""
    start, aim = one.accuracies[one.task].mean, one.before[one.task].mean
    points = sorted((point for point in one.relearned if point.source == source), key=lambda point: point.examples)
    return next((p.examples for p in points if p.accuracy.mean - start >= RECOVERED * (aim - start) > 0), None)


# ---- tables ----


def task_table(result: ForgetResult) -> Table:
    """Every task, and what the model makes of it before and after fine-tuning."""
    heads = (
        "task",
        "family",
        "train",
        "test",
        "left out",
        "base",
        "by characters",
        "confidence",
        "total variance",
        "fine-tuned",
    )
    rows = tuple(
        (
            task.name, task.family, str(task.train), str(task.test), str(task.overlap + task.repeated),
            _shown(task.base), number(task.base_per_character, 3), number(task.confidence, 2),
            number(task.variance, 2), _shown(task.tuned),
        )
        for task in result.tasks
    )  # fmt: skip
    return Table(heads, rows)


def ratios_table(result: ForgetResult) -> list[tuple[str, Table]]:
    """A title and a table for each kind of forgetting: the task itself before and after."""
    heads = ("task", "labels", "base", "fine-tuned", "forgotten", "gap", "forget ratio", "interval", "behaviour")
    base = {task.name: task.base for task in result.tasks}
    found = []
    for labels, examples in kinds_of(result):
        rows = tuple(
            (
                one.task,
                str(one.used),
                number(base[one.task].mean, 3),
                number(one.before[one.task].mean, 3),
                _shown(one.accuracies[one.task]),
                number(one.gap, 3),
                number(one.ratios[one.task].value, 2),
                _interval(one.ratios[one.task]),
                one.behaviours[one.task],
            )
            for one in result.forgotten
            if (one.labels, one.examples) == (labels, examples)
        )
        found.append((f"Forgotten with {labels} labels of {examples} questions", Table(heads, rows)))
    return found


def _deep(one: Forgotten) -> bool:
    return one.probed is not None or one.quantized is not None


def depth_table(result: ForgetResult) -> Table:
    """Probes before, after and untrained; the 4-bit copy; how few labels bring the task back."""
    heads = (
        "task",
        "labels",
        "forgotten",
        "probe before",
        "probe after",
        "untrained",
        "4-bit copy",
        "comes back with",
        "through another task",
    )
    rows = []
    for one in result.forgotten:
        sources = [source for source in dict.fromkeys(point.source for point in one.relearned) if source != one.task]
        probes = (one.probed.before, one.probed.after, one.probed.control) if one.probed else (None, None, None)
        rows.append(
            (
                one.task,
                f"{one.labels} {one.examples}",
                number(one.accuracies[one.task].mean, 3),
                *(ABSENT if probe is None else number(probe.mean, 3) for probe in probes),
                ABSENT if one.quantized is None else number(one.quantized.mean, 3),
                _labels(one, one.task),
                "; ".join(f"{source}: {_labels(one, source)}" for source in sources) or ABSENT,
            )
        )
    return Table(heads, tuple(rows))


def _labels(one: Forgotten, source: str) -> str:
    tried = [point.examples for point in one.relearned if point.source == source]
    if not tried or one.accuracies[one.task].mean >= one.before[one.task].mean:
        return ABSENT
    least = _comes_back(one, source)
    return f"{least} labels" if least is not None else f"not with {max(tried)}"


def answers_table(result: ForgetResult) -> Table:
    """Accuracy under Best-of-n and pass@n, before and after, and of answers with no choices given."""
    sizes = list(dict.fromkeys(n for one in result.forgotten for n in one.best_of))
    opened = list(dict.fromkeys(n for one in result.forgotten if one.open_answers for n in one.open_answers.after))
    heads = ("task", "labels", *(f"Best-of-{n}" for n in sizes), f"Best-of-{sizes[-1]} of coins" if sizes else "")
    heads = (*heads, *(f"pass@{n}" for n in sizes))
    heads = (*heads, *(f"open pass@{n}" for n in opened))
    rows = tuple(
        (
            one.task,
            f"{one.labels} {one.examples}",
            *(_change(one.best_of_before.get(n), one.best_of.get(n)) for n in sizes),
            number(one.best_of_coin.get(sizes[-1]), 2) if sizes else "",
            *(_change(one.pass_at_before.get(n), one.pass_at.get(n)) for n in sizes),
            *(
                ABSENT
                if one.open_answers is None
                else _change(one.open_answers.before.get(n), one.open_answers.after.get(n))
                for n in opened
            ),
        )
        for one in result.forgotten
    )
    return Table(heads, rows)


def elsewhere_table(result: ForgetResult) -> Table:
    """Nats a token on held-out texts, and win rates against the fine-tuned model on the general recipe's prompts."""
    texts = list(dict.fromkeys(name for one in result.forgotten for name in one.texts))
    decoders = list(dict.fromkeys(name for one in result.forgotten for name in one.wins))
    heads = (
        "forgot",
        "labels",
        *(f"{name}, nats a token" for name in texts),
        *(f"win rate, {name}" for name in decoders),
    )
    rows = tuple(
        (
            one.task,
            f"{one.labels} {one.examples}",
            *(_change(one.texts_before.get(name), one.texts.get(name)) for name in texts),
            *(_shown(one.wins[name]) if name in one.wins else ABSENT for name in decoders),
        )
        for one in result.forgotten
    )
    return Table(heads, rows)


def predictors_table(result: ForgetResult) -> Table:
    """How what is known of a task before training goes with its forget ratio."""
    level = f"{100 * result.confidence:g} % interval"
    rows = tuple(
        (
            one.predictor,
            f"{one.labels} {one.examples}",
            number(one.correlation.value, 2),
            ABSENT if math.isnan(one.correlation.low) else f"[{one.correlation.low:.2f}, {one.correlation.high:.2f}]",
            number(one.correlation.p, 3),
            str(one.correlation.count),
        )
        for one in result.predictions
    )
    return Table(("predictor", "labels", "rank correlation with the forget ratio", level, "p", "tasks"), rows)


def _shown(one: Accuracy) -> str:
    return ABSENT if math.isnan(one.mean) else f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _interval(one: Ratio) -> str:
    return ABSENT if math.isnan(one.low) else f"[{one.low:.2f}, {one.high:.2f}]"


def _change(before: float | None, after: float | None) -> str:
    return f"{number(before, 2)} \N{RIGHTWARDS ARROW} {number(after, 2)}"
