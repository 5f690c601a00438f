"""The sampler draws from the model's own distribution, and a sample depends on nothing but its own stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from infalign.generation import likelihood
from infalign.generation.hf import HFSampler, decode_rows
from infalign.generation.likelihood import completion_states, sequence_kl
from infalign.generation.plan import Request, plan_batches
from infalign.models.head import head_of
from infalign.models.loading import end_token_ids, load_policy, load_tokenizer
from infalign.models.shared_prefix import why_plain
from infalign.runtime.seeds import uniforms
from infalign.types import SamplingSettings
from tests.tiny import CLOSE, tiny_causal

CPU = torch.device("cpu")
PROMPTS = [(5, 6, 7, 8), (9, 10), (11,), (5, 6, 7, 8)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2", "gemma2"])
def model(request, tmp_path_factory):
    path = tiny_causal(tmp_path_factory.mktemp(request.param), request.param)
    return load_policy(path, device=CPU), load_tokenizer(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tiny_causal(tmp_path_factory.mktemp("llama"), "llama")
    return load_policy(path, device=CPU), load_tokenizer(path)


def sampler(pair, max_tokens=6, seed=0, **settings):
    model, tokenizer = pair
    return HFSampler(model, tokenizer, SamplingSettings(max_tokens, **settings), end_token_ids(model, tokenizer), seed)


def requests(prompts=PROMPTS, per_prompt=5):
    return [Request(f"p{number}", index, ids) for number, ids in enumerate(prompts) for index in range(per_prompt)]


def plain_logps(model, prompt, completion, temperature=1.0):
    """Teacher forcing without cache, padding or batch."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_models_own(model, temperature):
    for request, sample in zip(requests(), sampler(model, temperature=temperature).sample(requests()), strict=True):
        expected = plain_logps(model[0], request.prompt_ids, sample.token_ids, temperature)
        np.testing.assert_allclose(sample.token_logps, expected, atol=CLOSE)


def test_a_sample_is_a_function_of_its_stream_alone(model):
    together = sampler(model).sample(requests())
    alone = [sampler(model).sample([request])[0] for request in requests()]
    backwards = sampler(model).sample(requests()[::-1])[::-1]
    assert [s.token_ids for s in together] == [s.token_ids for s in alone] == [s.token_ids for s in backwards]


def test_tokens_follow_inverse_cdf(llama):
    """Token by token from plain forwards: the first whose cumulative probability exceeds the uniform."""
    model, tokenizer = llama
    ends = end_token_ids(model, tokenizer)
    for request, sample in zip(requests(), sampler(llama).sample(requests()), strict=True):
        ids = list(request.prompt_ids)
        for u in uniforms(0, request.key, request.index, 6):
            with torch.no_grad():
                probabilities = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()
            ids.append(int(np.searchsorted(np.cumsum(probabilities), u, side="right")))
            if ids[-1] in ends:
                break
        assert tuple(ids[len(request.prompt_ids) :]) == sample.token_ids
        assert sample.finished == (ids[-1] in ends)


def test_the_first_token_has_the_models_distribution(llama):
    drawn = sampler(llama, max_tokens=1).sample([Request("p", index, (5, 6)) for index in range(6000)])
    with torch.no_grad():
        expected = torch.softmax(llama[0](torch.tensor([[5, 6]])).logits[0, -1].double(), -1).numpy()
    counts = np.bincount([sample.token_ids[0] for sample in drawn], minlength=expected.size)
    common = expected * len(drawn) > 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * len(drawn)
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


def test_the_models_generation_config_does_not_leak(llama):
    model, _ = llama
    before = [sample.token_ids for sample in sampler(llama).sample(requests())]
    model.generation_config.update(temperature=0.01, top_k=1, do_sample=False, max_new_tokens=1)
    after = [sample.token_ids for sample in sampler(llama).sample(requests())]
    assert before == after


def test_every_end_token_ends(llama):
    model, _ = llama
    uniform = np.stack([uniforms(1, "p", index, 12) for index in range(40)])
    free = decode_rows(model, [(5, 6)] * 40, uniform, SamplingSettings(12), [])
    ends = [free[0][0][3], free[1][0][2]]
    ended = decode_rows(model, [(5, 6)] * 40, uniform, SamplingSettings(12), ends)
    for (ids, logps), (unended, _) in zip(ended, free, strict=True):
        first = next((place for place, token in enumerate(unended) if token in ends), 11)
        assert ids == unended[: first + 1] and len(logps) == first + 1


