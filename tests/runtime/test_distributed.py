"""What ranks say to each other, in one process: the exchange itself is put in the place of torch's."""

from __future__ import annotations

import pickle
import re

import pytest
import torch

from infalign.runtime import distributed
from infalign.runtime.distributed import PeerError, gathered, together
from infalign.types import InputError, TrainingError


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks: what the other one sends is a list's only item; `rank` is ours."""

    def connect(other, rank=0):
        def exchange(parts, mine):
            parts[rank], parts[1 - rank] = pickle.loads(pickle.dumps(mine)), other

        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(distributed, "_connected", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_gather_object", exchange)

    return connect


def test_values_come_in_rank_order(ranks):
    ranks(distributed._Tagged("rewards", 2.0), rank=1)
    assert gathered(1.0, "rewards") == [2.0, 1.0]


@pytest.mark.parametrize(
    ("other", "place"),
    [(distributed._Tagged("rewards", (1, 2)), "rewards"), ([3.0, 4.0], "a collective of other code")],
)
def test_ranks_that_have_lost_step_are_named(other, place, ranks):
    """`together` unpacked whatever the other rank had sent."""
    ranks(other)
    line = f"lost step: rank 0 is at the checks and rank 1 at {place}: see that a reward"
    with pytest.raises(TrainingError, match=re.escape(line)), together("an outer block"), together("the checks"):
        pass
    ranks(other, rank=1)
    with pytest.raises(PeerError, match="lost step"), together("the checks"):
        pass


@pytest.mark.parametrize("what", ["the checks", "an outer block"])
def test_a_failure_on_another_rank_is_raised_by_name(what, ranks):
    """Also where that rank has left a block that we are still in, for the end of an outer one."""
    failure = distributed._Failure("InputError", "no such file")
    ranks(distributed._Tagged(what, failure))
    with pytest.raises(InputError, match=r"^rank 1: no such file$"), together("the checks"):
        pass
    with pytest.raises(InputError, match=r"^rank 1: no such file$"):
        gathered(1.0, "rewards")


def test_ones_own_failure_is_raised_as_it_is(ranks):
    ranks(distributed._Tagged("the checks", None))
    with pytest.raises(ZeroDivisionError), together("the checks"):
        _ = 1 / 0
