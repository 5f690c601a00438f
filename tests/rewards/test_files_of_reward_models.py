"""What the files of a reward model hold: weights without a place, and adapters on a base model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.loader import load_reward
from infalign.types import InputError
from tests.tiny import CLOSE, tiny_causal, tiny_classifier, tiny_tokenizer

PROMPTS = ["the cat", "the dog ran", "i like the moon and the sun", "why"]
COMPLETIONS = [" sat on the mat .", "", " very very much , thanks !", " so big"]
OPTIONS = {"pair": False, "as_chat": False}


def warnings_in(text):
    """What infalign said, without the libraries' progress."""
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def with_weights(path, **more):
    file = Path(path) / "model.safetensors"
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bias_that_the_head_has_no_place_for_is_told(family, tmp_path, capsys):
    path = tiny_classifier(tmp_path / "rm", family)
    before = load_reward(path, OPTIONS)(PROMPTS, COMPLETIONS)
    assert warnings_in(capsys.readouterr().err) == []
    with_weights(path, **{"score.bias": torch.ones(1)})
    np.testing.assert_array_equal(load_reward(path, OPTIONS)(PROMPTS, COMPLETIONS), before)
    (told,) = warnings_in(capsys.readouterr().err)
    assert "score.bias in its files left out" in told and "off by the same constant" in told


@pytest.mark.parametrize(
    "key", ["v_head.summary.weight", "score.2.weight", "score.dense.weight", "classifier.weight", "regression.weight"]
)
def test_the_weights_of_another_head_are_refused(key, tmp_path):
    path = with_weights(tiny_classifier(tmp_path / "rm"), **{key: torch.ones(1, 32), "score.bias": torch.ones(1)})
    with pytest.raises(InputError, match=rf"hold weights of another head, {key}, for which LlamaForSequenceClass"):
        load_reward(path, OPTIONS)


def test_a_backbone_weight_without_a_place_is_told(tmp_path, capsys):
    """A Qwen2 called a llama: its attention has biases that a llama lacks."""
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    load_reward(with_weights(tiny_classifier(tmp_path / "rm"), **more), OPTIONS)
    (told,) = warnings_in(capsys.readouterr().err)
    assert "q_proj.bias in its files left out" in told and "scores differ" in told


def test_what_old_files_and_other_tasks_leave_behind_is_silent(tmp_path, capsys):
    more = {
        "lm_head.weight": torch.ones(5, 32), "model.rotary_emb.inv_freq": torch.ones(3),
        "model.layers.0.attn.bias": torch.ones(1), "cls.predictions.bias": torch.ones(4),
        "model.embeddings.position_ids": torch.ones(4),
    }  # fmt: skip
    load_reward(with_weights(tiny_classifier(tmp_path / "rm"), **more), OPTIONS)
    assert warnings_in(capsys.readouterr().err) == []


# --- adapters -------------------------------------------------------------------------------------------------------


def adapter(base, folder, *, tokenizer=True, labels=1, **options):
    """An adapter with a head, as `SEQ_CLS` trains it: saved under `folder`; the model that it was saved from."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    config = LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "init_lora_weights": False, **options})
    found = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "modules_to_save" in name:
                weight.normal_(0.0, 0.3)
    found.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return found.eval()


def by_definition(model, reward):
    """Each sequence alone, through the adapted model's own forward."""
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([reward.function.encode(p, c)])).logits[0, 0].item()
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_an_adapter_scores_as_the_model_that_it_was_saved_from(family, tmp_path):
    """On a base that has no head, or another one; found by a path and as a `PeftModel` itself; and merged by peft."""
    base = tiny_causal(tmp_path / "base") if family == "llama" else tiny_classifier(tmp_path / "base", family)
    model = adapter(base, tmp_path / "adapter", fan_in_fan_out=family == "gpt2")
    reward = load_reward("adapter", OPTIONS, base_dir=tmp_path)
    wanted = by_definition(model, reward)
    assert np.ptp(wanted) > 1e-2
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), wanted, atol=CLOSE)
    whole = model.merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    merged = load_reward(str(tmp_path / "merged"), OPTIONS)
    np.testing.assert_allclose(merged(PROMPTS, COMPLETIONS), wanted, atol=CLOSE)
    assert reward.function.model.config.num_labels == 1


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_peft_model_is_scored_as_it_is(family, tmp_path):
    base = tiny_classifier(tmp_path / "base", family)
    model = adapter(base, tmp_path / "adapter")
    reward = load_reward(model, OPTIONS)
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), by_definition(model, reward), atol=CLOSE)
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), load_reward(str(tmp_path / "adapter"), OPTIONS)(
        PROMPTS, COMPLETIONS), atol=CLOSE)  # fmt: skip
    assert isinstance(model, PeftModel) and any("lora" in name for name, _ in model.named_parameters())


