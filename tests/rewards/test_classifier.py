"""Classifiers as rewards: the score is the model's own for that sequence alone, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from infalign.rewards.classifier import ClassifierReward
from infalign.types import InputError, RewardError
from tests.tiny import BOS, CHAT_TEMPLATE, CLOSE, EOS, PAD, tiny_causal, tiny_classifier, tiny_tokenizer

PROMPTS = ["the cat", "the dog ran", "i like the moon and the sun", "why"]
COMPLETIONS = [" sat on the mat .", "", " very very much , thanks !", " so big </s>"]
ENCODERS = ("bert", "distilbert", "deberta-v2")


def by_definition(path, sequences, label=0):
    """Each sequence alone, without padding, through the model's own forward."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0, label].item() for ids in sequences]


@pytest.mark.parametrize("pad", [PAD, EOS, None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_batches_score_like_single_sequences_whatever_the_padding(tmp_path, family, pad):
    path = tiny_classifier(tmp_path / "rm", family, tokenizer=tiny_tokenizer(pad=pad))
    reward = ClassifierReward(path, device="cpu")
    sequences = [reward.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert sequences[3][-1] == reward.tokenizer.eos_token_id
    scores = reward(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scores, by_definition(path, sequences), atol=CLOSE)
    one_by_one = [reward([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(scores, one_by_one, atol=CLOSE)
    assert np.ptp(scores) > 1e-2 and reward.counts["scored"] == 8


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(tmp_path, family):
    path = tiny_classifier(tmp_path / "rm", family)
    reward = ClassifierReward(path, device="cpu")
    sequences = [reward.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), by_definition(path, sequences), atol=CLOSE)


def test_an_encoder_without_padding_token(tmp_path):
    path = tiny_classifier(tmp_path / "rm", "bert", tokenizer=tiny_tokenizer(pad=None))
    reward = ClassifierReward(path, device="cpu")
    one_by_one = [reward([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), one_by_one, atol=CLOSE)


def test_small_batches_score_like_one(tmp_path):
    path = tiny_classifier(tmp_path / "rm")
    whole, pieces = (ClassifierReward(path, batch_tokens=n, device="cpu")(PROMPTS, COMPLETIONS) for n in (10**6, 1))
    np.testing.assert_allclose(whole, pieces, atol=CLOSE)


def test_chats_go_through_the_models_own_template(tmp_path):
    path = tiny_classifier(tmp_path / "rm")
    reward = ClassifierReward(path, device="cpu")
    prompt, completion = [{"role": "user", "content": "why"}], [{"role": "assistant", "content": "so"}]
    expected = "<|im_start|> user why <|im_end|> <|im_start|> assistant so <|im_end|>"
    assert reward.render(prompt, completion) == reward.render(prompt, "so") == expected
    sequence = reward.tokenizer.convert_tokens_to_ids(expected.split())
    np.testing.assert_allclose(reward([prompt], [completion]), by_definition(path, [sequence]), atol=CLOSE)


def test_chats_without_template(tmp_path):
    path = tiny_classifier(tmp_path / "rm", tokenizer=tiny_tokenizer(chat_template=False))
    prompt = [{"role": "user", "content": "why"}]
    with pytest.raises(InputError, match=r"reward model .* has no chat template; give chat_template"):
        ClassifierReward(path, device="cpu")([prompt], ["so"])
    given = ClassifierReward(path, device="cpu", chat_template=CHAT_TEMPLATE)
    assert given.render(prompt, "so").startswith("<|im_start|> user")
    assert given.fingerprint != ClassifierReward(path, device="cpu").fingerprint
    refusing = ClassifierReward(path, device="cpu", chat_template="{{ raise_exception('no ' ~ who) }}",
                                chat_template_kwargs={"who": "way"})  # fmt: skip
    with pytest.raises(InputError, match="refuses a chat with the roles user, assistant: no way"):
        refusing([prompt], ["so"])


def test_one_bos_at_most(tmp_path):
    tokenizer = tiny_tokenizer(add_bos=True, chat_template=f"{{{{ '{BOS}{BOS}' }}}}{CHAT_TEMPLATE}")
    reward = ClassifierReward(tiny_classifier(tmp_path / "rm", tokenizer=tokenizer), device="cpu")
    assert reward.render("why", " so") == f"{BOS} why so"
    assert reward.render(f"{BOS}why", " so") == f"{BOS} why so"
    assert reward.render([{"role": "user", "content": "why"}], "so").startswith(f"{BOS} <|im_start|>")


def test_nothing_to_score(tmp_path):
    with pytest.raises(InputError, match="together have no tokens"):
        ClassifierReward(tiny_classifier(tmp_path / "rm"), device="cpu")([""], [""])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_several_labels_need_a_choice(tmp_path, family):
    names = {0: "bad", 1: "fair", 2: "good"}
    path = tiny_classifier(tmp_path / "rm", family, 3, id2label=names)
    with pytest.raises(InputError, match=r"has 3 labels \(0: bad, 1: fair, 2: good\); set label"):
        ClassifierReward(path, device="cpu")
    for label in ("great", 3, -1, True):
        with pytest.raises(InputError, match=r"has no label .*; its labels are 0: bad"):
            ClassifierReward(path, device="cpu", label=label)
    by_name, by_index = (ClassifierReward(path, device="cpu", label=label) for label in ("good", 2))
    sequences = [by_name.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(by_name(PROMPTS, COMPLETIONS), by_definition(path, sequences, 2), atol=CLOSE)
    assert by_name.fingerprint == by_index.fingerprint
    assert by_name.fingerprint != ClassifierReward(path, device="cpu", label=0).fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fresh_head_is_refused(tmp_path, family):
    path = tiny_causal(tmp_path / "lm", family)
    with pytest.raises(InputError, match=r"has no trained score.weight: it would be freshly initialised"):
        ClassifierReward(path, device="cpu")


def test_no_model_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded as a sequence classifier"):
        ClassifierReward(str(tmp_path / "none"), device="cpu")
    path = tiny_classifier(tmp_path / "rm")
    for file in (tmp_path / "rm").glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer for the reward model"):
        ClassifierReward(path, device="cpu")
    assert ClassifierReward(path, device="cpu", tokenizer=tiny_tokenizer()).counts["scored"] == 0


def test_pickled_weights_are_refused(tmp_path):
    path = tiny_classifier(tmp_path / "rm")
    weights = AutoModelForSequenceClassification.from_pretrained(path).state_dict()
    torch.save(weights, tmp_path / "rm" / "pytorch_model.bin")
    (tmp_path / "rm" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot be loaded .* safetensors"):
        ClassifierReward(path, device="cpu")


class BatchMinded(LlamaForSequenceClassification):
    """A model whose score depends on its neighbours: no `score` head that we could read ourselves."""

    def __init__(self, config):
        super().__init__(config)
        self.verdict, self.score = self.score, None

    def forward(self, input_ids, attention_mask=None, **_):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return type("Output", (), {"logits": self.verdict(hidden.mean(1)) + input_ids.shape[0]})


def test_a_score_that_depends_on_the_batch_is_refused():
    tokenizer = tiny_tokenizer()
    model = BatchMinded(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=0,
    ))  # fmt: skip
    with pytest.raises(InputError, match="the score depends on the batch"):
        ClassifierReward(model, tokenizer=tokenizer)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_classifier(tmp_path / "rm"))
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="its weights are not finite"):
        ClassifierReward(model, tokenizer=tiny_tokenizer())


def test_long_sequences(tmp_path):
    path = tiny_classifier(tmp_path / "rm", tokenizer=tiny_tokenizer(add_bos=True))
    assert ClassifierReward(path, device="cpu").max_length == 512
    prompts, completions = ["the cat sat on", "why"], [" the mat", " so"]
    with pytest.raises(RewardError, match=r"completion 0 has 7 tokens with its prompt, .* takes 4; shorten"):
        ClassifierReward(path, device="cpu", max_length=4)(prompts, completions)
    masking = ClassifierReward(path, device="cpu", max_length=4, too_long="mask")
    scores = masking(prompts, completions)
    assert np.isnan(scores[0]) and np.isfinite(scores[1]) and masking.counts["masked"] == 1
    cutting = ClassifierReward(path, device="cpu", max_length=4, too_long="truncate")
    kept = cutting.tokenizer.convert_tokens_to_ids([BOS, "on", "the", "mat"])
    np.testing.assert_allclose(cutting(prompts, completions)[0], by_definition(path, [kept])[0], atol=CLOSE)
    assert cutting.counts == {"scored": 2, "truncated": 1, "masked": 0}


def test_options_are_checked(tmp_path):
    for options, message in [
        ({"batch_tokens": 0}, "batch_tokens is at least 1 token, got 0"),
        ({"max_length": 0}, "max_length is at least 1 token, got 0"),
        ({"too_long": "cut"}, "too_long is one of error, truncate, mask, got 'cut'"),
    ]:
        with pytest.raises(InputError, match=message):
            ClassifierReward("unused", **options)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_bf16_backbone_has_a_float32_head(tmp_path, family):
    path = tiny_classifier(tmp_path / "rm", family)
    reward = ClassifierReward(path, device="cpu", dtype=torch.bfloat16)
    head = reward.model.score if family == "llama" else reward.model.classifier
    assert head.weight.dtype == torch.float32
    assert next(reward._backbone.parameters()).dtype == torch.bfloat16
    scores = reward(PROMPTS, COMPLETIONS)
    assert (scores != torch.tensor(scores).bfloat16().double().numpy()).any()  # finer than bf16 can say
    assert not any(parameter.requires_grad for parameter in reward.model.parameters()) and not reward.model.training
