"""From a recipe's names to its procedure, transform and beta, one's own included."""

from __future__ import annotations

import re

import numpy as np
import pytest

from infalign import BestOfN, KthOfN, RandomN, SoftBestOfN, WorstOfN, optimal_transform, tilt, transforms
from infalign.stages.objective import load_procedure, load_transform
from infalign.stages.recipe import load_recipe
from infalign.types import InputError

OWN = """
from infalign import KthOfN

second_best = KthOfN(2, 8)


def best(n):
    return KthOfN(1, n)


def phi(u):
    return u**7


def power(k):
    return lambda u: u**k


def broken(u):
    return u / 0


def scalar(u):
    return 1.0


def wrong(n):
    return "no procedure"
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "recipe.yaml").write_text("n: 4\n")
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, BestOfN(4)),
        ({"procedure": "worst_of_n", "n": 2}, WorstOfN(2)),
        ({"procedure": "kth_of_n", "procedure_kwargs": {"k": 2}}, KthOfN(2, 4)),
        ({"procedure": "random_n", "procedure_kwargs": {"pmf": [0.5, 0.5]}}, RandomN([0.5, 0.5])),
        ({"procedure": "soft_best_of_n", "procedure_kwargs": {"tilt": 3.0}}, SoftBestOfN(4, 3.0)),
        ({"procedure": "own.py:second_best"}, KthOfN(2, 8)),
        ({"procedure": "own.py:best", "procedure_kwargs": {"n": 3}}, BestOfN(3)),
    ],
)
def test_procedures(keys, expected, own):
    assert load_procedure(load_recipe(own, keys)) == expected


def test_transforms(own):
    u = np.linspace(0.01, 0.99, 7)
    transform, beta = load_transform(load_recipe(own, {"target_kl": 1.0}), BestOfN(4))
    assert beta == pytest.approx(1 / 12.04099, rel=1e-5)  # theory.md section 5
    np.testing.assert_allclose(transform(u), optimal_transform(BestOfN(4), kl=1.0)(u))
    keys = {"transform": "exponential", "transform_kwargs": {"t": 10}, "target_kl": 1.0}
    transform, beta = load_transform(load_recipe(own, keys), BestOfN(4))
    assert beta == pytest.approx(1 / 4.14401, rel=1e-5)
    transform, beta = load_transform(load_recipe(own, {"transform": "own.py:phi", "target_kl": 0.5}), BestOfN(4))
    np.testing.assert_allclose(transform(u), u**7)
    assert tilt(lambda v: np.asarray(v) ** 7, beta=beta).kl == pytest.approx(0.5, abs=1e-6)
    keys = {"transform": "own.py:power", "transform_kwargs": {"k": 3}, "beta": 0.2}
    transform, beta = load_transform(load_recipe(own, keys), BestOfN(4))
    assert (float(transform(np.array(0.5))), beta) == (0.125, 0.2)
    assert (
        load_transform(load_recipe(own, {"transform": "identity", "beta": 0.1}), BestOfN(4))[0] == transforms.identity
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"transform": "own.py:broken"}, "finite values of the same shape"),
        ({"transform": "own.py:scalar"}, "finite values of the same shape"),
        ({"transform": "own.py:nothing"}, "nothing"),
        ({"transform": "own.py:power"}, "fails on an array|finite values"),
    ],
)
def test_transforms_that_are_none(keys, message, own):
    with pytest.raises(InputError, match=message), np.errstate(all="ignore"):
        load_transform(load_recipe(own, {**keys, "beta": 0.1}), BestOfN(4))


def test_a_procedure_that_is_none(own):
    with pytest.raises(InputError, match="gave str, not an infalign Procedure"):
        load_procedure(load_recipe(own, {"procedure": "own.py:wrong", "procedure_kwargs": {"n": 1}}))


@pytest.mark.parametrize(
    ("name", "example"), [("kth_of_n", "{k: 2}"), ("soft_best_of_n", "{tilt: 8}"), ("random_n", "{pmf: [0.5, 0.5]}")]
)
def test_a_built_in_says_what_else_it_takes(name, example):
    with pytest.raises(InputError, match=f"procedure {name} needs procedure_kwargs: {re.escape(example)}"):
        load_procedure(load_recipe({"procedure": name}))
