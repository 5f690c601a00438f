"""`infalign merge` with merge_method dam: from files to a model, killed and continued, refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from infalign.data.examples import read_examples
from infalign.stages.merge import dam
from infalign.stages.merge.recipe import load_merge_recipe
from infalign.stages.merge.run import merge
from infalign.types import InputError
from tests.tiny import tiny_causal, tiny_tokenizer

TEXTS = {"one": "the cat sat on the mat .", "two": "i love the blue moon and you ."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dam")
    for seed, (name, text) in enumerate(TEXTS.items()):
        tiny_causal(folder / name, layers=1, seed=seed, initializer_range=0.1)
        rows = [{"prompt": text[: 4 + row], "completion": text[4 + row :]} for row in range(6)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(folder, out, name="dam", **parameters):
    plan = {
        "merge_method": "dam",
        "models": [{"model": one, "data": f"{one}.jsonl"} for one in TEXTS],
        "parameters": {"steps": 6, "batch_size": 2, "learning_rate": 0.01, "top_k": 16, **parameters},
    }
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(plan))
    return load_merge_recipe(path, {"output_dir": str(out), "use_cpu": True})


def test_the_model_is_the_coefficients(folder, tmp_path, capsys):
    merge(recipe(folder, tmp_path / "out"))
    assert "divergence from the parents" in capsys.readouterr().out
    found = load_file(tmp_path / "out" / "model.safetensors")
    learned = load_file(tmp_path / "out" / "dam" / "coefficients.safetensors")
    parents = [load_file(folder / name / "model.safetensors") for name in TEXTS]
    assert learned.keys() == found.keys()
    for name, weight in found.items():
        expected = sum(
            parent[name].double().numpy() * c.double().numpy() for parent, c in zip(parents, learned[name], strict=True)
        )
        np.testing.assert_allclose(weight.double().numpy(), expected, atol=1e-6)
    assert max(float((c - 0.5).abs().max()) for c in learned.values()) > 0.01
    losses = json.loads((tmp_path / "out" / "dam" / "losses.json").read_text())
    assert np.shape(losses["divergence"]) == (6, 2)
    assert (tmp_path / "out" / "dam" / "coefficients.png").stat().st_size > 10_000
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]  # nothing is left beside it


def test_a_killed_merge_goes_on_and_ends_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("infalign.merging.learning.CHECKPOINT_SECONDS", 0.0)
    merge(recipe(folder, tmp_path / "whole"))
    real, calls = dam.Progress.advance, []

    def killed(self, count=1, note=""):
        calls.append(self.title)
        if calls.count("dam: learning") == 4:
            raise KeyboardInterrupt
        real(self, count, note)

    monkeypatch.setattr(dam.Progress, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    calls.clear()
    merge(recipe(folder, tmp_path / "out"))
    assert calls.count("dam: learning") == 3  # of six steps three were done, and the parents are not asked again
    assert set(calls) == {"dam: learning"}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_texts_are_examples_too(folder):
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS.values()))
    examples = read_examples(str(folder / "texts.jsonl"), tiny_tokenizer(), 5, 10, np.random.default_rng(0))
    assert sorted(len(one.ids) for one in examples) == [5, 5]
    assert {one.start for one in examples} == {1}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, r"steps: expected an integer, got 2\.5"),
        ({"learning_rate": -1}, "learning_rate must be more than 0"),
        ({"cosine": -0.1}, "cosine must be at least 0"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"temperature": "hot"}, "temperature: expected a number"),
    ],
)
def test_parameters_out_of_range(folder, tmp_path, parameters, message):
    with pytest.raises(InputError, match=message):
        merge(recipe(folder, tmp_path / "out", "wrong", **parameters))
    assert not (tmp_path / "out").exists()


def test_missing_data_and_other_vocabularies(folder, tmp_path):
    path = folder / "missing.yml"
    plan = {"merge_method": "dam", "models": [{"model": one, "data": "nix.jsonl"} for one in TEXTS]}
    path.write_text(yaml.safe_dump(plan))
    with pytest.raises(InputError, match=r"data 'nix\.jsonl': no such file"):
        merge(load_merge_recipe(path, {"output_dir": str(tmp_path / "out")}))
    words = [f"w{number}" for number in range(len(tiny_tokenizer()) - 6)]  # as many tokens, other ones
    tiny_causal(folder / "words", layers=1, tokenizer=tiny_tokenizer(words))
    plan = {"merge_method": "dam", "models": [{"model": one, "data": "one.jsonl"} for one in ("one", "words")]}
    path.write_text(yaml.safe_dump(plan))
    with pytest.raises(InputError, match="models of one vocabulary"):
        merge(load_merge_recipe(path, {"output_dir": str(tmp_path / "out")}))


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero3"])
def test_two_processes_learn_the_same_merge_as_one(folder, tmp_path, launch):
    recipe(folder, tmp_path / "one")  # writes the YAML
    command = [sys.executable, "-m", "infalign", "merge", "--config", str(folder / "dam.yml"), "--use_cpu"]
    many = ["--accelerate_config", launch, "--num_processes", "2"]
    for name, words in (("one", []), ("two", many)):
        out = ["--output_dir", str(tmp_path / name)]
        done = subprocess.run([*command, *out, *words], capture_output=True, text=True, check=False, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("merged model:") == 1
    one, two = (load_file(tmp_path / name / "dam" / "coefficients.safetensors") for name in ("one", "two"))
    assert max(float((c - 0.5).abs().max()) for c in one.values()) > 0.01
    # Adam turns a gradient of rounding size into a whole step: where the gradient is more, both agree
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    assert float((apart > 1e-4).float().mean()) < 0.02
