"""Whatever the strategy: a prompt's decoding depends on no other prompt, costs add up, and mistakes are refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from infalign import BestOfN, KthOfN, SoftBestOfN, TopOfN, WorstOfN
from infalign.decoding.adaptive import Adaptive
from infalign.decoding.by_procedure import ByProcedure, as_strategy
from infalign.decoding.decode import decode, plan_decoding
from infalign.decoding.early_rejection import EarlyRejection
from infalign.decoding.majority_vote import MajorityVote
from infalign.decoding.rejection import Rejection
from infalign.decoding.strategies import STRATEGIES as BUILT_IN
from infalign.decoding.strategies import TAKES_PROCEDURE
from infalign.decoding.strategy import Choose, Draw, Finish, Spent
from infalign.generation.plan import Request
from infalign.runtime.seeds import stream
from infalign.types import InputError
from tests.decoding.toys import Digits, Levels, number, prompts, run

STRATEGIES = {
    "procedure": ByProcedure(SoftBestOfN(4, 2.0)),
    "rejection": Rejection(6, 0.8, num_references=5, at_once=2),
    "majority_vote": MajorityVote(5, r"\d"),
    "early_rejection": EarlyRejection(SoftBestOfN(5, 2.0), 2, 0.6),
    "adaptive": Adaptive(9, cost=0.4, unit="spread"),
}
REFERENCE = Digits(seed="base")


def test_every_built_in_is_tested_here():
    assert set(STRATEGIES) == set(BUILT_IN)
    assert {name: type(one) for name, one in STRATEGIES.items()} == BUILT_IN
    assert {name for name, one in STRATEGIES.items() if hasattr(one, "procedure")} == set(TAKES_PROCEDURE)


@pytest.mark.parametrize("name", STRATEGIES)
def test_order_and_batches_do_not_matter(name):
    strategy, given = STRATEGIES[name], prompts(25)
    first = run(strategy, Digits(), given=given, reference=REFERENCE)
    others = [
        run(strategy, Digits(), given=given[::-1], reference=REFERENCE)[::-1],
        run(strategy, Digits(), given=given, tokens=1, reference=REFERENCE),
        [run(strategy, Digits(), given=[one], reference=REFERENCE)[0] for one in given],
    ]
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert (one.chosen, one.spent) == (same.chosen, same.spent)
            assert [c.token_ids for c in one.candidates] == [c.token_ids for c in same.candidates]
            np.testing.assert_array_equal(one.rewards_N, same.rewards_N)
    assert len({one.chosen for one in first}) > 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_was_drawn_is_what_is_counted(name):
    class Counted(Digits):
        tokens = 0

        def count(self, samples, before=0):
            self.tokens += sum(len(sample.token_ids) for sample in samples) - before
            return samples

        def sample(self, requests):
            return self.count(super().sample(requests))

        def begin(self, requests, tokens):
            return self.count(super().begin(requests, tokens))

        def resume(self, requests, begun):
            return self.count(super().sample(requests), sum(len(one.token_ids) for one in begun))

    scored = [0, 0]

    def score(given, samples):
        scored[0] += len(samples)
        scored[1] += sum(len(sample.token_ids) for sample in samples)
        return number(given, samples)

    sampler, reference = Counted(), Counted(seed="base")
    found = run(STRATEGIES[name], sampler, score, given=prompts(20), reference=reference)
    spent = sum((one.spent for one in found), Spent())
    assert spent.tokens == sampler.tokens + reference.tokens
    assert [spent.reward_calls, spent.scored_tokens] == scored
    assert spent.candidates == sum(len(one.candidates) for one in found)
    assert all(one.spent.candidates <= STRATEGIES[name].n for one in found)


@pytest.mark.parametrize(
    "procedure", [BestOfN(4), WorstOfN(4), KthOfN(2, 4), SoftBestOfN(4, 1.0), TopOfN(2, 4)], ids=repr
)
def test_a_procedure_is_its_own_strategy(procedure):
    """The same samples and the same choice as select on the whole row with the prompt's stream."""
    given = prompts(30)
    found, wrapped = (run(one, Levels([0.1] * 10), given=given, seed=3) for one in (procedure, ByProcedure(procedure)))
    for one, other in zip(found, wrapped, strict=True):
        row = [float(Levels([0.1] * 10).level(one.prompt.key, index)) for index in range(4)]
        assert one.chosen == other.chosen == procedure.select([row], stream(3, "decode", one.prompt.key))[0]
        assert one.rewards_N.tolist() == row
        assert one.spent == Spent(4, 0, 1 + 2 + 3 + 4, 4, 10)


