"""The contract: what counts as rewards, what does not; reasoning out of completions."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import torch

from infalign.rewards.contract import (
    RewardFunction,
    as_rewards,
    completion_text,
    shape_completions,
    strip_reasoning,
)
from infalign.types import RewardError


@pytest.mark.parametrize(
    "output",
    [
        [1, 0.5, None],
        (True, 0.5, float("nan")),
        np.array([1, 0.5, np.nan], dtype=np.float32),
        np.array([1, 0.5, None], dtype=object),
        torch.tensor([1, 0.5, float("nan")], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1), np.float32(0.5), None],
        [Decimal(1), Decimal("0.5"), None],
    ],
)
def test_accepted(output):
    rewards = as_rewards(output, 3, "r")
    assert rewards.dtype == np.float64 and rewards.shape == (3,)
    np.testing.assert_array_equal(rewards, [1.0, 0.5, np.nan])


def test_integers_and_booleans_keep_their_values():
    assert as_rewards(torch.tensor([True, False]), 2, "r").tolist() == [1.0, 0.0]
    assert as_rewards(np.array([2**40, 3]), 2, "r").tolist() == [2.0**40, 3.0]
    assert as_rewards([], 0, "r").shape == (0,)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1, 2], r"reward 'r' returned 2 values for 3 completions"),
        ([1, "2", 3], r"returned '2' \(str\) at index 1; a number or None"),
        ([1, 2, [3]], r"returned \[3\] \(list\) at index 2"),
        ([1j, 2, 3], r"returned 1j \(complex\) at index 0"),
        (np.array([1j, 2, 3]), r"complex128\) at index 0"),
        ([1, np.array([2.0]), 3], r"ndarray\) at index 1"),
        ([1, torch.zeros(2), 3], r"Tensor\) at index 1"),
        ([1, object, 3], r"\(type\) at index 1"),
        ([1, float("inf"), 3], r"reward 'r' is not finite: inf at index 1"),
        ([1, -(10**400), 3], r"not finite: -inf at index 1"),
        (np.zeros((3, 1)), r"array of shape \(3, 1\)"),
        (torch.tensor(1.0), r"array of shape \(\)"),
        (None, r"returned None \(NoneType\); return a list"),
        (0.5, r"returned 0.5 \(float\)"),
        ("abc", r"returned 'abc' \(str\)"),
        ({"a": 1}, r"\(dict\)"),
        ((x for x in range(3)), r"\(generator\)"),
    ],
)
def test_refused(output, message):
    with pytest.raises(RewardError, match=message):
        as_rewards(output, 3, "r")


def test_infinities_can_be_kept():
    assert as_rewards([float("-inf"), 10**400], 2, "r", infinite="keep").tolist() == [-np.inf, np.inf]


def test_completions_follow_their_prompts():
    chat = [{"role": "user", "content": "q"}]
    shaped = shape_completions(["q", chat], ["a", "b"])
    assert shaped == ["a", [{"role": "assistant", "content": "b"}]]
    assert [completion_text(completion) for completion in shaped] == ["a", "b"]
    tools = [{"role": "assistant", "content": None}, {"role": "tool", "content": "t"}, {"content": "c"}]
    assert completion_text(tools) == "\nc"


def test_any_callable_is_a_reward_function():
    assert isinstance(lambda **_: [], RewardFunction)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain < text", "plain < text"),
        ("<think>a\nb</think>\n\n42", "42"),
        ("<think>a</think>x<think>b</think>y", "xy"),
        ("so <think>never closed 42", "so "),
        ("<think>never closed", ""),
        ("opened in the prompt</think>42", "42"),
        ("a</think>b<think>c", "b"),
    ],
)
def test_reasoning_is_stripped(text, answer):
    assert strip_reasoning(text) == answer
    message = {"role": "assistant", "content": text, "reasoning_content": "hidden"}
    assert strip_reasoning([message]) == [{"role": "assistant", "content": answer}]


def test_other_tags_and_inputs_left_alone():
    assert strip_reasoning("[r]x[/r]y<think>", "[r]", "[/r]") == "y<think>"
    message = [{"role": "assistant", "content": "<think>a</think>b"}]
    strip_reasoning(message)
    assert message[0]["content"] == "<think>a</think>b"
