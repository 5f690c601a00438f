"""What K calibration samples and G rollouts a prompt cost, and what wins them back, where everything is known exactly.

`python recipes/few_samples.py --k 8 16 64 --g 8 16` trains the table of logits of `ctrl_one_page.py` with the package's
own rewards (`CTRLReward`) and its control of the KL, and prints a row for each objective and calibration: KL, win rate
as decoded, attainment and regret ratio, all by enumeration, seed by seed. A row takes some ten seconds a seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import ctrl_one_page as page
import numpy as np
import torch
from scipy import optimize

from infalign import BestOfN, CTRLReward, WorstOfN, optimal_transform, win_rate_limit
from infalign.calibration.few_samples import beta_for_kl
from infalign.training.baselines import Baseline
from infalign.training.direct import Direct
from infalign.training.kl_control import FARTHEST, FARTHEST_UNKNOWN, KLControl, sensitivity
from infalign.training.offline import OfflineLoss


def train(
    reward: CTRLReward,
    beta: float,
    kl: float | None,
    count: int,
    group: int,
    steps: int,
    rate: float,
    seed: int,
    start: page.Policy | None = None,
    rewards: torch.Tensor | None = None,
) -> tuple[page.Policy, page.Policy, torch.Tensor]:
    """Policy, base and rewards (P, J): the loop of the page, with the package's rewards, and beta steered to `kl`.

    `start` is the policy to begin with; None is the base. `rewards` stand in for the page's.
    """
    base, reward_PJ = page.make_problem(seed)
    reward_PJ = reward_PJ if rewards is None else rewards
    rng = torch.Generator().manual_seed(seed)
    references = list(reward_PJ.gather(1, page.sample(base, count, rng)).numpy())
    policy = page.Policy(*(logits.clone().requires_grad_() for logits in start or base))
    optimizer = torch.optim.Adam(policy, lr=rate)
    bound = FARTHEST_UNKNOWN if isinstance(reward.transform, Baseline) else FARTHEST
    control = None
    if kl is not None:
        how = sensitivity(reward.transform, kl)
        control = KLControl(kl, math.log(beta), steps, math.log(beta), farthest=bound, sensitivity=how)
    names = [str(prompt) for prompt in range(page.P) for _ in range(group)]
    rows = [references[prompt] for prompt in range(page.P) for _ in range(group)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        answers_PG = page.sample(policy, group, rng)
        log_pi_PG, log_base_PG = (page.log_probs(side).gather(1, answers_PG) for side in (policy, base))
        ratio_PG = log_pi_PG.detach() - log_base_PG
        reward.log_ratios_B = ratio_PG.flatten().numpy()
        values = reward(names, reward_PJ.gather(1, answers_PG).flatten().tolist(), ref_rewards=rows)
        value_PG = torch.tensor(values, dtype=torch.float64).view(-1, group)
        value_PG = value_PG - (control.beta if control else beta) * ratio_PG
        advantage_PG = (value_PG - value_PG.mean(1, keepdim=True)) * group / (group - 1)
        optimizer.zero_grad()
        (-advantage_PG * log_pi_PG).mean().backward()
        optimizer.step()
        if control:
            control.update(float(ratio_PG.mean()))
    return page.Policy(*(logits.detach() for logits in policy)), base, reward_PJ


def train_offline(
    loss: OfflineLoss,
    reward: CTRLReward,
    beta: float,
    kl: float | None,
    count: int,
    group: int,
    steps: int,
    rate: float,
    seed: int,
) -> tuple[page.Policy, page.Policy, torch.Tensor]:
    """The same from the K samples alone: the package's offline loss, and logits moved along the line to `kl`."""
    base, reward_PJ = page.make_problem(seed)
    rng = torch.Generator().manual_seed(seed)
    answers_PK = page.sample(base, count, rng)  # the first draw of `train`, too
    rewards_PK, log_base_PK = reward_PJ.gather(1, answers_PK), page.log_probs(base).gather(1, answers_PK)
    targets_PK = torch.tensor(np.stack([loss.targets(reward, row, beta) for row in rewards_PK.numpy()]))
    policy = page.Policy(*(logits.clone().requires_grad_() for logits in base))
    optimizer = torch.optim.Adam(policy, lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        if step * group % count < group:  # the next pass over all K
            order_PK = torch.rand(answers_PK.shape, generator=rng).argsort(1)
        place = step * group % (count - count % group)
        chosen_PG = order_PK[:, place : place + group]
        log_pi_PG = page.log_probs(policy).gather(1, answers_PK.gather(1, chosen_PG))
        ratio_PG = log_pi_PG - log_base_PK.gather(1, chosen_PG)
        optimizer.zero_grad()
        loss(ratio_PG, log_pi_PG, targets_PK.gather(1, chosen_PG), beta).backward()
        optimizer.step()
    trained = page.Policy(*(logits.detach() for logits in policy))
    return trained if kl is None else on_the_line(trained, base, kl), base, reward_PJ


def on_the_line(policy: page.Policy, base: page.Policy, kl: float) -> page.Policy:
    """Logits on the line from the base's to the policy's where the exact KL is `kl`; at most twice as far."""

    def at(weight: float) -> page.Policy:
        return page.Policy(*(torch.lerp(start, end, weight) for start, end in zip(base, policy, strict=True)))

    def over(weight: float) -> float:
        log_pi, log_base = page.log_probs(at(weight)), page.log_probs(base)
        return float((log_pi.exp() * (log_pi - log_base)).sum(1).mean()) - kl

    return at(2.0 if over(2.0) < 0 else float(optimize.brentq(over, 0.0, 2.0, xtol=1e-4)))


def exact(policy: page.Policy, base: page.Policy, reward_PJ: torch.Tensor, procedure: Any) -> tuple[float, float]:
    """KL and win rate by enumeration; the rewards are distinct."""
    log_pi, log_base = page.log_probs(policy), page.log_probs(base)
    kl = float((log_pi.exp() * (log_pi - log_base)).sum(1).mean())
    order = reward_PJ.argsort(1)
    ours, theirs = (
        torch.tensor(
            procedure.cdf(
                torch.cat([torch.zeros(page.P, 1), log.exp().gather(1, order).cumsum(1)], 1).clamp(0, 1).numpy()
            )
        )
        for log in (log_pi, log_base)
    )
    wins = 1 - 0.5 * (theirs.diff(dim=1) * (ours[:, 1:] + ours[:, :-1])).sum(1)
    return kl, float(wins.mean())


def row(arguments: argparse.Namespace, count: int, group: int, objective: str, method: str) -> str:
    """One line of the table, in Markdown."""
    procedure = WorstOfN(arguments.n) if arguments.worst else BestOfN(arguments.n)
    phi = optimal_transform(procedure, kl=arguments.kl)
    cells = []
    for seed in arguments.seeds:
        value = Direct(procedure) if objective == "direct" else phi
        reward = CTRLReward(lambda completions, **_: completions, value, method=method, num_generations=group)
        cut_off = objective == "transform" and method == "midrank" and not arguments.constant
        beta = beta_for_kl(phi, count, arguments.kl) if cut_off else phi.beta
        kept = None if arguments.constant else arguments.kl
        steps, rate = arguments.steps, arguments.learning_rate
        kl, wins = exact(*train(reward, beta, kept, count, group, steps, rate, seed), procedure)
        limit = float(win_rate_limit(procedure, kl))
        cells.append(f"{kl:.2f} {wins:.3f} {(wins - 0.5) / (limit - 0.5):.3f} {(1 - wins) / (1 - limit):.2f}")
    return f"| {count}, {group} | {objective} | {method} | {'; '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 64], help="calibration samples a prompt")
    parser.add_argument("--g", type=int, nargs="+", default=[8, 16], help="rollouts a prompt")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--worst", action="store_true", help="Worst-of-N in place of Best-of-N")
    parser.add_argument("--kl", type=float, default=1.0, help="nats asked for")
    parser.add_argument("--constant", action="store_true", help="the optimum's beta, not steered")
    parser.add_argument("--methods", nargs="+", default=["midrank", "pooled"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=0.1, help="Adam's, falling linearly")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    print("| K, G | objective | calibration | KL, win rate, attainment, regret ratio, a seed each |\n|---|---|---|---|")
    for count, group in itertools.product(arguments.k, arguments.g):
        for objective, method in itertools.product(("transform", "direct"), arguments.methods):
            print(row(arguments, count, group, objective, method), flush=True)


if __name__ == "__main__":
    main()
