"""Offline, online, and one after the other, at equal CPU seconds where everything is known exactly.

`python recipes/offline.py --k 64 512` trains the table of logits of `ctrl_one_page.py` for Best-of-4 at one nat, as
`few_samples.py` does, from K base samples a prompt: online in so many steps, offline, and offline first for a tenth of
the online steps' time. A row has the CPU seconds of training, KL, win rate and attainment, all exact, seed by seed.
"""

from __future__ import annotations

import argparse
import time

from few_samples import exact, train, train_offline

from infalign import BestOfN, CTRLReward, optimal_transform, win_rate_limit
from infalign.calibration.few_samples import beta_for_kl
from infalign.training.offline import offline_loss

KL, RATE, GROUP = 1.0, 0.1, 64
OFFLINE_STEPS = 100


def measured(how: str, steps: int, count: int, seed: int, loss: str) -> tuple[float, float, float, float]:
    """CPU seconds, KL, win rate and attainment of one training.

    Args:
        how: online, offline, or offline+online.
        steps: online steps; offline makes `OFFLINE_STEPS`.
        count: K.
        seed: of the problem and of training.
        loss: the offline one's.
    """
    procedure = BestOfN(4)
    phi, group = optimal_transform(procedure, kl=KL), min(GROUP, count)
    reward = CTRLReward(lambda completions, **_: completions, phi, num_generations=group)
    began, start, out = time.process_time(), None, None
    if how != "online":
        given = offline_loss(loss, None, KL)
        out = train_offline(given, reward, phi.beta, KL, count, group, OFFLINE_STEPS, RATE, seed)
        start = out[0]
    if how != "offline":
        out = train(reward, beta_for_kl(phi, count, KL), KL, count, group, steps, RATE, seed, start)
    assert out is not None
    spent = time.process_time() - began
    kl, wins = exact(*out, procedure)
    return spent, kl, wins, (wins - 0.5) / (float(win_rate_limit(procedure, kl)) - 0.5)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 512], help="calibration samples a prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50, 100, 400], help="online steps")
    parser.add_argument("--loss", default="variance", help="of the offline solver")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    print("| K | solver, steps | CPU seconds, KL, win rate, attainment, a seed each |\n|---|---|---|")
    for count in arguments.k:
        cases = [("offline", 0), *((how, steps) for steps in arguments.steps for how in ("online", "offline+online"))]
        for how, steps in cases:
            rows = [measured(how, steps, count, seed, arguments.loss) for seed in arguments.seeds]
            cells = "; ".join(f"{spent:.1f} s {kl:.2f} {wins:.3f} {share:.3f}" for spent, kl, wins, share in rows)
            print(f"| {count} | {how}{f' {steps}' if steps else ''} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
