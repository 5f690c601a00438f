"""Tasks by definition: one distractor each, no test question that training has, labels as asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from infalign.forgetting.tasks import (
    Item,
    Question,
    binarised,
    build_task,
    normalised,
    read_items,
    relabelled,
    shared_questions,
)
from infalign.types import InputError


def items(count, prefix="question", distractors=("b", "c", "d")):
    return [Item(f"{prefix} {number}", f"a{number % 7}", distractors) for number in range(count)]


def built(train, test=None, **changes):
    return build_task("task", "family", train, test, **{"num_train": 1000, "num_test": 1000, "seed": 1, **changes})


def test_rows_are_read():
    rows = [
        {"context": "1 + 1 =", "correct": 2, "distractors": [3, "4"]},
        {"context": "is it?", "correct": " yes ", "distractors": "no"},
    ]
    assert read_items(rows, "t") == [Item("1 + 1 =", "2", ("3", "4")), Item("is it?", "yes", ("no",))]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context": "x", "correct": "a"}, r"t, row 1: no distractors \(it has context, correct\)"),
        ({"context": "x", "correct": "a", "distractors": []}, "no distractor, or an empty answer"),
        ({"context": "x", "correct": " ", "distractors": ["b"]}, "no distractor, or an empty answer"),
        (
            {"context": "x", "correct": "a", "distractors": ["b", "a "]},
            "the correct answer 'a' is among its distractors",
        ),
        ({"context": "x", "correct": "a", "distractors": {"b": 1}}, "distractors a list of texts"),
        ({"context": "x", "correct": "a", "distractors": ["b", None]}, "distractors a list of texts, got"),
        ({"context": "x", "correct": ["a"], "distractors": ["b"]}, "correct is a text, distractors a list of texts"),
        ({"context": ["x"], "correct": "a", "distractors": ["b"]}, r"context is a text, got \["),
        ({}, r"no context and no correct and no distractors \(it has nothing\)"),
    ],
)
def test_rows_that_are_no_questions(row, words):
    with pytest.raises(InputError, match=words):
        read_items([row], "t")


def test_nothing_to_read():
    with pytest.raises(InputError, match="t: no question in it"):
        read_items([], "t")


def test_a_question_has_one_distractor_and_keeps_it():
    found = [binarised(item, 3, "task") for item in items(600)]
    assert found == [binarised(item, 3, "task") for item in items(600)]
    for item, question in zip(items(600), found, strict=True):
        wrong = question.answers[1 - question.label]
        assert question.answers[question.label] == item.correct and wrong in item.distractors
    # uniform over three distractors and two orders: 200 and 300 of 600, five standard deviations
    drawn = Counter(question.answers[1 - question.label] for question in found)
    assert set(drawn) == {"b", "c", "d"} and all(abs(count - 200) < 58 for count in drawn.values())
    assert abs(sum(question.label for question in found) - 300) < 62
    other = [binarised(item, 4, "task") for item in items(600)]
    assert other != found


def test_test_questions_of_training_are_removed_and_counted():
    train = items(10)
    test = [
        Item("Question  3?", "x", ("y",)),  # the same but for case, white space and punctuation
        Item("question 4", "x", ("y",)),
        Item("fresh one", "x", ("y",)),
        Item("Fresh one!", "z", ("y",)),  # a second time
        Item("another", "w", ("y",)),
    ]
    task = built(train, test)
    assert (task.overlap, task.repeated) == (2, 1)
    assert [question.context for question in task.test] == ["fresh one", "another"]
    known = {normalised(question.context) for question in task.train}
    assert not known & {normalised(question.context) for question in task.test}


def test_signs_tell_questions_apart():
    keys = {normalised(f"what is 3 {sign} 4") for sign in "+-*/"}
    assert (
        len(keys) == 4 and normalised("-3") != normalised("3") and normalised("well-known") == normalised("well known")
    )


def test_without_a_context_the_answers_tell():
    bare = [Item("", f"good {number}", (f"bad {number}",)) for number in range(12)]
    task = built(bare[:6], bare[4:])
    assert (task.overlap, len(task.test)) == (2, 6)


def test_questions_that_another_task_trains_on_are_counted():
    one, other = built(items(20), items(10, "x")), built(items(10, "x"), items(5))
    other = replace(other, name="other")
    assert shared_questions({"one": one, "other": other}) == {("one", "other"): 10, ("other", "one"): 5}


def test_what_is_not_trained_on_may_be_tested():
    """The cap comes before the overlap: of 100 questions 60 are trained on, and the other 40 stay in the test part."""
    task = built(items(100), items(100), num_train=60)
    assert (len(task.train), len(task.test), task.overlap) == (60, 40, 60)


def test_sizes_are_capped_and_the_draw_is_seeded():
    task = built(items(100), items(50, "other"), num_train=30, num_test=20)
    assert (len(task.train), len(task.test)) == (30, 20)
    assert task == built(items(100), items(50, "other"), num_train=30, num_test=20)
    assert task.train != built(items(100), items(50, "other"), num_train=30, num_test=20, seed=2).train


def test_one_file_is_split_by_context():
    twice = [*items(40), *items(40)]  # two rows a context, which stay together
    task = built(twice, num_test=10)
    assert len(task.test) == 10 and task.repeated == 10 and task.overlap == 0
    assert len(task.train) == 60
    few = built(items(6), num_test=100)
    assert (len(few.train), len(few.test)) == (3, 3)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (items(5), items(5), "task: all 5 test questions are in the training part, too"),
        ([], items(5), "task: no training question is left"),
        (
            [Item(f"q{n}", "yes", ("no",)) for n in range(9)],
            items(5),
            "all 9 training questions is 'yes': one class only",
        ),
        (items(9), [Item(f"q{n}", "yes", ("no",)) for n in range(4)], "all 4 test questions is 'yes': one class only"),
    ],
)
def test_tasks_that_measure_nothing(train, test, words):
    with pytest.raises(InputError, match=words):
        built(train, test)


QUESTIONS = [Question(f"q{number}", ("a", "b"), number % 2) for number in range(400)]


def test_labels():
    assert relabelled(QUESTIONS, "true", 400, 1, "t") == QUESTIONS
    flipped = relabelled(QUESTIONS, "flipped", 400, 1, "t")
    assert all(new.label == 1 - old.label for new, old in zip(flipped, QUESTIONS, strict=True))
    drawn = relabelled(QUESTIONS, "random", 400, 1, "t")
    assert drawn == relabelled(QUESTIONS, "random", 400, 1, "t") != relabelled(QUESTIONS, "random", 400, 2, "t")
    agree = sum(new.label == old.label for new, old in zip(drawn, QUESTIONS, strict=True))
    assert abs(agree - 200) < 50  # five standard deviations of a fair coin
    assert [(one.context, one.answers) for one in drawn] == [(one.context, one.answers) for one in QUESTIONS]


def test_a_few_labels():
    few = relabelled(QUESTIONS, "random", 100, 1, "t")
    assert len(few) == len({one.context for one in few}) == 100
    assert len(relabelled(QUESTIONS, "true", 1000, 1, "t")) == 400
