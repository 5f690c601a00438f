"""The files of reward_models/ that are made of other rewards say what they say they do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from infalign.rewards.calibrated_sum import CalibratedSum
from infalign.rewards.llm_judge import LLMReward
from infalign.rewards.loader import load_reward
from infalign.types import InputError

FOLDER = Path(__file__).parents[2] / "reward_models"
TEXTS = ["I love this wonderful day.", "This is awful.", "A day.", "What a great and happy and lovely thing it is!"]
PROMPTS = ["Say something."] * len(TEXTS)


def scores(name, **kwargs):
    return load_reward(f"{name}.py:build", kwargs, base_dir=FOLDER)(PROMPTS, TEXTS)


def test_the_ensemble_is_pessimistic(tmp_path):
    (tmp_path / "two.py").write_text(
        "def words(completions, **_):\n    return [float(len(c.split())) for c in completions]\n"
        "def letters(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    members = np.array([[len(text.split()) for text in TEXTS], [len(text) for text in TEXTS]], dtype=float)
    models = [f"{tmp_path}/two.py:words", f"{tmp_path}/two.py:letters"]
    found = scores("ensemble", models=models, penalty=0.5)
    np.testing.assert_allclose(found, members.mean(0) - 0.5 * members.std(0))


def test_length_control_takes_the_words_off():
    plain = scores("vader")
    words = np.array([len(text.split()) for text in TEXTS])
    np.testing.assert_allclose(scores("length_controlled", coefficient=0.02), plain - 0.02 * words)
    np.testing.assert_allclose(scores("length_controlled", coefficient=0.0), plain)


def test_the_calibrated_sum_has_its_members_and_weights():
    reward = load_reward("calibrated_sum.py:build", {"target": 5, "weight": 0.25}, base_dir=FOLDER)
    assert isinstance(reward.function, CalibratedSum)
    assert [member.name for member in reward.function.members] == ["vader", "length"]
    other = load_reward("calibrated_sum.py:build", {"target": 5, "weight": 0.5}, base_dir=FOLDER)
    assert other.fingerprint != reward.fingerprint
    with pytest.raises(InputError, match="calibrat"):
        reward(PROMPTS, TEXTS)  # before base samples are scored there are no quantiles


def test_the_language_model_s_template_is_filled():
    reward = load_reward("llm.py:build", {"model": "m"}, base_dir=FOLDER)
    assert isinstance(reward.function, LLMReward) and reward.function.scale == (1, 10)
    assert all(f"{{{name}}}" in reward.function.template for name in ("prompt", "completion", "low", "high", "tag"))
