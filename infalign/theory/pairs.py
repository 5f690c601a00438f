"""What preference losses on best-and-worst pairs aim at, as a transform of the quantile.

Of n base samples of a prompt take the best and the worst, and ask for a log-ratio of the policy that differs by c
between them: `min E (l(best) - l(worst) - c)^2`, l = log(pi/pi_ref), as IPO (arXiv:2310.12036) does on such pairs. Two
base quantiles are the best and the worst of n with density `n (n-1) |u - v|^(n-2)`, so the minimum satisfies

    int_0^1 |u - v|^(n-2) (l(u) - l(v)) dv = c [u^(n-1) - (1-u)^(n-1)] / (n-1).

It is linear in c, and IPO's c is 1/(2 beta): `l = Phi_n / beta + const`, the optimum of ordinary KL-regularised RL for
a transform Phi_n at the same beta. For n = 2, Phi_2 = u - 1/2: IPO on random pairs is the identity transform. For
n = 3, Phi' is proportional to 1/a^2 with a = (u^2 + (1-u)^2)/2; for larger n the equation is solved on a grid. The more
samples a pair comes from, the more Phi_n is a step at the median.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from infalign.types import InputError

Floats = NDArray[np.float64]

_CELLS = 600  # of the grid; at 1,200 Phi_8 changes by 1e-5 of its range


class BestAndWorst:
    """The transform Phi_n: u in [0, 1], any shape -> what IPO on pairs of the best and the worst of n aims at.

    Args:
        n: samples that a pair comes from, at least 2.

    Raises:
        InputError: fewer than 2.

    >>> BestAndWorst(2)([0.0, 0.5, 1.0]).round(6).tolist()
    [-0.5, 0.0, 0.5]
    """

    name = "best_and_worst"

    def __init__(self, n: int) -> None:
        if n < 2:
            raise InputError(f"BestAndWorst: n must be at least 2, got {n!r}")
        self.n = n
        u_Q = (np.arange(_CELLS) + 0.5) / _CELLS
        # both sides divided by int |u - v|^(n-2) dv = (u^(n-1) + (1-u)^(n-1)) / (n-1), which at the median of many
        # samples is 2^-n: the kernel's rows sum to one, and the right side is a hyperbolic tangent
        with np.errstate(divide="ignore"):
            log_QQ = (n - 2) * np.log(np.abs(u_Q[:, None] - u_Q)) if n > 2 else np.zeros((_CELLS, _CELLS))
        kernel_QQ = special.softmax(log_QQ, axis=1)
        asked_Q = 0.5 * np.tanh((n - 1) / 2.0 * special.logit(u_Q))
        system_QQ = np.eye(_CELLS) - kernel_QQ + 1.0 / _CELLS  # the last term fixes the constant: mean 0
        phi_Q = np.linalg.solve(system_QQ, asked_Q)
        ends = 1.5 * phi_Q[[0, -1]] - 0.5 * phi_Q[[1, -2]]  # half a cell beyond the outermost middles
        self._u = np.concatenate([[0.0], u_Q, [1.0]])
        self._phi = np.concatenate([ends[:1], phi_Q, ends[1:]])

    def __call__(self, u: ArrayLike) -> Floats:
        """The values at u."""
        return np.interp(np.asarray(u, dtype=np.float64), self._u, self._phi)

    def __repr__(self) -> str:
        return f"BestAndWorst({self.n})"
