"""Transformations are what they say, increasing, and refuse what is no calibrated reward."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from scipy import stats

from infalign.theory import transforms
from infalign.types import InputError

U = np.linspace(0.01, 0.99, 33)
EVERY = [transforms.identity, transforms.log, transforms.log_mirror, transforms.normal_icdf]
EVERY += [transforms.exponential(t) for t in (0.5, 10, -0.5, -10)]


def test_values_by_definition() -> None:
    for u in U.tolist():
        assert transforms.identity(u) == u
        assert float(transforms.log(u)) == pytest.approx(math.log(u), rel=1e-15)
        assert float(transforms.log_mirror(u)) == pytest.approx(-math.log(1 - u), rel=1e-13)
        assert float(transforms.normal_icdf(u)) == pytest.approx(float(stats.norm.ppf(u)), rel=1e-12, abs=1e-15)
        assert float(transforms.exponential(10)(u)) == pytest.approx(math.exp(10 * (u - 1)), rel=1e-15)
        assert float(transforms.exponential(-10)(u)) == pytest.approx(-math.exp(-10 * u), rel=1e-15)


@pytest.mark.parametrize("transform", EVERY, ids=repr)
def test_increasing_vectorised_and_transparent_to_nan(transform: transforms.Transform) -> None:
    assert np.all(np.diff(transform(U)) > 0)
    assert transform(U.reshape(3, 11)).shape == (3, 11)
    np.testing.assert_array_equal(transform(U.reshape(3, 11)).ravel(), transform(U))
    assert np.isnan(transform([0.5, np.nan])).tolist() == [False, True]
    assert pickle.loads(pickle.dumps(transform)) == transform
    for outside in (-1e-9, 1 + 1e-9, [0.5, 2.0]):
        with pytest.raises(InputError, match=r"u must lie in \[0, 1\]"):
            transform(outside)


def test_ends() -> None:
    assert transforms.log(0.0) == -np.inf and transforms.log_mirror(1.0) == np.inf
    assert transforms.normal_icdf([0.0, 1.0]).tolist() == [-np.inf, np.inf]
    assert transforms.exponential(5)(1.0) == 1.0 and transforms.exponential(-5)(0.0) == -1.0


@pytest.mark.parametrize("t", [0, 0.0, float("nan"), float("inf"), -float("inf")])
def test_exponential_refuses(t: float) -> None:
    with pytest.raises(InputError, match="t must be a finite number other than 0"):
        transforms.exponential(t)


def test_names_and_catalogue() -> None:
    assert [t.name for t in EVERY[:5]] == ["identity", "log", "log_mirror", "normal_icdf", "exponential"]
    assert transforms.CATALOGUE["exponential"](t=10) == transforms.exponential(10.0)
    for name in ("identity", "log", "log_mirror", "normal_icdf"):
        assert transforms.CATALOGUE[name]() == getattr(transforms, name)
        assert transforms.CATALOGUE[name]().name == name
    assert repr(transforms.exponential(10)) == "Exponential(t=10.0)" and repr(transforms.identity) == "Identity()"
