"""InfAlign-CTRL on one page: make a policy better *as it will be decoded*. Plain torch on one CPU core, 20 seconds.

If a model will be deployed with Best-of-N, training it to win single samples aims at the wrong target. InfAlign
(Balashankar et al., arXiv:2412.19792) maximises the inference-time win rate over the base policy, W_N, in which BOTH
sides keep the best of their N samples, minus beta KL(policy || base). Its algorithm, CTRL, has three steps:

    1. Calibrate: replace the reward by its quantile u among rewards of base samples on the same prompt.
    2. Transform: map u by a function Phi that is chosen for the decoder.
    3. RL:        maximise E[Phi(u)] - beta KL, with ordinary KL-regularised reinforcement learning.

What is simplified: the language model is a table (two tokens, no attention), so that KL and win rates are also known
exactly, by enumeration; training prompts are the test prompts; no minibatches, no learned reward. The `infalign`
package is the same method for real models, and tests/recipes/test_one_page.py checks that the two agree.

Shapes, as suffixes on names: P prompts, K base samples per prompt for calibration, G policy samples per prompt in
training, M samples per prompt and side in evaluation, V vocabulary, J = V*V answers, Q points of a grid on [0, 1].
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

P, V, K, G, M = 32, 24, 512, 128, 256  # the toy: 32 prompts, answers of two tokens out of 24
N, TARGET_KL = 4, 1.0  # the policy will be decoded by Best-of-4; nats that training aims at
U_Q = torch.linspace(0, 1, 4097, dtype=torch.float64)  # quantiles; a transform Phi is its values phi_Q on this grid


# ---- The toy: a policy that is a table of logits, and a reward that is a table of numbers ----
class Policy(NamedTuple):
    """A "language model" for two-token answers: logits of the first token, and of the second given the first."""

    first_PV: Tensor
    second_PVV: Tensor


def make_problem(seed: int = 0) -> tuple[Policy, Tensor]:
    """A fixed random base policy and a fixed random reward of each answer, reward_PJ: 576 distinct values a prompt."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(P, V), (P, V, V), (P, V * V)]
    first_PV, second_PVV, reward_PJ = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return Policy(0.5 * first_PV, 0.5 * second_PVV), reward_PJ


def sample(policy: Policy, count: int, rng: torch.Generator) -> Tensor:
    """(P, count) answers, token by token as a language model would; an answer is the number j = first * V + second."""
    first_PG = torch.multinomial(policy.first_PV.softmax(-1), count, replacement=True, generator=rng)
    second_PGV = policy.second_PVV.softmax(-1)[torch.arange(len(first_PG))[:, None], first_PG]
    return first_PG * V + torch.multinomial(second_PGV.flatten(0, 1), 1, generator=rng).view_as(first_PG)


def log_probs(policy: Policy) -> Tensor:
    """log pi(answer | prompt) of all answers, summed over both tokens: (P, J). `gather` those that were sampled."""
    return (policy.first_PV.log_softmax(-1)[:, :, None] + policy.second_PVV.log_softmax(-1)).flatten(1)


# ---- Step 1: calibrate ----
def calibrate(rewards_PG: Tensor, ref_rewards_PK: Tensor) -> Tensor:
    """C(x, y) = P(r(x, z) < r(x, y)) + 1/2 P(r(x, z) = r(x, y)) over K base samples z: the mid-rank quantile in [0, 1].

    No increasing map of the reward changes it, and its mean over a policy is that policy's standard win rate. The K
    samples are drawn once, before training, with the settings of the policy's rollouts.
    """
    sorted_PK = ref_rewards_PK.sort(1).values
    below_PG, up_to_PG = (torch.searchsorted(sorted_PK, rewards_PG, right=right) for right in (False, True))
    return (below_PG + up_to_PG).double() / (2 * sorted_PK.shape[1])


# ---- Step 2: transform ----
# Best-of-n turns a policy pi into pi(y) g(p), p the quantile of y under pi itself. Another rank-based decoder changes
# g, its integral G and `order_weights` below (Worst-of-n: g = n (1-p)^(n-1)). For a continuous reward everything
# happens on base quantiles u in [0, 1], and depends on neither the reward nor the model:
#     policy density q(u) = exp(Phi(u)/beta)/Z, with CDF Q(u);   W_n = 1 - int g(u) G(Q(u)) du;   KL = int q log q du


def best_of_pdf(p: Tensor, n: int) -> Tensor:
    """g(p) = n p^(n-1), the density of the best of n uniform numbers."""
    return n * p ** (n - 1)


def best_of_cdf(p: Tensor, n: int) -> Tensor:
    """G(p) = p^n, its integral."""
    return p**n


def integral(f_Q: Tensor) -> Tensor:
    """int_0^u f for every u of the grid by the trapezoid rule, (Q,); the last entry is the whole integral."""
    return F.pad(torch.cumulative_trapezoid(f_Q, U_Q), (1, 0))


