"""Reward models of the architectures that people have: batches, padding and shared prompts change no score.

Each score is compared with plain transformers on that sequence alone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.process import ProcessReward
from infalign.types import InputError
from tests.tiny import CLOSE, tiny_classifier, tiny_tokenizer

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    # decoders
    "bloom": {}, "falcon": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "glm4": {}, "gpt2": {}, "gpt_bigcode": {},
    "gpt_neox": {}, "gpt_oss": {}, "llama": {}, "mistral": {"sliding_window": 4}, "mixtral": {}, "mpt": {},
    "nemotron": {}, "olmo2": {}, "opt": {}, "persimmon": {}, "phi": {}, "phi3": {}, "phimoe": {}, "qwen2": {},
    "qwen3": {}, "qwen3_moe": EXPERTS, "smollm3": {}, "stablelm": {}, "starcoder2": {},
    # encoders
    "albert": {}, "bert": {}, "deberta-v2": {}, "distilbert": {}, "electra": {}, "modernbert": {}, "mpnet": {},
    "roberta": {}, "xlm-roberta": {},
}  # fmt: skip
DEPENDS_ON_PADDING = ("convbert", "fnet", "nystromformer")
PROMPTS = ["the cat", "the dog ran", "the dog ran", "the dog ran", "i like the moon and the sun", "why", "why"]
COMPLETIONS = [" sat on the mat .", "", " in the rain", " so", " very very much , thanks !", " so big </s>", " not"]
# tokenizers of a family's own class would read the words otherwise, so each model gets the one that it was made with


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_scores_as_plain_transformers(family, tmp_path):
    path = tiny_classifier(tmp_path / "rm", family, **FAMILIES[family])
    reward = ClassifierReward(path, tokenizer=tiny_tokenizer(), device="cpu", pair=False)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        rows = [torch.tensor([reward.encode(*pair)]) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
        alone = np.array([model(input_ids=row).logits[0, 0].item() for row in rows])
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), alone, atol=CLOSE)
    assert np.ptp(alone) > 1e-2 and np.ptp(alone[1:4]) > 1e-3


@pytest.mark.parametrize("family", DEPENDS_ON_PADDING)
def test_a_model_that_mixes_padding_in_is_refused(family, tmp_path):
    """Its attention reaches the padding whatever the mask says: no score of a batch is the sequence's own."""
    with pytest.raises(InputError, match="the score depends on the batch"):
        ClassifierReward(tiny_classifier(tmp_path / "rm", family), tokenizer=tiny_tokenizer(), device="cpu")


def test_an_encoder_with_decoder_wants_the_end_that_its_tokenizer_gives(tmp_path):
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    path = tiny_classifier(tmp_path / "rm", "bart", **shape, **heads)
    with pytest.raises(InputError, match=r"scoring three short texts failed \(.*eos.*belong together"):
        ClassifierReward(path, tokenizer=tiny_tokenizer(), device="cpu")
    ending = tiny_tokenizer()
    ending.backend_tokenizer.post_processor = _ends(ending)
    reward = ClassifierReward(path, tokenizer=ending, device="cpu", pair=False)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    pairs = [pair for pair in zip(PROMPTS, COMPLETIONS, strict=True) if "</s>" not in pair[1]]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([reward.encode(*pair)])).logits[0, 0].item() for pair in pairs]
    np.testing.assert_allclose(reward(*zip(*pairs, strict=True)), alone, atol=CLOSE)


def _ends(tokenizer):
    return TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )


STEPS = (
    "bert",
    "distilbert",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "modernbert",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)


@pytest.mark.parametrize("family", STEPS)
def test_a_process_reward_model_scores_steps_as_plain_transformers(family, tmp_path):
    path = tiny_classifier(tmp_path / "rm", family, num_labels=2, of="token", **FAMILIES[family])
    reward = ProcessReward(path, tokenizer=tiny_tokenizer(), device="cpu", label=1, separator=" ;", aggregate="prod")
    completions = [completion.replace(" ", " ; ") for completion in COMPLETIONS]
    model = AutoModelForTokenClassification.from_pretrained(path).eval()
    products = []
    for prompt, completion, found in zip(PROMPTS, completions, reward.step_scores(PROMPTS, completions), strict=True):
        ids, places = reward.encode(prompt, completion)
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)[:, 1].numpy()
        np.testing.assert_allclose(found, alone[places], atol=CLOSE)
        assert len(found) == max(1, len(completion.split(" ; ")) - 1)
        products.append(np.prod(found))
    np.testing.assert_allclose(reward(PROMPTS, completions), products, atol=1e-12)
    assert np.ptp(products) > 1e-2
