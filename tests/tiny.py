"""Tiny tokenizers and models built from a config, offline: what every test of the project stands on.

The models are random but not flat: `initializer_range` is large, so that samples differ and scores spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

CLOSE = 5e-5
"""How near two float32 computations of one score, logit or log-probability of these models come, of a size up to 20.

float32 rounds such a number by 1e-6, some dozens of times over two layers, in an order that depends on the processor's
kernels, on padding and on the batch: up to 1e-5 was seen (AVX2, AVX-512). What is another score is 1e-2 away.
"""

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIALS = (PAD, BOS, EOS, UNK, TURN_START, TURN_END)

_VOCABULARY = (
    "system user assistant the a cat dog bird sat ran on in mat tree is was good bad great awful happy sad yes no "
    "i you we they like love hate want what why how when red blue green big small one two three four five "
    "sun moon rain wind and or but not very so to of it that this hello bye thanks please sorry help think answer "
    "0 1 2 3 4 5 6 7 8 9 . , ! ? : ; - + = ( ) ' < > /"
)
WORDS = tuple(_VOCABULARY.split())

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(
    words: Sequence[str] | None = None,
    *,
    chat_template: bool | str = True,
    pad: str | None = PAD,
    add_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with distinct pad, bos, eos and unk, savable with `save_pretrained`.

    `words` replace the default vocabulary (special tokens are added in front). `chat_template=True` is a ChatML-like
    one whose turns end with `<|im_end|>` (not the end token); a string is used as the template itself. `pad` may be
    another special token (e.g. EOS) or None. `add_bos=True` prepends the bos token to plain text.

    >>> tiny_tokenizer()("the cat sat").input_ids == tiny_tokenizer().convert_tokens_to_ids(["the", "cat", "sat"])
    True
    """
    names = [*SPECIALS, *dict.fromkeys(words if words is not None else WORDS)]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNK))
    core.pre_tokenizer = Whitespace()
    if add_bos:
        core.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, names.index(BOS))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE if chat_template is True else chat_template
    return tokenizer


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> Any:
    """A tiny config of `family` (an `AutoConfig` model type); `overrides` are fields of that family."""
    hidden = overrides.pop("hidden", 32)
    layers = overrides.pop("layers", 2)
    vocab_size = overrides.pop("vocab_size", None) or len(tokenizer)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    fields = {
        "vocab_size": vocab_size,
        "initializer_range": 0.3,
        **tokens,
        **_shape(family, hidden, layers),
        **overrides,
    }
    return AutoConfig.for_model(family, **fields)


def _shape(family: str, hidden: int, layers: int) -> dict[str, Any]:
    if family == "gpt2":
        return {"n_embd": hidden, "n_layer": layers, "n_head": 2, "n_positions": 512}
    if family == "distilbert":
        return {"dim": hidden, "hidden_dim": 2 * hidden, "n_layers": layers, "n_heads": 2}
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    if family not in {"bert", "deberta-v2", "gpt_neox"}:
        shape["num_key_value_heads"] = 1
    if family in {"gemma2", "gemma3_text", "qwen3"}:
        shape["head_dim"] = hidden // 2
    return shape


def tiny_causal(
    path: str | Path,
    family: str = "llama",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    **config: Any,
) -> str:
    """Save a random causal model and its tokenizer under `path`; returns the path as a string.

    `family`: llama, gpt2, qwen2, qwen3, gemma2, mistral, gpt_neox, ...; `config` takes `vocab_size`, `hidden` (32),
    `layers` (2) and any field of the family's config (e.g. `sliding_window=8`, `attention_dropout=0.1`).
    """
    return _save(AutoModelForCausalLM, path, family, tokenizer, seed, config)


def tiny_classifier(
    path: str | Path,
    family: str = "llama",
    num_labels: int = 1,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    of: str = "sequence",
    **config: Any,
) -> str:
    """Save a random classifier of sequences (or `of="token"`) and its tokenizer; returns the path as a string.

    `family` as in `tiny_causal`, and encoders: bert, distilbert, deberta-v2, ...
    """
    factory = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}[of]
    return _save(factory, path, family, tokenizer, seed, {"num_labels": num_labels, **config})


def _save(factory: Any, path: str | Path, family: str, tokenizer: Any, seed: int, config: dict[str, Any]) -> str:
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(tiny_config(family, tokenizer, **config), dtype=torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