def tilt(phi_Q: Tensor, beta: float) -> tuple[Tensor, float]:
    """CDF Q(u) and KL in nats of q = exp(Phi/beta)/Z, the optimum of E[Phi(u)] - beta KL: what step 3 aims at."""
    weight_Q = ((phi_Q - phi_Q.max()) / beta).exp()
    mass_Q = integral(weight_Q)
    density_Q = weight_Q / mass_Q[-1]
    return mass_Q / mass_Q[-1], integral(torch.xlogy(density_Q, density_Q))[-1].item()


def tilted_win_rate(phi_Q: Tensor, beta: float, n: int) -> float:
    """W_n of the tilted policy against the base, both decoded by Best-of-n."""
    return 1 - integral(best_of_pdf(U_Q, n) * best_of_cdf(tilt(phi_Q, beta)[0], n))[-1].item()


def identity(beta: float, n: int) -> Tensor:
    """Phi = u: optimal for plain sampling (n = 1). This is alignment that ignores the decoder."""
    return U_Q


def exponential(beta: float, n: int) -> Tensor:
    """Phi = e^{10u}: a fixed guess for Best-of-4, divided by e^10 to stay below 1 (that only rescales beta)."""
    return (10 * (U_Q - 1)).exp()


def optimal(beta: float, n: int) -> Tensor:
    """Phi*, the best there is for Best-of-n at this beta: Phi*'(u) = g(u) g(Q(u)), Q the CDF of its own tilted policy.

    This coupled pair is where the derivative of W_n - beta KL with respect to the policy is zero. Iterated with damping
    1/(1 + L/beta), L = max g'(p) p(1-p), it converges; W_n is concave in the policy, so there is no other optimum.
    """
    slope_Q = torch.gradient(best_of_pdf(U_Q, n), spacing=(U_Q,))[0]
    damping = 1 / (1 + (slope_Q * U_Q * (1 - U_Q)).max().item() / beta)
    phi_Q = torch.zeros_like(U_Q)
    for _ in range(20_000):
        step_Q = integral(best_of_pdf(U_Q, n) * best_of_pdf(tilt(phi_Q, beta)[0], n)) - phi_Q
        phi_Q = phi_Q + damping * step_Q
        if step_Q.abs().max() < 1e-7:
            return phi_Q
    raise ValueError(f"the optimal transform did not converge at beta={beta:g}: use a larger beta")


TRANSFORMS = {"optimal": optimal, "exponential(10)": exponential, "identity": identity}


def beta_for_kl(transform: Callable[[float, int], Tensor], kl: float, n: int) -> float:
    """The beta whose tilted policy has this KL (within .01 .. 10), by bisection: KL falls as beta grows."""
    low, high = 0.01, 10.0
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if tilt(transform(middle, n), middle)[1] > kl else (low, middle)
    return math.sqrt(low * high)


def limit(kl: float, n: int) -> float:
    """W*(KL): the best Best-of-n win rate that ANY policy reaches at this KL, for a continuous reward."""
    beta = beta_for_kl(optimal, kl, n)
    return tilted_win_rate(optimal(beta, n), beta, n)


# ---- Step 3: KL-regularised policy gradient ----
def train(base: Policy, reward_PJ: Tensor, phi_Q: Tensor, beta: float, steps: int, seed: int = 0) -> Policy:
    """RLOO (arXiv:2402.14740): REINFORCE on A = Phi(C) - beta log(pi/base), minus the mean A of the other G-1 samples.

    The KL of the whole answer is inside the reward, so that A is constant, beta log Z, at the optimum; dividing it by
    its standard deviation would only amplify noise there. A batch serves one step: no importance ratios, no clipping.
    """
    rng = torch.Generator().manual_seed(seed)
    ref_rewards_PK = reward_PJ.gather(1, sample(base, K, rng))
    policy = Policy(*(logits.clone().requires_grad_() for logits in base))
    optimizer = torch.optim.Adam(policy, lr=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        answers_PG = sample(policy, G, rng)
        log_pi_PG, log_base_PG = (log_probs(side).gather(1, answers_PG) for side in (policy, base))
        u_PG = calibrate(reward_PJ.gather(1, answers_PG), ref_rewards_PK)
        transformed_PG = phi_Q[(u_PG * (len(phi_Q) - 1)).round().long()]  # with K = 512 every u is a grid point
        value_PG = transformed_PG - beta * (log_pi_PG.detach() - log_base_PG)
        advantage_PG = (value_PG - value_PG.mean(1, keepdim=True)) * G / (G - 1)
        optimizer.zero_grad()
        (-advantage_PG * log_pi_PG).mean().backward()
        optimizer.step()
    return Policy(*(logits.detach() for logits in policy))


# ---- Evaluate: from samples, as for a real model, and exactly ----
def order_weights(m: int, n: int) -> Tensor:
    """Chance that the i-th smallest of m samples is the best of n drawn from them: C(i-1, n-1)/C(m, n), (M,)."""
    return torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)], dtype=torch.float64)


