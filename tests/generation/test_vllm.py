"""`generation: vllm` without vLLM: a stand-in engine sees what is asked of it; a real one is in `tests/engines`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import infalign
from infalign.generation.plan import Request
from infalign.generation.vllm_engine import Engine, VLLMSampler, check_vllm
from infalign.stages.experiment import CALIBRATION, Experiment
from infalign.stages.recipe import load_recipe
from infalign.types import InputError, SamplingSettings
from tests.e2e.experiment import tiny_experiment

REQUESTS = [Request("a", 3, (20, 21)), Request("a", 4, (20, 21)), Request("b", 0, (30,))]


class Decoder:
    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


@pytest.fixture
def vllm(monkeypatch):
    """A module `vllm` whose engine answers token 7 and, for even numbers of a request, the end token 2."""
    asked = []

    class LLM:
        def __init__(self, path, **options):
            if path == "unknown":
                raise ValueError("Model architectures ['X'] are\nnot supported")
            asked.append((path, options))
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: asked.append("shut down")))

        def generate(self, prompts, parameters, use_tqdm):
            asked.append((prompts, parameters))
            told = {7: SimpleNamespace(logprob=-0.5), 2: SimpleNamespace(logprob=-0.25)}
            answers = []
            for one in parameters:
                rows = [[7, 2] if number % 2 == 0 else [7, 7] for number in range(one.n)]
                outputs = [
                    SimpleNamespace(index=number, token_ids=ids, logprobs=[{i: told[i]} for i in ids])
                    for number, ids in enumerate(rows)
                ]
                answers.append(SimpleNamespace(outputs=outputs[::-1]))
            return answers

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **keys: SimpleNamespace(**keys)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    importlib.invalidate_caches()
    return asked


def test_a_prompts_samples_are_one_request(vllm):
    settings = SamplingSettings(max_tokens=2, temperature=0.7)
    sampler = VLLMSampler(Engine("model", {"dtype": "float32"}), Decoder(), settings, (2, 5), "0/calibration")
    samples = sampler.sample(REQUESTS)
    assert [(one.key, one.index, one.token_ids, one.finished) for one in samples] == [
        ("a", 3, (7, 2), True),
        ("a", 4, (7, 7), False),
        ("b", 0, (7, 2), True),
    ]
    assert samples[0].text == "7 2" and np.allclose(samples[0].token_logps, [-0.5, -0.25])
    (_, options), (prompts, parameters) = vllm
    assert options["logprobs_mode"] == "processed_logprobs" and options["generation_config"] == "vllm"
    assert prompts == [{"prompt_token_ids": [20, 21]}, {"prompt_token_ids": [30]}]
    assert [one.n for one in parameters] == [2, 1] and parameters[0].seed != parameters[1].seed
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "stop_token_ids")
    assert [getattr(parameters[0], name) for name in fields] == [0.7, 1.0, 0, 0.0, 1.0, 2, [2, 5]]
    again = VLLMSampler(sampler.engine, Decoder(), settings, (2, 5), "0/evaluation")
    again.sample(REQUESTS[:1])
    assert len(vllm) == 3, "the engine started once"
    assert vllm[2][1][0].seed != parameters[0].seed, "another purpose, another stream"
    sampler.engine.close()
    assert vllm[-1] == "shut down"


def test_an_engine_that_cannot_run_the_model_is_one_line(vllm):
    with pytest.raises(InputError, match=r"^vLLM can't run unknown: Model architectures \['X'\] are not supported"):
        _ = Engine("unknown").llm


@pytest.mark.parametrize(
    ("version", "told"), [("0.9.2", "needs vllm 0.10 or newer, found vllm 0.9.2"), ("0.32.0", None)]
)
def test_the_version(vllm, version, told, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    if told is None:
        check_vllm()
    else:
        with pytest.raises(InputError, match=told):
            check_vllm()


def test_without_vllm_it_says_so(tmp_path, monkeypatch):
    recipe = load_recipe({**tiny_experiment(tmp_path), "generation": "vllm"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="generation: vllm needs the package vllm"):
        Experiment(recipe).sampler("model", CALIBRATION)
    with pytest.raises(InputError, match="generation: vllm needs the package vllm"):
        infalign.run(recipe, dry=True)  # known before any work


def test_what_it_does_not_sample(vllm, tmp_path, monkeypatch):
    experiment = Experiment(load_recipe({**tiny_experiment(tmp_path), "generation": "vllm"}))
    for file in ("adapter_config.json", "mixture.json"):
        (tmp_path / file).touch()
        with pytest.raises(InputError, match=f"needs one whole model, and .* has {file}"):
            experiment.sampler(tmp_path, CALIBRATION)
        (tmp_path / file).unlink()
    monkeypatch.setattr("infalign.stages.engines.world_size", lambda: 2)
    with pytest.raises(InputError, match="samples in one process, got 2"):
        experiment.sampler(experiment.base_path, CALIBRATION)


def test_its_samples_are_not_those_of_another_sampler(vllm, tmp_path):
    keys = tiny_experiment(tmp_path)
    ours, theirs = (
        Experiment(load_recipe({**keys, "generation": one})).sampling_parts(keys["model_name_or_path"], CALIBRATION)
        for one in ("transformers", "vllm")
    )
    assert theirs == {**ours, "generation": "vllm", "engine": 1} != ours
