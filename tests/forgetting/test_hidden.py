"""Hidden states: the layer that is meant, whatever the batch; probes that find what is linear and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.forgetting.hidden import LAYER, answer_differences, last_states, probe, total_variance
from infalign.forgetting.scoring import Encoded
from tests.tiny import CLOSE, tiny_causal


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path_factory.mktemp("model"), layers=6)).eval()


SEQUENCES = [[5, 6, 7], [8, 9], [5, 6, 7, 8, 9, 10, 11], [12]]


@pytest.mark.parametrize("layer", [LAYER, -1, -2, -40])
def test_states_are_those_of_one_sequence_alone(model, layer):
    found = last_states(model, SEQUENCES, 16, layer)
    for row, ids in zip(found, SEQUENCES, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        # the embeddings come first; a model with fewer layers than asked for gives its first layer
        wanted = states[layer if layer > -40 else 1][0, -1].double().numpy()
        assert np.abs(row - wanted).max() < CLOSE


def test_total_variance_is_the_trace():
    states = np.random.default_rng(0).normal(size=(30, 4)) * [1.0, 2.0, 0.5, 3.0]
    assert total_variance(states) == pytest.approx(np.trace(np.cov(states.T)), rel=1e-12)
    assert np.isnan(total_variance(states[:1]))


def test_differences_are_of_the_answers_ends(model):
    pair = (Encoded((5, 6), (7,)), Encoded((5, 6), (8, 9)))
    both = last_states(model, [[5, 6, 7], [5, 6, 8, 9]], 100)
    assert answer_differences(model, [pair], 100)[0] == pytest.approx(both[0] - both[1], abs=CLOSE)


def test_a_probe_finds_a_direction_and_not_a_coin():
    rng = np.random.default_rng(2)
    labels, noise = rng.integers(2, size=500), rng.normal(size=(500, 12))
    direction = rng.normal(size=12)
    states = noise + np.outer(1 - 2 * labels, direction)
    found = probe(states[:300], labels[:300], states[300:], labels[300:], seed=0)
    assert found.mean() > 0.95
    blind = probe(noise[:300], labels[:300], noise[300:], labels[300:], seed=0)
    assert abs(blind.mean() - 0.5) < 0.18  # five standard deviations of 200 coins
    swapped = probe(-states[:300], 1 - labels[:300], -states[300:], 1 - labels[300:], seed=0)
    assert (swapped == found).all()  # the answers in the other order


def test_a_probe_of_two_questions_does_not_fail():
    assert probe(np.eye(2), np.array([0, 1]), np.eye(2), np.array([0, 1]), seed=0).shape == (2,)
