"""h, what a proxy's quantiles are worth under a gold reward, from base samples that both have scored.

`h(u)` is the chance that a sample at base quantile u of the proxy beats, under gold and with ties half, the base's
sample that the procedure decodes by the proxy (infalign/theory/README.md, equation 16). A prompt's samples are split in
two: one part tells a sample's rank by the proxy, the other one is what it is judged against, through the procedure's
unbiased weights. So a sample's judged value is unbiased given its rank, which it would not be with one part for both:
the sample that ranks first has rivals that all rank below it.

The quantile of the sample of rank k of a is Beta(k, a-k+1), not (k - 1/2)/a. Every shape but "free" is fitted through
that: E[value | rank k] = int h dBeta(k, a-k+1), so that few samples a prompt do not flatten h (equation 18).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from infalign.theory.procedures import Procedure, check_procedure
from infalign.types import InputError

Floats = NDArray[np.float64]
Rewards = NDArray[np.float64] | Sequence[ArrayLike]
Shape = Literal["smooth", "monotone", "free"]

SHAPES = ("smooth", "monotone", "free")
PLAIN, LARGEST_DEGREE, MONOTONE_DEGREE = 3, 15, 12
RESAMPLES = 200


@dataclass(frozen=True)
class JudgedCurve:
    """`h_J` on J levels of equal base mass, ascending in the proxy, in [0, 1]; `error_J` its standard errors.

    The errors are by bootstrap over prompts (at the chosen degree), NaN for one prompt. `degree` is the number of
    the terms beside the constant, None for other shapes. `prompts` and `samples` say what it rests on.
    """

    h_J: Floats
    error_J: Floats
    degree: int | None
    prompts: int
    samples: int


def estimate_h(
    proxy_rewards_PK: Rewards,
    gold_rewards_PK: Rewards,
    procedure: Procedure,
    *,
    levels: int = 500,
    shape: Shape = "smooth",
    splits: int = 8,
    seed: int = 0,
) -> JudgedCurve:
    """h of a procedure, pooled over prompts that count alike.

    Args:
        proxy_rewards_PK, gold_rewards_PK: (P, K) rewards of the same base samples; rows may differ in length; a sample
            without one of both (NaN) is left out. K - n of them at most are ranked: at K = n + 1 h is flat, 2n and
            more tell its shape.
        procedure: decodes the base by the proxy.
        levels: J.
        shape: "smooth" is a polynomial of degree 0 to 3, to which powers are added that see the two ends, u^8, (1-u)^8,
            u^16 and so on: as many as have the smallest error on prompts left out (degree 1 for a single prompt).
            "monotone" is one of degree 12 that does not fall: it
            can't see a hacked top. "free" is the mean over ranks, blurred by what a rank leaves open.
        splits: random splits of each prompt's samples that are averaged over.
        seed: of the splits and the bootstrap.

    Raises:
        InputError: rewards that are not of the same samples, infinite ones, a prompt with fewer than n + 1 samples that
            have both, no prompt, or an unknown shape.

    >>> from infalign.theory.procedures import BestOfN
    >>> rewards = np.random.default_rng(0).random((200, 16))
    >>> found = estimate_h(rewards, rewards, BestOfN(2), levels=4)  # gold is the proxy: h(u) = u^2
    >>> bool(np.abs(found.h_J - np.array([1, 3, 5, 7]) ** 2 / 64).max() < 0.02)
    True
    """
    check_procedure(procedure)
    if shape not in SHAPES:
        raise InputError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    for name, value in {"levels": levels, "splits": splits}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number >= 1; got {value!r}")
    pairs = _scored(proxy_rewards_PK, gold_rewards_PK, procedure)
    rng = np.random.default_rng(seed)
    means = [rank_means(proxy, gold, procedure, splits, rng) for proxy, gold in pairs]
    pool = _pooled(means, shape)
    shares_P = np.ones(len(means)) / len(means)
    h_J = pool.fit(shares_P, levels)
    error_J = np.full(levels, np.nan)
    if len(means) > 1:
        drawn = rng.multinomial(len(means), shares_P, size=RESAMPLES) / len(means)
        error_J = np.std([pool.fit(share_P, levels) for share_P in drawn], axis=0, ddof=1)
    degree = pool.degree if shape == "smooth" else None
    return JudgedCurve(h_J, error_J, degree, len(means), sum(len(proxy) for proxy, _ in pairs))


def judged_values(gold_A: Floats, rival_proxy_B: Floats, rival_gold_B: Floats, procedure: Procedure) -> Floats:
    """The chance that each of A samples beats the decoded one of B others under gold, ties half, unbiased: (A,).

    A rival's weight is its order weight by the proxy, the mean over rivals that tie there. B >= n.

    >>> from infalign.theory.procedures import BestOfN
    >>> rivals = np.array([1.0, 2.0]), np.array([5.0, 3.0])
    >>> judged_values(np.array([4.0, 2.0]), *rivals, BestOfN(2)).tolist()
    [1.0, 0.0]
    """
    order = np.argsort(rival_proxy_B, kind="stable")
    weights_B = _over_ties(rival_proxy_B[order], _order_weights(procedure, len(order)))
    beaten_AB = (gold_A[:, None] > rival_gold_B[order]) + 0.5 * (gold_A[:, None] == rival_gold_B[order])
    return np.asarray(beaten_AB @ weights_B, dtype=float)


def rank_means(
    proxy_K: Floats, gold_K: Floats, procedure: Procedure, splits: int, rng: np.random.Generator
) -> dict[int, Floats]:
    """One prompt's mean judged value by rank, {a: (a,)}: ranks among a samples, judged against the other K - a.

    a is half of K (of an odd K both halves), less where the other part would have fewer than n; each part is ranked
    whose other part has n.
    """
    count, n = len(proxy_K), procedure.n
    size = min(count // 2, count - n)
    found: dict[int, list[Floats]] = {}
    for _ in range(splits):
        order = rng.permutation(count)
        first, second = order[:size], order[size:]
        for ranked, rivals in ((first, second), (second, first)):
            if len(rivals) < n:
                continue
            value_A = judged_values(gold_K[ranked], proxy_K[rivals], gold_K[rivals], procedure)
            ascending = np.argsort(proxy_K[ranked], kind="stable")
            # samples that tie share their values, as if ties were broken at random
            by_rank_A = _over_ties(proxy_K[ranked][ascending], value_A[ascending])
            found.setdefault(len(ranked), []).append(by_rank_A)
    return {a: np.mean(values, axis=0) for a, values in found.items()}


def _over_ties(ascending_A: Floats, values_A: Floats) -> Floats:
    """Values of samples in ascending order of the proxy; those of samples that tie become their mean."""
    fresh = np.append(True, ascending_A[1:] > ascending_A[:-1])
    if fresh.all():
        return values_A
    block = np.cumsum(fresh) - 1
    return (np.bincount(block, values_A) / np.bincount(block))[block]


@lru_cache(maxsize=64)
def _order_weights(procedure: Procedure, m: int) -> Floats:
    """The procedure's weights of m samples, once for all prompts with so many."""
    weights_m = procedure.order_weights(m)
    weights_m.setflags(write=False)
    return weights_m


