r"""The shipped verifier, on what maths data and its answers look like; the vote counts the same answers as one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infalign.decoding.answers import hashes, marked, normal_form
from infalign.rewards.loader import load_reward

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parents[1] / "cases"

RIGHT = [
    # (completion, answer in the data)
    (r"It is \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\frac12}", ".5"),
    (r"\boxed{\dfrac{2}{4}}", "1/2"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{\frac{-1}{2}}", "-1/2"),
    (r"\boxed{1\frac{1}{2}}", "1.5"),
    ("it takes 1 1/2.", "3/2"),
    ("so 1/2.", "0.5"),
    (r"The probability is \frac{3}{4}.", "0.75"),
    ("10/2 = 5", "5"),
    ("the range is 1-5", "5"),
    ("x is -5.", "-5"),
    ("it is \N{MINUS SIGN}5", "-5"),
    ("5.", "5"),
    (r"\boxed{5.}", "5"),
    ("1,000", "1000"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{12\,345}", "12345"),
    ("1e3", "1000"),
    ("$5", "5"),
    (r"\boxed{\$5.00}", "5"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{5 \text{ cm}}", "5 cm"),
    (r"\boxed{5 \mathrm{cm}^2}", "5"),
    ("#### 1,200 dollars", "work\n#### 1200"),
    ("He has 12", "He has 3 left, so 3*4=12\n#### 12"),
    ("50%", "50"),
    (r"\boxed{50\%}", "50%"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{90^{\circ}}", "90"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{5}, no: \boxed{7}", "7"),
    (r"\boxed{7} and an open \boxed{8", "7"),
    (r"\boxed{\text{E}}", "E"),
    (r"\boxed{\textbf{(E)}}", "E"),
    (r"\boxed{\text{New York}}", "new  york"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{\left(3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{\sqrt{2}}", r"$\sqrt{2}$"),
    (r"\boxed{3, 4}", "3,4"),
    (r"\boxed{2\pi}", r"2 \pi"),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\boxed{\sqrt2}", r"\sqrt{2}"),
    (r"\boxed{x^2 + 1}", "x^{2}+1"),
    ("5cm", "5"),
    (r"\boxed{5 apples}", "5"),
]
WRONG = [
    (r"\boxed{\frac{1}{2}}", "2"),
    (r"\boxed{\frac{1}{2}}", "1"),
    (r"\boxed{\frac{\pi}{2}}", "2"),
    (r"\boxed{2\pi}", "2"),
    (r"\boxed{2 pi}", "2"),
    (r"\boxed{2x}", "2"),
    (r"\boxed{6xy}", "6"),
    (r"\boxed{6 x y}", "6"),
    (r"\boxed{\sqrt{2}}", "2"),
    ("1-5", "-5"),
    ("-5", "5"),
    (r"\boxed{7}, no: \boxed{5}", "7"),
    (r"\boxed{(1,2)}", "(1,3)"),
    (r"\boxed{\text{E}}", "F"),
    (r"\boxed{50\%}", "5"),
    (r"\boxed{5 \text{ or } 6}", "5"),
    (r"\boxed{\frac{1}{0}}", "1"),
    ("1 1/2", "1/2"),
    ("1,000", "1"),
]


def score(text, answer, **options):
    reward = load_reward("verifier.py:build", options, base_dir=ROOT / "reward_models")
    return reward(["q"], [text], answer=[answer]).tolist()[0]


@pytest.mark.parametrize(("text", "answer"), RIGHT)
def test_right_answers(text, answer):
    assert score(text, answer) == 1.0


@pytest.mark.parametrize(("text", "answer"), WRONG)
def test_wrong_answers(text, answer):
    assert score(text, answer) == 0.0


def test_units_and_percentages_of_which_only_the_verifier_knows_both_sides():
    assert score(r"\boxed{5\text{ m}}", "5 cm") == 0.0
    assert score(r"\boxed{50\%}", "0.5") == score("0.5", r"50\%") == score("50", "50%") == 1.0


def test_the_reported_rows():
    """2 is not 1/2, 1-5 ends with 5, the last box counts, \\text{} is looks, and GSM8K's gold is behind ####."""
    wanted = {
        "half?": [0, 1], "half again?": [1, 0], "set size?": [1, 1], "retracted?": [1, 0], "text box?": [1, 1],
        "gsm8k gold?": [1, 1],
    }  # fmt: skip
    rows = [json.loads(line) for line in (CASES / "verifier_rows.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == set(wanted)
    for row in rows:
        assert [score(text, row["answer"]) for text in row["completions"]] == wanted[row["prompt"]], row


def test_numbers_of_the_data_are_answers():
    assert [score("5", answer) for answer in (5, 5.0, "5")] == [1.0] * 3
    assert score("0.3333", 1 / 3) == 0.0 and score("0.3333", 1 / 3, tolerance=1e-3) == 1.0
    assert np.isnan(score("5", None)) and np.isnan(score("5", " "))


@pytest.mark.parametrize(("text", "answer"), [*RIGHT, *WRONG])
def test_the_vote_counts_as_one_what_the_verifier_takes_for_the_same(text, answer):
    gold = hashes(answer) or answer
    same = normal_form(marked(text) or text) == normal_form(gold)
    assert same == ((text, answer) in RIGHT)
