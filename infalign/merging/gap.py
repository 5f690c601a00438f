"""How far a merged model is from the mixture of its parents' logits, which merging weights approximates.

With y drawn from the mixture q, token by token:

    merge gap       KL(q || merged) = E sum_t KL(q(. | y_<t) || merged(. | y_<t))
    sequence gap    KL(q || p*),    p* the mixture normalised over whole completions

For the second, `p*(y) = q(y) W(y) / E_q[W]` with `log W(y) = sum_t log sum_a prod_k pi_k(a | y_<t)^w_k`, the logs of
the normalisers that q divides by; hence `KL(q || p*) = log E[W] - E[log W]`. Nats; zero where parents agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from infalign.generation.likelihood import completion_logits
from infalign.models.mixture import LogitMixture

PASS_BYTES = 2**30
"""Of the float32 logits, of all models and what is made of them, that a pass holds."""


@dataclass(frozen=True)
class MergeGap:
    """In nats, with standard errors over completions.

    Attributes:
        gap, error: KL of the mixture against the merged model.
        sequence_gap, sequence_error: KL of the mixture against the one that is normalised over completions.
        from_base: KL of the mixture against the base, for scale; NaN without one.
    """

    gap: float
    error: float
    sequence_gap: float
    sequence_error: float
    from_base: float


@torch.no_grad()
def merge_gap(
    mixture: LogitMixture,
    merged: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    base: Any | None = None,
) -> MergeGap:
    """Measure both gaps along completions of the mixture.

    Args:
        mixture: what the completions were drawn from, at temperature 1.
        merged: a model on the same device.
        prompts, completions: B token sequences each.
        base: for `from_base`.
    """
    gaps, bases, normalisers = [], [], []
    vocabulary = mixture.get_input_embeddings().weight.shape[0]
    longest = max(len(prompt) + len(one) for prompt, one in zip(prompts, completions, strict=True))
    size = max(1, PASS_BYTES // (4 * vocabulary * longest * (len(mixture.models) + 4)))
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size], completions[start : start + size]
        mixed = mixture.mixed([completion_logits(one, *rows) for one in mixture.models])
        real = torch.zeros(mixed.shape[:2], dtype=torch.bool, device=mixed.device)
        for row, completion in enumerate(rows[1]):
            real[row, : len(completion)] = True
        normaliser_BT = mixed.logsumexp(-1)
        logq = mixed - normaliser_BT[..., None]
        normalisers.append((normaliser_BT * real).sum(1))
        for found, other in ((gaps, merged), (bases, base)):
            if other is not None:
                logp = completion_logits(other, *rows).log_softmax(-1)
                found.append(((logq.exp() * (logq - logp)).sum(-1) * real).sum(1))
    gap_B, log_w_B = (torch.cat(one).double().cpu().numpy() for one in (gaps, normalisers))
    count = math.sqrt(len(gap_B))
    weight_B = np.exp(log_w_B - log_w_B.max())
    # by the delta method: log mean(W) - mean(log W) varies as W / mean(W) - log W
    influence_B = weight_B / weight_B.mean() - log_w_B
    return MergeGap(
        gap=float(gap_B.mean()),
        error=float(gap_B.std(ddof=1)) / count,
        sequence_gap=float(np.log(weight_B.mean()) + log_w_B.max() - log_w_B.mean()),
        sequence_error=float(influence_B.std(ddof=1)) / count,
        from_base=float(torch.cat(bases).mean()) if bases else math.nan,
    )
