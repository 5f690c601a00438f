"""Length taken out of a reward: what is length becomes constant, what is not is left alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from infalign.rewards.length_control import slope_within
from infalign.rewards.loader import load_reward
from infalign.types import InputError

SPEC = "infalign.rewards.length_control:LengthControlled"
WORDS = {  # by prompt: the completions of the file
    "short please": ["a", "b b", "c c c"],
    "long please": ["d d d d", "e e e e e e", "f f f f f f f f"],
}
NEW = ["", "x", "y y", "z z", "v v v v v"]


def size(text):
    return float(len(text.split()))


@pytest.fixture
def samples(tmp_path):
    rows = [{"prompt": prompt, "completions": texts, "bonus": 5.0} for prompt, texts in WORDS.items()]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def controlled(score, folder=None, **options):
    def raw(prompts, completions, **_):
        return [score(p, c) for p, c in zip(prompts, completions, strict=True)]

    given = {"samples": "samples.jsonl"} if "coefficient" not in options else {}
    return load_reward(SPEC, {"reward": raw, **given, **options}, base_dir=folder or ".")


def test_a_reward_that_is_length_becomes_constant(samples):
    found = controlled(lambda p, c: 3.0 * size(c) - 2.0, samples)(["new"] * 5, NEW)
    average = np.mean([size(text) for texts in WORDS.values() for text in texts])
    np.testing.assert_allclose(found, 3.0 * average - 2.0, rtol=1e-12)


def test_a_reward_that_does_not_depend_on_length_is_unchanged(samples):
    """On the file it is symmetric about the mean length, so its slope is 0."""
    value = {"a": 1.0, "b b": -2.0, "c c c": 1.0, "d d d d": 0.5, "e e e e e e": 4.0, "f f f f f f f f": 0.5}
    raw = lambda p, c: value.get(c, float(sum(map(ord, c))))  # noqa: E731
    np.testing.assert_allclose(controlled(raw, samples)(["new"] * 5, NEW), [raw("", c) for c in NEW], rtol=1e-12)


def test_a_prompt_that_scores_high_and_asks_for_long_answers_is_no_taste_for_length(samples):
    """Across prompts length and reward go together, within each they do not: the slope is 0, pooled it would not be."""
    found = controlled(lambda p, c: 100.0 * p.startswith("long"), samples)
    assert found.function.fit[0] == 0.0
    assert found(["long x", "short x"], ["a b c", "a"]).tolist() == [100.0, 0.0]


def test_ranks_among_completions_of_one_length_never_change(samples):
    rng = np.random.default_rng(0)
    texts = [f"{word} x y"[: 1 + 2 * (number % 3)] for number, word in enumerate("abcdefghijkl")]
    noise = dict(zip(texts, rng.normal(size=12), strict=True))
    raw = lambda p, c: noise.get(c, size(c) ** 2)  # noqa: E731
    found = controlled(raw, samples)(["p"] * 12, texts)
    before = np.array([raw("p", text) for text in texts])
    for length in {size(text) for text in texts}:
        same = [row for row, text in enumerate(texts) if size(text) == length]
        assert np.argsort(found[same]).tolist() == np.argsort(before[same]).tolist()
        assert np.ptp(found[same] - before[same]) < 1e-12


def test_the_slope_is_that_of_least_squares_with_an_intercept_per_prompt():
    rng = np.random.default_rng(3)
    lengths = [rng.integers(1, 30, size=count).astype(float) for count in (4, 7, 5)]
    rewards = [rng.normal(size=len(row)) + 0.2 * row for row in lengths]
    rewards[1][2] = np.nan
    rows = [
        (length, reward, prompt)
        for prompt, (one, two) in enumerate(zip(lengths, rewards, strict=True))
        for length, reward in zip(one, two, strict=True)
        if not np.isnan(reward)
    ]
    design = np.array([[length, *(float(prompt == number) for number in range(3))] for length, _, prompt in rows])
    expected = np.linalg.lstsq(design, np.array([reward for _, reward, _ in rows]), rcond=None)[0][0]
    assert slope_within(lengths, rewards) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("unit", "text", "ids", "length"),
    [("words", "ab cd", [1], 2), ("characters", "ab cd", [1], 5), ("tokens", "a", [1, 2, 3], 3)],
)
@pytest.mark.parametrize("chat", [False, True])
def test_a_given_coefficient(unit, text, ids, length, chat):
    reward = controlled(lambda p, c: 10.0, coefficient=0.5, unit=unit)
    completion = [{"role": "assistant", "content": text}] if chat else text
    assert reward(["p"], [completion], [ids]).tolist() == [10.0 - 0.5 * length]


def test_no_score_stays_none_and_the_files_columns_reach_the_reward(samples):
    def raw(completions, bonus, **_):
        return [None if not c else b * size(c) for c, b in zip(completions, bonus, strict=True)]

    reward = load_reward(SPEC, {"reward": raw, "samples": "samples.jsonl"}, base_dir=samples)
    found = reward(["p"] * 2, ["", "x"], bonus=[5.0, 5.0])
    assert np.isnan(found[0]) and reward.function.fit == (5.0, 4.0)
    assert found[1] == pytest.approx(5.0 * 4.0)


def test_what_the_fingerprint_covers(samples):
    raw = lambda p, c: 1.0  # noqa: E731
    found = {controlled(raw, samples).fingerprint, controlled(raw, samples, unit="characters").fingerprint}
    found |= {controlled(raw, coefficient=value).fingerprint for value in (0.1, 0.2)}
    (samples / "samples.jsonl").write_text('{"prompt": "p", "completions": ["a", "b c"]}\n')
    assert len({*found, controlled(raw, samples).fingerprint}) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give exactly one of coefficient and samples"),
        ({"coefficient": 1.0, "samples": "samples.jsonl"}, "give exactly one of coefficient and samples"),
        ({"coefficient": "much"}, "coefficient is a finite number, got 'much'"),
        ({"coefficient": float("nan")}, "coefficient is a finite number, got nan"),
        ({"coefficient": 1.0, "unit": "lines"}, "unit is one of words, characters, tokens, got 'lines'"),
        ({"samples": "samples.jsonl", "unit": "tokens"}, "a file of samples holds no tokens"),
        ({"samples": "nowhere.jsonl"}, "samples 'nowhere.jsonl': no such file"),
    ],
)
def test_refused_when_loaded(samples, options, words):
    with pytest.raises(InputError, match=words):
        load_reward(SPEC, {"reward": lambda completions, **_: [], **options}, base_dir=samples)


def test_lengths_that_do_not_differ_fit_nothing(samples):
    (samples / "samples.jsonl").write_text('{"prompt": "p", "completions": ["a b", "c d"]}\n')
    with pytest.raises(InputError, match="no prompt of the samples has two scored completions of other lengths"):
        controlled(lambda p, c: 1.0, samples)(["p"], ["x"])
