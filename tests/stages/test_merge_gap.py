"""Which mixture of logits a merge approximates: where weights are those of the merge, weights on one tensor tell."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from infalign.merging.plan import read_plan
from infalign.stages.merge.recipe import load_merge_recipe
from infalign.stages.merge.run import merge
from infalign.stages.sweep.gap import mixture_weights
from tests.tiny import tiny_causal


def weights(method, own, base=None, **parameters):
    """Of a merge of models with these weights."""
    models = [{"model": name, **({"parameters": {"weight": one}} if one else {})} for name, one in own.items()]
    yaml = {"merge_method": method, "models": models, "parameters": parameters}
    return mixture_weights(read_plan({**yaml, **({"base_model": base} if base else {})}))


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (weights("linear", {"a": 1, "b": 3}), {"a": 0.25, "b": 0.75}),
        (weights("linear", {"a": 1, "b": 3}, normalize=False), {"a": 1, "b": 3}),
        (weights("logit_mixture", {"a": 1, "b": 0.5}), {"a": 1, "b": 0.5}),
        (weights("logit_mixture", {"a": 0.5, "b": 0.2}, "x"), {"a": 0.5, "b": 0.2}),
        (weights("task_arithmetic", {"a": 0.5, "b": 0.5}, "x"), {"a": 0.5, "b": 0.5}),
        (weights("task_arithmetic", {"a": 1, "b": 1}, "x"), {"a": 1, "b": 1, "x": -1}),
        (weights("task_arithmetic", {"a": 0.5, "b": 0.5}, "x", **{"lambda": 0.4}), {"a": 0.2, "b": 0.2, "x": 0.6}),
        (weights("ties", {"a": 1, "b": 3}, "x", **{"lambda": 1.6}), {"a": 0.4, "b": 1.2, "x": -0.6}),
        (weights("ties", {"a": 1, "b": 1, "x": 5}, "x"), {"a": 0.5, "b": 0.5}),
        (weights("slerp", {"a": None, "b": None}, "a", t=0.3), {"a": 0.7, "b": 0.3}),
    ],
)
def test_the_mixtures_weights(found, wanted):
    assert found == pytest.approx(wanted)


def test_they_are_those_that_the_merge_has(tmp_path):
    """Of models that differ from the base in one tensor by constants, the merged constant is the mixture's mean."""
    base = tiny_causal(tmp_path / "base", layers=1)
    moves = {"a": 1.0, "b": 10.0}
    for name, move in moves.items():
        tiny_causal(tmp_path / name, layers=1)
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        save_file({key: one + move * (key == "model.norm.weight") for key, one in tensors.items()}, path,
                  metadata={"format": "pt"})  # fmt: skip
    start = load_file(tmp_path / "base" / "model.safetensors")["model.norm.weight"]
    cases = [
        ("linear", {"a": 1.0, "b": 3.0}, {}),
        ("task_arithmetic", {"a": 0.5, "b": 0.25}, {"lambda": 0.4}),
        ("ties", {"a": 1.0, "b": 3.0}, {"lambda": 0.5, "density": 1.0}),
    ]
    for number, (method, own, parameters) in enumerate(cases):
        models = [{"model": str(tmp_path / name), "parameters": {"weight": one}} for name, one in own.items()]
        yaml = {"merge_method": method, "models": models, "parameters": parameters}
        yaml |= {} if method == "linear" else {"base_model": base}
        out = tmp_path / f"out{number}"
        merge(load_merge_recipe({**yaml, "output_dir": str(out)}))
        mixed = mixture_weights(read_plan(yaml))
        wanted = sum(moves[name] * mixed[str(tmp_path / name)] for name in moves)
        merged = load_file(out / "model.safetensors")["model.norm.weight"]
        torch.testing.assert_close(merged - start, torch.full_like(start, wanted), atol=1e-5, rtol=0)
