"""DAM against its definition, computed apart in float64; its limits; and that the coefficients are learned."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.merging.dam import (
    alikeness,
    coefficient_shapes,
    divergence,
    equal_coefficients,
    merged,
    merged_logits,
    penalty,
    teacher_logits,
)
from tests.tiny import tiny_causal

IDS = torch.tensor([[6, 9, 12, 30, 7, 15]])


def parents_of(folder, family="llama", count=2, **config):
    return [
        AutoModelForCausalLM.from_pretrained(tiny_causal(folder / str(seed), family, seed=seed, **config)).eval()
        for seed in range(count)
    ]


def weights_of(models):
    return [{name: one.detach() for name, one in model.named_parameters()} for model in models]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_merged_weights_are_the_definition(tmp_path, family):
    models = parents_of(tmp_path, family, 3)
    rng = torch.Generator().manual_seed(0)
    coefficients = {n: torch.rand(c.shape, generator=rng) for n, c in equal_coefficients(models[0], 3).items()}
    found = merged(weights_of(models), coefficients)
    linear = {n for n, m in models[0].named_modules() if isinstance(m, torch.nn.Linear)}
    checked = set()
    for name, weight in found.items():
        module, _, kind = name.rpartition(".")
        parts = [dict(model.named_parameters())[name].detach().double().numpy() for model in models]
        by_parent = [c.double().numpy() for c in coefficients[name]]
        if kind == "bias":
            expected = sum(w * c.item() for w, c in zip(parts, by_parent, strict=True))
        elif parts[0].ndim == 1:
            expected = sum(w * c for w, c in zip(parts, by_parent, strict=True))
        elif module in linear or "embed" in name or "wte" in name or "wpe" in name:  # W diag(c): an input column each
            expected = sum(w @ np.diag(c.ravel()) for w, c in zip(parts, by_parent, strict=True))
        else:  # GPT-2's Conv1D computes x W: its input columns are W's rows
            expected = sum(np.diag(c.ravel()) @ w for w, c in zip(parts, by_parent, strict=True))
        np.testing.assert_allclose(weight.double().numpy(), expected, atol=1e-6)
        checked.add(kind if kind == "bias" or parts[0].ndim == 1 else "matrix")
    assert checked == ({"bias", "weight", "matrix"} if family != "llama" else {"weight", "matrix"})


def test_equal_coefficients_average_and_one_parent_is_itself(tmp_path):
    models = parents_of(tmp_path)
    average = merged(weights_of(models), equal_coefficients(models[0], 2))
    for name, weight in average.items():
        mean = sum(dict(model.named_parameters())[name].double() for model in models) / 2
        torch.testing.assert_close(weight.double(), mean.detach(), atol=1e-6, rtol=0)
    alone = merged(weights_of(models[:1]), equal_coefficients(models[0], 1))
    assert all(torch.equal(alone[name], weight) for name, weight in models[0].named_parameters())


def test_tied_embeddings_are_merged_once_and_used_twice(tmp_path):
    models = parents_of(tmp_path, tie_word_embeddings=True)
    shapes = coefficient_shapes(models[0])
    assert "model.embed_tokens.weight" in shapes
    assert "lm_head.weight" not in shapes
    weights = merged(weights_of(models), {n: torch.full((2, *s), 0.3) for n, s in shapes.items()})
    logits = merged_logits(models[0], weights, {"input_ids": IDS})
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            parameter.copy_(weights[name])
        torch.testing.assert_close(logits, models[1](input_ids=IDS).logits, atol=1e-5, rtol=0)


def test_divergence_is_the_kl_and_a_kept_part_of_it_is_less():
    rng = np.random.default_rng(1)
    theirs, ours = rng.normal(size=(2, 5, 20)) * 2
    temperature = 2.0

    def softmax(z):
        e = np.exp(z / temperature - (z / temperature).max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(theirs), softmax(ours)
    exact = temperature**2 * (p * np.log(p / q)).sum(-1)
    for top_k in (20, 50):
        kept = teacher_logits(torch.tensor(theirs), top_k, temperature)
        np.testing.assert_allclose(divergence(torch.tensor(ours), kept, temperature).numpy(), exact, atol=1e-5)
    previous = exact
    for top_k in (8, 2):
        kept = teacher_logits(torch.tensor(theirs), top_k, temperature)
        found = divergence(torch.tensor(ours), kept, temperature).double().numpy()
        coarse = []
        for row in range(5):
            top = np.argsort(-p[row])[:top_k]
            rest = 1 - p[row][top].sum(), 1 - q[row][top].sum()
            coarse.append((p[row][top] * np.log(p[row][top] / q[row][top])).sum() + rest[0] * np.log(rest[0] / rest[1]))
        np.testing.assert_allclose(found, temperature**2 * np.array(coarse), atol=1e-4)
        assert (found <= previous + 1e-5).all()
        previous = found
    same = teacher_logits(torch.tensor(theirs), 4, temperature)
    np.testing.assert_allclose(divergence(torch.tensor(theirs), same, temperature).numpy(), 0, atol=1e-5)


def test_penalties_are_their_formulas():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(3, 1, 7)), rng.normal(size=(3, 4))
    scalars = rng.normal(size=(3, 1))
    coefficients = {"a": torch.tensor(a), "b": torch.tensor(b), "bias": torch.tensor(scalars)}
    expected = 0.0
    for layer in (a.reshape(3, -1), b):
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in itertools.combinations(layer, 2)]
        expected += np.mean(cosines)
    assert float(alikeness(coefficients)) == pytest.approx(expected, abs=1e-9)
    all_of_them = np.concatenate([a.ravel(), b.ravel(), scalars.ravel()])
    whole = 0.3 * expected + 0.2 * np.abs(all_of_them).sum() + 0.1 * (all_of_them**2).sum()
    assert float(penalty(coefficients, 0.3, 0.2, 0.1)) == pytest.approx(whole, abs=1e-9)
    assert float(alikeness({"a": torch.tensor(a[:1])})) == 0.0  # one parent has nobody to be like