def _scored(proxy_PK: Rewards, gold_PK: Rewards, procedure: Procedure) -> list[tuple[Floats, Floats]]:
    """Each prompt's samples that have both rewards."""
    if len(proxy_PK) != len(gold_PK) or not len(proxy_PK):
        raise InputError(f"give both rewards of one prompt or more; got {len(proxy_PK)} and {len(gold_PK)} prompts")
    pairs: list[tuple[Floats, Floats]] = []
    for prompt, rows in enumerate(zip(proxy_PK, gold_PK, strict=True)):
        proxy, gold = (np.asarray(row, dtype=float) for row in rows)
        if proxy.shape != gold.shape or proxy.ndim != 1:
            raise InputError(f"prompt {prompt} has {proxy.size} proxy and {gold.size} gold rewards: give both of each")
        both = ~(np.isnan(proxy) | np.isnan(gold))
        if np.isinf(proxy).any() or np.isinf(gold).any():
            raise InputError(f"prompt {prompt} has an infinite reward: rewards must be finite, or NaN")
        if both.sum() < procedure.n + 1:
            raise InputError(
                f"{procedure!r} needs {procedure.n + 1} samples a prompt with both rewards; prompt {prompt} has "
                f"{both.sum()}: draw more samples or use a smaller n"
            )
        pairs.append((proxy[both], gold[both]))
    return pairs


