"""A language model small enough that training it to the end takes minutes, on real text, and a reward without ties.

`python recipes/small_language_model.py chats.jsonl` writes `outputs/small_language_model/` with `model`, a Llama of
three layers on 800 byte-pair tokens, trained on the turns of the chats (about four CPU minutes), `prompts.jsonl`, 1,200
openings of eight tokens, and `texts.jsonl`, 400 of the turns, on which a policy shows what it has forgotten.
`small_language_model.yaml` trains it for Best-of-4. The model knows how words look and hardly more; what it is for is
that five hundred steps of reinforcement learning take minutes, so that objectives, learning rates and calibrations can
be compared to the end.

The chats: JSONL whose rows have `chosen` and `rejected` transcripts (hh-rlhf), plain or gzipped.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent.parent / "outputs" / "small_language_model"
VOCABULARY, OPENING, COMPLETION = 800, 8, 10
BEGIN, END = "<s>", "</s>"
STEPS, BATCH, CONTEXT, RATE = 1500, 48, 33, 2e-3


def turns(path: Path) -> list[str]:
    """The distinct turns of all transcripts, sorted."""
    found = set()
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for side in ("chosen", "rejected"):
                found.update(part.split(": ", 1)[-1].strip() for part in row[side].split("\n\n"))
    return sorted(text for text in found if len(text) > 20)


def byte_pairs(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; `END` never occurs in a text, so a completion always has its full length."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    special = [BEGIN, END]
    pairs.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token=BEGIN, eos_token=END, pad_token=END)


def pretrained(documents: list[list[int]], size: int) -> LlamaForCausalLM:
    """A Llama that has seen `STEPS` batches of the documents."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    stream = torch.tensor([token for document in documents for token in document])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
        starts = torch.randint(0, len(stream) - CONTEXT, (BATCH,))
        batch = stream[starts[:, None] + torch.arange(CONTEXT)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 300 == 0:
            print(f"step {step + 1}, loss {loss.item():.2f}")
    return model


@cache
def made_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that `main` wrote."""
    return PreTrainedTokenizerFast.from_pretrained(HERE / "model")


@cache
def values(against: float | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of the reward: what tokens are worth (V,), directions (V, 32) of tokens, weights of places; drawn once.

    With `against`, of another reward: its tokens' worths have that correlation, negated, with the first one's.
    """
    generator = np.random.default_rng(5 if against is None else 6)
    worth = generator.normal(size=VOCABULARY)
    directions = generator.normal(size=(VOCABULARY, 32)) / np.sqrt(32)
    place = 1.0 + 0.3 * generator.normal(size=4 * COMPLETION)
    if against is not None:
        worth = np.sqrt(1.0 - against**2) * worth - against * values()[0]
    return worth, directions, place


def build(against: float | None = None) -> Callable[..., list[float]]:
    """The reward: what each token at its place is worth, and how a completion goes with its prompt; both random.

    With `against` (between -1 and 1) a second one that pulls the other way: what the first values it tends to dislike.
    """
    worth, directions, place = values(against)

    def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        return [one(tokens(prompt), tokens(text)) for prompt, text in zip(prompts, completions, strict=True)]

    def tokens(text: str) -> list[int]:
        return made_tokenizer()(text, add_special_tokens=False)["input_ids"][: 4 * COMPLETION]

    def one(prompt: list[int], text: list[int]) -> float:
        if not prompt or not text:
            return 0.0
        alone = (worth[text] * place[: len(text)]).mean()
        together = directions[prompt].mean(0) @ directions[text].mean(0)
        return float(alone + 3.0 * together)

    return reward


def by_position(prompt: Sequence[int], completions_BT: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B, T) what each token of completions adds to their rewards, which are the sums over T."""
    worth, directions, place = values()
    count = completions_BT.shape[1]
    together = directions[completions_BT] @ directions[list(prompt)].mean(0)
    return (worth[completions_BT] * place[:count] + 3.0 * together) / count


def write(name: str, rows: Iterable[dict[str, str]]) -> None:
    """A file of rows beside the model."""
    (HERE / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main(path: str) -> None:
    """Train the tokenizer and the model, and write them with their openings."""
    texts = turns(Path(path))
    tokenizer = byte_pairs(texts)
    documents = [[0, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    print(f"{len(texts)} turns, {sum(map(len, documents))} tokens")
    openings = {tokenizer.decode(ids[1 : OPENING + 1]) for ids in documents if len(ids) > OPENING + COMPLETION}
    prompts = sorted(text for text in openings if "\ufffd" not in text)
    random.Random(0).shuffle(prompts)
    model = pretrained(documents, len(tokenizer))
    HERE.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    write("prompts", [{"prompt": text} for text in prompts[:1200]])
    write("texts", [{"text": text} for text in random.Random(1).sample(texts, 400)])
    print(f"written to {HERE}")


if __name__ == "__main__":
    main(sys.argv[1])
