"""From a recipe's names to its procedure, transform and beta, one's own included."""

from __future__ import annotations

import re

import numpy as np
import pytest

from infalign import (
    BestOfN,
    BottomOfN,
    KthOfN,
    PessimisticOfN,
    RandomN,
    SoftBestOfN,
    TopOfN,
    WorstOfN,
    optimal_transform,
    tilt,
    transforms,
)
from infalign.stages.objective import find_procedure, load_objective, load_procedure
from infalign.stages.recipe import load_recipe
from infalign.theory.objective import differing
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
    (tmp_path / "recipe.yaml").write_text("seed: 4\n")
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, BestOfN(4)),
        ({"procedure": "worst_of_n", "n": 2}, WorstOfN(2)),
        ({"procedure": "kth_of_n", "procedure_kwargs": {"k": 2}}, KthOfN(2, 4)),
        ({"procedure": "random_n", "procedure_kwargs": {"pmf": [0.5, 0.5]}}, RandomN([0.5, 0.5])),
        ({"procedure": "soft_best_of_n", "procedure_kwargs": {"tilt": 3.0}}, SoftBestOfN(4, 3.0)),
        ({"procedure": "top_of_n", "n": 8, "procedure_kwargs": {"k": 2}}, TopOfN(2, 8)),
        ({"procedure": "bottom_of_n", "procedure_kwargs": {"k": 3}}, BottomOfN(3, 4)),
        ({"procedure": "pessimistic_of_n", "procedure_kwargs": {"beta": 0.1}}, PessimisticOfN(4, 0.1)),
        ({"procedure": "own.py:second_best"}, KthOfN(2, 8)),
        ({"procedure": "own.py:best", "procedure_kwargs": {"n": 3}}, BestOfN(3)),
    ],
)
def test_procedures(keys, expected, own):
    assert load_procedure(load_recipe(own, keys)) == expected


def test_objectives(own):
    u = np.linspace(0.01, 0.99, 7)
    best = load_objective(load_recipe(own, {"target_kl": 1.0}), BestOfN(4))
    assert best.beta == pytest.approx(1 / 12.04099, rel=1e-5)
    assert (best.kl, best.win_rate) == (pytest.approx(1.0), pytest.approx(0.941123, abs=1e-6))
    np.testing.assert_allclose(best.transform(u), optimal_transform(BestOfN(4), kl=1.0)(u))
    keys = {"transform": "exponential", "transform_kwargs": {"t": 10}}
    for given in ({"target_kl": 1.0}, {"beta": 1 / 4.14401}):  # the same optimum, from either side
        found = load_objective(load_recipe(own, {**keys, **given}), BestOfN(4))
        assert found.beta == pytest.approx(1 / 4.14401, rel=1e-5)
        assert (found.kl, found.win_rate) == (pytest.approx(1.0, abs=1e-5), pytest.approx(0.935097, abs=1e-5))
    own_one = load_objective(load_recipe(own, {"transform": "own.py:phi", "target_kl": 0.5}), BestOfN(4))
    np.testing.assert_allclose(own_one.transform(u), u**7)
    assert tilt(lambda v: np.asarray(v) ** 7, beta=own_one.beta).kl == pytest.approx(0.5, abs=1e-6)
    keys = {"transform": "own.py:power", "transform_kwargs": {"k": 3}, "beta": 0.2}
    powers = load_objective(load_recipe(own, keys), BestOfN(4))
    assert (float(powers.transform(np.array(0.5))), powers.beta) == (0.125, 0.2)
    assert powers.kl == pytest.approx(tilt(lambda v: np.asarray(v) ** 3, beta=0.2).kl)
    plain = load_objective(load_recipe(own, {"transform": "identity", "beta": 0.1}), BestOfN(4))
    assert plain.transform == transforms.identity
    mirror = load_objective(load_recipe(own, {"transform": "log_mirror", "beta": 0.5}), BestOfN(4))
    assert (mirror.kl, mirror.win_rate, mirror.policy) == (None, None, None)  # it diverges on [0, 1]


def test_records_of_objectives(own):
    """Two runs of one recipe agree, whatever solved it; other recipes differ in what differs."""

    def record(**keys):
        recipe = load_recipe(own, keys)
        return load_objective(recipe, load_procedure(recipe)).record()

    first = record(target_kl=1.0)
    assert first["transform"].startswith("OptimalTransform(BestOfN(4), log_beta=-2.488")
    assert differing(first, {**first, "beta": first["beta"] * (1 + 1e-6), "transform": "OptimalTransform(x)"}) == []
    assert differing(first, record(target_kl=0.5)) == ["beta"]
    assert differing(first, record(target_kl=1.0, n=8)) == ["procedure", "beta"]
    assert differing(first, record(transform="identity", beta=first["beta"])) == ["transform"]
    assert differing(record(transform="own.py:phi", beta=0.1), record(transform="own.py:phi", beta=0.1)) == []
    assert differing({}, first) == []


