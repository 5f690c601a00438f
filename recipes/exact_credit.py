"""What the small language model learns where credit is exact: `python recipes/exact_credit.py --n 16 --kl 0.5`.

KL-regularised RL maximises `-KL(policy || optimum)`. The reward of `small_language_model.py` is a sum over positions,
so the optimum is known token by token, nearly: the base's next-token law, each token weighted with what the optimum's
density of the answer's rank is expected to be, if the rest of the answer comes from the base (its part of the sum taken
as normal). Here the network is fitted to that law on its own samples: no advantages, no ranks, no noise of a group.
What it does not learn then, no estimate of credit teaches it in as many steps.

Printed, for the law itself (`--law`, drawn from token by token) and for the network: KL, of the ranks, win rate beside
the limit, spread of the rewards in units of the base's, and their variance by position as in `by_position.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import small_language_model as small
from where_it_goes import in_units, kl_of_ranks

from infalign import BestOfN, win_rate, win_rate_limit
from infalign.generation.hf import decode_rows
from infalign.generation.likelihood import completion_logits
from infalign.models.loading import load_policy
from infalign.theory.objective import objective
from infalign.theory.transforms import identity
from infalign.types import SamplingSettings

Floats = NDArray[np.float64]
Ids = list[list[int]]
TRAIN, SAMPLES, ROWS = 960, 96, 2048
Z_X = torch.linspace(-9.0, 9.0, 721)
"""Normal scores at which a weight is tabulated."""


@dataclass(frozen=True)
class Law:
    """The optimum's next-token law beside the base's: log weights, a table by position and expected normal score.

    For prompt p with rewards of mean `center_P[p]` and spread `scale_P[p]` under the base, a prefix up to position t
    with sum s is expected to end at the score `(s + rest_PT[p, t] - center_P[p]) / scale_P[p]`.
    """

    log_weight_TX: Tensor
    center_P: Tensor
    scale_P: Tensor
    rest_PT: Tensor
    adds: Callable[[Tensor], Tensor]

    def log_weights(self, prompt_B: Tensor, ids_BT: Tensor) -> Tensor:
        """(B, T, V) of every next token, after the tokens before it."""
        adds_BTV = self.adds(prompt_B)
        own_BT = adds_BTV.gather(2, ids_BT[..., None])[..., 0]
        before_BT = own_BT.cumsum(1) - own_BT
        score = before_BT[..., None] + adds_BTV + (self.rest_PT - self.center_P[:, None])[prompt_B][..., None]
        place = (score / self.scale_P[prompt_B, None, None] - Z_X[0]) / (Z_X[1] - Z_X[0])
        place = place.clamp(0, len(Z_X) - 1.001)
        low = place.long()
        row = low + (torch.arange(ids_BT.shape[1]) * len(Z_X))[None, :, None]
        flat = self.log_weight_TX.flatten()
        return torch.lerp(flat[row], flat[row + 1], place - low)


def law_of(density: Callable[[Floats], Floats], adds_PMT: Floats, prompts: Ids) -> Law:
    """From base samples: what M answers of each prompt add to their rewards, by position."""
    whole_PM = adds_PMT.sum(2)
    center_P, scale_P = whole_PM.mean(1), whole_PM.std(1, ddof=1)
    after_PMT = np.flip(np.cumsum(np.flip(adds_PMT, 2), 2), 2) - adds_PMT
    spread_T = (after_PMT.std(1, ddof=1) / scale_P[:, None]).mean(0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    table = []
    for spread in spread_T:  # E[density(Phi(x + spread e))], e standard normal
        u = stats.norm.cdf(Z_X.numpy().astype(float)[:, None] + spread * nodes)
        table.append(np.log(np.maximum(density(u.ravel()).reshape(u.shape) @ (weights / weights.sum()), 1e-30)))
    worth, directions, place = small.values()
    together_PV = 3.0 * np.array([directions[one].mean(0) for one in prompts]) @ directions.T / small.COMPLETION
    alone_TV = worth * place[: small.COMPLETION, None] / small.COMPLETION
    alone, together = (torch.tensor(one, dtype=torch.float32) for one in (alone_TV, together_PV))
    numbers = (
        torch.tensor(one, dtype=torch.float32) for one in (np.array(table), center_P, scale_P, after_PMT.mean(1))
    )
    return Law(*numbers, adds=lambda prompt_B: together[prompt_B][:, None] + alone)


def drawn(model: Any, prompts: Ids, seed: int) -> Ids:
    """A completion a row; the end token never comes, but for a few rows, which are filled up."""
    uniforms = np.random.default_rng(seed).random((len(prompts), small.COMPLETION))
    settings, found = SamplingSettings(max_tokens=small.COMPLETION), []
    with torch.no_grad():
        for at in range(0, len(prompts), ROWS):
            found += decode_rows(model, prompts[at : at + ROWS], uniforms[at : at + ROWS], settings, [])
    return [ids + ids[-1:] * (small.COMPLETION - len(ids)) for ids, _ in found]


def drawn_from_law(base: Any, law: Law, prompts: Ids, numbers: Sequence[int], seed: int) -> Ids:
    """Likewise, of the law: every token from the base's logits and the weights."""
    rng, found = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for at in range(0, len(numbers), ROWS):
            rows = list(numbers[at : at + ROWS])
            ids = torch.zeros(len(rows), small.COMPLETION, dtype=torch.long)
            for t in range(small.COMPLETION):
                logits = completion_logits(base, [prompts[row] for row in rows], ids[:, : t + 1].tolist())[:, t]
                logits = logits + law.log_weights(torch.tensor(rows), ids)[:, t]
                ids[:, t] = torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]
            found += ids.tolist()
    return found


