"""Samples made elsewhere: the names they come under, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from infalign.data.completions import read_completions
from infalign.types import InputError, prompt_key


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rewards_are_read_and_null_is_no_score(tmp_path):
    row = {"prompt": "p", "completions": ["a", "b"], "rewards": [1, None], "gold_rewards": [2.5, 3], "topic": "x"}
    one = read_completions(write(tmp_path / "a.jsonl", row))[prompt_key("p")]
    assert one.texts == ("a", "b") and one.prompt.columns == {"topic": "x"}
    np.testing.assert_array_equal(one.rewards_M, [1.0, np.nan])
    np.testing.assert_array_equal(one.gold_M, [2.5, 3.0])


def test_other_names_and_forms(tmp_path):
    chat = [{"role": "assistant", "content": "c"}]
    rows = [
        {"prompt": "v", "responses": ["a", "b"], "rewards": [1, 2]},
        {"prompt": "g", "candidates": [{"completion": "a", "reward": 1.5}, {"completion": "b", "reward": None}]},
        {"prompt": [{"role": "user", "content": "t"}], "completions": [chat, chat]},
    ]
    found = list(read_completions(write(tmp_path / "a.jsonl", *rows)).values())
    assert [one.texts for one in found] == [("a", "b"), ("a", "b"), ("c", "c")]
    np.testing.assert_array_equal(found[1].rewards_M, [1.5, np.nan])
    assert found[2].rewards_M is None


def test_rows_of_one_prompt_are_joined(tmp_path):
    rows = [{"prompt": "P ", "completions": ["a"], "rewards": [1]}, {"prompt": "p", "completions": ["b"]}]
    found = read_completions(write(tmp_path / "a.jsonl", *rows))
    assert len(found) == 1
    one = found[prompt_key("p")]
    assert one.texts == ("a", "b") and one.gold_M is None
    np.testing.assert_array_equal(one.rewards_M, [1.0, np.nan])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a"]}, "row 1: no prompt"),
        ({"prompt": "p", "completions": "a"}, "completions is a list of texts, got 'a'"),
        ({"prompt": "p", "completions": []}, "no completions"),
        ({"prompt": "p", "completions": ["a", 3]}, "completion 1 is 3, no text"),
        ({"prompt": "p", "completions": ["a"], "rewards": [1, 2]}, "rewards must be a list of 1 numbers"),
        ({"prompt": "p", "completions": ["a"], "rewards": ["x"]}, "is 'x'; a finite number or null"),
        ({"prompt": "p", "completions": ["a"], "gold_rewards": [True]}, "is True; a finite number or null"),
        ({"prompt": "", "completions": ["a"]}, "the prompt is empty"),
    ],
)
def test_what_is_no_row_is_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_completions(write(tmp_path / "a.jsonl", row))


def test_an_empty_file_and_an_infinite_reward(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        read_completions(write(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completions": ["a"], "rewards": [Infinity]}\n')
    with pytest.raises(InputError, match="is inf; a finite number or null"):
        read_completions(str(tmp_path / "b.jsonl"))