def test_a_plug_in_is_executed_once(own, tmp_path, monkeypatch):
    """However often its objects are asked for; again when it, or a module that it imports, was edited."""
    (tmp_path / "helper.py").write_text("POWER = 3\n")
    (tmp_path / "plug.py").write_text(
        "from pathlib import Path\nfrom infalign import BestOfN\nimport helper\n"
        "with (Path(__file__).parent / 'count').open('a') as file:\n    file.write('x')\n"
        "def procedure(n=4):\n    return BestOfN(n)\n"
        "def phi(u):\n    return u ** helper.POWER\n"
    )
    keys = {"procedure": f"{tmp_path}/plug.py:procedure", "transform": f"{tmp_path}/plug.py:phi", "beta": 0.2}
    recipe = load_recipe(own, keys)
    for _ in range(3):
        found = load_objective(recipe, load_procedure(recipe))
    assert (tmp_path / "count").read_text() == "x" and float(found.transform(np.array(0.5))) == 0.125
    (tmp_path / "helper.py").write_text("POWER = 2\n")
    assert float(load_objective(recipe, BestOfN(4)).transform(np.array(0.5))) == 0.25
    assert (tmp_path / "count").read_text() == "xx"


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
        load_objective(load_recipe(own, {**keys, "beta": 0.1}), BestOfN(4))


def test_a_procedure_that_is_none(own):
    with pytest.raises(InputError, match="gave str, not an infalign Procedure"):
        load_procedure(load_recipe(own, {"procedure": "own.py:wrong", "procedure_kwargs": {"n": 1}}))


def test_random_n_takes_no_n(own):
    """It was ignored. A strategy that draws `n` candidates itself takes it all the same."""
    keys = {"procedure": "random_n", "procedure_kwargs": {"pmf": [0.5, 0.5]}}
    with pytest.raises(InputError, match=r"procedure random_n takes no n, got 8: pmf says how many .*: leave n out"):
        load_recipe(own, {**keys, "n": 8})
    with pytest.raises(InputError, match="procedure random_n takes no n, got 4"):  # the default is no exception
        load_recipe(own, {**keys, "n": 4})
    assert load_recipe(own, {**keys, "n": 8, "strategy": "rejection"}).n == 8


def test_a_builder_that_takes_no_n_is_told_what_it_got(own):
    with pytest.raises(
        InputError, match=r"does not take procedure_kwargs {'n': 3, 'm': 1}: best\(\) got an unexpected"
    ):
        find_procedure("own.py:best", 3, {"m": 1}, own.parent)


def test_a_procedure_that_is_made_already_takes_no_arguments(own):
    with pytest.raises(InputError, match=r"is KthOfN\(2, 8\) already and takes no arguments, got {'n': 3}"):
        load_procedure(load_recipe(own, {"procedure": "own.py:second_best", "procedure_kwargs": {"n": 3}}))


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("kth_of_n", "{k: 2}"),
        ("soft_best_of_n", "{tilt: 8}"),
        ("random_n", "{pmf: [0.5, 0.5]}"),
        ("top_of_n", "{k: 2}"),
        ("bottom_of_n", "{k: 2}"),
        ("pessimistic_of_n", "{beta: 0.1}"),
    ],
)
def test_a_built_in_says_what_else_it_takes(name, example):
    with pytest.raises(InputError, match=f"procedure {name} needs procedure_kwargs: {re.escape(example)}"):
        load_procedure(load_recipe({"procedure": name}))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("top_of_n", {"k": 5}, "k must be at most n, the number of candidates; got k=5, n=4"),
        ("bottom_of_n", {"k": 1.5}, "k must be a whole number >= 1; got 1.5"),
        ("pessimistic_of_n", {"beta": 0}, "beta must be a finite number > 0 .*; got 0"),
        ("pessimistic_of_n", {"beta": "low"}, "beta must be a finite number > 0 .*; got 'low'"),
        ("pessimistic_of_n", {"beta": 0.1, "k": 2}, "does not take procedure_kwargs {'beta': 0.1, 'k': 2}"),
        ("topofn", {"k": 2}, "procedure 'topofn' is unknown: did you mean 'top_of_n'"),
    ],
)
def test_wrong_arguments_of_a_built_in(name, kwargs, message):
    with pytest.raises(InputError, match=message):
        load_procedure(load_recipe({"procedure": name, "procedure_kwargs": kwargs}))
