"""Shared prefixes give what plain passes give: states, gradients, decoded logits, on every kind of model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from infalign.generation.hf import decode_rows
from infalign.models import shared_prefix
from infalign.models.shared_prefix import (
    PASS_COST,
    Decoding,
    buckets,
    continuation,
    encode_prefixes,
    pad_left,
    pad_right,
    unique_rows,
    why_plain,
    without_router_logits,
)
from infalign.types import SamplingSettings
from tests.tiny import CLOSE, tiny_causal, tiny_classifier

RNG = np.random.default_rng(0)
PROMPTS = [(5, 6, 7, 8), (9, 10), (11,), (5, 6, 7, 8), (9, 10), (12, 13, 14, 15, 16, 17, 18)]
COMPLETIONS = [(4, 5, 6), (7,), (8, 9, 10, 11), (10, 11), (12, 13, 14), (15,)]
SHAPES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, many heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"head_dim": 16},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None, "output_router_logits": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "output_router_logits": True,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "output_router_logits": True,
    },
    "qwen3_moe, router logits not asked for": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request, tmp_path_factory):
    path = tiny_causal(tmp_path_factory.mktemp("model"), request.param.split(",")[0], **SHAPES[request.param])
    return AutoModelForCausalLM.from_pretrained(path).eval()


def plain_logps(model, prompt, completion):
    """Teacher forcing without cache, padding or batch."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def shared_logps(model, prompts, completions):
    """Each row's log-probabilities from prefixes that are computed once."""
    ids_BP, mask_BP = pad_left(prompts, 0, model.device)
    ids_BT, mask_BT = pad_right(completions, 0, model.device)
    first, of_row = unique_rows(ids_BP, mask_BP)
    prefix = encode_prefixes(model, ids_BP[first], mask_BP[first])
    ids = torch.cat([ids_BP[:, -1:], ids_BT[:, :-1]], 1)
    mask = torch.cat([mask_BP[:, -1:], mask_BT[:, :-1]], 1)
    inputs = {**continuation(prefix, of_row, ids, mask), **without_router_logits(model)}
    logps = torch.log_softmax(model(**inputs).logits.float(), -1)
    found = logps.gather(-1, ids_BT[..., None])[..., 0]
    return [row[: len(completion)] for row, completion in zip(found, completions, strict=True)]


