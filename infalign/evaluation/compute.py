"""Win rate against compute: how many tokens and reward calls a prompt costs each decoder, and how often it then wins.

The opponent is the same for all: ONE plain sample of the base, judged by the reward that decodes. So base and policy,
one sample and Best-of-32, stand in one picture, and how many tokens the base needs to do what training does can be
read off. (`evaluation.winrate` answers another question: there both sides are decoded alike.)

theory: with M policy and M' base samples of a prompt the unbiased estimate for a procedure is
`W = sum_i a_i (1/M') sum_j h(r_(i), s_j)`, h = 1[>] + 1/2 1[=], with the order weights a of M samples. For the base
against itself the opponent must not be one of the candidates: each sample in turn is the opponent of the M - 1 others.
Strategies that are no procedures are replayed on the same samples in random orders (`decoding.replay`).

Cost is what decoding spends: tokens generated and completions scored, per prompt. What training cost is not in it, nor
is reading prompts; a decoder of one candidate needs no reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from infalign.decoding.by_procedure import ByProcedure
from infalign.decoding.replay import Pool, replay
from infalign.decoding.strategy import Strategy
from infalign.evaluation.winrate import RESAMPLES, WinRate, summarise
from infalign.theory.procedures import BestOfN, Procedure
from infalign.types import InputError, Prompt

Array = NDArray[np.float64]

REPLAYS = 2048
"""Courses that a strategy is replayed in all: shared out over the prompts, `FEWEST` a prompt at least."""
FEWEST = 8


@dataclass(frozen=True)
class Contest:
    """A prompt with the samples of base and policy on it."""

    prompt: Prompt
    base: Pool
    policy: Pool

    def pool(self, side: str) -> Pool:
        """The samples of "base" or "policy"."""
        return self.base if side == "base" else self.policy

    def order_wins(self, side: str) -> Array:
        """`order_wins` of the prompt's scored rewards, computed once."""
        return self._order_wins[side]

    @cached_property
    def _order_wins(self) -> dict[str, Array]:
        base, policy = _scored(self.base), _scored(self.policy)
        return {"base": order_wins(base), "policy": order_wins(base, policy)}


@dataclass(frozen=True)
class ComputeRow:
    """A decoder's win rate against one base sample with its interval, and what it spends on a prompt on average."""

    side: str
    label: str
    n: int
    mean: float
    low: float
    high: float
    tokens: float
    reward_calls: float


@dataclass(frozen=True)
class Point:
    """A `ComputeRow` with the win rate of every prompt."""

    side: str
    label: str
    n: int
    win: WinRate
    tokens: float
    reward_calls: float

    @property
    def row(self) -> ComputeRow:
        """Without the single prompts."""
        win = self.win
        return ComputeRow(self.side, self.label, self.n, win.mean, win.low, win.high, self.tokens, self.reward_calls)


@dataclass(frozen=True)
class Match:
    """What the base needs, by Best-of-N, to win as often as one plain sample of the policy does.

    Attributes:
        n, low, high: N with its interval; None: more than `largest`, 1: no more than one sample.
        largest: the most that the samples can tell.
        win: the policy's win rate.
        base_tokens, policy_tokens: of one sample.
        tokens: what the base spends at `n`.
    """

    n: float | None
    low: float | None
    high: float | None
    largest: int
    win: float
    base_tokens: float
    policy_tokens: float
    tokens: float | None = None


@dataclass(frozen=True)
class Compute:
    """Everything that the plot of win rate against compute shows.

    Attributes:
        curves: Best-of-1, 2, 3, 4, 6, 8, ... of base and policy, up to half of the samples.
        decoder: the recipe's own on both sides; empty where the samples do not suffice, and `problem` says why.
        match: None when there are too few samples.
    """

    curves: tuple[ComputeRow, ...] = ()
    decoder: tuple[ComputeRow, ...] = ()
    problem: str = ""
    match: Match | None = None


