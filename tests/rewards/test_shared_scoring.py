"""Scoring completions with their prompts computed once gives the scores of whole sequences, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.shared_scoring import LEAST, Group, groups_of
from tests.tiny import CLOSE, WORDS, tiny_classifier, tiny_tokenizer

RNG = np.random.default_rng(0)


def words(count):
    return " ".join(RNG.choice(WORDS[:60], count))


PROMPTS = [words(20), words(9), words(3), words(14)]
ROWS = [(prompt, words(int(size))) for prompt in PROMPTS for size in RNG.integers(1, 12, 5)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3", "gemma", "gpt_neox"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_scores_are_those_of_single_sequences(family, pad, tmp_path):
    reward = ClassifierReward(tiny_classifier(tmp_path, family, tokenizer=tiny_tokenizer(pad=pad)), batch_tokens=200)
    assert reward._shares
    prompts, completions = map(list, zip(*ROWS, strict=True))
    found = reward(prompts=prompts, completions=completions)
    alone = [reward.score([reward.encode(p, c)])[0] for p, c in ROWS]
    np.testing.assert_allclose(found, alone, atol=CLOSE)
    order = RNG.permutation(len(ROWS))
    shuffled = reward(prompts=[prompts[i] for i in order], completions=[completions[i] for i in order])
    np.testing.assert_allclose(shuffled, found[order], atol=CLOSE)


def test_sliding_windows_are_scored_whole(tmp_path):
    reward = ClassifierReward(tiny_classifier(tmp_path, "mistral", sliding_window=8))
    assert not reward._shares
    prompts, completions = map(list, zip(*ROWS, strict=True))
    alone = [reward.score([reward.encode(p, c)])[0] for p, c in ROWS]
    np.testing.assert_allclose(reward(prompts=prompts, completions=completions), alone, atol=CLOSE)


def test_groups_share_what_all_begin_with():
    base = list(range(LEAST + 4))
    sequences = [[*base, 90, 91], [*base, 92], [5, 6, 7], base[: LEAST + 1], [1, 2, 3]]
    found = groups_of(sequences, ["a", "a", "b", "a", "b"])
    assert found == [Group((0, 1, 3), LEAST), Group((2, 4), 0)]
    assert groups_of(sequences[:1], ["a"]) == [Group((0,), 0)], "nobody to share with"


@pytest.mark.parametrize("tokens", [1, 40, 100, 10**6])
def test_budgets_change_no_score(tokens, tmp_path):
    reward = ClassifierReward(tiny_classifier(tmp_path), batch_tokens=10**6)
    prompts, completions = map(list, zip(*ROWS, strict=True))
    whole = reward(prompts=prompts, completions=completions)
    reward.batch_tokens = tokens
    np.testing.assert_allclose(reward(prompts=prompts, completions=completions), whole, atol=CLOSE)