def gradients(model, rows):
    """Gradients of a loss that weighs every token differently."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, sum(map(len, rows)))
    (torch.cat(list(rows)) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_logps_and_gradients(model, inner):
    plain = [plain_logps(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    shared = shared_logps(inner, PROMPTS, COMPLETIONS)
    torch.testing.assert_close(torch.cat(shared), torch.cat(plain), atol=CLOSE, rtol=0)
    expected, found = gradients(model, plain), gradients(model, shared)
    assert found.keys() == expected.keys() and found
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, atol=1e-5 * largest, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_log_probabilities_and_gradients(model):
    assert why_plain(model) is None
    assert_equal_logps_and_gradients(model, model)


def test_with_lora(model):
    conv = model.config.model_type == "gpt2"  # its layers are Conv1D
    experts = hasattr(model.config, "output_router_logits")  # PEFT warns of its own patterns for their weights
    modules = ["q_proj", "v_proj"] if experts else "all-linear"
    wrapped = get_peft_model(model, LoraConfig(target_modules=modules, init_lora_weights=False, fan_in_fan_out=conv))
    try:
        inner = wrapped.get_base_model()
        assert why_plain(inner) is None
        assert_equal_logps_and_gradients(wrapped, inner)
    finally:
        wrapped.unload()


@torch.no_grad()
def test_decoding_gives_the_logits_of_whole_sequences(model):
    """Also when rows leave, prompts leave, and the groups are of unlike size."""
    decoding = Decoding(model, PROMPTS, room=4)
    rows, written = list(range(len(PROMPTS))), [list(prompt) for prompt in PROMPTS]
    for keep in ([0, 1, 2, 3, 4, 5], [0, 2, 3, 4], [1, 2, 3], [0, 2]):
        rows = [rows[place] for place in keep] if len(keep) < len(rows) else rows
        if len(keep) < len(decoding.positions):
            decoding.keep(torch.tensor(keep))
        found = decoding.logits(torch.tensor([written[row][-1] for row in rows]))
        for place, row in enumerate(rows):
            expected = model(torch.tensor([written[row]])).logits[0, -1]
            torch.testing.assert_close(found[place], expected, atol=CLOSE, rtol=0)
            written[row].append(int(RNG.integers(1, 40)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_in_bf16_within_its_rounding(family, tmp_path):
    path = tiny_causal(tmp_path, family, initializer_range=0.1)
    exact, rough = (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert why_plain(rough) is None
    expected = torch.cat([plain_logps(exact, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    plain = torch.cat([plain_logps(rough, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    shared = torch.cat(shared_logps(rough, PROMPTS, COMPLETIONS))
    assert (shared - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-3
    decoded = Decoding(rough, PROMPTS, room=1).logits(torch.tensor([prompt[-1] for prompt in PROMPTS])).float()
    whole = torch.stack([exact(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    assert (decoded - whole).abs().max() < 0.05


def test_the_distribution_of_samples(tmp_path):
    """20,000 two-token samples of a model with many tokens (several blocks of the draw) against its probabilities."""
    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama", vocab_size=300, initializer_range=0.2))
    prompts = [(5, 6, 7), (8,)]
    rows = [prompts[row % 2] for row in range(20_000)]
    with torch.no_grad():
        found = decode_rows(model, rows, RNG.random((len(rows), 2)), SamplingSettings(2), [])
        for number, prompt in enumerate(prompts):
            first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
            seen = np.bincount([ids[0] for ids, _ in found[number::2]], minlength=300)
            assert chi_square_p(seen, first) > 1e-4
            top = int(first.argmax())
            second = torch.softmax(model(torch.tensor([[*prompt, top]])).logits[0, -1].double(), -1).numpy()
            seen = np.bincount([ids[1] for ids, _ in found[number::2] if ids[0] == top], minlength=300)
            assert seen.sum() > 100 and chi_square_p(seen, second) > 1e-4


def chi_square_p(counts, probabilities):
    """p-value of counts under probabilities, rare outcomes put together."""
    from scipy import stats  # noqa: PLC0415

    expected = probabilities / probabilities.sum() * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    return stats.chisquare(observed, wanted).pvalue


class TestTrust:
    """A model is compared with the plain path before it is trusted, once, and says why when it is not."""

    def test_sliding_windows(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "mistral", sliding_window=4))
        assert "DynamicSlidingWindowLayer" in why_plain(model)

    def test_gpt_oss_is_sampled_row_by_row(self, tmp_path):
        """Its windows slide. The router logits that its config asks for would fail on the second token."""
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "output_router_logits": True}
        rope = {"rope_type": "default", "rope_theta": 1e4}
        path = tiny_causal(tmp_path, "gpt_oss", rope_parameters=rope, **experts)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        assert "DynamicSlidingWindowLayer" in why_plain(model)
        rows = decode_rows(model, PROMPTS, RNG.random((len(PROMPTS), 3)), SamplingSettings(3), [])
        for prompt, (ids, logps) in zip(PROMPTS, rows, strict=True):
            expected = plain_logps(model, prompt, ids).detach()
            torch.testing.assert_close(torch.tensor(logps), expected, atol=1e-5, rtol=1e-5)

    def test_gradient_checkpointing_only_while_training(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama")).train()
        model.gradient_checkpointing_enable()
        assert "gradient checkpointing" in why_plain(model)
        assert why_plain(model.eval()) is None

    def test_dropout_does_not_mislead(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5))
        assert why_plain(model.train()) is None and model.training

    def test_a_model_that_ignores_its_positions(self, tmp_path, monkeypatch):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
        forward = model.model.rotary_emb.forward

        def ignores(x, position_ids):
            return forward(x, position_ids=position_ids - position_ids[:, :1])

        monkeypatch.setattr(model.model.rotary_emb, "forward", ignores)
        assert "change its results by" in why_plain(model)

    def test_attention_of_its_own(self, tmp_path, monkeypatch):
        """A model that does not call the attention that it is told to would decode on its own tokens alone."""
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
        monkeypatch.setattr(shared_prefix, "ATTENTION", "sdpa")
        assert why_plain(model) is not None

    @pytest.mark.parametrize("rope", ["longrope", "dynamic"])
    def test_positions_that_change_with_the_length(self, rope, tmp_path):
        """Longer than the probe, a prefix and its continuation would be turned at different speeds."""
        factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if rope == "longrope" else {}
        scaling = {
            "rope_type": rope,
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            **factors,
        }
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama", rope_parameters=scaling))
        assert rope in why_plain(model)

    @pytest.mark.parametrize("broken", ["states", "decoding"])
    def test_numbers_that_are_none(self, broken, tmp_path, monkeypatch):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
        if broken == "states":
            before = shared_prefix.encode_prefixes

            def wrong(*args):
                prefix = before(*args)
                prefix.cache.layers[0].keys.fill_(float("nan"))
                return prefix

            monkeypatch.setattr(shared_prefix, "encode_prefixes", wrong)
        else:
            monkeypatch.setattr(Decoding, "logits", lambda self, ids: torch.full((len(ids), 100), float("nan")))
        assert "its results by nan" in why_plain(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_layer_with_attention_of_its_own(self, dtype, tmp_path):
        """In bf16, with flat attention, its numbers alone would not tell."""
        path = tiny_causal(tmp_path, "bloom", n_head=2, initializer_range=0.02)
        assert why_plain(AutoModelForCausalLM.from_pretrained(path, dtype=dtype)) is not None

    def test_mixed_precision_is_judged_as_such(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert why_plain(model) is None
        other = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
        other.forward = torch.autocast("cpu", dtype=torch.bfloat16)(other.forward)  # as accelerate wraps it
        assert why_plain(other) is None

    def test_a_model_that_fails(self, tmp_path, monkeypatch):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))

        def fails(*args, **kwargs):
            raise ValueError("no position_ids here")

        monkeypatch.setattr(model.model, "forward", fails)
        assert "ValueError: no position_ids here" in why_plain(model)

    def test_it_is_asked_once(self, tmp_path, monkeypatch):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"))
        assert why_plain(model) is None
        monkeypatch.setattr(model, "forward", None)
        assert why_plain(model) is None

    def test_decoding_leaves_the_attention_as_it_was(self, model):
        before = model.config._attn_implementation
        Decoding(model, PROMPTS, room=1).logits(torch.tensor([1] * len(PROMPTS)))
        assert model.config._attn_implementation == before


def test_classifiers_are_compared_too(tmp_path):
    assert why_plain(AutoModelForSequenceClassification.from_pretrained(tiny_classifier(tmp_path, "llama"))) is None


class TestBuckets:
    def cost(self, lengths, batches):
        return sum(PASS_COST + len(batch) * max(lengths[row] for row in batch) for batch in batches)

    def test_no_cut_is_cheaper(self):
        """Against every cut of the sorted rows."""
        for tokens, beside, most in itertools.product((300, 700, 10_000), (0, 30), (20, 60, 120, 300)):
            lengths = RNG.integers(1, most, 9).tolist()
            order = sorted(range(9), key=lambda row: -lengths[row])
            best = np.inf
            for cuts in itertools.product((False, True), repeat=8):
                edges = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), 9]
                batches = [order[a:b] for a, b in itertools.pairwise(edges)]
                if all(len(b) == 1 or len(b) * (lengths[b[0]] + beside) <= tokens for b in batches):
                    best = min(best, self.cost(lengths, batches))
            assert self.cost(lengths, buckets(lengths, tokens, beside)) == best

    @pytest.mark.parametrize("tokens", [1, 50, 10**6])
    def test_every_row_once_within_the_budget(self, tokens):
        lengths = RNG.integers(1, 60, 100).tolist()
        batches = buckets(lengths, tokens)
        assert sorted(row for batch in batches for row in batch) == list(range(100))
        assert all(len(b) == 1 or len(b) * max(lengths[row] for row in b) <= tokens for b in batches)
        assert buckets([], tokens) == []
