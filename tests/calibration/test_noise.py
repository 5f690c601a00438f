"""A reward that answers otherwise when it is asked again is told of in calibration, and nothing else is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from infalign.calibration.table import Wanted
from infalign.rewards.loader import load_reward
from infalign.rewards.scoring import ASKED_AGAIN, NOISE, noise_line, score_samples
from infalign.stages.calibrate import calibrate, calibration_prompts, open_table
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.sampling import fill, table_rewards
from infalign.types import Prompt, Sample
from tests.e2e.experiment import tiny_experiment

COUNT = 40
SAMPLES = [Sample("k", index, (index,), np.zeros(1, np.float32), str(index), True) for index in range(COUNT)]
PROMPTS = [Prompt("say a number", "k")] * COUNT
SPREAD = float(np.arange(COUNT).std())


def line(change):
    """What is said of a reward that gives numbers as they are, and then as `change` makes them."""
    calls = itertools.count()

    def reward(completions, **_):
        numbers = np.array([float(text) for text in completions])
        return numbers if next(calls) == 0 else change(numbers)

    found = load_reward(reward, name="numbers")
    return noise_line(found, PROMPTS, SAMPLES, score_samples(found, PROMPTS, SAMPLES))


@pytest.mark.parametrize(
    "change",
    [lambda r: r, lambda r: r + 0.9 * NOISE * SPREAD, lambda r: r - 1e-6],
    ids=["the same", "rounding in bf16", "rounding"],
)
def test_what_is_no_noise(change):
    assert line(change) is None


def test_a_constant_reward_has_none():
    reward = load_reward(lambda completions, **_: [1.0] * len(completions))
    assert noise_line(reward, PROMPTS, SAMPLES, np.ones(COUNT)) is None
    assert noise_line(load_reward(lambda completions, **_: [None] * len(completions)), PROMPTS, SAMPLES,
                      np.full(COUNT, np.nan)) is None  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r + 2.0 * (r == 3), "1 of 16 samples otherwise, by up to 2 where rewards spread by 11.5"),
        (lambda r: r[::-1] + 0.0, "of 16 samples otherwise, by up to"),
        (lambda r: np.where(r < 2, np.nan, r), "2 of 16 samples otherwise, by up to 0 where"),
    ],
    ids=["one other", "all other", "no score"],
)
def test_what_is_noise(change, words):
    found = line(change)
    assert (
        found is not None
        and words in found
        and "reward 'numbers' is not deterministic, or scores depend on what else is in the call: asked again" in found
    )


def test_one_outlier_does_not_hide_noise():
    rewards = np.arange(COUNT, dtype=float)
    rewards[-1] = 1e9
    reward = load_reward(lambda completions, **_: [float(text) + 5.0 for text in completions])
    found = noise_line(reward, PROMPTS, SAMPLES, rewards)
    assert found is not None and "16 of 16 samples otherwise, by up to 5" in found


def test_rewards_as_large_as_numbers_get():
    rewards = np.where(np.arange(COUNT) % 2, 1e308, -1e308)
    reward = load_reward(lambda completions, **_: [1e308 if int(text) % 2 else -1e308 for text in completions])
    assert noise_line(reward, PROMPTS, SAMPLES, rewards) is None


def test_a_reward_that_fails_when_asked_again_is_told_of():
    def fails(completions, **_):
        raise RuntimeError("down")

    found = noise_line(load_reward(fails, retries=0), PROMPTS, SAMPLES, np.arange(COUNT, dtype=float))
    assert found is not None and "scored 40 samples and failed when asked again about 16: " in found and "down" in found


def test_each_reward_is_looked_at_once(tmp_path):
    """Also one that is not asked in the first batch."""
    experiment = Experiment(load_recipe(tiny_experiment(tmp_path)))
    prompts = calibration_prompts(experiment)
    wanted = [Wanted(one, experiment.prompt_ids[one.key], 6) for one in prompts]
    rewards = [
        load_reward(lambda completions, name=name, **_: [1.0] * len(completions), name=name)
        for name in ("first", "last")
    ]
    seen: list[str] = []
    fill(
        open_table(experiment),
        wanted,
        rewards,
        lambda: experiment.sampler(experiment.base_path, "calibration"),
        max_tokens=5,
        tokens_per_batch=100,
        title="",
        asks=lambda reward, prompt: reward.name == "first" or prompt.key == prompts[-1].key,
        look=lambda reward, *_: seen.append(reward.name),
    )
    assert sorted(seen) == ["first", "last"]


def test_few_samples_are_asked_about_again():
    counts = []

    def reward(completions, **_):
        counts.append(len(completions))
        return [1.0] * len(completions)

    noise_line(load_reward(reward), PROMPTS, SAMPLES, np.ones(COUNT))
    assert counts == [ASKED_AGAIN]


NOISY = """
import itertools

COUNT = itertools.count()


def noisy(completion_ids, **_):
    return [float(next(COUNT)) for _ in completion_ids]
"""


def test_calibration_says_so_once_and_keeps_the_first_scores(tmp_path, capsys):
    keys = tiny_experiment(tmp_path)
    calibrate(load_recipe(keys))
    assert "not deterministic" not in capsys.readouterr().err
    (tmp_path / "noisy.py").write_text(NOISY)
    noisy = {**keys, "reward": f"{tmp_path / 'noisy.py'}:noisy", "output_dir": str(tmp_path / "other")}
    calibrate(load_recipe(noisy))
    told = capsys.readouterr().err
    assert told.count("reward 'noisy' is not deterministic") == 1
    experiment = Experiment(load_recipe(noisy))
    kept = table_rewards(open_table(experiment), experiment.reward, calibration_prompts(experiment))
    numbers = sorted(np.concatenate(list(kept.values())).astype(int))
    second = sorted(set(range(numbers[-1] + 1)) - set(numbers))
    assert (
        numbers[0] == 0 < second[0] and second == list(range(second[0], second[-1] + 1)) and len(second) <= ASKED_AGAIN
    )
    calibrate(load_recipe(noisy))  # all is there: nothing is asked
    assert "not deterministic" not in capsys.readouterr().err