def measure_compute(
    contests: Sequence[Contest], strategy: Strategy, *, confidence: float = 0.95, seed: int = 0
) -> Compute:
    """Measure base and policy.

    Args:
        contests: the prompts.
        strategy: the recipe's decoder, marked in the plot.
        confidence, seed: of the intervals; seed also orders the replays.
    """
    fewest = min(int(_scored(pool).size) for one in contests for pool in (one.base, one.policy))
    # 1, 2, 3, 4, 6, 8, 12, ... up to half of the samples: about even steps on a log scale
    most = fewest // 2
    steps = {m * 2**power for power in range(most.bit_length()) for m in (1, 3)}
    counts = sorted(n for n in steps if n <= most)
    points = [
        procedure_point(contests, side, BestOfN(n), confidence, seed).row for side in ("base", "policy") for n in counts
    ]
    decoder: list[ComputeRow] = []
    problem = ""
    try:
        decoder = [strategy_point(contests, side, strategy, confidence, seed).row for side in ("base", "policy")]
    except InputError as error:  # too few samples for this decoder: the curves stand without it
        problem = str(error)
    return Compute(tuple(points), tuple(decoder), problem, match(contests, confidence, seed) if counts else None)


def procedure_point(
    contests: Sequence[Contest], side: str, procedure: Procedure, confidence: float = 0.95, seed: int = 0
) -> Point:
    """A procedure's exact, unbiased estimate from all samples of the side.

    Raises:
        InputError: fewer scored samples than it draws (on the base's side one more is needed, the opponent).
    """
    wins: list[float] = []
    for one in contests:
        rank_wins, opponents = one.order_wins(side), int(side == "base")
        if rank_wins.size < procedure.n:
            raise InputError(
                f"{procedure!r} needs {procedure.n + opponents} scored samples of the {side} here, and the prompt "
                f"{str(one.prompt.content)[:80]!r} has {rank_wins.size + opponents}: raise eval_samples"
            )
        wins.append(float(rank_wins @ procedure.order_weights(rank_wins.size)))
    tokens = procedure.n * float(np.mean([_tokens(one.pool(side)) for one in contests]))
    calls = float(procedure.n) if procedure.n > 1 else 0.0
    win = summarise(np.array(wins), confidence, seed)
    return Point(side, repr(procedure), procedure.n, win, tokens, calls)


def order_wins(base_M: Array, policy_M: Array | None = None) -> Array:
    """What each ascending rank of a side's samples wins against one base sample, on average over the opponents.

    Policy: (M,), `c_i = mean_j h(r_(i), s_j)`. Base (policy None): (M - 1,), each sample in turn the opponent of the
    others: `c_k = (1/M) [sum_{j > k} h(r_(k), r_(j)) + sum_{j <= k} h(r_(k+1), r_(j))]`, since without the opponent j
    the sample of rank k keeps it for j > k, and that of rank k + 1 gets it for j <= k.

    >>> order_wins(np.array([1.0, 2.0, 3.0, 4.0])).tolist(), order_wins(np.array([1.0, 2.0]), np.array([2.0])).tolist()
    ([0.25, 0.5, 0.75], [0.75])
    """
    base_M = np.sort(base_M)
    if policy_M is not None:
        return _beats(np.sort(policy_M), base_M).mean(1)
    wins_MM = _beats(base_M, base_M)
    after, before = np.triu(wins_MM, 1).sum(1), np.tril(wins_MM, -1).sum(1)
    return (after[:-1] + before[1:]) / base_M.size