def test_the_base_may_lie_beside_and_have_the_tokenizer(tmp_path):
    """`base_model_name_or_path` relative to the adapter's folder; several labels need a choice, as always."""
    model = adapter(tiny_causal(tmp_path / "base"), tmp_path / "adapter", tokenizer=False, labels=3)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "../base"}))
    with pytest.raises(InputError, match="has 3 labels"):
        load_reward(str(tmp_path / "adapter"), OPTIONS)
    reward = load_reward(str(tmp_path / "adapter"), {**OPTIONS, "label": 0})
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), by_definition(model, reward), atol=CLOSE)


def test_an_adapter_whose_base_is_gone_says_which(tmp_path):
    base = tiny_classifier(tmp_path / "base")
    adapter(base, tmp_path / "adapter")
    shutil.rmtree(base)
    with pytest.raises(InputError, match=rf"adapter of the base model '{base}', which can't be loaded .*put it there"):
        load_reward("adapter", OPTIONS, base_dir=tmp_path)


def test_without_peft_its_install_line_is_given(tmp_path, monkeypatch):
    adapter(tiny_classifier(tmp_path / "base"), tmp_path / "adapter")
    monkeypatch.setattr(sys.modules["infalign.rewards.adapters"].importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"needs the package peft: pip install 'infalign\[peft\]'"):
        load_reward("adapter", OPTIONS, base_dir=tmp_path)


def test_an_adapter_without_a_head_on_a_base_without_one_is_refused(tmp_path):
    adapter(tiny_causal(tmp_path / "base"), tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    with pytest.raises(InputError, match=r"has no trained score.weight, neither in the adapter nor in its base"):
        load_reward("adapter", OPTIONS, base_dir=tmp_path)


def test_adapters_that_can_not_be_used_are_refused(tmp_path):
    base = tiny_classifier(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    prompting = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(InputError, match="with a learned prompt, which can't be scored here"):
        ClassifierReward(prompting, tokenizer=tiny_tokenizer())
    prompting.save_pretrained(tmp_path / "prompting")
    with pytest.raises(InputError, match="the adapter can't be merged into its base"):
        load_reward("prompting", OPTIONS, base_dir=tmp_path)
    adapter(base, tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has adapter_config.json and no adapter_model.safetensors"):
        load_reward("pickled", OPTIONS, base_dir=tmp_path)
    adapter(base, tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="the adapter's weights can't be read"):
        load_reward("damaged", OPTIONS, base_dir=tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=r"holds no model \(no config.json, no adapter_config.json\)"):
        load_reward("nothing", base_dir=tmp_path)


def test_a_whole_model_with_an_adapters_config_beside_it_says_what_to_take_out(tmp_path):
    """As after merging into the folder that the adapter was trained in: transformers, too, takes it for an adapter."""
    path = tiny_classifier(tmp_path / "rm")
    adapter(tiny_classifier(tmp_path / "base", seed=3), tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", path)
    with pytest.raises(InputError, match=r"take adapter_config.json out if the model next to it is whole"):
        load_reward(path, OPTIONS)
