"""`infalign merge`: every method against its definition in float64, its limits, mergekit's traps, and mistakes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infalign.merging.parents import check_loadable
from infalign.merging.plan import methods
from infalign.stages.merge.recipe import load_merge_recipe
from infalign.stages.merge.run import merge
from infalign.types import InputError, TrainingError
from tests.tiny import tiny_causal, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two models near it, in which every number has moved."""
    folder = tmp_path_factory.mktemp("models")
    tiny_causal(folder / "base", layers=1)
    for seed, name in enumerate(("one", "two"), start=1):
        shutil.copytree(folder / "base", folder / name)
        weights, rng = load_file(folder / "base" / "model.safetensors"), torch.Generator().manual_seed(seed)
        moved = {key: value + 0.1 * torch.randn(value.shape, generator=rng) for key, value in weights.items()}
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def entries(*weights, **own):
    return [
        {"model": name, "parameters": {"weight": weight, **own}}
        for name, weight in zip(("one", "two"), weights, strict=False)
    ]


def made(folder, out, **plan):
    """The merged tensors in float64, by name."""
    path = folder / f"{out.name}.yml"
    path.write_text(yaml.safe_dump(plan))
    merge(load_merge_recipe(path, {"output_dir": str(out)}))
    return {name: value.double().numpy() for name, value in load_file(out / "model.safetensors").items()}


def tensors(models, name):
    return {key: value.double().numpy() for key, value in load_file(models / name / "model.safetensors").items()}


def arc(t, a, b, linear_from=2.0):
    """Spherical interpolation of two flat vectors; linear where they point the same way."""
    cosine = np.clip(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)
    if abs(cosine) > linear_from:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def trimmed(delta, density):
    kept = np.zeros(delta.size)
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")[: max(1, int(density * delta.size))]
    kept[order] = delta.ravel()[order]
    return kept.reshape(delta.shape)


def elected(deltas, weights):
    """TIES: of the weighted task vectors those with the sign of their sum, divided by the weights that agree."""
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1.0, -1.0)
    agree = [np.sign(one) == sign for one in weighted]
    total = sum(one * same for one, same in zip(weighted, agree, strict=True))
    divisor = sum(weight * same for weight, same in zip(weights, agree, strict=True))
    return total / np.where(divisor == 0, 1.0, divisor)


def test_linear(models, tmp_path):
    found = made(models, tmp_path / "out", merge_method="linear", models=entries(1.0, 3.0))
    one, two = tensors(models, "one"), tensors(models, "two")
    for name, value in found.items():
        np.testing.assert_allclose(value, (one[name] + 3.0 * two[name]) / 4.0, atol=1e-6)


def test_linear_of_one_model_is_that_model(models, tmp_path):
    found = made(models, tmp_path / "out", merge_method="linear", models=entries(0.3))
    for name, value in tensors(models, "one").items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(models, tmp_path, t):
    two = [{"model": "one"}, {"model": "two"}]
    found = made(models, tmp_path / "out", merge_method="slerp", base_model="one", models=two, parameters={"t": t})
    one, two = tensors(models, "one"), tensors(models, "two")
    for name, value in found.items():
        np.testing.assert_allclose(value, arc(t, one[name], two[name], linear_from=0.9995), atol=2e-6)


def test_nuslerp_keeps_the_length_of_the_change(models, tmp_path):
    plan = {"merge_method": "nuslerp", "base_model": "base", "models": entries(0.6, 0.4)}
    found = made(models, tmp_path / "out", **plan)
    base, one, two = (tensors(models, name) for name in ("base", "one", "two"))
    lengths = []
    for name, value in found.items():
        change = arc(0.4, one[name] - base[name], two[name] - base[name])
        np.testing.assert_allclose(value, base[name] + change, atol=2e-6)
        lengths.append(np.linalg.norm(value - base[name]) / np.linalg.norm(one[name] - base[name]))
    big = [length for length, value in zip(lengths, found.values(), strict=True) if value.size > 500]
    assert np.mean(big) == pytest.approx(1.0, abs=0.05)  # the average would shorten unrelated changes to .72


