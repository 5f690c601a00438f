"""One way to the log-probabilities of 8 x 128 tokens at a vocabulary of 128,000, and their gradient: its peak memory.

A process of its own for each, so that what the system says of its peak is this pass'. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from infalign.training.chunked_head import add_chunked_head
from infalign.training.shared_logps import shared_logps
from tests.tiny import tiny_causal

VOCABULARY, ROWS, PROMPT, NEW = 128_000, 8, 64, 128


def main(name: str, folder: str) -> None:
    """Run one way, after a small pass that pays for what is loaded once."""
    torch.set_num_threads(1)
    path = f"{folder}/large-vocabulary"
    if not (Path(path) / "config.json").exists():
        tiny_causal(path, "llama", vocab_size=VOCABULARY, hidden=64, tie_word_embeddings=True, initializer_range=0.05)
    model = AutoModelForCausalLM.from_pretrained(path)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # as RLOOTrainer does
    if name == "infalign":
        add_chunked_head(model, 1.0, entropy=True)
    ids = torch.randint(1, VOCABULARY, (ROWS, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    ids[:, :PROMPT] = ids[:1, :PROMPT]
    logps(name, model, ids[:2, -20:], 4).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = peak()
    found = logps(name, model, ids, NEW)
    found.sum().backward()
    print(json.dumps({"bytes": peak() - before, "sum": float(found.sum())}))


def logps(name: str, model: torch.nn.Module, ids: torch.Tensor, kept: int) -> torch.Tensor:
    """(B, kept) log-probabilities of the last tokens."""
    mask = torch.ones_like(ids)
    if name == "infalign":
        return shared_logps(model, model, ids, mask, kept, None)[0]
    if name == "plain logits":
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept + 1).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, ids[:, -kept:, None])[..., 0]
    labels = ids.clone()
    labels[:, :-kept] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -kept:]


def peak() -> int:
    """Bytes of the most memory that this process has held (Linux; getrusage's count starts at its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:])
