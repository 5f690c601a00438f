"""Log-probabilities of completions, each distinct prompt run once, through TRL's chunked head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from infalign.models.shared_prefix import (
    buckets,
    continuation,
    encode_prefixes,
    pass_cost,
    unique_rows,
    without_router_logits,
)


def shared_logps(
    model: Any, inner: Any, input_ids: Tensor, attention_mask: Tensor, kept: int, batch_size: int | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, kept) of the last `kept` tokens, in nats, and their entropies if the head computes them.

    With gradients, batches are whole prompt groups; without, completions of like length, cut to it.

    Args:
        model: as the trainer calls it (wrapped), with TRL's fused head.
        inner: the causal language model inside it, for the prefixes.
        input_ids, attention_mask: (B, P + kept), prompts padded on the left and completions on the right.
        kept: completion tokens.
        batch_size: rows of a forward pass at full length; None is all.
    """
    prompt = input_ids.shape[1] - kept
    lengths = attention_mask[:, prompt:].sum(1).tolist()
    rows_at_once = batch_size or len(lengths)
    if torch.is_grad_enabled():
        # sorted by prompt, so that a pass holds whole groups and computes each of their prompts once
        _, of_row = unique_rows(input_ids[:, :prompt], attention_mask[:, :prompt])
        parts = list(of_row.argsort(stable=True).split(rows_at_once))
        widths = [kept] * len(parts)
    else:
        # without gradients: as many tokens a pass as `batch_size` full rows; a repeated prompt takes room and no time
        cut = buckets(lengths, rows_at_once * (prompt + kept), beside=prompt, cost=pass_cost(inner))
        parts = [torch.tensor(rows, device=input_ids.device) for rows in cut]
        widths = [max(1, *(lengths[row] for row in rows)) for rows in cut]
    logps, entropies = [], []
    for rows, width in zip(parts, widths, strict=True):
        end = prompt + width
        outputs = _forward(model, inner, input_ids[rows, :end], attention_mask[rows, :end], prompt)
        logps.append(pad(outputs.log_probs, (0, kept - width)))
        if outputs.entropy is not None:
            entropies.append(pad(outputs.entropy, (0, kept - width)))
    order = torch.cat(parts).argsort()  # back to the order of the rows
    return torch.cat(logps)[order], torch.cat(entropies)[order] if entropies else None


def _forward(model: Any, inner: Any, input_ids: Tensor, attention_mask: Tensor, prompt: int) -> Any:
    """One forward: the distinct prompts once, then all completions on their repeated caches."""
    ids_BP, mask_BP = input_ids[:, :prompt], attention_mask[:, :prompt]
    if prompt == 1:
        # A prompt of one token has no prefix, and its graph no prefix pass. ZeRO-1 and 2 fill their buckets in the
        # order in which gradients arrive, which must be every rank's: give it a masked prefix.
        ids_BP, mask_BP = (pad(part, (1, 0)) for part in (ids_BP, mask_BP))
    first, of_row = unique_rows(ids_BP, mask_BP)
    prefix = encode_prefixes(inner, ids_BP[first], mask_BP[first])
    # The last prompt token is the input that predicts the first completion token. As the first label it is shifted
    # away, so (B, 1 + T) inputs give T log-probabilities.
    ids = torch.cat([ids_BP[:, -1:], input_ids[:, prompt:]], dim=1)
    mask = torch.cat([mask_BP[:, -1:], attention_mask[:, prompt:]], dim=1)
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {**continuation(prefix, of_row, ids, mask), **without_router_logits(inner)}
    return model(**inputs, labels=labels, fused_lm_head=True)
