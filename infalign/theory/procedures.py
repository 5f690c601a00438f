"""Rank-based inference procedures: one small object from which everything about a decoder follows.

A procedure draws n candidates and keeps the one of ascending rank r with probability w_r, possibly with a random n:
a finite list of (probability, n, weights). Its laws: G' = g; sum_i a_i Beta(i, m-i+1)(p) = g(p) for the unbiased
weights a of any m >= n; the frequencies of `select` equal the weights. Add a procedure by adding a constructor here.

Theory: InfAlign (arXiv:2412.19792), calibrated procedures; the polynomial form is equation 2 of README.md.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from infalign.theory.order_statistics import beta_law, falling_line_law, line_law, powers_law, soft_law
from infalign.types import InputError

Floats = NDArray[np.float64]
Monotone = Literal["constant", "increasing", "decreasing", "neither"]

LARGEST_TILT = 500.0


@dataclass(frozen=True)
class Component:
    """With probability `probability`, draw `n` candidates and keep one rank: `picks` are (ascending rank, weight).

    Ranks that are not listed have weight 0. Two kinds of weights have closed forms: `tilt` marks those ~ e^{tilt r/n},
    `line` = (first, level, step) marks ranks r >= first with weights level + step (r - first); with `falling`, the
    ranks are counted from the top (n + 1 - r in place of r).
    """

    probability: float
    n: int
    picks: tuple[tuple[int, float], ...]
    tilt: float | None = None
    line: tuple[int, float, float] | None = None
    falling: bool = False

    @property
    def weights(self) -> Floats:
        """The weights of all n ascending ranks, (n,), sum 1."""
        weights_n = np.zeros(self.n)
        for rank, weight in self.picks:
            weights_n[rank - 1] = weight
        return weights_n


@dataclass(frozen=True)
class Procedure:
    """A finite mixture of `Component`s; equal when the components are. Build one with `BestOfN` and its siblings.

    `name` is the key in `BUILT_IN`; `label` is the repr. Raises InputError when the components are no distribution.

    >>> float(BestOfN(4).density(0.5)), BestOfN(4).n
    (0.5, 4)
    """

    components: tuple[Component, ...]
    name: str = field(default="procedure", compare=False)
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.components or abs(sum(c.probability for c in self.components) - 1) > 1e-9:
            raise InputError(f"a procedure's component probabilities must sum to 1; got {self.components!r}")
        for one in self.components:
            n = _whole("n", one.n)
            if one.probability < 0 or any(not 1 <= rank <= n or not weight >= 0 for rank, weight in one.picks):
                raise InputError(f"a component needs a probability >= 0, ranks in 1..n and weights >= 0; got {one!r}")
            if len({rank for rank, _ in one.picks}) < len(one.picks):
                raise InputError(f"a component lists a rank twice; got {one!r}")
            if abs(sum(weight for _, weight in one.picks) - 1) > 1e-9:
                raise InputError(f"a component's weights must sum to 1; got {one!r}")

    def __repr__(self) -> str:
        return self.label or f"Procedure({self.components!r})"

    @property
    def n(self) -> int:
        """The most candidates the procedure draws."""
        return max(component.n for component in self.components)

    @property
    def is_random(self) -> bool:
        """True when the kept rank or the number of candidates is drawn, so that `select` needs a generator."""
        return len(self.components) > 1 or any(len(component.picks) > 1 for component in self.components)

    @cached_property
    def monotone(self) -> Monotone:
        """How g moves on [0, 1], by its Bernstein coefficients (monotone weights give a monotone g).

        "increasing" (non-decreasing): the win rate is concave in the policy; "decreasing": it is convex.
        """
        steps = np.diff(self.order_weights(self.n))
        up, down = bool(np.any(steps > 1e-13)), bool(np.any(steps < -1e-13))
        if up and down:
            return "neither"
        return "increasing" if up else "decreasing" if down else "constant"

    @cached_property
    def mirror(self) -> Procedure:
        """The procedure that keeps rank n+1-r where this keeps r: its G at 1-p is 1 - G(p), accurate near p = 1."""
        turned = tuple(
            Component(
                c.probability,
                c.n,
                tuple((c.n + 1 - r, w) for r, w in c.picks),
                None if c.tilt is None else -c.tilt,
                c.line,
                c.line is not None and not c.falling,
            )
            for c in self.components
        )
        return Procedure(turned, "mirror", f"{self!r}.mirror")

    def density(self, p: ArrayLike) -> Floats:
        """g(p) = sum_r w_r Beta(r, n-r+1)(p): the decoded policy is pi(y|x) g(C(x,y)).

        p: probabilities in [0, 1], any shape; returns the same shape. Raises InputError for p outside [0, 1].

        >>> float(WorstOfN(2).density(0.25))
        1.5
        """
        return _evaluate(self, p, 0)

    def cdf(self, p: ArrayLike) -> Floats:
        """G(p), the integral of g from 0 to p; same shapes and errors as `density`.

        >>> float(BestOfN(2).cdf(0.5))
        0.25
        """
        return _evaluate(self, p, -1)

    def slope(self, p: ArrayLike) -> Floats:
        """g'(p), the derivative of `density`; same shapes and errors.

        >>> float(BestOfN(2).slope(0.3))
        2.0
        """
        return _evaluate(self, p, 1)

    def order_weights(self, m: int) -> Floats:
        """Unbiased weights a_i of m samples sorted ascending, (m,), sum 1.

        a_i = sum_r w_r C(i-1, r-1) C(m-i, n-r) / C(m, n), mixed over n: the chance that the i-th of m is kept when
        n of the m are drawn without replacement. At m = n (fixed n) they are the weights themselves.
        Raises InputError when m < n: no unbiased estimate exists.

        >>> BestOfN(2).order_weights(3).round(4).tolist()
        [0.0, 0.3333, 0.6667]
        """
        m = _whole("m", m)
        if m < self.n:
            raise InputError(f"{self!r} needs at least {self.n} samples for an unbiased estimate; got m={m}")
        log_factorial = special.gammaln(np.arange(m + 1) + 1.0)  # binomials of large m overflow, their logs do not
        weights_m = np.zeros(m)
        for component in self.components:
            n, of_component_m = component.n, np.zeros(m)
            scale = log_factorial[m] - log_factorial[n] - log_factorial[m - n]  # log C(m, n)
            for rank, weight in component.picks:
                i = np.arange(rank, m - n + rank + 1)  # where both binomials are positive
                below = log_factorial[i - 1] - log_factorial[rank - 1] - log_factorial[i - rank]
                above = log_factorial[m - i] - log_factorial[n - rank] - log_factorial[m - i - n + rank]
                of_component_m[i - 1] += weight * np.exp(below + above - scale)
            weights_m += component.probability * of_component_m
        return weights_m / weights_m.sum()  # they sum to 1 but for rounding

    def select(self, scores_PN: ArrayLike, rng: np.random.Generator | None = None) -> NDArray[np.intp]:
        """The column the procedure keeps in each row, (P,).

        scores_PN: one score per candidate, NaN for "no score"; N must be `n`. A random-N procedure draws n' and lets
        the first n' candidates compete. Unscored candidates are never chosen: the first m = min(n', scored) scored
        ones compete and rank r of n' becomes rank ceil(r m / n') of m (best stays best, worst stays worst).
        Ties are broken uniformly with `rng`, by the first index without; a random procedure needs `rng`.
        Raises InputError for a wrong width, a row without any score, or a missing `rng`.

        >>> BestOfN(3).select([[0.1, 0.9, float("nan")]]).tolist()
        [1]
        """
        scores_PN = np.asarray(scores_PN, dtype=float)
        if scores_PN.ndim != 2 or scores_PN.shape[1] != self.n:
            raise InputError(f"{self!r} selects among (P, {self.n}) scores; got shape {scores_PN.shape}")
        empty_P = np.isnan(scores_PN).all(1)
        if empty_P.any():
            raise InputError(f"row {int(empty_P.argmax())} has no scored candidate (all NaN): drop it before selecting")
        if rng is None and self.is_random:
            raise InputError(f"{self!r} is random: select needs rng, a numpy.random.Generator; got None")
        size_P, rank_P = _drawn_ranks(self, len(scores_PN), rng)
        scored_PN = ~np.isnan(scores_PN)
        rivals_P = np.minimum(size_P, scored_PN.sum(1))
        # the first m scored candidates compete; the others become NaN, which sorts last
        rival_PN = np.where(scored_PN & (scored_PN.cumsum(1) <= rivals_P[:, None]), scores_PN, np.nan)
        # ceil(r m / n'), counted from 0
        place_P = -(-rank_P * rivals_P // size_P) - 1
        value_P = np.take_along_axis(np.sort(rival_PN, axis=1), place_P[:, None], axis=1)
        tied_PN = rival_PN == value_P
        if rng is None:
            return tied_PN.argmax(1)
        # of the columns tied for that rank, the one whose number among them was drawn
        which_P = np.floor(rng.random(len(tied_PN)) * tied_PN.sum(1))
        return (tied_PN.cumsum(1) > which_P[:, None]).argmax(1)


def BestOfN(n: int) -> Procedure:
    """Keep the best of n: g = n p^(n-1), G = p^n. n = 1 is plain sampling. Raises InputError unless n >= 1.

    >>> BestOfN(4)
    BestOfN(4)
    """
    n = _whole("n", n)
    return Procedure((Component(1.0, n, ((n, 1.0),)),), "best_of_n", f"BestOfN({n})")


def WorstOfN(n: int) -> Procedure:
    """Keep the worst of n (a safety model of adversarial decoding): g = n (1-p)^(n-1). InputError unless n >= 1.

    >>> float(WorstOfN(4).cdf(0.5))
    0.9375
    """
    n = _whole("n", n)
    return Procedure((Component(1.0, n, ((1, 1.0),)),), "worst_of_n", f"WorstOfN({n})")


def KthOfN(k: int, n: int) -> Procedure:
    """Keep the k-th best of n: g is the Beta(n-k+1, k) density. Raises InputError unless 1 <= k <= n.

    >>> KthOfN(1, 4) == BestOfN(4)
    True
    """
    k, n = _k_of_n(k, n)
    return Procedure((Component(1.0, n, ((n - k + 1, 1.0),)),), "kth_of_n", f"KthOfN({k}, {n})")


def RandomN(pmf: Sequence[float]) -> Procedure:
    """Keep the best of a random number of candidates, pmf[j] = P(N = j+1): G is the generating function of N.

    Raises InputError unless pmf is a non-empty list of probabilities that sum to 1.

    >>> float(RandomN([0.5, 0.5]).cdf(0.5))
    0.375
    """
    given = np.asarray(pmf, dtype=float)
    if given.ndim != 1 or given.size == 0 or not np.all(given >= 0) or not abs(given.sum() - 1) <= 1e-9:
        raise InputError(f"pmf must be probabilities of N = 1, 2, ... that sum to 1; got {pmf!r}")
    shares = (given / given.sum()).tolist()
    components = tuple(Component(share, j + 1, ((j + 1, 1.0),)) for j, share in enumerate(shares) if share > 0)
    return Procedure(components, "random_n", f"RandomN({given.tolist()})")


def SoftBestOfN(n: int, tilt: float) -> Procedure:
    """Keep ascending rank j of n with probability ~ e^{tilt j/n}; G = [(1+p(e^{tilt/n}-1))^n - 1]/(e^tilt - 1).

    tilt = 0 is plain sampling, tilt -> +-infinity Best-of-n and Worst-of-n.
    Raises InputError unless n >= 1 and |tilt| <= 500.

    >>> SoftBestOfN(2, 0.0).order_weights(2).tolist()
    [0.5, 0.5]
    """
    n = _whole("n", n)
    if not abs(tilt) <= LARGEST_TILT:
        raise InputError(f"tilt must be a number within +-{LARGEST_TILT:g} (beyond: BestOfN, WorstOfN); got {tilt!r}")
    weights_n = special.softmax(float(tilt) * np.arange(1, n + 1) / n).tolist()
    picks = tuple((rank, weight) for rank, weight in enumerate(weights_n, start=1))
    label = f"SoftBestOfN({n}, {float(tilt):g})"
    return Procedure((Component(1.0, n, picks, None if n == 1 else float(tilt)),), "soft_best_of_n", label)


def TopOfN(k: int, n: int) -> Procedure:
    """Keep one of the k best of n, each with probability 1/k: g = (n/k) P(Binomial(n-1, p) >= n-k), which rises.

    It gives up some reward for a weaker pull at the very top, where a reward is hacked (Sriraman & Block,
    arXiv:2603.05739, by its definition). k = 1 is BestOfN(n), k = n plain sampling.
    Raises InputError unless 1 <= k <= n.

    >>> TopOfN(2, 4).order_weights(4).tolist()
    [0.0, 0.0, 0.5, 0.5]
    """
    k, n = _k_of_n(k, n)
    picks = tuple((rank, 1 / k) for rank in range(n - k + 1, n + 1))
    line = (n - k + 1, 1 / k, 0.0) if k > 1 else None
    return Procedure((Component(1.0, n, picks, line=line),), "top_of_n", f"TopOfN({k}, {n})")


def BottomOfN(k: int, n: int) -> Procedure:
    """Keep one of the k worst of n, each with probability 1/k: the mirror of `TopOfN`. k = 1 is WorstOfN(n).

    Raises InputError unless 1 <= k <= n.

    >>> BottomOfN(2, 4).order_weights(4).tolist()
    [0.5, 0.5, 0.0, 0.0]
    """
    components = TopOfN(k, n).mirror.components
    return Procedure(components, "bottom_of_n", f"BottomOfN({k}, {n})")


def PessimisticOfN(n: int, beta: float) -> Procedure:
    """Keep ascending rank r of n with the weight that f(u) = max((u - lam)/beta, 0) has between (r-1)/n and r/n.

    f is the decoder of InferenceTimePessimism (Huang et al., arXiv:2503.21878) for infinitely many candidates: the
    policy's best expected reward less a chi-squared penalty. Ours is that the reward is the calibrated quantile u, so
    that lam, which makes the integral of f one, is known: 1 - sqrt(2 beta) for beta <= 1/2, and 1/2 - beta beyond,
    where f is positive everywhere. Ours are also the weights at finite n, in place of the paper's rejection sampling:
    g is then the Kantorovich polynomial of f, which rises like f and tends to it as n grows (SoftBestOfN and TopOfN
    are that of e^{tilt u} and of the step at 1 - k/n). beta -> 0 is Best-of-N (exactly from sqrt(2 beta) = 1/n down),
    beta -> infinity plain sampling. Raises InputError unless n >= 1 and beta is a finite number > 0.

    >>> PessimisticOfN(4, 0.5).order_weights(4).tolist()  # f(u) = 2 u
    [0.0625, 0.1875, 0.3125, 0.4375]
    """
    n = _whole("n", n)
    if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 < beta < math.inf:
        raise InputError(f"beta must be a finite number > 0 (small: BestOfN, large: plain sampling); got {beta!r}")
    beta = float(beta)
    # Weights up to their sum. The line through those of whole cells begins at rank `first`; the cell below it, the one
    # that f rises from 0 in, has the rest.
    if beta <= 0.5:
        width = min(n * math.sqrt(2 * beta), float(n))  # n (1 - lam): f is 0 below n - width
        whole = math.ceil(width) - 1
        rest, first, step = width - whole, n - whole + 1, 1.0
        lowest, level = rest * rest / 2, rest + 0.5
    else:
        lowest, first, step = 0.0, 1, 1 / beta / n
        level = 1 + (0.5 / n - 0.5) / beta
    heights = [level + step * index for index in range(n - first + 1)]
    weights = [lowest, *heights] if first > 1 else heights
    ranks = range(n - len(weights) + 1, n + 1)
    total = math.fsum(weights)
    picks = tuple((rank, weight / total) for rank, weight in zip(ranks, weights, strict=True))
    line = (first, level / total, step / total) if len(heights) > 1 else None
    return Procedure((Component(1.0, n, picks, line=line),), "pessimistic_of_n", f"PessimisticOfN({n}, {beta:g})")


BUILT_IN: dict[str, Callable[..., Procedure]] = {
    "best_of_n": BestOfN,
    "worst_of_n": WorstOfN,
    "kth_of_n": KthOfN,
    "random_n": RandomN,
    "soft_best_of_n": SoftBestOfN,
    "top_of_n": TopOfN,
    "bottom_of_n": BottomOfN,
    "pessimistic_of_n": PessimisticOfN,
}
"""Procedures a recipe knows by name: `procedure: best_of_n`, with `n` and `procedure_kwargs` as the arguments."""

NEEDS: dict[str, tuple[str, str]] = {
    "kth_of_n": ("k", "{k: 2} for the second best"),
    "soft_best_of_n": ("tilt", "{tilt: 8}"),
    "random_n": ("pmf", "{pmf: [0.5, 0.5]}, the chances of 1, 2, ... samples"),
    "top_of_n": ("k", "{k: 2} for one of the two best"),
    "bottom_of_n": ("k", "{k: 2} for one of the two worst"),
    "pessimistic_of_n": ("beta", "{beta: 0.1}"),
}
"""What one of them takes in `procedure_kwargs`, with an example."""


def takes_n(name: str) -> bool:
    """Whether the built-in procedure of that name has an argument n.

    >>> takes_n("best_of_n"), takes_n("random_n")
    (True, False)
    """
    return "n" in inspect.signature(BUILT_IN[name]).parameters


def refuse_n(procedure: str, n: int | None) -> None:
    """Raise for an n that was given to a built-in procedure which has none.

    Raises:
        InputError: naming what decides in its place.
    """
    if n is not None and procedure in BUILT_IN and not takes_n(procedure):
        wanted, example = NEEDS[procedure]
        raise InputError(
            f"procedure {procedure} takes no n, got {n}: {wanted} says how many candidates are drawn "
            f"({example}): leave n out"
        )


def check_procedure(value: object) -> Procedure:
    """`value` if it is a Procedure; raises InputError otherwise.

    >>> check_procedure(BestOfN(2))
    BestOfN(2)
    """
    if not isinstance(value, Procedure):
        raise InputError(f"procedure must be a Procedure such as BestOfN(4); got {value!r}")
    return value


def _whole(name: str, value: Any) -> int:
    """`value` as an int >= 1; True, 4.5 and "4" are mistakes."""
    try:
        whole = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = 0
    if whole < 1:
        raise InputError(f"{name} must be a whole number >= 1; got {value!r}")
    return whole


def _k_of_n(k: Any, n: Any) -> tuple[int, int]:
    """k and n as ints with 1 <= k <= n."""
    k, n = _whole("k", k), _whole("n", n)
    if k > n:
        raise InputError(f"k must be at most n, the number of candidates; got k={k}, n={n}")
    return k, n


def _drawn_ranks(
    procedure: Procedure, rows: int, rng: np.random.Generator | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Each row's number of candidates and ascending rank, drawn from the mixture: two (P,) arrays."""
    which_P = np.zeros(rows, dtype=np.intp)
    if rng is not None and len(procedure.components) > 1:
        shares = np.array([component.probability for component in procedure.components])
        which_P = rng.choice(len(shares), size=rows, p=shares / shares.sum())
    size_P, rank_P = np.empty(rows, dtype=np.intp), np.empty(rows, dtype=np.intp)
    for index, component in enumerate(procedure.components):
        mine_P = which_P == index
        ranks, weights = np.array([rank for rank, _ in component.picks]), np.array([w for _, w in component.picks])
        size_P[mine_P] = component.n
        if rng is None or len(ranks) == 1:
            rank_P[mine_P] = ranks[0]
        else:
            rank_P[mine_P] = rng.choice(ranks, size=int(mine_P.sum()), p=weights / weights.sum())
    return size_P, rank_P


def _evaluate(procedure: Procedure, p: ArrayLike, order: int) -> Floats:
    """G (order -1), g (0) or g' (1) of the mixture at p."""
    p = np.asarray(p, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise InputError(f"p must lie in [0, 1]; got values in [{np.min(p)}, {np.max(p)}]")
    total, power_shares = np.zeros_like(p), np.zeros(procedure.n + 1)
    for component in procedure.components:
        if component.tilt is not None:
            total = total + component.probability * soft_law(component.n, component.tilt, p, order)
            continue
        picks = component.picks
        if component.line is not None:
            law = falling_line_law if component.falling else line_law
            total = total + component.probability * law(*component.line, component.n, p, order)
            # what the line does not hold: ranks below its first one, counted from its side
            first = component.line[0]
            picks = tuple(
                (rank, weight)
                for rank, weight in picks
                if (component.n + 1 - rank if component.falling else rank) < first
            )
        for rank, weight in picks:
            if rank == component.n:
                power_shares[rank] += component.probability * weight
            else:
                total = total + component.probability * weight * beta_law(rank, component.n, p, order)
    return total + powers_law(power_shares, p, order) if power_shares.any() else total