def test_truncating_settings_truncate(llama):
    drawn = sampler(llama, max_tokens=3, top_k=1).sample(requests())
    by_prompt = {}
    for sample in drawn:
        by_prompt.setdefault(sample.key, set()).add(sample.token_ids)
    assert all(len(distinct) == 1 for distinct in by_prompt.values())


def test_a_sliding_window_takes_the_plain_path(tmp_path, capsys):
    model = load_policy(tiny_causal(tmp_path / "m", "mistral", sliding_window=4), device=CPU)
    assert "DynamicSlidingWindowLayer" in why_plain(model)
    for _ in range(2):
        decode_rows(model, PROMPTS, np.full((len(PROMPTS), 2), 0.5), SamplingSettings(2), [])
    assert capsys.readouterr().err.count("sampling computes each prompt once per completion: its cache has") == 1
    model = load_policy(tiny_causal(tmp_path / "l", "llama"), device=CPU)
    assert why_plain(model) is None


def test_a_damaged_model_is_named(llama, tmp_path):
    model = load_policy(tiny_causal(tmp_path, "llama"), device=CPU)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sampler((model, llama[1])).sample(requests())


def test_completion_logits_equal_plain_forwards(model):
    completions = [(4, 5, 6), (7,), (8, 9), (10, 11)]
    with torch.no_grad():
        found = head_of(model[0]).logits(completion_states(model[0], PROMPTS, completions))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        with torch.no_grad():
            expected = model[0](torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(found[row, : len(completion)], expected, atol=CLOSE, rtol=0)


def test_sequence_kl_by_enumeration(tmp_path):
    """On two-token completions the conditional KLs, averaged exactly over the policy, are the KL of the sequences."""
    policy = load_policy(tiny_causal(tmp_path / "a", "llama", seed=1, vocab_size=16), device=CPU)
    base = load_policy(tiny_causal(tmp_path / "b", "llama", seed=2, vocab_size=16), device=CPU)
    pairs = [(first, second) for first in range(16) for second in range(16)]
    log_ratio, conditional = sequence_kl(policy, base, [(5, 6)] * 256, pairs, tokens_per_batch=100)
    logp = np.array([plain_logps(policy, (5, 6), pair).sum() for pair in pairs], dtype=float)
    logq = np.array([plain_logps(base, (5, 6), pair).sum() for pair in pairs], dtype=float)
    np.testing.assert_allclose(log_ratio.numpy(), logp - logq, atol=1e-4)
    exact = (np.exp(logp) * (logp - logq)).sum()
    assert (np.exp(logp) * conditional.numpy()).sum() == pytest.approx(exact, abs=1e-4)
    assert (np.exp(logp) * log_ratio.numpy()).sum() == pytest.approx(exact, abs=1e-4)
    assert conditional.numpy().std() < log_ratio.numpy().std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_of_a_capped_model(dtype, tmp_path):
    """Gemma 2 rounds its cap in bf16: of itself its KL is 0 all the same."""
    policy = load_policy(tiny_causal(tmp_path, "gemma2", final_logit_softcapping=30.0), device=CPU, dtype=dtype)
    log_ratio, conditional = sequence_kl(policy, policy, PROMPTS[:2], [(4, 5, 6), (7,)])
    assert log_ratio.abs().max() == conditional.abs().max() == 0


def test_kl_without_a_known_head(tmp_path, monkeypatch):
    """A model whose logits are not its head's is measured on whole logits: the same numbers."""
    policy = load_policy(tiny_causal(tmp_path / "a", "llama", seed=1), device=CPU)
    base = load_policy(tiny_causal(tmp_path / "b", "llama", seed=2), device=CPU)
    completions = [(4, 5, 6), (7,), (8, 9), (10, 11, 12, 13)]
    expected = sequence_kl(policy, base, PROMPTS, completions)
    monkeypatch.setattr(likelihood, "head_of", lambda model: None)
    found = sequence_kl(policy, base, PROMPTS, completions)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=CLOSE, rtol=0)


def test_the_plan_depends_on_requests_and_budget_alone():
    rows = requests([(1,) * length for length in (3, 50, 7, 20)], per_prompt=9)
    plan = plan_batches(rows, max_tokens=10, tokens_per_batch=200)
    assert plan == plan_batches(rows[::-1], max_tokens=10, tokens_per_batch=200)
    assert sorted((r.key, r.index) for batch in plan for r in batch) == sorted((r.key, r.index) for r in rows)
    assert all(len(b) * (max(len(r.prompt_ids) for r in b) + 10) <= 200 for b in plan)
    assert [len(b) for b in plan_batches(rows, max_tokens=10, tokens_per_batch=1)] == [1] * 36
