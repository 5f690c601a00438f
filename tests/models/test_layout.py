"""The layout of weights is nobody's business: values are the same, and what is trained is given back as it was."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM

from infalign.models.layout import columnwise, lay_columnwise
from tests.tiny import CLOSE, tiny_causal

IDS = torch.tensor([[5, 6, 7, 8]])


def test_results_stay(tmp_path):
    path = tiny_causal(tmp_path / "model", "llama", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    turned = copy.deepcopy(model)
    lay_columnwise(turned)
    assert turned.lm_head.weight is turned.model.embed_tokens.weight, "tied weights stay tied"
    assert turned.model.layers[0].mlp.up_proj.weight.t().is_contiguous()
    torch.testing.assert_close(turned(IDS).logits, model(IDS).logits, atol=CLOSE, rtol=0)


def test_meanwhile_leaves_the_originals(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
    before = {name: (p, p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    with columnwise(model):
        assert model.model.layers[0].mlp.up_proj.weight.t().is_contiguous()
    for name, p in model.named_parameters():
        assert (p, p.data_ptr(), p.stride()) == before[name]


def test_other_precisions_are_left_alone(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"), dtype=torch.bfloat16)
    lay_columnwise(model)
    assert all(p.is_contiguous() for p in model.parameters())