def fitted(base: Any, law: Law, prompts: Ids, steps: int, rate: float) -> Any:
    """The base after `steps` down the gradient of KL(policy || law), exact at each token of 16 x 16 own samples."""
    policy = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1.0 - step / steps)
        numbers = np.repeat(np.random.default_rng([1, step]).choice(min(TRAIN, len(prompts)), 16, replace=False), 16)
        rows, prompt_B = [prompts[number] for number in numbers], torch.tensor(numbers)
        ids = drawn(policy.eval(), rows, seed=1000 + step)
        with torch.no_grad():
            aim = completion_logits(base, rows, ids).log_softmax(-1) + law.log_weights(prompt_B, torch.tensor(ids))
            aim = aim.log_softmax(-1)
        ours = completion_logits(policy, rows, ids).log_softmax(-1)
        loss = (ours.exp() * (ours - aim)).sum(-1).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"  step {step + 1}: KL to the law {loss.item():.3f} nats", flush=True)
    return policy.eval()


def measured(
    name: str, ids: Ids, kl: float, plain: Ids, base_PMT: Floats, sizes: Sequence[int], wanted: Sequence[float]
) -> None:
    """Print a policy's row."""
    rows = np.array(ids).reshape(len(plain), SAMPLES, -1)
    adds_PMT = np.array([small.by_position(prompt, answers) for prompt, answers in zip(plain, rows, strict=True)])
    ours_PM, theirs_PM = adds_PMT.sum(2), base_PMT.sum(2)
    unit_P = theirs_PM.var(1, ddof=1)
    whole = float((ours_PM.var(1, ddof=1) / unit_P).mean())
    alone = float((adds_PMT.var(1, ddof=1).sum(1) / unit_P).mean())
    wins = ", ".join(
        f"W_{n} {win_rate(ours_PM, theirs_PM, BestOfN(n)).mean:.3f} of {win_rate_limit(BestOfN(n), kl):.3f} "
        f"(exact policy {exact:.3f})"
        for n, exact in zip(sizes, wanted, strict=True)
    )
    ranks, spread = kl_of_ranks(list(ours_PM), list(theirs_PM)), in_units(list(ours_PM), list(theirs_PM)).std()
    print(
        f"{name}: KL {kl:.3f}, of the ranks {ranks:.3f}; {wins}; spread {spread:.2f}, variance {whole:.2f}: positions "
        f"{alone:.2f}, covariances {whole - alone:.2f}",
        flush=True,
    )


def kl_along(logps_of: Callable[[Ids, Ids, Sequence[int]], Tensor], base: Any, rows: Ids, ids: Ids) -> float:
    """Of completions, with every next token's KL summed over the vocabulary: those of 32 samples a prompt."""
    kept, total = [row for row in range(len(rows)) if row % SAMPLES < 32], 0.0
    with torch.no_grad():
        for at in range(0, len(kept), 256):
            part = kept[at : at + 256]
            prompts, answers = [rows[row] for row in part], [ids[row] for row in part]
            theirs = completion_logits(base, prompts, answers).log_softmax(-1)
            ours = logps_of(prompts, answers, part)
            total += float((ours.exp() * (ours - theirs)).sum())
    return total / len(kept)


def main() -> None:
    """Fit and measure the optimum for each N, and identity's exact policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[16])
    parser.add_argument("--kl", type=float, default=0.5, help="nats of the exact policy")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--law", action="store_true", help="measure the law itself, too")
    given = parser.parse_args()
    tokenizer: Any = small.made_tokenizer()
    base: Any = load_policy(str(small.HERE / "model"), device=torch.device("cpu"))
    lines = (small.HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[: given.prompts]
    texts = [json.loads(line)["prompt"] for line in lines]
    prompts: Ids = [tokenizer(text)["input_ids"] for text in texts]  # as a run renders them
    plain: Ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    answers = np.array(drawn(base, repeated, seed=0)).reshape(len(prompts), SAMPLES, -1)
    adds_PMT = np.array([small.by_position(*one) for one in zip(plain, answers, strict=True)])
    first = len(prompts) * TRAIN // 1200
    tested = [number for number in range(first, len(prompts)) for _ in range(SAMPLES)]
    rows = [prompts[number] for number in tested]
    aims = {f"optimal for N={n}": objective(BestOfN(n), kl=given.kl) for n in given.n}
    aims["identity"] = objective(BestOfN(1), identity, kl=given.kl)
    for name, aim in aims.items():
        assert aim.policy is not None
        law = law_of(aim.policy.density, adds_PMT, plain)
        exact = [float(aim.policy.win_rate(BestOfN(n))) for n in given.n]

        def by_law(prompts: Ids, ids: Ids, part: Sequence[int], law: Law = law) -> Tensor:
            logits = completion_logits(base, prompts, ids).log_softmax(-1)
            numbers = torch.tensor([tested[row] for row in part])
            return (logits + law.log_weights(numbers, torch.tensor(ids))).log_softmax(-1)

        if given.law:
            ids = drawn_from_law(base, law, prompts, tested, seed=7)
            kl = kl_along(by_law, base, rows, ids)
            measured(f"{name}, the law", ids, kl, plain[first:], adds_PMT[first:], given.n, exact)
        policy = fitted(base, law, prompts[:first], given.steps, given.learning_rate)
        ids = drawn(policy, rows, seed=2)
        kl = kl_along(lambda p, c, _, one=policy: completion_logits(one, p, c).log_softmax(-1), base, rows, ids)
        measured(f"{name}, {given.steps} steps", ids, kl, plain[first:], adds_PMT[first:], given.n, exact)


if __name__ == "__main__":
    main()