def strategy_point(
    contests: Sequence[Contest], side: str, strategy: Strategy, confidence: float = 0.95, seed: int = 0
) -> Point:
    """Any strategy: a procedure exactly, every other one replayed on the samples in random orders.

    Each replay's choice meets every base sample that it has not looked at.

    Raises:
        InputError: too few samples for it, or it needs what the pools do not hold.
    """
    if isinstance(strategy, ByProcedure):
        return procedure_point(contests, side, strategy.procedure, confidence, seed)
    orders = max(FEWEST, -(-REPLAYS // len(contests)))
    rows = [_replayed(one, side, strategy, orders, seed) for one in contests]
    wins, tokens, calls = np.array(rows).T
    win = summarise(wins, confidence, seed)
    return Point(side, repr(strategy), strategy.n, win, float(tokens.mean()), float(calls.mean()))


def _replayed(one: Contest, side: str, strategy: Strategy, orders: int, seed: int) -> tuple[float, float, float]:
    """(win rate, tokens, reward calls) of one prompt, averaged over random orders of its samples."""
    rng = np.random.default_rng([seed, *one.prompt.key.encode()])
    pool, wins, tokens, calls = one.pool(side), [], [], []
    for _ in range(orders):
        base_order = rng.permutation(len(one.base.samples)).tolist()
        # references come from the front, candidates of the base from the back: no sample is both
        order = base_order[::-1] if side == "base" else rng.permutation(len(pool.samples)).tolist()
        found = replay(strategy, one.prompt, pool, order, one.base, base_order, rng)
        seen = {*found.used_references, *(found.used if side == "base" else ())}
        if len(found.used_references) + (len(found.used) if side == "base" else 0) >= len(one.base.samples):
            raise InputError(
                f"{strategy!r} used all {len(one.base.samples)} base samples of a prompt and left none as the "
                "opponent: raise eval_samples"
            )
        rivals = np.delete(one.base.rewards_M, sorted(seen))
        tokens.append(found.spent.tokens)
        calls.append(found.spent.reward_calls)
        if found.chosen is not None and not np.isnan(rivals).all():
            reward = pool.rewards_M[found.chosen]
            if not np.isnan(reward):
                wins.append(float(_beats(np.array([reward]), rivals[~np.isnan(rivals)]).mean()))
    if not wins:
        raise InputError(f"{strategy!r} chose nothing that has a score on the prompt {str(one.prompt.content)[:80]!r}")
    return float(np.mean(wins)), float(np.mean(tokens)), float(np.mean(calls))


def match(contests: Sequence[Contest], confidence: float = 0.95, seed: int = 0) -> Match:
    """What the base needs to match one policy sample.

    The base's win rate is taken at every whole N and interpolated linearly. The interval resamples prompts.
    """
    largest = min(one.order_wins("base").size for one in contests)
    wins = [one.order_wins("base") for one in contests]
    sizes = {one.size for one in wins}
    weights = {m: np.array([BestOfN(n).order_weights(m) for n in range(1, largest + 1)]) for m in sizes}
    # (P, N): the win rate of each prompt at N = 1, ..., largest; prompts may have different numbers of samples
    base_PN = np.array([weights[one.size] @ one for one in wins])
    policy_P = np.array([one.order_wins("policy").mean() for one in contests])
    rng = np.random.default_rng(seed)
    # each row (P,) says how much every prompt counts in a resample
    rows = rng.multinomial(len(contests), np.full(len(contests), 1 / len(contests)), size=RESAMPLES) / len(contests)
    drawn = np.array([_crossing(w @ base_PN, float(w @ policy_P)) for w in rows])
    # some resamples may never cross (inf), and between inf and a number there is nothing to interpolate
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    found = _crossing(base_PN.mean(0), float(policy_P.mean()))
    base_tokens, policy_tokens = (float(np.mean([_tokens(c.pool(s)) for c in contests])) for s in ("base", "policy"))
    alone = len(contests) == 1
    return Match(
        n=_finite(found),
        low=None if alone else _finite(low),
        high=None if alone else _finite(high),
        largest=largest,
        win=float(policy_P.mean()),
        base_tokens=base_tokens,
        policy_tokens=policy_tokens,
        tokens=None if found == np.inf else found * base_tokens,
    )


def _crossing(curve_N: Array, level: float) -> float:
    """The N, between whole ones linearly, at which a rising curve (N = 1, 2, ...) reaches a level; inf: nowhere."""
    if level <= curve_N[0]:
        return 1.0
    reached = np.flatnonzero(curve_N >= level)
    if not reached.size:
        return float("inf")
    at = int(reached[0])  # curve_N[at - 1] is the win rate at N = at, still below the level
    return at + (level - curve_N[at - 1]) / (curve_N[at] - curve_N[at - 1])


def _finite(value: float) -> float | None:
    return None if np.isinf(value) else float(value)


def _beats(ours_M: Array, theirs_L: Array) -> Array:
    """(M, L) of 1, 1/2 (equal) or 0."""
    return (ours_M[:, None] > theirs_L) + 0.5 * (ours_M[:, None] == theirs_L)


def _scored(pool: Pool) -> Array:
    return pool.rewards_M[~np.isnan(pool.rewards_M)]


def _tokens(pool: Pool) -> float:
    return float(np.mean([len(sample.token_ids) for sample in pool.samples]))