def win_rate(policy_rewards_PM: Tensor, base_rewards_PM: Tensor, n: int) -> Tensor:
    """Unbiased W_n per prompt, (P,): the average over all n-subsets of both sides as one weighted sum; ties are 1/2."""
    ours_PM, theirs_PM = policy_rewards_PM.sort(1).values, base_rewards_PM.sort(1).values
    wins_PMM = 0.5 + 0.5 * (ours_PM[:, :, None] - theirs_PM[:, None, :]).sign()
    return (wins_PMM @ order_weights(theirs_PM.shape[1], n)) @ order_weights(ours_PM.shape[1], n)


def exact_win_rate(policy: Policy, base: Policy, reward_PJ: Tensor, n: int) -> float:
    """W_n over all answers j, sorted by reward: B_j and Q_j are the masses of base and policy up to j.

    W_n = 1 - 1/2 sum_j [G(B_j) - G(B_{j-1})] [G(Q_j) + G(Q_{j-1})], for distinct rewards (ties would share one j).
    """
    masses = (log_probs(side).exp().gather(1, reward_PJ.argsort(1)).cumsum(1) for side in (base, policy))
    base_PJ, policy_PJ = (F.pad(best_of_cdf(mass_PJ, n), (1, 0)) for mass_PJ in masses)
    return 1 - 0.5 * (base_PJ.diff(dim=1) * (policy_PJ[:, 1:] + policy_PJ[:, :-1])).sum(1).mean().item()


def interval(values_P: Tensor) -> str:
    """95 % bootstrap-t interval of the mean; prompts are the independent units."""
    drawn = torch.randint(len(values_P), (2000, len(values_P)), generator=torch.Generator().manual_seed(0))
    pivots_B = (values_P[drawn].mean(1) - values_P.mean()) / values_P[drawn].std(1)
    low, high = values_P.mean() - values_P.std() * pivots_B.quantile(pivots_B.new_tensor([0.975, 0.025]))
    return f"[{low:.4f}, {high:.4f}]"


def evaluate(policy: Policy, base: Policy, reward_PJ: Tensor, n: int, seed: int = 1) -> tuple[float, float, float, str]:
    """KL, W_1, W_n and the interval of W_n, estimated without bias from M fresh samples per prompt and side."""
    rng = torch.Generator().manual_seed(seed)
    answers_PM = sample(policy, M, rng)
    kl = (log_probs(policy) - log_probs(base)).gather(1, answers_PM).mean().item()
    ours_PM, theirs_PM = reward_PJ.gather(1, answers_PM), reward_PJ.gather(1, sample(base, M, rng))
    best_P = win_rate(ours_PM, theirs_PM, n)
    return kl, win_rate(ours_PM, theirs_PM, 1).mean().item(), best_P.mean().item(), interval(best_P)


def evaluate_exactly(policy: Policy, base: Policy, reward_PJ: Tensor, n: int) -> tuple[float, float, float]:
    """KL, W_1 and W_n by enumeration of all answers, which only a toy allows."""
    kl = (log_probs(policy).exp() * (log_probs(policy) - log_probs(base))).sum(1).mean().item()
    return kl, exact_win_rate(policy, base, reward_PJ, 1), exact_win_rate(policy, base, reward_PJ, n)


def line(label: str, n: int, kl: float, standard: float, best: float, span: str = "") -> str:
    """A row of the table, with the limit at this KL and the attainment: 1 is the limit, 0 the base policy."""
    bound = limit(kl, n)
    return f"{label:<32} {kl:.4f} {standard:.4f} {best:.4f} {span:^16} {bound:.4f} {(best - 0.5) / (bound - 0.5):11.3f}"


def main() -> None:
    """Train once per transform, each at the beta that aims at the same KL, and print one table."""
    parser = argparse.ArgumentParser(description="InfAlign-CTRL on one page: calibrate, transform, RL, evaluate")
    parser.add_argument("--steps", type=int, default=400, help="policy-gradient steps per transform")
    parser.add_argument("--seed", type=int, default=0, help="of calibration and rollouts")
    args = parser.parse_args()
    base, reward_PJ = make_problem()
    print(f"{'transform':<16} 1/beta {'':<11} KL    W_1    W_{N}     95 % interval   limit  attainment")
    for name, transform in TRANSFORMS.items():
        beta = beta_for_kl(transform, TARGET_KL, N)
        phi_Q = transform(beta, N)
        kl, w_1, w_n = tilt(phi_Q, beta)[1], tilted_win_rate(phi_Q, beta, 1), tilted_win_rate(phi_Q, beta, N)
        print(line(f"{name:<15} {1 / beta:7.3f} theory", N, kl, w_1, w_n))
        policy = train(base, reward_PJ, phi_Q, beta, args.steps, args.seed)
        print(line(f"{'':<23} sampled", N, *evaluate(policy, base, reward_PJ, N)))
        print(line(f"{'':<23} exact", N, *evaluate_exactly(policy, base, reward_PJ, N)))


if __name__ == "__main__":
    main()