def test_task_arithmetic(models, tmp_path):
    plan = {"merge_method": "task_arithmetic", "base_model": "base", "models": entries(1.0, -0.5)}
    found = made(models, tmp_path / "out", **plan, parameters={"lambda": 0.7})
    base, one, two = (tensors(models, name) for name in ("base", "one", "two"))
    for name, value in found.items():
        change = (one[name] - base[name]) - 0.5 * (two[name] - base[name])
        np.testing.assert_allclose(value, base[name] + 0.7 * change, atol=1e-6)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties(models, tmp_path, density):
    plan = {"merge_method": "ties", "base_model": "base", "models": entries(0.8, 0.5)}
    found = made(models, tmp_path / "out", **plan, parameters={"density": density, "lambda": 0.9})
    base, one, two = (tensors(models, name) for name in ("base", "one", "two"))
    for name, value in found.items():
        deltas = [trimmed(side[name] - base[name], density) for side in (one, two)]
        expected = base[name] + 0.9 * elected(deltas, (0.8, 0.5))
        wrong = np.abs(value - expected) > 5e-6  # float32 may order two nearly equal magnitudes the other way
        assert wrong.mean() <= 2 / value.size


def test_equal_parents_merge_to_themselves(models, tmp_path):
    shutil.copytree(models / "one", models / "same", dirs_exist_ok=True)
    both = [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", "same")]
    for method, more in (("linear", {}), ("ties", {"base_model": "base", "parameters": {"density": 1.0}})):
        found = made(models, tmp_path / method, merge_method=method, models=both, **more)
        for name, value in tensors(models, "one").items():
            np.testing.assert_allclose(found[name], value, atol=2e-6)


def test_dare_ties_is_seeded_and_drops_what_its_density_says(models, tmp_path):
    plan = {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": entries(1.0)[:1],
        "parameters": {"density": 0.4},
    }
    first, again = (made(models, tmp_path / name, **plan) for name in ("first", "again"))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    recipe = load_merge_recipe(models / "first.yml", {"output_dir": str(tmp_path / "other"), "seed": 7})
    merge(recipe)
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert any(not np.array_equal(first[name], other[name].double().numpy()) for name in first)
    base, one = tensors(models, "base"), tensors(models, "one")
    name = "model.embed_tokens.weight"
    delta, change = one[name] - base[name], first[name] - base[name]
    kept = np.abs(change) > 1e-6
    size = delta.size
    assert abs(kept.mean() - 0.4) < 4 * np.sqrt(0.4 * 0.6 / size)
    # what is kept is scaled to the task vector's L1 norm, which is about 1 / density
    scale = change[kept] / delta[kept]
    np.testing.assert_allclose(scale, np.abs(delta).sum() / np.abs(delta[kept]).sum(), rtol=1e-3)


def test_density_of_ties_is_the_papers_where_none_is_given(models, capsys):
    given = {"merge_method": "ties", "base_model": "base", "models": entries(1.0, 1.0), "output_dir": "x"}
    plan = load_merge_recipe(given).plan
    assert plan.yaml["parameters"]["density"] == 0.2
    assert "density is not given: 0.2" in plan.notes[0]
    given["parameters"] = {"density": 0.5}
    assert load_merge_recipe(given).plan.notes == ()
    assert load_merge_recipe(given).plan.yaml["parameters"]["density"] == 0.5


def test_notes_on_what_mergekit_does_silently():
    slerp = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}], "output_dir": "x"}
    notes = load_merge_recipe({**slerp, "parameters": {"t": [0.0, 0.5, 1.0]}}).plan.notes
    assert any("nuslerp" in note for note in notes)
    assert any("embeddings" in note for note in notes)


def test_a_changed_parent_is_read_again_and_a_stale_merge_refused(models, tmp_path):
    shutil.copytree(models / "one", models / "mine")
    plan = {"merge_method": "linear", "models": [{"model": "mine", "parameters": {"weight": 1.0}}]}
    before = made(models, tmp_path / "out", **plan)
    weights = {name: value + 1.0 for name, value in load_file(models / "mine" / "model.safetensors").items()}
    save_file(weights, models / "mine" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="made with other settings"):
        made(models, tmp_path / "out", **plan)
    merge(load_merge_recipe(models / "out.yml", {"output_dir": str(tmp_path / "out"), "overwrite": True}))
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in before.items():
        np.testing.assert_allclose(after[name].double().numpy(), value + 1.0, atol=1e-5)


