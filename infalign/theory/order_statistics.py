"""The laws of kept ranks: CDF (order -1), density (0) or its derivative (1) of one order statistic or a mixture.

Theory: a rank-r pick of n uniforms is Beta(r, n-r+1); soft weights sum to a closed form, and so do weights that are a
straight line in the rank: they are truncated moments of a binomial number (README.md, equation 2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]


def powers_law(shares: Floats, p: Floats, order: int) -> Floats:
    """sum_k shares[k] p^k, or a derivative: no cancellation, since all coefficients are >= 0 and p is in [0, 1]."""
    k = np.arange(len(shares))
    # a derivative multiplies by the exponent and lowers it by one: the first coefficient drops out each time
    coefficients = (shares, shares * k, shares * k * (k - 1))[order + 1][order + 1 :]
    exponents = np.flatnonzero(coefficients)
    # Best-of-N is one power: p^N, not N multiplications through zeros
    if len(exponents) <= 2:
        return sum((coefficients[e] * p**e for e in exponents), start=np.zeros_like(p))
    return np.asarray(np.polynomial.polynomial.polyval(p, coefficients), dtype=float)


def beta_law(rank: int, n: int, p: Floats, order: int) -> Floats:
    """CDF (order -1), density (0) or its derivative (1) of Beta(rank, n-rank+1), the rank-th of n uniforms."""
    if order == -1:
        return -np.expm1(special.xlog1py(n, -p)) if rank == 1 else special.betainc(rank, n - rank + 1, p)
    if order == 1:
        # derivative of a Bernstein polynomial: n (density of rank r-1 of n-1 minus density of rank r of n-1)
        below = beta_law(rank - 1, n - 1, p, 0) if rank > 1 else np.zeros_like(p)
        return n * (below - (beta_law(rank, n - 1, p, 0) if rank < n else 0.0))
    if rank == 1:
        return n * (1 - p) ** (n - 1)
    log_scale = np.log(n) + special.gammaln(n) - special.gammaln(rank) - special.gammaln(n - rank + 1)
    return np.exp(log_scale + special.xlogy(rank - 1, p) + special.xlog1py(n - rank, -p))


def soft_law(n: int, tilt: float, p: Floats, order: int) -> Floats:
    """CDF, density or its derivative of the soft Best-of-n; exponents are shifted so that nothing overflows."""
    if tilt == 0:
        return (p, np.ones_like(p), np.zeros_like(p))[order + 1]
    growth = np.expm1(tilt / n)
    with np.errstate(divide="ignore"):
        log_base = np.log1p(p * growth)
    shift = max(tilt, 0.0)
    norm = -np.expm1(-abs(tilt)) * np.sign(tilt)  # (e^tilt - 1) e^-shift
    if order == -1:
        if tilt < 0:
            return np.expm1(n * log_base) / norm
        return np.exp(n * log_base - shift) * -np.expm1(-n * log_base) / norm
    if order == 0:
        return n * growth * np.exp((n - 1) * log_base - shift) / norm
    return n * (n - 1) * growth**2 * np.exp((n - 2) * log_base - shift) / norm


def line_law(first: int, level: float, step: float, n: int, p: Floats, order: int) -> Floats:
    """CDF, density or its derivative of the weights level + step (r - first) on ranks r = first..n of n.

    The weights need not sum to 1. With X_n ~ Binomial(n, p) and T_s(n) = E[C(X_n - j, s); X_n >= j], j = first - 1,
    ranks above j with weight 1 have G = T_1(n), with weight r - first T_2(n), and T_s(n)' = n T_{s-1}(n-1).
    """
    j, drawn, scale = first - 1, n - order - 1, (1, n, n * (n - 1))[order + 1]
    total = np.zeros_like(p)
    for s, height in ((1, level), (2, step)):
        if height and scale:
            total = total + height * scale * _excess(s - order - 1, j, drawn, p)
    return total


def falling_line_law(first: int, level: float, step: float, n: int, p: Floats, order: int) -> Floats:
    """The same for ranks counted from the top: weights level + step (n + 1 - r - first) on r = 1..n + 1 - first."""
    if order != -1:
        return (1, -1)[order] * line_law(first, level, step, n, 1 - p, order)
    last, count = n + 1 - first, n + 1 - first
    whole = level * count + step * count * (count - 1) / 2
    # Up to p = last/n, the line over all ranks less what it is too low above `last`: accurate relative to itself near
    # p = 0, where 1 - G(1-p) is not. Beyond, where the two would cancel, the mirror.
    near = np.minimum(p, last / n)
    through = (level + step * (last - 1)) * n * near - step * n * (n - 1) * near**2 / 2
    # above `last` the line goes on with level - step (r - last), from rank last + 1 on
    beyond = line_law(last + 1, level - step, -step, n, near, -1) if last < n else 0.0
    return np.where(p * n < last, through - beyond, whole - line_law(first, level, step, n, 1 - p, -1))


def _excess(s: int, j: int, n: int, p: Floats) -> Floats:
    """T_s = E[C(X - j, s); X >= j] of X ~ Binomial(n, p), s >= 0; T_{-1} = P(X = j - 1)."""
    if s == -1:
        # rank j of n + 1 has the density (n + 1) P(X_n = j - 1)
        return beta_law(j, n + 1, p, 0) / (n + 1) if 1 <= j <= n + 1 else np.zeros_like(p)
    if s == 0:
        return np.ones_like(p) if j <= 0 else beta_law(j, n, p, -1) if j <= n else np.zeros_like(p)
    if n < j + s:
        return np.zeros_like(p)
    # From E[X f(X)] = n p E[f(X' + 1)] with X' ~ Binomial(n - 1, p). Both terms are of order p^{j+s} and positive from
    # p = j/n up; far below, they cancel to about 1/j of their size, where T_s is next to nothing.
    lower, lowest = _excess(s - 1, j + 1, n - 1, p), _excess(s - 2, j + 1, n - 1, p)
    return np.maximum(((n * p - j) * lower + (n - j) * p * lowest) / s, 0.0)