def test_a_round_is_one_batch():
    sampler = Levels([0.1] * 10)
    run(Adaptive(5, cost=0.0), sampler, given=prompts(4))
    assert sampler.batches == [12, 4, 4]


def test_a_prompt_may_stand_twice_in_a_batch():
    head, prompt = Request("k", 0, (1,)), prompts(1)[0]
    (batch,) = decode([[head, head]], {"k": prompt}, Levels([0.5, 0.5]), number, Adaptive(8, cost=0.3))
    assert len(batch) == 2 and batch[0].chosen == batch[1].chosen and batch[0].spent == batch[1].spent


def test_batches_have_room_for_what_is_drawn_at_once():
    sizes = {
        name: [len(b) for b in plan_decoding(prompts(12), [(1,)] * 12, one, max_tokens=9, tokens_per_batch=120)]
        for name, one in {**STRATEGIES, "plain": BestOfN(4)}.items()
    }
    assert sizes["procedure"] == sizes["plain"] == [3] * 4
    assert sizes["rejection"] == sizes["majority_vote"] == sizes["early_rejection"] == [2] * 6
    assert sizes["adaptive"] == [4] * 3
    assert as_strategy(BestOfN(4)).n == 4


def test_references_are_the_first_base_samples_whenever_they_are_asked_for():
    class Late:
        n, width = 2, 3

        def step(self, seen):
            if seen.references_K is not None:
                return Choose(int(seen.references_K.sum()) % 2)
            return Draw(3, reference=True) if seen.candidates else Draw(2)

    base = Levels([0.1] * 10, "base")
    for one in run(Late(), Levels([0.1] * 10), given=prompts(20), reference=base):
        assert one.chosen == sum(base.level(one.prompt.key, index) for index in range(3)) % 2
        assert one.spent == Spent(2, 3, 1 + 2 + 1 + 2 + 3, 5, 9)


@dataclass(frozen=True)
class Says:
    """Draws two candidates, then says what it was told to."""

    last: object
    first: object = Draw(2)
    n: int = 2
    width: int = 2

    def step(self, seen):
        return self.last if seen.candidates or seen.references_K is not None else self.first


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Says(Draw(1)), "draws 3 candidates, more than its n=2"),
        (Says(None, first=Draw(0)), "count and tokens must be at least 1"),
        (Says(None, first=Draw(1, tokens=0)), "count and tokens must be at least 1"),
        (Says(Finish((0,))), r"asks to finish candidates \[0\], but begun are \[\]"),
        (Says(Finish(()), first=Draw(2, tokens=1)), r"asks to finish candidates \[\]"),
        (Says(Choose(2)), "chooses candidate 2, which is not there or not whole"),
        (Says(Choose(-1)), "chooses candidate -1"),
        (Says(Choose(0), first=Draw(2, tokens=1)), "chooses candidate 0, which is not there or not whole"),
        (Says(Draw(1, reference=True), first=Draw(1, reference=True)), "asks for reference samples twice"),
        (Says("stop"), "must answer Draw, Finish or Choose; got 'stop'"),
    ],
)
def test_a_strategy_that_asks_for_what_it_may_not_is_refused(strategy, message):
    with pytest.raises(InputError, match=message):
        run(strategy, Digits(), given=prompts(1), reference=REFERENCE)
