"""Reward hacking where everything is known exactly: a proxy with a planted cue decodes, the gold reward judges.

`python recipes/hacking.py` trains the table of logits of `ctrl_one_page.py`. An answer whose first token is one of
a few has a cue: the proxy likes it better by a bonus, and gold likes it less. Each objective is trained on the proxy
for Best-of-4 at some KLs. What it wins under gold against the base's Best-of-4, by whatever decoder, is by enumeration;
differences have 95 % intervals over the 32 prompts. A seed takes some three minutes on one core.
"""

from __future__ import annotations

import argparse
from typing import Any

import ctrl_one_page as page
import numpy as np
import torch
from few_samples import on_the_line, train
from numpy.typing import NDArray

from infalign import BestOfN, CTRLReward, TopOfN, optimal_transform
from infalign.calibration.judged import estimate_h
from infalign.evaluation.winrate import bootstrap_interval
from infalign.theory.judged import gold_optimal
from infalign.theory.procedures import Procedure
from infalign.theory.tilted import tilt
from infalign.theory.transforms import identity, normal_icdf
from infalign.training.baselines import Baseline, base_spread
from infalign.training.direct import Direct

Floats = NDArray[np.float64]

TRAINED_FOR = BestOfN(4)
COUNT, GROUP, STEPS, RATE = 512, 64, 300, 0.1
CUES = 3  # of 24 first tokens
DECODERS: tuple[Procedure, ...] = (
    *(BestOfN(n) for n in (1, 2, 4, 8, 16, 32)),
    *(TopOfN(2, n) for n in (4, 8, 16, 32)),
    *(TopOfN(4, n) for n in (8, 16, 32)),
)


def problem(seed: int, bonus: float, harm: float) -> tuple[page.Policy, Floats, Floats]:
    """The base, and gold and proxy rewards (P, J): a cue is worth `bonus` more to the proxy, `harm` less to gold."""
    base, reward_PJ = page.make_problem(seed)
    first_J = torch.arange(page.V * page.V) // page.V
    cue_J = (first_J < CUES).double()
    return base, (reward_PJ - harm * cue_J).numpy(), (reward_PJ + bonus * cue_J).numpy()


def decoded(policy: page.Policy, proxy_PJ: Floats, procedure: Procedure) -> Floats:
    """(P, J) chances of every answer when `procedure` decodes by the proxy, whose values are distinct."""
    order = proxy_PJ.argsort(1)
    mass_PJ = np.take_along_axis(page.log_probs(policy).exp().numpy(), order, 1)
    below_PJ = np.clip(np.concatenate([np.zeros((len(mass_PJ), 1)), mass_PJ.cumsum(1)], 1), 0.0, 1.0)
    found = np.empty_like(mass_PJ)
    np.put_along_axis(found, order, np.diff(procedure.cdf(below_PJ), axis=1), 1)
    return found


def gold_wins(ours_PJ: Floats, theirs_PJ: Floats, gold_PJ: Floats) -> Floats:
    """(P,) how often an answer drawn from `ours` beats one from `theirs` under gold, whose values are distinct."""
    order = gold_PJ.argsort(1)
    ours, theirs = (np.take_along_axis(one, order, 1) for one in (ours_PJ, theirs_PJ))
    below = theirs.cumsum(1) - theirs / 2.0  # an answer ties with itself
    return (ours * below).sum(1)


def ahead(first_P: Floats, second_P: Floats) -> str:
    """Points that the first is ahead, with its interval over prompts."""
    gap_P = 100.0 * (first_P - second_P)
    low, high = bootstrap_interval(gap_P)
    return f"{gap_P.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def objectives(kl: float, rewards: list[Floats], curve: Any) -> dict[str, tuple[Any, float]]:
    """Name -> what is trained for, and the beta that it begins with."""
    optimal, judged = optimal_transform(TRAINED_FOR, kl=kl), gold_optimal(TRAINED_FOR, curve.h_J, kl=kl)
    raw = Baseline("raw", TRAINED_FOR, scale=base_spread(rewards))
    return {
        "raw": (raw, tilt(normal_icdf, kl=kl).beta),
        "identity": (identity, tilt(identity, kl=kl).beta),
        "optimal": (optimal, optimal.beta),
        "direct": (Direct(TRAINED_FOR), optimal.beta),
        "gold_optimal": (judged, judged.beta),
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kl", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--bonus", type=float, default=1.5, help="of the cue, in standard deviations of the reward")
    parser.add_argument("--harm", type=float, default=1.0, help="of the cue under gold, likewise")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    heads = " | ".join(map(repr, DECODERS))
    print(f"| seed | objective | KL | {heads} |\n|---|---|---|{'---|' * len(DECODERS)}")
    for seed in arguments.seeds:
        base, gold_PJ, proxy_PJ = problem(seed, arguments.bonus, arguments.harm)
        opponent_PJ = decoded(base, proxy_PJ, TRAINED_FOR)

        def row(name: str, kl: float, policy: page.Policy) -> dict[Procedure, Floats]:
            wins = {one: gold_wins(decoded(policy, proxy_PJ, one), opponent_PJ, gold_PJ) for one in DECODERS}  # noqa: B023
            shown = " | ".join(f"{one.mean():.3f}" for one in wins.values())
            print(f"| {seed} | {name} | {kl:g} | {shown} |", flush=True)  # noqa: B023
            return wins

        found = {("base", 0.0): row("base", 0.0, base)}
        drawn_PK = page.sample(base, COUNT, torch.Generator().manual_seed(seed)).numpy()
        both = [np.take_along_axis(rewards, drawn_PK, 1) for rewards in (proxy_PJ, gold_PJ)]
        curve = estimate_h(*both, TRAINED_FOR, seed=seed)
        for kl in arguments.kl:
            for name, (value, beta) in objectives(kl, list(both[0]), curve).items():
                reward = CTRLReward(lambda completions, **_: completions, value, num_generations=GROUP)
                given = torch.tensor(proxy_PJ)
                policy, _, _ = train(reward, beta, kl, COUNT, GROUP, arguments.steps, RATE, seed, rewards=given)
                found[name, kl] = row(name, kl, on_the_line(policy, base, kl))
        print(f"\nseed {seed}, points under gold:")
        for kl in arguments.kl:
            judged, optimal = found["gold_optimal", kl][TRAINED_FOR], found["optimal", kl][TRAINED_FOR]
            print(f"  Best-of-4 at {kl:g} nats, gold_optimal ahead of optimal: {ahead(judged, optimal)}")
        for (name, kl), wins in found.items():
            if name in ("base", "optimal"):
                gaps = [f"N = {n}: {ahead(wins[TopOfN(2, n)], wins[BestOfN(n)])}" for n in (4, 16)]
                print(f"  {name} at {kl:g} nats, TopOfN(2, N) ahead of BestOfN(N): {'; '.join(gaps)}")
        print(flush=True)


if __name__ == "__main__":
    main()
