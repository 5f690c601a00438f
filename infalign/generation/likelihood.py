"""Log-probabilities of given completions, and the KL between two models along them.

The sequence KL of a policy against its base is the mean of `sum_t log pi(y_t) - log pi_ref(y_t)` over policy samples
(k1), or of `sum_t KL(pi(.|y_<t) || pi_ref(.|y_<t))`, the conditional KL summed along the same samples: the same mean,
usually less variance (theory.md section 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from infalign.runtime.shared_prefix import (
    continuation,
    encode_prefixes,
    pad_left,
    pad_right,
    positions,
    unique_rows,
    why_plain,
)
from infalign.types import InputError

HEAD_TOKENS = 64
"""Tokens whose (tokens, V) logits are held at a time."""


def completion_states(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
    """(B, T, H) last hidden states that predict each completion token; past a completion's end they are meaningless."""
    ids_BP, mask_BP = pad_left(prompts, 0, model.device)
    ids_BT, mask_BT = pad_right(completions, 0, model.device)
    width = ids_BT.shape[1]
    if why_plain(model):
        mask = torch.cat([mask_BP, mask_BT], dim=1)
        ids = torch.cat([ids_BP, ids_BT], dim=1)
        states = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
        return states[:, -width - 1 : -1]
    first, of_row = unique_rows(ids_BP, mask_BP)
    prefix = encode_prefixes(model, ids_BP[first], mask_BP[first])
    ids = torch.cat([ids_BP[:, -1:], ids_BT[:, :-1]], dim=1)
    mask = torch.cat([mask_BP[:, -1:], mask_BT[:, :-1]], dim=1)
    return model.base_model(**continuation(prefix, of_row, ids, mask)).last_hidden_state


def logits_of(model: Any, states: Tensor) -> Tensor:
    """(..., V) float32 logits of last hidden states (..., H): the head, and the scale and cap of models that have one.

    Raises:
        InputError: the head does something else (seen by comparing with the model's own logits, once a model).
    """
    if model not in _known_heads:
        ids = torch.arange(1, 5, device=model.device)[None]
        with torch.no_grad():
            own = model(input_ids=ids, use_cache=False).logits.float()
            found = _projected(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        if not torch.allclose(found, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
            raise InputError(
                f"{type(model).__name__}: its logits are not those of its head, scale and cap; its KL can't be measured"
            )
        _known_heads.add(model)
    return _projected(model, states)


_known_heads: WeakSet[Any] = WeakSet()


def _projected(model: Any, states: Tensor) -> Tensor:
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(states).float()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            logits *= getattr(config, name)
            break
    if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM divide, HyperCLOVA X multiplies
        logits *= config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def sequence_kl(
    policy: Any,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    tokens_per_batch: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Two estimates per completion of KL(policy || reference), in nats, at the sampling temperature.

    No (B, T, V) tensor is made: hidden states go through the heads `HEAD_TOKENS` at a time.

    Args:
        policy, reference: causal language models on one device.
        prompts, completions: B token sequences each; completions were drawn from the policy.
        temperature: the one that they were drawn at.
        tokens_per_batch: completion tokens of a forward pass.

    Returns:
        (B,) k1 log-ratios and (B,) summed conditional KLs, float64 on the CPU.
    """
    log_ratios, conditionals = torch.zeros(len(prompts)).double(), torch.zeros(len(prompts)).double()
    for rows in _chunks(prompts, completions, tokens_per_batch):
        batch = [prompts[row] for row in rows], [completions[row] for row in rows]
        ids, mask = pad_right(batch[1], 0, policy.device)
        real = mask.bool()
        of_row = torch.tensor(rows, device=ids.device)[:, None].expand_as(ids)[real].cpu()
        states = [completion_states(model, *batch)[real] for model in (policy, reference)]
        for piece in torch.arange(len(of_row)).split(HEAD_TOKENS):
            logp, logq = (
                torch.log_softmax(logits_of(model, of_model[piece]) / temperature, dim=-1)
                for model, of_model in zip((policy, reference), states, strict=True)
            )
            chosen = (logp - logq).gather(-1, ids[real][piece, None])[:, 0]
            conditional = (logp.exp() * (logp - logq)).sum(-1)
            log_ratios.index_add_(0, of_row[piece], chosen.double().cpu())
            conditionals.index_add_(0, of_row[piece], conditional.double().cpu())
    return log_ratios, conditionals


def _chunks(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], tokens_per_batch: int
) -> Iterator[list[int]]:
    """Row numbers in chunks of about `tokens_per_batch` completion tokens, rows of one prompt side by side."""
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), tuple(prompts[row]), len(completions[row])))
    chunk: list[int] = []
    longest = 0
    for row in order:
        longest = max(longest, len(completions[row]))
        if chunk and longest * (len(chunk) + 1) > tokens_per_batch:
            yield chunk
            chunk, longest = [], len(completions[row])
        chunk.append(row)
    if chunk:
        yield chunk
