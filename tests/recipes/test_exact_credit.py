"""The token-level optimum of an additive reward: exact at the last token, and a martingale under the base before it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import exact_credit
import small_language_model as small

from infalign import BestOfN
from infalign.theory.objective import objective


def test_the_law_weighs_with_the_expected_density():
    aim = objective(BestOfN(8), kl=0.5).policy
    assert aim is not None
    prompts = [[3, 4, 5], [6, 7, 8]]
    rng = np.random.default_rng(0)
    law_P = rng.dirichlet(np.ones(small.VOCABULARY))  # the base: every token from the same law, whatever came before
    drawn = rng.choice(small.VOCABULARY, (2, 4000, small.COMPLETION), p=law_P)
    adds_PMT = np.array([small.by_position(one, rows) for one, rows in zip(prompts, drawn, strict=True)])
    law = exact_credit.law_of(aim.density, adds_PMT, prompts)

    ids = torch.tensor(drawn[1, :6])
    found = law.log_weights(torch.ones(6, dtype=torch.long), ids).double()
    assert found.shape == (6, small.COMPLETION, small.VOCABULARY)
    whole = adds_PMT[1].sum(1)
    for row in range(6):  # after the last token nothing is left to expect
        answers = np.tile(drawn[1, row], (small.VOCABULARY, 1))
        answers[:, -1] = np.arange(small.VOCABULARY)
        score = (small.by_position(prompts[1], answers).sum(1) - whole.mean()) / whole.std(ddof=1)
        expected = np.log(aim.density(stats.norm.cdf(score)))
        np.testing.assert_allclose(found[row, -1].numpy(), expected, atol=0.02)
        # a token's weight is what the next token's weight is expected to be
        for t in range(small.COMPLETION - 1):
            own = float(found[row, t, ids[row, t]])
            after = float(np.log(law_P @ np.exp(found[row, t + 1].numpy())))
            assert abs(own - after) < 0.1  # the rest of the sum is not quite normal


def test_fitting_comes_nearer_to_the_law(monkeypatch, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=small.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip
    prompts = [[3 + number, 40, 50 + number] for number in range(16)]
    rows = [prompt for prompt in prompts for _ in range(exact_credit.SAMPLES)]
    answers = np.array(exact_credit.drawn(base, rows, seed=0)).reshape(16, exact_credit.SAMPLES, -1)
    adds_PMT = np.array([small.by_position(*one) for one in zip(prompts, answers, strict=True)])
    aim = objective(BestOfN(4), kl=0.5).policy
    assert aim is not None
    law = exact_credit.law_of(aim.density, adds_PMT, prompts)
    policy = exact_credit.fitted(base, law, prompts, steps=40, rate=3e-3)

    def to_the_law(model):
        ids = exact_credit.drawn(model, rows, seed=5)
        with torch.no_grad():
            weights = law.log_weights(torch.arange(16).repeat_interleave(exact_credit.SAMPLES), torch.tensor(ids))
            theirs = (exact_credit.completion_logits(base, rows, ids).log_softmax(-1) + weights).log_softmax(-1)
            ours = exact_credit.completion_logits(model, rows, ids).log_softmax(-1)
        return float((ours.exp() * (ours - theirs)).sum(-1).sum(1).mean())

    assert to_the_law(policy) < 0.7 * to_the_law(base)
