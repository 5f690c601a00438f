"""What `infalign forget` found: records that the verb writes down (`forget.json`) and the report reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FILE = "forget.json"


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers among `count`, with Wilson's interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Ratio:
    """A forget ratio with its interval; NaN with the reason where it has no meaning."""

    value: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over `count` tasks, its interval, and how often chance gives as much."""

    value: float
    low: float
    high: float
    count: int
    p: float


@dataclass(frozen=True)
class TaskFacts:
    """A task, and what the model makes of it before anything is trained.

    Attributes:
        name, family: of the task.
        train, test: questions of each part.
        overlap, repeated: test questions removed: because the training part has them, because they are there twice.
        base: accuracy; `base_per_character`: with log-likelihoods divided by the answers' lengths.
        confidence: mean probability of the preferred one of both answers.
        variance: total variance of hidden states at the questions' last tokens.
        tuned: accuracy of the model fine-tuned on the task, on the task.
    """

    name: str
    family: str
    train: int
    test: int
    overlap: int
    repeated: int
    base: Accuracy
    base_per_character: float
    confidence: float
    variance: float
    tuned: Accuracy


@dataclass(frozen=True)
class Relearned:
    """Accuracy on a forgotten task after training on true labels of `source`: the task itself, or another."""

    source: str
    examples: int
    accuracy: Accuracy


@dataclass(frozen=True)
class Probed:
    """Accuracies of linear probes of hidden states: before and after forgetting, and of an untrained model."""

    before: Accuracy
    after: Accuracy
    control: Accuracy


@dataclass(frozen=True)
class OpenAnswers:
    """Answers that were sampled with no choices given: shares of questions answered rightly, by number of samples."""

    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class Forgotten:
    """One model that forgot one task.

    Attributes:
        name: of the model.
        task, labels, examples: what it was trained on to forget, with which labels, how many questions were asked for.
        used: how many questions there were.
        accuracies, before: by task, after and before (of the fine-tuned model it comes from).
        ratios, behaviours: by task.
        gap: accuracy on its task minus 1/2.
        best_of: accuracy on its task when it gives n answers and the fine-tuned model picks one, by n.
        pass_at: probability that one of its n answers is right, by n.
        best_of_before, pass_at_before: the same of the fine-tuned model.
        best_of_coin: what Best-of-n gives of answers that a coin draws: the fine-tuned model's own knowledge.
        probed, quantized, open_answers: None where not measured.
        relearned: by source and number of examples; `learned`: what the base makes of the same labels.
        texts, texts_before: nats a token on held-out texts, by file.
        wins: win rate against the fine-tuned model under each decoder of the `general` recipe, with its interval.
    """

    name: str
    task: str
    labels: str
    examples: int
    used: int
    accuracies: dict[str, Accuracy]
    before: dict[str, Accuracy]
    ratios: dict[str, Ratio]
    behaviours: dict[str, str]
    gap: float
    best_of: dict[str, float] = field(default_factory=dict)
    pass_at: dict[str, float] = field(default_factory=dict)
    best_of_before: dict[str, float] = field(default_factory=dict)
    pass_at_before: dict[str, float] = field(default_factory=dict)
    best_of_coin: dict[str, float] = field(default_factory=dict)
    probed: Probed | None = None
    quantized: Accuracy | None = None
    open_answers: OpenAnswers | None = None
    relearned: tuple[Relearned, ...] = ()
    learned: tuple[Relearned, ...] = ()
    texts: dict[str, float] = field(default_factory=dict)
    texts_before: dict[str, float] = field(default_factory=dict)
    wins: dict[str, Accuracy] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """How a predictor of the model before training goes with the forget ratio, over the tasks."""

    predictor: str
    labels: str
    examples: int
    correlation: Correlation


@dataclass(frozen=True)
class ForgetResult:
    """Everything that was measured.

    Attributes:
        model: what was trained.
        fine_tune: "each" task its own model, or all "together".
        confidence: of the intervals.
        tasks: as the recipe lists them.
        forgotten: a model a task, kind of labels and number of examples.
        predictions: of the forget ratio of a task in the model that forgot it.
        order: of the tasks in the matrix, those forgotten alike side by side, by "LABELS EXAMPLES".
        seconds: of training and measuring, all attempts together.
    """

    model: str
    fine_tune: str
    confidence: float
    tasks: tuple[TaskFacts, ...]
    forgotten: tuple[Forgotten, ...]
    predictions: tuple[Prediction, ...]
    order: dict[str, list[int]]
    seconds: float
