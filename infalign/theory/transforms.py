"""Reward transformations Phi: [0, 1] -> R, applied to the calibrated reward before KL-regularised RL.

Small frozen callables, vectorised, with a `name`. NaN (no score) passes through; u outside [0, 1] raises InputError.
`exponential` is e^{t(u-1)} and -e^{tu} rather than the paper's e^{tu}: the same up to the scale of beta, and the
transformed reward stays in [-1, 1]. The transformation that is optimal for a procedure is `optimal_transform`.

Theory: InfAlign-CTRL (arXiv:2412.19792).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from infalign.types import InputError

Floats = NDArray[np.float64]


class Transform(Protocol):
    """What every transformation here is: a callable u -> Phi(u) on arrays, with a name."""

    @property
    def name(self) -> str:
        """The key in `CATALOGUE`."""
        ...

    def __call__(self, u: ArrayLike) -> Floats:
        """Phi(u), same shape as u."""
        ...


@dataclass(frozen=True)
class Identity:
    """Phi(u) = u: exactly optimal without an inference procedure, where E[C] is the win rate.

    >>> float(Identity()(0.25))
    0.25
    """

    name: str = field(default="identity", init=False, repr=False)

    def __call__(self, u: ArrayLike) -> Floats:
        """u itself; u in [0, 1], any shape."""
        return _checked(u)


@dataclass(frozen=True)
class Log:
    """Phi(u) = log u, whose tilted policy is the Best-of-m policy with m = 1 + 1/beta (BOND, vBoN, BoNBoN).

    >>> float(Log()(1.0))
    0.0
    """

    name: str = field(default="log", init=False, repr=False)

    def __call__(self, u: ArrayLike) -> Floats:
        """log u; -inf at 0; u in [0, 1], any shape."""
        with np.errstate(divide="ignore"):
            return np.log(_checked(u))


@dataclass(frozen=True)
class LogMirror:
    """Phi(u) = -log(1-u), the mirror of `log` for Worst-of-N; its tilted policy needs beta > 1.

    >>> float(LogMirror()(0.0))
    0.0
    """

    name: str = field(default="log_mirror", init=False, repr=False)

    def __call__(self, u: ArrayLike) -> Floats:
        """-log(1-u); +inf at 1; u in [0, 1], any shape."""
        with np.errstate(divide="ignore"):
            return 0.0 - np.log1p(-_checked(u))


@dataclass(frozen=True)
class NormalIcdf:
    """The normal quantile of u: what the raw reward is when rewards are Gaussian with the same spread everywhere.

    >>> float(NormalIcdf()(0.5))
    0.0
    """

    name: str = field(default="normal_icdf", init=False, repr=False)

    def __call__(self, u: ArrayLike) -> Floats:
        """The z with NormalCDF(z) = u; -inf at 0 and +inf at 1; u in [0, 1], any shape."""
        return special.ndtri(_checked(u))


@dataclass(frozen=True)
class Exponential:
    """Phi(u) = e^{t(u-1)} for t > 0 (Best-of-N), -e^{tu} for t < 0 (Worst-of-N); increasing, within [-1, 1].

    Raises InputError when t is 0 or not finite.

    >>> float(Exponential(10.0)(1.0)), float(Exponential(-10.0)(0.0))
    (1.0, -1.0)
    """

    t: float
    name: str = field(default="exponential", init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.t, bool) or not np.isfinite(self.t) or self.t == 0:
            raise InputError(f"t must be a finite number other than 0 (its limit t -> 0 is identity); got {self.t!r}")

    def __call__(self, u: ArrayLike) -> Floats:
        """e^{t(u-1)} or -e^{tu}; u in [0, 1], any shape."""
        u = _checked(u)
        return np.exp(self.t * (u - 1)) if self.t > 0 else -np.exp(self.t * u)


def exponential(t: float) -> Exponential:
    """The exponential transformation of InfAlign-CTRL: e^{t(u-1)} for t > 0, -e^{tu} for t < 0.

    t = 10 suits Best-of-4 at KL ~ .2, t = 5 Best-of-2 at KL ~ .7; the best t grows with the KL.
    Raises InputError when t is 0 or not finite.

    >>> exponential(10)
    Exponential(t=10.0)
    """
    return Exponential(float(t))


identity = Identity()
log = Log()
log_mirror = LogMirror()
normal_icdf = NormalIcdf()

CATALOGUE: dict[str, Callable[..., Transform]] = {
    "identity": Identity,
    "log": Log,
    "log_mirror": LogMirror,
    "normal_icdf": NormalIcdf,
    "exponential": exponential,
}
"""Transformations a recipe knows by name: `transform: exponential`, `transform_kwargs: {t: 10}`."""


def _checked(u: ArrayLike) -> Floats:
    """u as floats; NaN passes, anything outside [0, 1] is a mistake."""
    u = np.asarray(u, dtype=float)
    if np.any((u < 0) | (u > 1)):
        raise InputError(f"u must lie in [0, 1]: a calibrated reward; got values in [{np.nanmin(u)}, {np.nanmax(u)}]")
    return u[()]


def check_transform(transform: Callable[[Floats], object], what: str) -> None:
    """See that a function maps quantiles to finite values that are not all the same.

    Args:
        transform: a user's, of an array of quantiles in (0, 1).
        what: it is called in the message.

    Raises:
        InputError: it fails, changes the shape, is not finite, or is constant.

    >>> check_transform(identity, "identity")
    """
    probe = np.linspace(0.01, 0.99, 9)
    try:
        values = np.asarray(transform(probe), dtype=np.float64)
    except Exception as error:  # a user's function may raise anything
        raise InputError(f"{what} fails on an array of 9 quantiles: {type(error).__name__}: {error}") from error
    if values.shape != probe.shape or not np.isfinite(values).all():
        raise InputError(f"{what} must map an array of quantiles in (0, 1) to finite values of the same shape")
    if not np.ptp(values) > 0:
        raise InputError(f"{what} is constant: it must tell low quantiles from high ones")
