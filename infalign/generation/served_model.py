"""Is what a server samples the local model's? Two comparisons on a few of its samples, by one plain forward pass each.

1. Where the server tells the log-probabilities of the tokens it drew: their mean absolute difference from the local
   model's. Measured on SmolLM2-135M-Instruct in float32: 0.00 for itself, 0.04 for bfloat16, 0.04 for 8-bit
   weights, 0.6 with 5 % of noise on its weights, 1.0 for weights rounded to 4 bits (larger models round better).
2. Always: where each token stands in the local model's distribution. With tokens in the order of their probability,
   the mass above the one drawn plus a uniform share of its own is uniform on [0, 1] exactly when samples follow the
   model (the randomised probability integral transform). Greedy decoding, a top_p, top_k or temperature of the
   server's own, or other weights show as a share of tokens standing below some t that is not t. All end tokens count as
   one, for a text does not say which of them ended it. Measured there, 2000 tokens, beyond chance (0.02 is allowed):
   0.00 for bfloat16 and 8 bits, 0.02 for top_p 0.95, 0.04 for top_k 40, 0.09 for temperature 0.8, 0.27 for greedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infalign.types import InputError, Sample

SIGMAS = 4.0
SHARES_PER_NAT = 0.1
"""A model whose log-probabilities are d nats off shifts those shares by less than d times this."""


@dataclass(frozen=True)
class Agreement:
    """How far a server's samples are from the local model.

    `tokens` compared; `difference`: mean |server's - local| log-probability in nats, None when the server tells none;
    `tempered`: the server's are those at the sampling temperature, not at 1; `excess`: the largest difference, beyond
    four standard deviations, between t and the share of tokens that stand at most at t.
    """

    tokens: int
    difference: float | None
    tempered: bool
    excess: float


@torch.no_grad()
def compare(
    model: Any,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    *,
    temperature: float,
    end_ids: Sequence[int],
    rng: np.random.Generator,
) -> Agreement:
    """Compare samples that a server drew, at plain sampling settings, with the local model.

    Args:
        model: the local model, in eval mode.
        prompts: B prompts' token ids.
        samples: one a prompt; their `token_logps` are the server's, NaN where it told none.
        temperature: the sampling temperature.
        end_ids: tokens that end a completion.
        rng: of the shares.

    Raises:
        InputError: a token that the local model does not have.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    standing: list[NDArray[np.float64]] = []
    differences: list[NDArray[np.float64]] = []
    for prompt, sample in zip(prompts, samples, strict=True):
        if max(sample.token_ids) >= vocabulary:
            raise InputError(
                f"the server returned token {max(sample.token_ids)}, the recipe's model has {vocabulary}: it serves "
                "another model"
            )
        ids = torch.tensor([[*prompt, *sample.token_ids]], device=model.device)
        output = model(input_ids=ids, use_cache=False, logits_to_keep=len(sample.token_ids) + 1)
        logits_TV = output.logits[0, :-1].double().cpu()
        chosen_T = ids[0, len(prompt) :].cpu()
        standing.append(_standing(torch.softmax(logits_TV / temperature, dim=-1), chosen_T, end_ids, rng))
        local = [torch.log_softmax(logits_TV / t, dim=-1).gather(1, chosen_T[:, None])[:, 0] for t in (1, temperature)]
        differences.append(np.abs(np.stack([one.numpy() for one in local]) - sample.token_logps))
    differences_known = np.concatenate(differences, axis=1)
    differences_known = differences_known[:, np.isfinite(differences_known).all(axis=0)]
    raw, tempered = differences_known.mean(axis=1) if differences_known.size else (math.nan, math.nan)
    return Agreement(
        tokens=sum(map(len, standing)),
        difference=float(min(raw, tempered)) if differences_known.size else None,
        tempered=bool(tempered <= raw),
        excess=_excess(np.concatenate(standing)),
    )


def check(agreement: Agreement, tolerance: float, served: str) -> None:
    """Stop unless a server's samples are the local model's.

    Args:
        agreement: from `compare`.
        tolerance: nats that the log-probabilities may differ by on average.
        served: the model, as messages call it.

    Raises:
        InputError: they are not, and what may be the matter.
    """
    if agreement.difference is not None and agreement.difference > tolerance:
        raise InputError(
            f"{served} is not the recipe's model: log-probabilities of tokens that it drew differ by "
            f"{agreement.difference:.3g} nats on average, server_tolerance is {tolerance:g}: load the recipe's weights "
            "into the server, or raise server_tolerance if it quantises them this coarsely"
        )
    allowed = SHARES_PER_NAT * tolerance
    if agreement.excess > allowed:
        raise InputError(
            f"{served} does not sample from the recipe's model: the ranks of {agreement.tokens} tokens it drew are "
            f"{agreement.excess:.2f} further off than chance explains (server_tolerance {tolerance:g} allows "
            f"{allowed:.2g}): it serves other weights, or samples otherwise than asked (a top_k or top_p of its own, "
            "greedy decoding): see how the server was started"
        )


def _standing(
    probabilities_TV: Tensor, chosen_T: Tensor, end_ids: Sequence[int], rng: np.random.Generator
) -> NDArray[np.float64]:
    """(T,) the mass above each chosen token plus a uniform share of its own; end tokens are one token."""
    ends = [one for one in end_ids if one < probabilities_TV.shape[1]]
    if ends:
        mass_T = probabilities_TV[:, ends].sum(-1)
        probabilities_TV = probabilities_TV.index_fill(1, torch.tensor(ends), 0.0)
        probabilities_TV[:, ends[0]] = mass_T
        chosen_T = torch.where(torch.isin(chosen_T, torch.tensor(ends)), ends[0], chosen_T)
    own_T = probabilities_TV.gather(1, chosen_T[:, None])
    above_T = torch.where(probabilities_TV > own_T, probabilities_TV, 0.0).sum(-1)
    return above_T.numpy() + rng.random(len(chosen_T)) * own_T[:, 0].numpy()


def _excess(values: NDArray[np.float64]) -> float:
    """How far from uniform on [0, 1] values are beyond chance, 0 for not at all."""
    t_Q = np.linspace(0.05, 0.95, 19)
    share_Q = (values[:, None] <= t_Q).mean(axis=0)
    return max(0.0, float((np.abs(share_Q - t_Q) - SIGMAS * np.sqrt(t_Q * (1 - t_Q) / len(values))).max()))
