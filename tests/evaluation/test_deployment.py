"""Gold wins against N: unbiased for every N, and the N to deploy is where they are highest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from infalign import BestOfN, WorstOfN
from infalign.evaluation.deployment import deployment, sizes_up_to
from infalign.evaluation.length import Side
from infalign.types import InputError


def side(proxy_PM, judge_PM):
    return Side(list(proxy_PM), list(judge_PM), [np.ones(len(row)) for row in proxy_PM])


def hacked(rng, prompts, samples):
    """Proxy rewards, and gold ones that follow them up to the proxy's quantile .8 and fall above it."""
    proxy = rng.random((prompts, samples))
    gold = np.where(proxy < 0.8, proxy, 0.8 - 3.0 * (proxy - 0.8))
    return proxy, gold + 0.05 * rng.normal(size=proxy.shape)


def test_every_n_is_the_mean_over_all_subsets():
    """By double loops over the subsets of both sides' samples, ties in both rewards included."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 4, (2, 2, 3, 6)).astype(float)
    found = deployment(side(*ours), side(*theirs), WorstOfN(2))
    assert found.policy.n == (1, 2, 3)
    for place, n in enumerate(found.policy.n):
        wins = []
        for prompt in range(3):
            (proxy, gold), (their_proxy, their_gold) = ours[:, prompt], theirs[:, prompt]
            for mine in itertools.combinations(range(6), n):
                for other in itertools.combinations(range(6), 2):
                    best = [i for i in mine if proxy[i] == proxy[list(mine)].max()]
                    worst = [j for j in other if their_proxy[j] == their_proxy[list(other)].min()]
                    for i, j in itertools.product(best, worst):
                        win = float(gold[i] > their_gold[j]) + 0.5 * float(gold[i] == their_gold[j])
                        wins.append((prompt, win / len(best) / len(worst)))
        per_prompt = [sum(w for p, w in wins if p == prompt) for prompt in range(3)]
        pairs = len(list(itertools.combinations(range(6), n))) * 15
        assert found.policy.mean[place] == pytest.approx(np.mean(per_prompt) / pairs)


def test_a_hacked_proxy_is_deployed_with_few_candidates():
    rng = np.random.default_rng(1)
    found = deployment(side(*hacked(rng, 300, 64)), side(*hacked(rng, 300, 64)), BestOfN(4), seed=2)
    # P(best of N is at u) = N u^(N-1): the exact curve by quadrature over the noise-free gold reward
    u = (np.arange(20_000) + 0.5) / 20_000
    gold = np.where(u < 0.8, u, 0.8 - 3.0 * (u - 0.8))
    below = np.searchsorted(np.sort(gold), gold) / gold.size  # share of the base below, under gold
    decoded = 4 * u**3 / u.size
    opponent = np.concatenate([[0.0], np.cumsum(decoded[np.argsort(gold)])])
    wins = opponent[(below * gold.size).astype(int)]
    exact = {n: float((n * u ** (n - 1) / u.size) @ wins) for n in found.base.n}
    best = max(exact, key=exact.get)
    assert found.base.best_low <= best <= found.base.best_high
    assert best <= found.base.hurts_from <= 8
    assert str(found.base).startswith("deploy Best-of-") and "more candidates hurt" in str(found.base)
    for n, mean in zip(found.base.n, found.base.mean, strict=True):
        assert mean == pytest.approx(exact[n], abs=0.04)  # the noise of gold is small, and so are 300 prompts' errors


def test_an_honest_proxy_gains_with_every_candidate():
    rng = np.random.default_rng(3)
    ours, theirs = rng.random((2, 200, 32))
    found = deployment(side(ours, ours), side(theirs, theirs), BestOfN(2))
    assert found.policy.best == 16 and found.policy.hurts_from == 0
    assert found.policy.mean[:4] == pytest.approx([n / (n + 2) for n in (1, 2, 3, 4)], abs=0.01)
    assert "do not hurt up to N = 16" in str(found.policy)


def test_scores_that_are_missing_are_left_out():
    rng = np.random.default_rng(4)
    ours = rng.random((20, 16))
    holes = ours.copy()
    holes[:, -4:] = np.nan
    with_holes = deployment(side(ours, holes), side(ours, ours), BestOfN(2))
    without = deployment(side(ours[:, :-4], ours[:, :-4]), side(ours, ours), BestOfN(2))
    assert with_holes == without


def test_too_little_to_compare():
    few = np.random.default_rng(5).random((4, 3))
    assert deployment(side(few, few), side(few, few), BestOfN(2)) is None
    with pytest.raises(InputError, match="the same prompts, got 4 and 3"):
        deployment(side(few, few), side(few[:3], few[:3]), BestOfN(2))


def test_the_sizes():
    assert sizes_up_to(1) == (1,) and sizes_up_to(50) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