def test_the_result_is_a_model_with_its_recipe(models, tmp_path):
    plan = {"merge_method": "linear", "models": entries(1.0, 1.0), "dtype": "bfloat16"}
    made(models, tmp_path / "out", **plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert next(model.parameters()).dtype == torch.bfloat16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merge_method: linear" in card
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "merge"
    for content in manifest["parts"]["models"].values():
        assert content[0] in card
    assert not list((tmp_path / "out").glob(".*"))


def test_infinite_parents_are_not_passed_on(models, tmp_path):
    shutil.copytree(models / "one", models / "infinite")
    weights = load_file(models / "infinite" / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, models / "infinite" / "model.safetensors", metadata={"format": "pt"})
    plan = {"merge_method": "linear", "models": [{"model": "infinite", "parameters": {"weight": 1.0}}]}
    with pytest.raises(TrainingError, match=r"1 of 32 numbers of the merged model\.norm\.weight are not finite"):
        made(models, tmp_path / "out", **plan)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def adapter(models, name, base):
    torch.manual_seed(5)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models / base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(models / name)
    return model.merge_and_unload().state_dict()


def test_adapters_are_merged_with_their_base(models, tmp_path):
    whole = adapter(models, "lora", "base")
    for number, name in enumerate(("lora", "base+lora")):
        both = [{"model": name, "parameters": {"weight": 0.5}}, {"model": "two", "parameters": {"weight": 0.5}}]
        found = made(models, tmp_path / str(number), merge_method="linear", models=both)
        two = tensors(models, "two")
        for key, value in found.items():
            np.testing.assert_allclose(value, (whole[key].double().numpy() + two[key]) / 2, atol=1e-6)


def test_an_adapter_of_another_base_is_refused(models):
    adapter(models, "lora of one", "one")
    plan = {"merge_method": "ties", "base_model": "base", "models": [{"model": "lora of one"}, {"model": "two"}]}
    plan["parameters"] = {"weight": 1.0}
    path = models / "other.yml"
    path.write_text(yaml.safe_dump(plan))
    with pytest.raises(InputError, match=r"was trained on .*one, not on .*base"):
        merge(load_merge_recipe(path, {"output_dir": str(models / "out")}))


WRONG = {
    "method": ({"merge_method": "linaer"}, r"'linaer' is unknown: did you mean 'linear'"),
    "no method": ({"merge_method": None}, r"merge_method missing \(one of "),
    "key": ({"dtpye": "float32"}, r"unknown key dtpye: did you mean 'dtype'"),
    "model key": ({"models": [{"model": "one", "parmeters": {"weight": 1}}]}, r"did you mean 'parameters'"),
    "parameter": ({"models": entries(1.0, wieght=2.0)}, r"linear has no parameter wieght: did you mean 'weight'"),
    "foreign": ({"models": entries(1.0, density=0.2)}, r"linear has no parameter density"),
    "shared": ({"models": entries(1.0, normalize=True)}, r"normalize is of the whole merge"),
    "zero": ({"models": entries(0.5, -0.5)}, r"0\.5, -0\.5 sum to zero"),
    "nothing": ({"models": []}, r"exactly one of models, slices and modules"),
    "both": ({"slices": [{"sources": []}]}, r"got models and slices"),
    "no name": ({"models": [{"parameters": {"weight": 1}}]}, r"models\[0\] must name a model"),
    "twice": ({"models": [*entries(1.0), *entries(2.0)]}, r"names one model twice"),
    "missing": ({"models": [{"model": "one"}]}, r"linear needs weight"),
    "base": ({"merge_method": "ties"}, r"ties needs base_model"),
    "three": (
        {"merge_method": "slerp", "base_model": "one", "parameters": {"t": 0.5},
         "models": [{"model": name} for name in ("one", "two", "three", "four")]},
        r"slerp merges 1 at most with its base, got 3",
    ),
    "base beside two": (
        {"merge_method": "slerp", "base_model": "three", "parameters": {"t": 0.5},
         "models": [{"model": name} for name in ("one", "two")]},
        r"slerp merges 1 at most with its base, got 2",
    ),
    "value": ({"models": entries(None)}, r"weight must be a number"),
    "list": ({"models": {"model": "one"}}, r"models: expected a list"),
    "seed": ({"seed": -1}, r"seed must be between"),
    "shard": ({"shard_gb": 0}, r"shard_gb must be more than 0"),
    "output": ({"output_dir": ""}, r"output_dir must be given"),
    "dam": ({"merge_method": "dam", "models": [{"model": "one"}, {"model": "two"}]}, r"\(one\) needs data"),
    "dam parameter": ({"merge_method": "dam", "parameters": {"stpes": 3}}, r"dam has no parameter stpes: did you mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_get_one_clear_line(name):
    changes, message = WRONG[name]
    plan = {"merge_method": "linear", "models": entries(0.5, 0.5), "output_dir": "x", **changes}
    plan = {key: value for key, value in plan.items() if value is not None}
    with pytest.raises(InputError, match=message):
        load_merge_recipe(plan)


def test_other_shapes_are_named(models, tmp_path):
    tiny_causal(models / "wide", layers=1, hidden=48)
    tiny_causal(models / "deep", layers=2)
    tiny_causal(models / "words", layers=1, tokenizer=tiny_tokenizer(["a", "b", "c"]))
    expected = {
        "wide": r"\S+ is \[\d+, 32\] in one and \[\d+, 48\] in wide: .*architecture and size",
        "deep": r"model\.layers\.1\.\S+ is in deep and not in one",
        "words": r"their vocabularies differ: set tokenizer: \{source: base\}",
    }
    for other, message in expected.items():
        both = [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", other)]
        with pytest.raises(InputError, match=message):
            made(models, tmp_path / other, merge_method="linear", models=both)


def test_mergekits_names_are_known():
    known = methods()
    assert {"linear", "slerp", "nuslerp", "ties", "dare_ties", "task_arithmetic", "della", "karcher", "dam"} <= set(
        known
    )
    assert known["ties"].needs_base
    assert known["linear"].own == {"weight"}


def test_a_missing_or_old_mergekit_gets_one_line(monkeypatch):
    import importlib.metadata  # noqa: PLC0415

    real = importlib.metadata.version
    plan = {"merge_method": "linear", "models": entries(0.5, 0.5), "output_dir": "x"}
    for version, message in (("0.1.3", "not free software"), (None, r"pip install 'infalign\[merge\]'")):

        def told(name, version=version):
            if name != "mergekit":
                return real(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError
            return version

        monkeypatch.setattr(importlib.metadata, "version", told)
        with pytest.raises(InputError, match=message):
            load_merge_recipe(plan)


def test_killed_at_any_instant_nothing_passes_for_a_model(models, tmp_path):
    path = models / "killed.yml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries(0.5, 0.5)}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "infalign", "merge", "--config", str(path), "--output_dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".out.*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_mergekits_own_yaml_works_unchanged(models, tmp_path, monkeypatch):
    text = """\
slices:
  - sources:
      - model: one
        layer_range: [0, 1]
      - model: two
        layer_range: [0, 1]
merge_method: slerp
base_model: one
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5]
    - value: 0.5
dtype: float32
"""
    path = models / "own.yml"
    path.write_text(text)
    merge(load_merge_recipe(path, {"output_dir": str(tmp_path / "ours")}))
    monkeypatch.chdir(models)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "mergekit.scripts.run_yaml",
            "own.yml",
            str(tmp_path / "theirs"),
            "--no-write-model-card",
        ],
        check=True,
        capture_output=True,
    )
    ours, theirs = (load_file(Path(tmp_path) / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_the_config_wants_must_be_there(models, tmp_path, capsys):
    folder = tmp_path / "odd"
    shutil.copytree(models / "one", folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 2}, r"lacks model\.layers\.1\.\S+, which its config wants"),
        ({"intermediate_size": 48}, r"is \[64, 32\], and its config wants \[48, 32\]"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(TrainingError, match=message):
            check_loadable(folder)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MineForCausalLM"]}))
    check_loadable(folder)
    assert "no architecture of transformers' own" in capsys.readouterr().err