def _basis(shape: Shape, degree: int, u: Floats) -> Floats:
    """What h is a sum of, at quantiles u: (len(u), degree + 1)."""
    if shape == "smooth":
        plain = np.asarray(np.polynomial.legendre.legvander(2 * u - 1, min(degree, PLAIN)), dtype=np.float64)
        powers = 2.0 ** (1 + np.arange(PLAIN + 1, degree + 1) // 2)  # 8, 8, 16, 16, ...: the top, then the bottom
        ends = np.where(np.arange(PLAIN + 1, degree + 1) % 2 == 0, u[:, None], 1.0 - u[:, None]) ** powers
        return np.concatenate([plain, np.asarray(ends, dtype=np.float64)], axis=1)
    # 1 and the CDFs of order statistics of `degree` uniforms: sums of them with weights >= 0 are all the polynomials
    # whose Bernstein coefficients do not fall
    i = np.arange(1, degree + 1)
    above = np.asarray(special.betainc(i, degree - i + 1, u[:, None]), dtype=np.float64)
    return np.concatenate([np.ones((len(u), 1)), above], axis=1)


def _highest_power(degree: int) -> int:
    """Of u, in the smooth shape of so many terms."""
    return degree if degree <= PLAIN else 2 ** (1 + degree // 2)


def _rank_means_of(shape: Shape, degree: int, a: int) -> Floats:
    """The basis' means at U ~ Beta(k, a-k+1), k = 1..a: (a, degree + 1)."""
    # a Gauss rule of (a + degree)/2 nodes is exact: the density is a polynomial of degree a - 1
    highest = _highest_power(degree) if shape == "smooth" else degree
    x, weight = np.polynomial.legendre.leggauss((a + highest) // 2 + 1)
    k, u = np.arange(1, a + 1)[:, None], (1 + x) / 2
    log_density = special.xlogy(k - 1, u) + special.xlog1py(a - k, -u) - special.betaln(k, a - k + 1)
    return np.asarray((np.exp(log_density) * weight / 2) @ _basis(shape, degree, u), dtype=np.float64)


def _normal_equations(design: dict[int, Floats], means: list[dict[int, Floats]]) -> tuple[Floats, Floats]:
    """Each prompt's X'X and X'v, every sample of a part counting 1/a: (P, D, D) and (P, D)."""
    left = [np.array(sum(design[a].T @ design[a] / a for a in one)) for one in means]
    right = [np.array(sum(design[a].T @ value / a for a, value in one.items())) for one in means]
    return np.array(left), np.array(right)


def _chosen_degree(design: dict[int, Floats], means: list[dict[int, Floats]], most: int) -> int:
    """The degree with the smallest squared error on the prompt left out."""
    if len(means) == 1:
        return min(1, most)
    left_PDD, right_PD = _normal_equations(design, means)
    losses: list[Floats] = []
    for degree in range(most + 1):
        d = degree + 1
        left, right = left_PDD[:, :d, :d], right_PD[:, :d]
        # a prompt's part may have fewer ranks than d: the others together determine all coefficients, or the minimum
        # norm stands in
        others = left.sum(0) - left, right.sum(0) - right
        inverse: Floats = np.linalg.pinv(others[0], hermitian=True)
        coefficients_PD = (inverse @ others[1][..., None])[..., 0]
        # |v - X c|^2 less |v|^2, which no degree changes
        squares = np.einsum("pd,pde,pe->p", coefficients_PD, left, coefficients_PD)
        losses.append(np.asarray(squares - 2 * (coefficients_PD * right).sum(1), dtype=float))
    # No margin for a lower degree: what a decoder lives on, the top few quantiles, is a small part of the error.
    return int(np.argmin([loss.sum() for loss in losses]))


@dataclass(frozen=True)
class _Pool:
    """All prompts' mean values by rank, and how a curve is fitted to them.

    `values`: for each number a of ranked samples the prompts that have it and their values (., a); `design` (a, D).
    """

    shape: Shape
    degree: int
    values: dict[int, tuple[NDArray[np.intp], Floats]]
    design: dict[int, Floats]

    def fit(self, shares_P: Floats, levels: int) -> Floats:
        """h on the levels for given shares of the prompts, (J,)."""
        weights = {a: float(shares_P[prompts].sum()) for a, (prompts, _) in self.values.items()}
        pooled = {a: shares_P[self.values[a][0]] @ self.values[a][1] / w for a, w in weights.items() if w > 0}
        middle = (np.arange(levels) + 0.5) / levels
        if self.shape == "free":
            cells = [weights[a] * value_A[np.minimum((middle * a).astype(int), a - 1)] for a, value_A in pooled.items()]
            return np.clip(np.sum(cells, axis=0) / sum(weights[a] for a in pooled), 0.0, 1.0)
        # a row for each rank: what it is made of and its mean value, times the root of its weight
        left = np.concatenate([np.sqrt(weights[a] / a) * self.design[a] for a in pooled])
        right = np.concatenate([np.sqrt(weights[a] / a) * value_A for a, value_A in pooled.items()])
        coefficients = (
            np.linalg.lstsq(left, right, rcond=None)[0] if self.shape == "smooth" else optimize.nnls(left, right)[0]
        )
        return np.clip(_basis(self.shape, self.degree, middle) @ coefficients, 0.0, 1.0)


def _pooled(means: list[dict[int, Floats]], shape: Shape) -> _Pool:
    """The prompts' values stacked, with the degree of the curve."""
    counts = sorted({a for one in means for a in one})
    values = {
        a: (np.array([p for p, one in enumerate(means) if a in one]), np.array([one[a] for one in means if a in one]))
        for a in counts
    }
    # no more coefficients than ranks in the largest part: beyond, they are not determined
    degree = min({"smooth": LARGEST_DEGREE, "monotone": MONOTONE_DEGREE, "free": 0}[shape], counts[-1] - 1)
    while shape == "smooth" and _highest_power(degree) > max(PLAIN, counts[-1] - 1):
        degree -= 1
    design = {a: _rank_means_of(shape, degree, a) for a in counts}
    if shape == "smooth":
        degree = _chosen_degree(design, means, degree)
        design = {a: columns[:, : degree + 1] for a, columns in design.items()}
    return _Pool(shape, degree, values, design)
