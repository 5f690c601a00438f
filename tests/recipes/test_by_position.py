"""The parts of the small language model's reward, and what a policy that looks at no token before can do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import by_position
import small_language_model as small

from infalign import BestOfN


def test_the_positions_add_up_to_the_reward(monkeypatch):
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}

    monkeypatch.setattr(small, "made_tokenizer", lambda: tokenizer)
    rng = np.random.default_rng(0)
    prompt, completions = rng.integers(2, small.VOCABULARY, 8), rng.integers(2, small.VOCABULARY, (5, small.COMPLETION))
    texts = [" ".join(map(str, row)) for row in (prompt, *completions)]
    wanted = small.build()([texts[0]] * 5, texts[1:])
    np.testing.assert_allclose(small.by_position(list(prompt), completions).sum(1), wanted, atol=1e-12)


@pytest.mark.parametrize(("positions", "kl"), [(1, 0.5), (4, 0.5), (10, 1.0)])
def test_best_memoryless_spends_its_kl(positions, kl):
    """By a search of its own over shift and spread of one position, with KL and sums by integration and drawing."""
    win, spread = by_position.best_memoryless(BestOfN(8), kl, positions)
    z = np.linspace(-12, 12, 20_001)
    found = []
    for s in np.linspace(spread - 0.1, spread + 0.1, 5):
        p, q = stats.norm.pdf(z), stats.norm.pdf(z, 0, s)
        own = positions * float(np.sum(q * np.log(np.maximum(q, 1e-300) / p)) * (z[1] - z[0]))
        if own > kl:
            continue
        # a shift of the sum by m costs m^2 / 2, shared equally by all positions
        m = float(np.sqrt(2 * (kl - own)))
        u = (np.arange(400_000) + 0.5) / 400_000
        # Best-of-8 of N(m, s^2) against Best-of-8 of N(0, 1): draw the one by quantiles, the other by its law
        ours = m + s * stats.norm.ppf(u ** (1 / 8))
        found.append(float(np.mean(stats.norm.cdf(ours) ** 8)))
    assert win == pytest.approx(max(found), abs=2e-3)
    assert 1.0 <= spread < 2.0


def test_more_positions_make_a_spread_dearer():
    spreads = [by_position.best_memoryless(BestOfN(16), 1.0, count)[1] for count in (1, 2, 10, 100)]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 1.02


def test_variance_by_position(tmp_path, monkeypatch):
    """Positions that vary together have a covariance, others none."""
    rng = np.random.default_rng(1)
    alone, together = rng.normal(size=(500, small.COMPLETION)), rng.normal(size=(500, 1)) * np.ones(small.COMPLETION)
    samples = {
        key: [SimpleNamespace(token_ids=tuple(range(small.COMPLETION)))] * 500 + [SimpleNamespace(token_ids=(1,))]
        for key in ("a", "b")
    }
    prompts = {"a": (0,), "b": (1,)}
    table = SimpleNamespace(stored_prompt_ids=lambda: prompts, samples=lambda: samples)
    monkeypatch.setattr(by_position.SampleTable, "open", lambda *_: table)
    monkeypatch.setattr(small, "by_position", lambda prompt, rows: {0: alone, 1: together}[prompt[0]][: len(rows)])
    (tmp_path / "plan.json").write_text('{"parts": {}}')
    whole, positions = by_position.parts(tmp_path)
    assert positions == pytest.approx(small.COMPLETION * np.array([1.0, 1.0]), rel=0.15)
    assert whole[0] == pytest.approx(small.COMPLETION, rel=0.2)
    assert whole[1] == pytest.approx(small.COMPLETION**2, rel=0.2)
