"""A policy that is a table: two tokens over a small vocabulary, one for all prompts, with 400 distinct rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_causal, tiny_tokenizer

WORDS = [f"w{number}" for number in range(20)]

REWARD = '''
import numpy as np

TABLE = np.random.default_rng(0).normal(size=(64, 64))


def reward(completion_ids, **_):
    """A distinct random number for every pair of tokens."""
    return [float(TABLE[ids[0], ids[1] if len(ids) > 1 else 63]) for ids in completion_ids]
'''


def write_tabular(folder: Path, train: int = 8, test: int = 8) -> Path:
    """Model, prompts, reward and recipe under `folder`; returns the recipe's path."""
    model_path = tiny_causal(folder / "model", "llama", tokenizer=tiny_tokenizer(WORDS), hidden=64, layers=1)
    _forget_the_prompt(Path(model_path))
    rows = [{"prompt": [{"role": "user", "content": f"w{one % 20} w{one // 20}"}]} for one in range(train + test)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model_path}\ndataset_name: prompts.jsonl\nreward: reward.py:reward\n"
        f"num_train_prompts: {train}\nnum_test_prompts: {test}\nmax_completion_length: 2\nuse_cpu: true\n"
        "save_strategy: 'no'\nreport_to: none\n"
    )
    return recipe


def _forget_the_prompt(path: Path) -> None:
    """Zero attention's output and sharpen nothing else: the next token depends on the last one alone."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.o_proj.weight.requires_grad_(False)
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(path)


@dataclass(frozen=True)
class Exact:
    """Means over prompts: KL of policy against base (nats), and the win rate as decoded, ties half."""

    kl: float
    win_rate: float


def exactly(
    policy_path: str | Path, base_path: str | Path, prompts_ids: Sequence[list[int]], n: int, worst: bool
) -> Exact:
    """What a policy is worth, by all of its completions of two tokens: nothing is sampled.

    Args:
        policy_path, base_path: folders of the models.
        prompts_ids: tokens of each prompt.
        n: of Best-of-N, or with `worst` of Worst-of-N.
    """
    table = np.random.default_rng(0).normal(size=(64, 64))  # as in `REWARD`
    models = [AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (policy_path, base_path)]
    kls, wins = [], []
    for ids in prompts_ids:
        policy, base = (_chances(model, ids) for model in models)
        rewards = np.array([table[first, second] for first, second in policy])
        p, q = (np.array([side[pair] for pair in policy]) for side in (policy, base))
        kls.append(float(p @ np.log(p / q)))
        wins.append(_win_rate(rewards if not worst else -rewards, p, q, n, worst))
    return Exact(float(np.mean(kls)), float(np.mean(wins)))


def _chances(model: Any, prompt: list[int]) -> dict[tuple[int, int], float]:
    """The probability of every completion: (first, second) token, second 63 where the first one ends it."""
    ends = set(np.atleast_1d(model.generation_config.eos_token_id).tolist())
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(first.numel())])
        second = model(rows).logits[:, -1].softmax(-1)
    found: dict[tuple[int, int], float] = {}
    for token, chance in enumerate(first.tolist()):
        if token in ends:
            found[token, 63] = chance
        else:
            found |= {(token, other): chance * float(second[token, other]) for other in range(second.shape[1])}
    return found


def _win_rate(rewards: np.ndarray, p: np.ndarray, q: np.ndarray, n: int, worst: bool) -> float:
    """Of the best of n (for `worst` rewards are negated, and so is who wins)."""
    order = np.argsort(rewards)
    below = [np.cumsum(side[order]) ** n for side in (p, q)]
    chosen_p, chosen_q = (np.diff(one, prepend=0.0) for one in below)
    won = float(chosen_p @ (below[1] - chosen_q / 2.0))
    return 1.0 - won if worst else won
