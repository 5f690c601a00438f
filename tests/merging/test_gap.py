"""The mixture of logits, and the gaps, against enumeration of all completions of a tiny vocabulary."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.generation.hf import decode_rows
from infalign.generation.likelihood import completion_logits
from infalign.merging.gap import merge_gap
from infalign.models.mixture import LogitMixture
from infalign.types import InputError, SamplingSettings
from tests.tiny import tiny_causal, tiny_tokenizer

TOKENS = 2
PROMPT = (3, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(["a", "b"])  # with the special tokens eight in all
    return [
        AutoModelForCausalLM.from_pretrained(
            tiny_causal(folder / str(seed), tokenizer=tokenizer, seed=seed, initializer_range=0.2)
        ).eval()
        for seed in range(3)
    ]


def laws(model):
    """(V, V) log-probabilities of all completions of two tokens."""
    answers = list(itertools.product(range(8), repeat=TOKENS))
    with torch.no_grad():
        logits = completion_logits(model, [PROMPT] * len(answers), answers).double()
    return logits.log_softmax(-1).numpy(), answers


def mixed_law(models, weights):
    """By the definition: the mixture's next-token laws along each completion, and its normalisers."""
    logps = [laws(model)[0] for model in models]
    raw = sum(w * one for w, one in zip(weights, logps, strict=True))
    normaliser = np.log(np.exp(raw).sum(-1))
    return raw - normaliser[..., None], normaliser


def test_decoding_follows_the_mixture(models):
    mixture = LogitMixture(tuple(models[:2]), (0.7, 0.3))
    law, _ = mixed_law(models[:2], (0.7, 0.3))
    answers = laws(models[0])[1]
    expected = np.array([sum(law[row, t, a] for t, a in enumerate(answer)) for row, answer in enumerate(answers)])
    assert np.exp(expected).sum() == pytest.approx(1.0, abs=1e-6)
    count = 20_000
    uniforms = np.random.default_rng(0).random((count, TOKENS))
    drawn = decode_rows(mixture, [PROMPT] * count, uniforms, SamplingSettings(max_tokens=TOKENS), [])
    found = np.zeros(len(answers))
    for ids, logps in drawn[:50]:
        assert sum(logps) == pytest.approx(expected[answers.index(tuple(ids))], abs=1e-4)
    for ids, _ in drawn:
        found[answers.index(tuple(ids))] += 1
    probability = np.exp(expected)
    assert (np.abs(found / count - probability) < 5 * np.sqrt(probability / count) + 1e-3).all()


def test_one_model_alone_is_itself_and_finished_rows_leave(models):
    settings, ends = SamplingSettings(max_tokens=12), [2, 7]
    prompts = [PROMPT, (4,), (5, 6, 3)] * 4
    uniforms = np.random.default_rng(1).random((len(prompts), 12))
    alone = decode_rows(models[0], prompts, uniforms, settings, ends)
    for mixture in (LogitMixture((models[0],), (1.0,)), LogitMixture((models[0], models[1]), (1.0, 0.0))):
        found = decode_rows(mixture, prompts, uniforms, settings, ends)
        assert [ids for ids, _ in found] == [ids for ids, _ in alone]


def test_gaps_are_those_of_enumeration(models):
    weights = (0.6, 0.4)
    law, normaliser = mixed_law(models[:2], weights)
    theirs, answers = laws(models[2])
    logq = np.array([sum(law[row, t, a] for t, a in enumerate(answer)) for row, answer in enumerate(answers)])
    logp = np.array([sum(theirs[row, t, a] for t, a in enumerate(answer)) for row, answer in enumerate(answers)])
    q = np.exp(logq)
    log_w = normaliser.sum(1)
    star = q * np.exp(log_w)
    star /= star.sum()
    gap, sequence_gap = (q * (logq - logp)).sum(), (q * (logq - np.log(star))).sum()

    mixture = LogitMixture(tuple(models[:2]), weights)
    count = 4_000
    uniforms = np.random.default_rng(2).random((count, TOKENS))
    drawn = [
        ids for ids, _ in decode_rows(mixture, [PROMPT] * count, uniforms, SamplingSettings(max_tokens=TOKENS), [])
    ]
    found = merge_gap(mixture, models[2], [PROMPT] * count, drawn, base=models[0])
    assert abs(found.gap - gap) < 4 * found.error + 1e-4
    assert abs(found.sequence_gap - sequence_gap) < 4 * found.sequence_error + 1e-4
    assert gap > 10 * found.error
    assert sequence_gap > 4 * found.sequence_error
    assert found.from_base > 0


def test_no_gap_where_all_are_one(models):
    mixture = LogitMixture((models[0], models[0]), (0.5, 0.5))
    found = merge_gap(mixture, models[0], [PROMPT] * 3, [(1, 2), (3,), (4, 5)])
    assert found.gap == pytest.approx(0.0, abs=1e-5)
    assert found.sequence_gap == pytest.approx(0.0, abs=1e-5)


def test_mixtures_of_other_vocabularies_are_refused(models, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path))
    with pytest.raises(InputError, match="one vocabulary"):
        LogitMixture((models[0], other), (0.5, 0.5))
    with pytest.raises(InputError, match="a weight for each model: 1 for 2"):
        LogitMixture((models[0], models[1]), (0.5,))
