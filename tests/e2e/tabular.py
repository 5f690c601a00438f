"""A policy that is a table: two tokens over a small vocabulary, one for all prompts, with 400 distinct rewards."""

from __future__ import annotations

import json
from pathlib import Path

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
