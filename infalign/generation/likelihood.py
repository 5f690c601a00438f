"""Log-probabilities of given completions, and the KL between two models along them.

The sequence KL of a policy against its base is the mean of `sum_t log pi(y_t) - log pi_ref(y_t)` over policy samples
(k1), or of `sum_t KL(pi(.|y_<t) || pi_ref(.|y_<t))`, the conditional KL summed along the same samples: the same mean,
usually less variance (infalign/theory/README.md, equation 11).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from infalign.models.head import head_of, pieces
from infalign.models.mixture import LogitMixture
from infalign.models.shared_prefix import (
    continuation,
    encode_prefixes,
    pad_left,
    pad_right,
    positions,
    unique_rows,
    why_plain,
    without_router_logits,
)


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


def completion_logits(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
    """(B, T, V) float32 logits that predict each completion token, in one plain pass, for a model of any head."""
    if isinstance(model, LogitMixture):
        return model.mixed([completion_logits(one, prompts, completions) for one in model.models])
    ids, mask = pad_left([[*p, *c] for p, c in zip(prompts, completions, strict=True)], 0, model.device)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    logits = model(**inputs, **without_router_logits(model)).logits.float()
    width, longest = ids.shape[1], max(map(len, completions))
    starts = torch.tensor([width - len(completion) - 1 for completion in completions], device=ids.device)
    places = (starts[:, None] + torch.arange(longest, device=ids.device)).clamp(max=width - 1)
    return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))


@torch.no_grad()
def sequence_kl(
    policy: Any,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    tokens_per_batch: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Two estimates per completion of KL(policy || reference), in nats, at the sampling temperature.

    No (B, T, V) tensor is made: hidden states go through the heads some tokens at a time.

    Args:
        policy, reference: causal language models on one device.
        prompts, completions: B token sequences each; completions were drawn from the policy.
        temperature: the one that they were drawn at.
        tokens_per_batch: tokens of a forward pass, prompts and padding included.

    Returns:
        (B,) k1 log-ratios and (B,) summed conditional KLs, float64 on the CPU.
    """
    heads = [head_of(model) for model in (policy, reference)]
    if None in heads:  # logits of a whole batch, then
        tokens_per_batch = min(tokens_per_batch, 512)
    log_ratios, conditionals = torch.zeros(len(prompts)).double(), torch.zeros(len(prompts)).double()
    for rows in _chunks(prompts, completions, tokens_per_batch):
        batch = [prompts[row] for row in rows], [completions[row] for row in rows]
        ids, mask = pad_right(batch[1], 0, policy.device)
        real = mask.bool()
        of_row = torch.tensor(rows, device=ids.device)[:, None].expand_as(ids)[real].cpu()
        states = [
            (completion_logits(model, *batch) if head is None else completion_states(model, *batch))[real]
            for model, head in zip((policy, reference), heads, strict=True)
        ]
        for piece in pieces(len(of_row), policy.get_input_embeddings().weight.shape[0]):
            logp, logq = (
                torch.log_softmax((of_model[piece] if head is None else head.logits(of_model[piece])) / temperature, -1)
                for head, of_model in zip(heads, states, strict=True)
            )
            chosen = (logp - logq).gather(-1, ids[real][piece, None])[:, 0]
            conditional = (logp.exp() * (logp - logq)).sum(-1)
            log_ratios.index_add_(0, of_row[piece], chosen.double().cpu())
            conditionals.index_add_(0, of_row[piece], conditional.double().cpu())
    return log_ratios, conditionals


@torch.no_grad()
def completion_logps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = 8192,
) -> Tensor:
    """(B,) log-probabilities of completions given their prompts in nats, summed over tokens, float64 on the CPU."""
    head = head_of(model)
    summed = torch.zeros(len(prompts)).double()
    for rows in _chunks(prompts, completions, tokens_per_batch if head else min(tokens_per_batch, 512)):
        batch = [prompts[row] for row in rows], [completions[row] for row in rows]
        ids, mask = pad_right(batch[1], 0, model.device)
        real = mask.bool()
        if head is None:
            logps = completion_logits(model, *batch)[real].log_softmax(-1).gather(-1, ids[real][:, None])[:, 0]
        else:
            logps, _ = head.logps(completion_states(model, *batch)[real], ids[real])
        of_row = torch.tensor(rows, device=ids.device)[:, None].expand_as(ids)[real].cpu()
        summed.index_add_(0, of_row, logps.double().cpu())
    return summed


def _chunks(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], tokens_per_batch: int
) -> Iterator[list[int]]:
    """Row numbers in chunks of about `tokens_per_batch` tokens, rows of one prompt side by side."""
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), tuple(prompts[row]), len(completions[row])))
    chunk: list[int] = []
    longest = prompt = 0
    for row in order:
        longest, prompt = max(longest, len(completions[row])), max(prompt, len(prompts[row]))
        if chunk and (prompt + longest) * (len(chunk) + 1) > tokens_per_batch:
            yield chunk
            chunk, longest, prompt = [], len(completions[row]), len(prompts[row])
        chunk.append(row)
    if chunk:
        yield chunk
