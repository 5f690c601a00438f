"""Log-probabilities of given completions, and the KL between two models along them.

The sequence KL of a policy against its base is the mean of `sum_t log pi(y_t) - log pi_ref(y_t)` over policy samples
(k1), or of `sum_t KL(pi(.|y_<t) || pi_ref(.|y_<t))`, the conditional KL summed along the same samples: the same mean,
usually less variance (theory.md section 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from infalign.runtime.shared_prefix import (
    continuation,
    encode_prefixes,
    is_shareable,
    pad_left,
    pad_right,
    positions,
    unique_rows,
)


def completion_logits(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
    """(B, T, V) float32 logits that predict each completion token; rows past a completion's end are meaningless."""
    pad_id = 0
    ids_BP, mask_BP = pad_left(prompts, pad_id, model.device)
    ids_BT, mask_BT = pad_right(completions, pad_id, model.device)
    width = ids_BT.shape[1]
    if not is_shareable(model):
        mask = torch.cat([mask_BP, mask_BT], dim=1)
        ids = torch.cat([ids_BP, ids_BT], dim=1)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=width + 1)
        return logits.logits[:, :-1].float()
    first, of_row = unique_rows(ids_BP, mask_BP)
    prefix = encode_prefixes(model, ids_BP[first], mask_BP[first])
    ids = torch.cat([ids_BP[:, -1:], ids_BT[:, :-1]], dim=1)
    mask = torch.cat([mask_BP[:, -1:], mask_BT[:, :-1]], dim=1)
    return model(**continuation(prefix, of_row, ids, mask), use_cache=True).logits.float()


@torch.no_grad()
def sequence_kl(
    policy: Any,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    tokens_per_batch: int = 512,
) -> tuple[Tensor, Tensor]:
    """Two estimates per completion of KL(policy || reference), in nats, at the sampling temperature.

    Args:
        policy, reference: causal language models on one device.
        prompts, completions: B token sequences each; completions were drawn from the policy.
        temperature: the one that they were drawn at.
        tokens_per_batch: completion tokens whose (T, V) logits are held at a time.

    Returns:
        (B,) k1 log-ratios and (B,) summed conditional KLs, float64 on the CPU.
    """
    log_ratios, conditionals = torch.zeros(len(prompts)).double(), torch.zeros(len(prompts)).double()
    for rows in _chunks(prompts, completions, tokens_per_batch):
        batch_prompts, batch_completions = [prompts[row] for row in rows], [completions[row] for row in rows]
        ids, mask = pad_right(batch_completions, 0, policy.device)
        logp, logq = (
            torch.log_softmax(completion_logits(model, batch_prompts, batch_completions) / temperature, dim=-1)
            for model in (policy, reference)
        )
        chosen = (logp - logq).gather(-1, ids[..., None])[..., 0]
        conditional = (logp.exp() * (logp - logq)).sum(-1)
        log_ratios[rows] = (chosen.double() * mask).sum(1).cpu()
        conditionals[rows] = (conditional.double() * mask).sum(1).cpu()
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
