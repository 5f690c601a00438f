"""The head in pieces gives the log-probabilities, entropies and gradients of whole logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.models import head as head_module
from infalign.models.head import Head, head_of, pieces
from tests.tiny import tiny_causal


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(head_module, "PIECE_BYTES", 4 * 50 * 16)


def tensors(bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 8), (50, 8), (50,)] if bias else [(37, 8), (50, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, None), (1.0, 2.0), (1.3, 1.5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_against_whole_logits(bias, scale, cap, temperature):
    """Plain float64 arithmetic on the formula of the logits."""
    given = tensors(bias)
    labels = torch.randint(0, 50, (37,), generator=torch.Generator().manual_seed(1))
    logits = given[0] @ given[1].t() + (given[2] if bias else 0)
    logits = scale * logits if cap is None else cap * torch.tanh(scale * logits / cap)
    expected = torch.log_softmax(logits / temperature, -1)
    single = [one.detach().float().requires_grad_() for one in given]
    head = Head(single[1], single[2] if bias else None, scale, cap)
    logps, entropies = head.logps(single[0], labels, temperature, entropy=True)
    torch.testing.assert_close(logps.double(), expected.gather(1, labels[:, None])[:, 0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(entropies.double(), -(expected.exp() * expected).sum(1), atol=2e-6, rtol=1e-5)
    weights = torch.linspace(-1, 1, 37)
    (logps * weights).sum().backward()
    (expected.gather(1, labels[:, None])[:, 0] * weights).sum().backward()
    for found, wanted in zip(single, given, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, atol=1e-5, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient():
    states, weight = tensors(False, torch.float32)
    weight.requires_grad_(False)
    logps, _ = Head(weight, None, 1.0, None).logps(states, torch.zeros(37, dtype=torch.long))
    logps.sum().backward()
    assert weight.grad is None and states.grad.abs().sum() > 0


def test_under_autocast_it_multiplies_in_bf16():
    states, weight = tensors(False, torch.float32)
    labels = torch.arange(37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _ = Head(weight, None, 1.0, None).logps(states, labels)
        plain = torch.log_softmax((states @ weight.t()).float(), -1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, plain, atol=1e-5, rtol=1e-5)
    found, wanted = (
        torch.autograd.grad(logps.sum(), [states, weight]),
        torch.autograd.grad(plain.sum(), [states, weight]),
    )
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).abs().max() < 0.05 * b.abs().max()


def test_pieces_hold_every_token_once():
    assert [token for piece in pieces(100, 50) for token in range(piece.start, piece.stop)] == list(range(100))
    assert list(pieces(0, 50)) == []


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_the_heads_of_real_models(family, config, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, family, **config)).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found = head_of(model).logits(model.base_model(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_a_model_with_more_behind_its_head_is_not_trusted(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
    forward = model.forward

    def doubled(**kwargs):
        output = forward(**kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    assert head_of(model) is None and head_of(model) is None
    assert capsys.readouterr().err.count("its logits are not those of its head alone") == 1


def test_an_adapter_on_the_head_is_not_skipped(tmp_path):
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
    assert head_of(model) is not None
    wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert head_of(wrapped.get_base_model()) is None
