"""`infalign reward check`: what it says of rewards that keep their contract and of those that do not."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from infalign.cli import main
from infalign.stages.reward_check import ANSWERS, QUESTIONS, reward_check

SOURCE = """
import itertools

COUNT = itertools.count()

def words(completions, **_):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [len(text.split()) or None for text in texts]

def changing(completions, **_):
    return [float(next(COUNT)) for _ in completions]

def batched(completions, **_):
    return [float(len(completions))] * len(completions)

def placed(completions, **_):
    return [float(place) for place, _ in enumerate(completions)]

def chats(completions, **_):
    return [len(completion[-1]["content"]) for completion in completions]

def needs(completions, answer, **_):
    return [float(a in c) for a, c in zip(answer, completions)]

def wrong(completions, **_):
    return [1.0]

def build(factor):
    return lambda completions, **_: [factor for _ in completions]
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return lambda name: f"{tmp_path / 'mine.py'}:{name}"


def facts(out, form="text"):
    """The lines after the table of one form, by their names."""
    part = out.split(f"{form} prompts, ")[1].split("\n\n")[1]
    return {line[:14].strip(): line[16:] for line in part.splitlines()}


def test_what_a_good_reward_returned(spec, capsys):
    assert main(["reward", "check", spec("words")]) == 0
    out = capsys.readouterr().out
    table = out.split("chat prompts")[0]
    for answer in ANSWERS:
        count = str(len(answer.split())) if answer else "none"
        assert f"{count:>8}    {answer[:20]!r}"[:-1] in table
    found = facts(out)
    assert found["no score"] == f"{len(QUESTIONS)} of {len(QUESTIONS) * len(ANSWERS)}"
    assert found["ties"].startswith("0 of 10") and "ms a completion" in found["speed"]
    assert found["called again"] == "the same rewards: deterministic"
    assert found["one by one"].startswith("the same") and found["reversed"].startswith("the same")
    assert "chat prompts, 10 completions\n  the same rewards as above\n" in out
    assert not any(line != line.rstrip() for line in out.splitlines())


@pytest.mark.parametrize(
    ("name", "again", "alone", "reversed"),
    [("changing", 10, None, None), ("batched", 0, 9, 0), ("placed", 0, 9, 9)],
)
def test_what_is_not_as_it_should_be(spec, name, again, alone, reversed):
    first = reward_check(spec(name))[0]
    assert first.again == again
    if name != "changing":
        assert (first.alone, first.reversed) == (alone, reversed)
    else:
        assert first.alone > 0 and first.reversed > 0


def test_it_is_told(spec, capsys):
    assert main(["reward", "check", spec("placed")]) == 0
    found = facts(capsys.readouterr().out)
    assert found["called again"] == "the same rewards: deterministic"
    assert found["one by one"] == "other rewards, by up to 9" == found["reversed"]


def test_ties_are_between_other_texts_of_one_prompt(spec, tmp_path):
    rows = [{"prompt": "p", "completions": ["a b", "c d", "a b", "e"]}, {"prompt": "q", "completions": ["x y"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = reward_check(spec("words"), samples=str(tmp_path / "rows.jsonl"))
    assert found.tied == 2 and found.form == "text"
    assert found.scores_B.tolist() == [2, 2, 2, 1, 2]


def test_a_form_that_the_reward_does_not_take_is_one_line(spec, capsys):
    assert main(["reward", "check", spec("chats")]) == 0
    out = capsys.readouterr().out
    text, chat = out.split("chat prompts")
    assert "broke: reward 'chats' failed once (TypeError: string indices must be integers" in text
    assert "called again" in chat


def test_columns_come_from_a_file_of_prompts(spec, tmp_path, capsys):
    assert main(["reward", "check", spec("needs")]) == 2
    assert "needs the column 'answer', which the data does not have" in capsys.readouterr().err
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "6 x 7?", "answer": "42"}\n')
    (found,) = reward_check(spec("needs"), prompts=str(tmp_path / "prompts.jsonl"))
    np.testing.assert_array_equal(found.scores_B, [answer == "42" for answer in ANSWERS])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["check", "{wrong}"], "returned 1 values for 10 completions"),
        (["check", "{zzz}"], "has no 'zzz'"),
        (["check", "{build}", "--reward_kwargs", "{factr: 1}"], "unexpected keyword argument 'factr'"),
        (["check", "{build}", "--reward_kwargs", "7"], "reward_kwargs"),
        (["check", "{words}", "--samples", "a", "--prompts", "b"], "give --prompts or --samples, not both"),
        (["check", "{words}", "--samples", "nowhere.jsonl"], "nowhere.jsonl"),
        (["check"], "the following arguments are required: SPEC"),
        (["try", "{words}"], "infalign reward try: the only sub-verb is check"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(spec, capsys, words, expected):
    given = [spec(word[1:-1]) if word in ("{wrong}", "{zzz}", "{build}", "{words}") else word for word in words]
    assert main(["reward", *given]) == 2
    told = capsys.readouterr().err
    assert expected in told and told.count("\n") == 1 and told.startswith("infalign: error: ")


def test_kwargs_and_help(spec, capsys):
    assert main(["reward", "check", spec("build"), "--reward_kwargs", "{factor: 2.5}"]) == 0
    assert "     2.5    '42'" in capsys.readouterr().out
    assert main(["reward", "--help"]) == 0
    assert "--reward_kwargs" in capsys.readouterr().out


def test_a_reward_that_never_scores_is_an_error_and_one_that_never_differs_is_told(tmp_path, capsys):
    (tmp_path / "odd.py").write_text(
        "def nan(completions, **_):\n    return [float('nan')] * len(completions)\n"
        "def one(completions, **_):\n    return [1.0] * len(completions)\n"
    )
    assert main(["reward", "check", f"{tmp_path}/odd.py:nan"]) == 2
    assert "gave no sample a score" in capsys.readouterr().err
    assert main(["reward", "check", f"{tmp_path}/odd.py:one"]) == 0
    assert "every sample has the same reward, 1: try --samples of your own" in capsys.readouterr().err


def test_the_readmes_reward_tells_the_samples_apart(tmp_path):
    """It counts please and thanks, which occurred in no sample: every reward was 0."""
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (tmp_path / "polite.py").write_text(page.split("This is `polite.py`:\n\n```python\n")[1].split("```")[0])
    for found in reward_check(f"{tmp_path}/polite.py:build"):
        assert found.scores_B is not None and sorted(set(found.scores_B)) == [0.0, 2.0]


def test_a_dead_server_is_announced_once(capsys):
    """Every row is tried five times, which takes half a minute and was silent."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(["reward", "check", url, "--reward_kwargs", "{backoff: 0.01}"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: the server at {url} failed (ConnectError: ")
    assert "): attempt 2 of 5 in 0.0 s; further retries are not shown" in warning
    assert error.startswith("infalign: error: ")
