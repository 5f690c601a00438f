"""Win rates against one base sample by enumeration; replays against closed forms; what training saves, by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from infalign import BestOfN, KthOfN, PessimisticOfN, SoftBestOfN, TopOfN, WorstOfN
from infalign.decoding.adaptive import Adaptive
from infalign.decoding.by_procedure import ByProcedure
from infalign.decoding.early_rejection import EarlyRejection
from infalign.decoding.majority_vote import MajorityVote
from infalign.decoding.rejection import Rejection
from infalign.decoding.replay import Pool
from infalign.evaluation.compute import Contest, match, measure_compute, procedure_point, strategy_point
from infalign.evaluation.winrate import bootstrap_interval
from infalign.types import InputError, Prompt, Sample


def table(rewards, lengths=None, texts=None, **more):
    lengths = [1] * len(rewards) if lengths is None else lengths
    samples = [
        Sample("k", place, (1,) * length, np.zeros(length), "" if texts is None else texts[place], True)
        for place, length in enumerate(lengths)
    ]
    return Pool(samples, np.array(rewards, dtype=float), **more)


def contest(base, policy, key="k", **more):
    return Contest(Prompt(f"prompt {key}", key), table(base, **more), table(policy, **more))


def beats(ours, theirs):
    return float(ours > theirs) + 0.5 * float(ours == theirs)


def enumerated(procedure, ours, opponents_of):
    """The win rate over all opponents and all subsets of n candidates, rank by rank."""
    wins = []
    for candidates, opponent in opponents_of(ours):
        for subset in itertools.combinations(candidates, procedure.n):
            weights = procedure.order_weights(procedure.n)
            wins.append(sum(w * beats(r, opponent) for w, r in zip(weights, sorted(subset), strict=True)))
    return np.mean(wins)


PROCEDURES = [BestOfN(1), BestOfN(3), BestOfN(5), WorstOfN(2), KthOfN(2, 4), SoftBestOfN(3, 2.0)]
PROCEDURES += [TopOfN(2, 3), PessimisticOfN(3, 0.2)]


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_procedures_by_enumeration(procedure):
    base, policy = [0.0, 2.0, 1.0, 2.0, 5.0, 1.0], [2.0, 3.0, 0.0, 2.0, 6.0]
    one = contest(base, policy)
    own = enumerated(procedure, base, lambda rows: [(rows[:j] + rows[j + 1 :], rows[j]) for j in range(len(rows))])
    other = enumerated(procedure, policy, lambda rows: [(rows, opponent) for opponent in base])
    assert procedure_point([one], "base", procedure).win.mean == pytest.approx(own)
    assert procedure_point([one], "policy", procedure).win.mean == pytest.approx(other)


def test_without_ties_best_of_n_of_the_base_wins_n_of_n_plus_1():
    rng = np.random.default_rng(0)
    contests = [contest(rng.normal(size=9), rng.normal(size=9)) for _ in range(3)]
    for n in range(1, 9):
        np.testing.assert_allclose(procedure_point(contests, "base", BestOfN(n)).win.per_prompt, n / (n + 1))


def test_costs_and_intervals_by_hand():
    """Unscored samples cost tokens and win nothing; one sample needs no reward."""
    first = contest([1.0, 2.0, np.nan], [3.0, np.nan, 0.0], lengths=[2, 4, 6])
    second = contest([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "q", lengths=[1, 1, 1])
    one, two = (procedure_point([first, second], "policy", BestOfN(n)) for n in (1, 2))
    assert (one.tokens, one.reward_calls) == (2.5, 0.0)
    assert (two.tokens, two.reward_calls) == (5.0, 2.0)
    per_prompt = np.array([0.5, 2 / 3])
    np.testing.assert_allclose(one.win.per_prompt, per_prompt)
    low, high = bootstrap_interval(per_prompt)
    assert (one.win.low, one.win.high) == pytest.approx((max(low, 0), min(high, 1)))


class Replayed:
    """A procedure that hides what it is, so that it is replayed."""

    def __init__(self, procedure):
        self.inner = ByProcedure(procedure)
        self.n, self.width, self.step = procedure.n, procedure.n, self.inner.step


@pytest.mark.parametrize("side", ["base", "policy"])
@pytest.mark.parametrize("procedure", [BestOfN(4), WorstOfN(3), SoftBestOfN(4, 2.0)], ids=repr)
def test_replays_agree_with_the_exact_estimate(procedure, side):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9, 12)
    one = contest(np.round(rng.normal(size=12), 1), np.round(rng.normal(0.5, 1, 12), 1), lengths=lengths)
    exact, found = (strategy_point([one], side, s) for s in (ByProcedure(procedure), Replayed(procedure)))
    assert found.win.mean == pytest.approx(exact.win.mean, abs=0.03)
    assert found.tokens == pytest.approx(exact.tokens, rel=0.03)
    assert found.reward_calls == exact.reward_calls == procedure.n


def test_rejection_against_its_closed_form():
    """Drawing without replacement, A of M accepted: P(first at k) = C(M-k, A-1)/C(M, A); then a uniform one of them."""
    rng = np.random.default_rng(2)
    base, policy, lengths = rng.normal(size=20), rng.normal(0.3, 1, 20), rng.integers(1, 30, 20)
    one = contest(base, policy, lengths=lengths)
    references, n, size = rng.normal(size=50), 4, 20
    accepted = policy >= np.sort(references)[40]
    count = int(accepted.sum())
    assert 2 <= count <= 8
    first = [math.comb(size - k, count - 1) / math.comb(size, count) for k in range(1, n + 1)]
    none = 1 - sum(first)
    wins = np.array([np.mean([beats(r, s) for s in base]) for r in policy])
    fallback = BestOfN(n).order_weights(size - count) @ np.sort(wins[~accepted])
    tokens = sum(p * ((k - 1) * lengths[~accepted].mean() + lengths[accepted].mean()) for k, p in enumerate(first, 1))
    tokens += none * n * lengths[~accepted].mean()
    strategy = Rejection(n, 0.81, references={"k": references})
    found = strategy_point([one], "policy", strategy)
    assert found.win.mean == pytest.approx(sum(first) * wins[accepted].mean() + none * fallback, abs=0.02)
    assert found.tokens == pytest.approx(tokens, rel=0.03)
    assert found.reward_calls == pytest.approx(sum(k * p for k, p in enumerate(first, 1)) + none * n, rel=0.03)


def test_references_count_and_are_never_the_opponent():
    """Base samples 0..9 with 4 references: the opponent is one of those not looked at."""
    one = contest(np.arange(10.0), [100.0] * 10, lengths=[3] * 10)
    found = strategy_point([one], "policy", Rejection(2, 0.9, num_references=4))
    assert found.win.mean == 1.0 and found.tokens == 4 * 3 + 3 and found.reward_calls == 5
    with pytest.raises(InputError, match="used all 10 base samples of a prompt and left none as the opponent"):
        strategy_point([one], "policy", Rejection(2, 0.9, num_references=10))
    with pytest.raises(InputError, match="used all 10 base samples"):
        strategy_point([one], "base", Rejection(3, 1.0, num_references=7))
    with pytest.raises(InputError, match="asks for 11 samples of a prompt, and 10 are there"):
        strategy_point([one], "policy", Rejection(2, 0.9, num_references=11))


def test_base_samples_that_were_used_are_not_the_opponent():
    """Best-of-9 of ten against the tenth wins 9/10; a candidate above 4 references, itself none of them: 1 of 5."""
    one = contest(np.arange(10.0), np.arange(10.0))
    assert strategy_point([one], "base", Replayed(BestOfN(9))).win.mean == pytest.approx(0.9, abs=0.02)
    found = strategy_point([one], "base", Rejection(2, 1.0, num_references=4))
    assert found.reward_calls == pytest.approx(4 + 1 + 0.8, abs=0.04)


def test_adaptive_limits():
    rng = np.random.default_rng(3)
    one = contest(rng.normal(size=16), rng.normal(1, 1, 16))
    for side in ("base", "policy"):
        exact = procedure_point([one], side, BestOfN(6)).win.mean
        assert strategy_point([one], side, Adaptive(6, cost=0.0)).win.mean == pytest.approx(exact, abs=0.03)
        assert strategy_point([one], side, Adaptive(6, cost=1e9, n_min=4)).reward_calls == 4
    between = strategy_point([one], "policy", Adaptive(8, cost=0.1))
    assert 3 < between.reward_calls < 8 and between.tokens == between.reward_calls


def test_a_vote_reads_the_texts():
    """All but one say 7, and the one is never the majority of 3: its reward never wins."""
    one = contest([0.0] * 6, [1.0, 1.0, 1.0, 1.0, 1.0, -1.0], texts=["7"] * 5 + ["8"])
    assert strategy_point([one], "policy", MajorityVote(3)).win.mean == 1.0


def test_early_rejection_from_the_rewards_of_beginnings():
    """A beginning that tells the reward loses nothing; one that tells its opposite keeps the worst."""
    rng = np.random.default_rng(4)
    rewards, lengths = rng.normal(size=12), [8] * 11 + [3]
    tokens = 4 * (4 * 11 / 12 + 3 / 12)  # the check's share, of 4 candidates

    def point(beginnings, keep):
        one = contest(rewards, rewards, lengths=lengths, beginnings={4: np.array(beginnings)})
        return strategy_point([one], "policy", EarlyRejection(BestOfN(4), 4, keep))

    full = procedure_point([contest(rewards, rewards, lengths=lengths)], "policy", BestOfN(4))
    telling, all_kept = point(rewards, 0.25), point(-rewards, 1.0)
    assert telling.win.mean == pytest.approx(full.win.mean, abs=0.03)
    assert all_kept.win.mean == pytest.approx(full.win.mean, abs=0.03)
    assert all_kept.tokens == pytest.approx(full.tokens, rel=0.03)
    assert tokens < telling.tokens <= tokens + 4.2
    assert point(-rewards, 0.25).win.mean < full.win.mean - 0.2
    with pytest.raises(InputError, match="no rewards of beginnings of 5 tokens are there"):
        strategy_point([contest([1.0] * 6, [1.0] * 6)], "policy", EarlyRejection(BestOfN(4), 5))


@pytest.mark.parametrize(
    ("policy", "n"),
    [
        ([5.5], 3.0),  # beats 6 of 8: 3/4 = N/(N+1) at N = 3
        ([5.5, 5.5, 5.5, 5.5, 3.5], 2.4),  # 0.7 lies 2/5 of the way from 2/3 to 3/4
        ([-1.0], 1.0),
        ([3.5], 1.0),
        ([9.0], None),
    ],
)
def test_what_the_base_needs_by_hand(policy, n):
    base = table(np.arange(8.0), lengths=[10] * 8)
    ours = table(policy, lengths=[7] * len(policy))
    found = match([Contest(Prompt("p", "k"), base, ours), Contest(Prompt("q", "q"), base, ours)])
    assert found.largest == 7 and (found.base_tokens, found.policy_tokens) == (10, 7)
    assert found.n == (None if n is None else pytest.approx(n))
    assert found.tokens == (None if n is None else pytest.approx(10 * n))
    assert found.low == found.high == found.n  # both prompts are the same: nothing to resample


def test_the_interval_covers():
    """Policy samples are each the best of 3 base samples: the base needs N = 3."""
    inside = 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        contests = [contest(rng.normal(size=8), rng.normal(size=(8, 3)).max(1), str(p)) for p in range(30)]
        found = match(contests, confidence=0.9)
        inside += found.low <= 3 <= found.high
    assert 30 <= inside <= 40  # 36 expected, sd 1.9


def test_everything_is_measured_and_is_json():
    rng = np.random.default_rng(5)
    contests = [contest(rng.normal(size=8), rng.normal(0.5, 1, 8), str(p)) for p in range(4)]
    found = measure_compute(contests, ByProcedure(BestOfN(4)), seed=1)
    assert [(row.side, row.n) for row in found.curves] == [(s, n) for s in ("base", "policy") for n in (1, 2, 3, 4)]
    assert found.decoder == tuple(row for row in found.curves if row.n == 4)
    assert found.problem == "" and found.match.largest == 7
    assert found == measure_compute(contests, ByProcedure(BestOfN(4)), seed=1)
    vote = measure_compute(contests, MajorityVote(3, "text"), seed=1)
    assert vote == measure_compute(contests, MajorityVote(3, "text"), seed=1)
    assert vote.curves == found.curves and vote.decoder[0].label == repr(MajorityVote(3, "text"))


@pytest.mark.parametrize(
    ("samples", "counts"), [(2, [1]), (5, [1, 2]), (12, [1, 2, 3, 4, 6]), (64, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32])]
)
def test_curves_reach_half_of_the_samples(samples, counts):
    found = measure_compute([contest(np.arange(samples), np.arange(samples))], ByProcedure(BestOfN(1)))
    assert [row.n for row in found.curves] == counts * 2


def test_too_few_samples_are_told_and_hide_nothing_else():
    contests = [contest(np.arange(4.0), np.arange(4.0) + 0.5)]
    found = measure_compute(contests, ByProcedure(BestOfN(4)))
    assert found.decoder == () and "BestOfN(4) needs 5 scored samples of the base here" in found.problem
    assert [row.n for row in found.curves] == [1, 2, 1, 2]
    lonely = measure_compute([contest([1.0], [2.0])], ByProcedure(BestOfN(1)))
    assert lonely.curves == () and lonely.match is None and lonely.problem
    with pytest.raises(InputError, match="chose nothing that has a score"):
        strategy_point([contest([1.0, 2.0, 3.0], [np.nan] * 3)], "policy", MajorityVote(2))
