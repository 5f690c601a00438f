"""The laws of kept ranks: CDF (order -1), density (0) or its derivative (1) of one order statistic or a mixture.

Theory: a rank-r pick of n uniforms is Beta(r, n-r+1); soft weights sum to a closed form (README.md).
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
