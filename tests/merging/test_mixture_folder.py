"""A mixture of logits as a folder: what is read, moved, damaged, decoded and measured like any policy."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.generation.likelihood import completion_logps, sequence_kl
from infalign.models.loading import load_policy, model_fingerprint
from infalign.models.mixture import LogitMixture
from infalign.stages.evaluate import evaluate
from infalign.stages.merge.recipe import load_merge_recipe
from infalign.stages.merge.run import merge
from infalign.stages.recipe import load_recipe
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import CLOSE, tiny_causal, tiny_tokenizer

PROMPTS, COMPLETIONS = [[7, 8], [9, 10, 11]], [[12, 13, 14], [15]]
CPU = torch.device("cpu")


@pytest.fixture
def parents(tmp_path):
    return [tiny_causal(tmp_path / "here" / name, seed=seed, initializer_range=0.2) for seed, name in enumerate("ab")]


def mix(parents, output, weights=(0.7, 0.3)):
    models = [{"model": one, "parameters": {"weight": w}} for one, w in zip(parents, weights, strict=True)]
    merge(load_merge_recipe({"merge_method": "logit_mixture", "models": models, "output_dir": str(output)}))
    return output


def by_hand(parents, weights):
    """(T, V) float64 log-probabilities along each completion, from plain passes of the parents."""
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        total = 0.0
        for path, weight in zip(parents, weights, strict=True):
            model = AutoModelForCausalLM.from_pretrained(path).double().eval()
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            total = total + weight * logits.log_softmax(-1)
        found.append(total.log_softmax(-1))
    return found


def test_it_is_the_mixture_of_its_parents(parents, tmp_path):
    model = load_policy(str(mix(parents, tmp_path / "here" / "mixed")), device=CPU)
    assert isinstance(model, LogitMixture) and model.weights == (0.7, 0.3)
    laws = by_hand(parents, (0.7, 0.3))
    wanted = [law[range(len(ids)), ids].sum().item() for law, ids in zip(laws, COMPLETIONS, strict=True)]
    assert completion_logps(model, PROMPTS, COMPLETIONS).tolist() == pytest.approx(wanted, abs=CLOSE)
    base = load_policy(parents[0], device=CPU)
    ones = by_hand(parents[:1], (1.0,))
    conditional = [(p.exp() * (p - q)).sum().item() for p, q in zip(laws, ones, strict=True)]
    _, measured = sequence_kl(model, base, PROMPTS, COMPLETIONS)
    assert measured.tolist() == pytest.approx(conditional, abs=CLOSE)


def test_it_moves_with_its_parents_and_not_without(parents, tmp_path):
    mix(parents, tmp_path / "here" / "mixed")
    named = json.loads((tmp_path / "here" / "mixed" / "mixture.json").read_text())["models"]
    assert named == ["../a", "../b"]
    shutil.move(tmp_path / "here", tmp_path / "there")
    there = tmp_path / "there" / "mixed"
    assert len(load_policy(str(there), device=CPU).models) == 2
    shutil.move(there, tmp_path / "alone")
    with pytest.raises(InputError, match=r"there is no model at .*: a mixture needs its parents where they were"):
        load_policy(str(tmp_path / "alone"), device=CPU)


def test_a_folder_behind_a_link_finds_its_parents(parents, tmp_path):
    (tmp_path / "scratch" / "deep").mkdir(parents=True)
    (tmp_path / "outputs").symlink_to(tmp_path / "scratch" / "deep")
    assert len(load_policy(str(mix(parents, tmp_path / "outputs" / "mixed")), device=CPU).models) == 2


def test_its_content_is_that_of_its_parents(parents, tmp_path):
    first = model_fingerprint(str(mix(parents, tmp_path / "one")))
    assert model_fingerprint(str(mix(parents, tmp_path / "two"))) == first
    assert model_fingerprint(str(mix(parents, tmp_path / "three", (0.5, 0.5)))) != first
    tiny_causal(tmp_path / "here" / "b", seed=9, initializer_range=0.2)
    assert model_fingerprint(str(tmp_path / "one")) != first


@pytest.mark.parametrize("text", ["no json", "{}", '{"models": 3, "weights": [1]}', '{"models": [], "weights": ["x"]}'])
def test_a_damaged_file_is_one_line(parents, tmp_path, text):
    folder = mix(parents, tmp_path / "mixed")
    (folder / "mixture.json").write_text(text)
    with pytest.raises(InputError, match="is no mixture's file: it needs models and weights"):
        load_policy(str(folder), device=CPU)


def test_parents_of_other_vocabularies_are_refused(parents, tmp_path):
    other = tiny_causal(tmp_path / "other", tokenizer=tiny_tokenizer(["a", "b"]), seed=3)
    with pytest.raises(InputError, match=r"vocabular|shape"):
        mix([parents[0], other], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_a_mixture_of_one_policy_is_measured_as_that_policy(tmp_path):
    """Samples are those of the same random streams, so that the whole table agrees; of the base alone the KL is 0."""
    keys = tiny_experiment(tmp_path)
    base = str(keys["model_name_or_path"])
    policy = tiny_causal(tmp_path / "policy", "llama", seed=5)
    found = {}
    for name, path in (
        ("policy", policy),
        ("mixed", str(mix([policy, base], tmp_path / "mixed", (1.0, 0.0)))),
        ("base", str(mix([base, base + "/."], tmp_path / "same", (0.5, 0.5)))),
    ):
        recipe = load_recipe({**keys, "policy_name_or_path": path, "output_dir": str(tmp_path / f"out {name}")})
        found[name] = evaluate(recipe)
    assert found["mixed"].kl.mean == pytest.approx(found["policy"].kl.mean, abs=CLOSE)
    for ours, theirs in zip(found["mixed"].win_rates, found["policy"].win_rates, strict=True):
        assert ours.mean == pytest.approx(theirs.mean)
    assert found["policy"].kl.mean > 0.05
    assert found["base"].kl.mean == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(found["base"].main.mean)
