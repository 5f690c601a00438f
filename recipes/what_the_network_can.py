"""What a network can learn of an objective's policy: `python recipes/what_the_network_can.py`.

Without reinforcement learning: the policy that an objective aims at is known exactly, as the base's samples weighted by
a density of their rank. The language model of `small_language_model.py` is fitted to it by maximum likelihood, on many
base samples drawn again with those weights, and measured like a trained policy. What it wins is what the network can
represent and generalise; what reinforcement learning wins less is for its training to answer.

Printed: KL and win rate on held-out prompts, the limit at that KL, mean and spread of the policy's rewards in units of
the base's spread on the same prompt.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

import small_language_model as small
from where_it_goes import in_units, kl_of_ranks

from infalign import BestOfN, calibrate, win_rate, win_rate_limit
from infalign.generation.hf import decode_rows
from infalign.generation.likelihood import completion_logits
from infalign.report.table import Table, plain_text
from infalign.theory.objective import objective
from infalign.theory.transforms import identity
from infalign.types import SamplingSettings

Floats = NDArray[np.float64]
Ids = list[list[int]]
ROWS, BATCH = 2048, 256


def drawn(model: Any, prompts: Ids, count: int, seed: int) -> Ids:
    """`count` completions of each prompt, prompt by prompt."""
    rows = [prompt for prompt in prompts for _ in range(count)]
    uniforms = np.random.default_rng(seed).random((len(rows), small.COMPLETION))
    settings, found = SamplingSettings(max_tokens=small.COMPLETION), []
    with torch.no_grad():
        for at in range(0, len(rows), ROWS):
            found += [
                ids for ids, _ in decode_rows(model, rows[at : at + ROWS], uniforms[at : at + ROWS], settings, [])
            ]
    return found


def scored(texts: list[str], completions: Ids, count: int) -> Floats:
    """(prompts, count) rewards, as a run scores them: from text."""
    reward, tokenizer = small.build(), small.made_tokenizer()
    rows = [text for text in texts for _ in range(count)]
    return np.array(reward(rows, tokenizer.batch_decode(completions))).reshape(len(texts), count)


def logps(model: Any, prompts: Ids, completions: Ids) -> torch.Tensor:
    """(B,) log-probabilities of completions, in nats."""
    logits = completion_logits(model, prompts, completions).log_softmax(-1)
    return logits.gather(-1, torch.tensor(completions)[..., None]).sum((1, 2))


def sequence_kl(policy: Any, base: Any, prompts: Ids, completions: Ids) -> float:
    """Of policy samples; the exact KL of each next token, summed."""
    total = 0.0
    with torch.no_grad():
        for at in range(0, len(prompts), BATCH):
            ours, theirs = (
                completion_logits(model, prompts[at : at + BATCH], completions[at : at + BATCH]).log_softmax(-1)
                for model in (policy, base)
            )
            total += float((ours.exp() * (ours - theirs)).sum())
    return total / len(prompts)


def fitted(base: Any, prompts: Ids, completions: Ids, weights: Floats, steps: int, rate: float) -> Any:
    """The base after `steps` of maximum likelihood on its completions, drawn with `weights`."""
    policy = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    chosen = np.random.default_rng(1).choice(len(prompts), (steps, BATCH), p=weights / weights.sum())
    for step, rows in enumerate(chosen):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        loss = -logps(policy, [prompts[row] for row in rows], [completions[row] for row in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy.eval()


def main() -> None:
    """Fit and measure each objective at each KL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--kl", type=float, nargs="+", default=[1.0])
    parser.add_argument("--samples", type=int, default=256, help="base samples of each of the 960 training prompts")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    given = parser.parse_args()

    tokenizer: Any = small.made_tokenizer()
    base: Any = AutoModelForCausalLM.from_pretrained(small.HERE / "model").eval()
    rows = (small.HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["prompt"] for row in rows]
    ids: Ids = [tokenizer(text)["input_ids"] for text in texts]  # as a run renders them
    train, test, test_texts = ids[:960], ids[960:], texts[960:]
    start = time.process_time()
    completions = drawn(base, train, given.samples, seed=0)
    rewards = scored(texts[:960], completions, given.samples)
    ranks = calibrate(rewards, rewards)
    theirs = scored(test_texts, drawn(base, test, 96, seed=1), 96)
    repeated = [prompt for prompt in train for _ in range(given.samples)]
    print(f"{len(completions)} base samples: {time.process_time() - start:.0f} CPU seconds", flush=True)

    rows = []
    for kl in given.kl:
        aims = {f"optimal for N={n}": objective(BestOfN(n), kl=kl) for n in given.n}
        aims["identity"] = objective(BestOfN(max(given.n)), identity, kl=kl)
        for name, aim in aims.items():
            start = time.process_time()
            assert aim.policy is not None
            weights = aim.policy.density(np.concatenate(list(ranks)))
            policy = fitted(base, repeated, completions, weights, given.steps, given.learning_rate)
            mine = drawn(policy, test, 96, seed=2)
            ours = scored(test_texts, mine, 96)
            few = [row for row in range(len(mine)) if row % 96 < 32]
            found = sequence_kl(policy, base, [test[row // 96] for row in few], [mine[row] for row in few])
            units = in_units(list(ours), list(theirs))
            wins = []
            for n in given.n:
                value = win_rate(ours, theirs, BestOfN(n))
                wins.append(f"{value.mean:.3f} of {win_rate_limit(BestOfN(n), found):.3f} ({_exact(aim, n):.3f})")
            shape = f"{units.mean():.2f}, {units.std():.2f}"
            rows.append((name, f"{kl:g}", f"{found:.3f}", f"{kl_of_ranks(list(ours), list(theirs)):.3f}", *wins, shape))
            print(f"{name}, {kl:g} nats: {time.process_time() - start:.0f} CPU seconds", flush=True)
    wins = [f"Best-of-{n}: fitted, limit (exact policy)" for n in given.n]
    print("\n".join(plain_text(Table(("fitted to", "KL aimed", "KL", "of ranks", *wins, "mean, spread"), tuple(rows)))))


def _exact(aim: Any, n: int) -> float:
    """What the exact policy wins."""
    return float(aim.policy.win_rate(BestOfN(n))) if aim.policy is not None else math.nan


if __name__ == "__main__":
    main()
