"""A server with other weights than the recipe's, a key on an open line, rollouts of another distribution."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from infalign.cli import main
from infalign.models.loading import end_token_ids, load_policy, load_tokenizer
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.training.config import CTRLConfig
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.generation.completions import Served, serving


@pytest.mark.parametrize("style", ["vllm", "sglang"])
def test_a_failed_weight_sync_stops_before_a_sample_is_kept(style, tmp_path, capsys):
    """The server still holds what the recipe's model was before an update; its name tells nothing."""
    keys = tiny_experiment(tmp_path)
    model, tokenizer = (
        load_policy(keys["model_name_or_path"], device=torch.device("cpu")),
        load_tokenizer(keys["model_name_or_path"]),
    )
    stale = Served(model, tokenizer, style, ends=end_token_ids(model, tokenizer))
    updated = AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"])
    with torch.no_grad():
        for weight in updated.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    updated.save_pretrained(keys["model_name_or_path"])
    with serving(stale) as url:
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump({**keys, "generation": "openai", "base_url": url, "server_concurrency": 4})
        )
        capsys.readouterr()
        assert main(["calibrate", "--config", str(tmp_path / "recipe.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is not the recipe's model" in err and "load the recipe's weights" in err
    assert not list((tmp_path / "out" / "calibration").rglob("0*.parquet"))


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://10.1.2.3:8000/v1", True),
        ("http://gpu7/v1", True),
        ("https://gpu7/v1", False),
        ("http://localhost:8000/v1", False),
        ("http://[::1]:8000/v1", False),
    ],
)
def test_a_key_over_plain_http_is_told_once(url, warned, tmp_path, capsys):
    keys = {**tiny_experiment(tmp_path), "generation": "openai", "base_url": url, "policy_base_url": url}
    capsys.readouterr()
    Experiment(load_recipe({**keys, "api_key_env": "INFALIGN_TEST_KEY"}))
    err = capsys.readouterr().err
    assert err.count("over plain http: use https") == warned and (url in err) == warned
    Experiment(load_recipe(keys))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"generation_kwargs": {"temperature": 0.7}}, r"otherwise than calibration \(temperature=0.7\)"),
        ({"generation_kwargs": '{"top_k": 50}'}, r"otherwise than calibration \(top_k=50\)"),
        ({"generation_kwargs": {"min_p": 0.1, "seed": 1}}, r"otherwise than calibration \(min_p=0.1\)"),
        ({"generation_kwargs": {"bad_words": ["no"]}}, r"otherwise than calibration \(bad_words="),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2: log-probabilities and KL would be those of another"),
    ],
)
@pytest.mark.parametrize("use_vllm", [True, False])
def test_rollouts_of_another_distribution_than_calibration_are_refused(use_vllm, keys, words, tmp_path):
    with pytest.raises(InputError, match=words):
        CTRLConfig(str(tmp_path), use_cpu=True, use_vllm=use_vllm, **keys)


@pytest.mark.parametrize("kwargs", [None, {}, {"temperature": 0.7, "top_k": 0, "min_p": 0.0, "seed": 3}])
def test_generation_kwargs_that_repeat_the_settings_pass(kwargs, tmp_path):
    CTRLConfig(str(tmp_path), use_cpu=True, use_vllm=True, temperature=0.7, generation_kwargs=kwargs)


def test_a_grammar_on_rollouts_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"vllm_structured_outputs_regex='yes\|no': constrains rollouts"):
        CTRLConfig(str(tmp_path), use_cpu=True, use_vllm=True, vllm_structured_outputs_regex="yes|no")
