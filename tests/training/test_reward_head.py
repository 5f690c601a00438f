"""The Bradley-Terry head: against scipy by hand, where the truth is known, and on real forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize, special
from transformers import AutoModelForSequenceClassification

from infalign.training.reward_head import (
    FOLDS,
    bradley_terry,
    candidate_depths,
    cross_validate,
    features,
    fit_head,
)
from infalign.types import InputError
from tests.tiny import tiny_classifier


def test_the_fit_minimises_the_penalised_loss():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(80, 5)) * np.array([1.0, 10.0, 0.1, 1.0, 3.0])
    size = np.sqrt((differences**2).mean(0))

    def loss(w):
        return np.log1p(np.exp(-differences @ w)).mean() + 0.05 / 2 * ((size * w) ** 2).sum()

    found = bradley_terry(differences, 0.05)
    best = optimize.minimize(
        loss, np.zeros(5), method="Nelder-Mead", options={"maxiter": 20000, "fatol": 1e-14, "xatol": 1e-9}
    )
    assert loss(found) <= best.fun + 1e-9
    step = 1e-5 / size
    gradient = [(loss(found + step * np.eye(5)[i]) - loss(found - step * np.eye(5)[i])) / 2e-5 for i in range(5)]
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_margins_are_part_of_the_loss():
    rng = np.random.default_rng(1)
    differences, margins = rng.normal(size=(60, 3)), rng.normal(size=60)
    size = np.sqrt((differences**2).mean(0))

    def loss(w):
        return np.log1p(np.exp(margins - differences @ w)).mean() + 0.02 / 2 * ((size * w) ** 2).sum()

    best = optimize.minimize(loss, np.zeros(3), tol=1e-12)
    np.testing.assert_allclose(bradley_terry(differences, 0.02, margins_P=margins), best.x, atol=1e-5)
    zero = bradley_terry(differences, 0.02, margins_P=np.zeros(60))
    np.testing.assert_allclose(zero, bradley_terry(differences, 0.02), atol=1e-12)


def test_the_scale_of_a_feature_does_not_matter():
    rng = np.random.default_rng(1)
    differences = rng.normal(size=(60, 3))
    scale = np.array([1e-3, 1.0, 1e4])
    np.testing.assert_allclose(
        bradley_terry(differences * scale, 0.1) * scale, bradley_terry(differences, 0.1), rtol=1e-3, atol=1e-4
    )


def test_swapping_a_pair_turns_the_weights_around():
    rng = np.random.default_rng(2)
    differences = rng.normal(0.3, 1, size=(60, 3))
    np.testing.assert_allclose(bradley_terry(-differences, 0.1), -bradley_terry(differences, 0.1), atol=1e-6)


def test_a_feature_that_never_differs_gets_no_weight():
    differences = np.concatenate([np.random.default_rng(3).normal(0.5, 1, (40, 1)), np.zeros((40, 1))], axis=1)
    assert bradley_terry(differences, 0.1)[1] == 0.0


def test_cross_validation_holds_out_whole_folds():
    """Margins of a fold come from a fit without it: one penalty, by hand."""
    rng = np.random.default_rng(4)
    differences, fold = rng.normal(0.2, 1, size=(50, 4)), np.arange(50) % FOLDS
    losses = {penalty: loss for loss, _, penalty in cross_validate(differences, fold)}
    for penalty in (1e-3, 1.0):
        margins = np.empty(50)
        for out in range(FOLDS):
            margins[fold == out] = differences[fold == out] @ bradley_terry(differences[fold != out], penalty)
        assert losses[penalty] == pytest.approx(float(-special.log_expit(margins).mean()), abs=1e-4)


def test_the_depth_that_knows_is_chosen_and_noise_is_held_down():
    """Depth 2 of three carries the signal; the cross-validated accuracy is that of fresh pairs."""
    rng = np.random.default_rng(5)
    truth = np.zeros(12)
    truth[:2] = 1.5
    names = [f"p{i}" for i in range(600)]

    def draw(count):
        good = rng.normal(size=(count, 12))
        good *= np.where(rng.random(count) < special.expit(good @ truth), 1.0, -1.0)[:, None]
        return good

    noise = rng.normal(size=(2, 600, 12))
    signal = draw(600)
    head = fit_head(np.stack([noise[0], signal, noise[1]], axis=1).astype(np.float32), (1, 2, 3), names, seed=0)
    assert head.depth == 2
    fresh = draw(4000)
    assert float((fresh @ head.weights_H > 0).mean()) == pytest.approx(head.cv_accuracy, abs=0.04)
    assert head.cv_loss < 0.5


def test_pairs_of_one_prompt_share_a_fold():
    """Copies of a pair under one name can't help: with noise for labels the loss stays at chance or above."""
    rng = np.random.default_rng(6)
    once = rng.normal(size=(40, 30)).astype(np.float32)
    copied = np.repeat(once, 5, axis=0)[:, None]
    honest = fit_head(copied, (1,), [f"p{i // 5}" for i in range(200)], seed=0)
    leaky = fit_head(copied, (1,), [f"p{i}" for i in range(200)], seed=0)
    assert leaky.cv_accuracy > 0.9 and honest.cv_accuracy < 0.75


def test_too_few_prompts():
    with pytest.raises(InputError, match="at least 5 training prompts, there are 2"):
        fit_head(np.zeros((4, 1, 2), dtype=np.float32), (1,), ["a", "a", "b", "b"], seed=0)


def test_depths():
    assert candidate_depths(30) == (10, 15, 20, 25, 30)
    assert candidate_depths(2) == (1, 2) and candidate_depths(1) == (1,)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_features_are_those_of_the_cut_model_one_by_one(family, tmp_path):
    """All depths of one shared pass against forward passes of models with so many layers, one sequence at a time."""
    path = tiny_classifier(tmp_path, family, layers=3)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    beginning = list(range(10, 22))
    sequences = [[*beginning, 30, 31], [*beginning, 40], [50, 51, 52, 53], [60, 61, 62, 63, 64, 65, 66]]
    found = features(model, sequences, ["a", "a", "b", "c"], (1, 2, 3), tokens=64)
    for place, depth in enumerate((1, 2, 3)):
        config = model.config.__class__.from_pretrained(path)
        name = "n_layer" if family == "gpt2" else "num_hidden_layers"
        setattr(config, name, depth)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
        cut = AutoModelForSequenceClassification.from_pretrained(path, config=config).eval()
        for row, ids in enumerate(sequences):
            with torch.no_grad():
                state = cut.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            np.testing.assert_allclose(found[row, place], state.numpy(), atol=2e-5)


def test_a_backbone_without_a_known_norm_keeps_its_layers(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_classifier(tmp_path, "llama")).eval()
    model.base_model.register_module("scale", model.base_model.norm)
    del model.base_model.norm
    with pytest.raises(InputError, match="no final norm that is known: set keep_layers: 2"):
        features(model, [[5, 6]], ["a"], (1, 2), tokens=64)
