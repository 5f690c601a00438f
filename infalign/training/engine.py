"""Rollouts from an engine beside the trainer (`use_vllm`): whether it has the policy's weights, and what else it draws.

An engine samples from its own copy of the policy: other kernels, often another precision, and weights that somebody
has to bring over. What it draws is judged by its own log-probabilities beside the policy's. With
`r = log pi(y|x) - log mu(y|x)` of samples of the engine mu, `E[exp r - 1 - r] = KL(mu || pi)` (every term is at least
0; Schulman, "Approximating KL divergence", 2020): nothing but rounding where both are of one precision (1e-12 nats),
up to 7e-4 nats a token of a tiny model in half precision, and as much as the policy has moved where its weights were
not brought over (1.8 after one large step).

Within the tolerance, importance weights make the gradient the policy's own again, as TRL's GRPO has them; RLOO's ratio
is that of a whole completion, and so is the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infalign.types import InputError

MODES = ("sequence_mask", "sequence_truncate")
"""What becomes of completions whose weight is out of bounds: left out, or the weight is cut."""
_SLACK = 0.05  # nats a completion: as much as `checks.MOST_KL_AT_START` allows between policy and reference


def engine_logps(drawn: Sequence[Sequence[Any]], width: int, device: torch.device) -> Tensor:
    """(B, `width`) log-probabilities of the drawn tokens, 0 behind them, NaN where the engine gave none.

    Args:
        drawn: for each completion, for each token, the engine's log-probability, alone or as a list of one.
        width: of the padded completions.
        device: of the result.
    """
    rows = [[one[0] if isinstance(one, (list, tuple)) else one for one in row] for row in drawn]
    padded = [[float("nan") if one is None else one for one in row] + [0.0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.float32, device=device)


def token_kl(log_ratios_BT: Tensor, drawn_BT: Tensor) -> tuple[float, float]:
    """KL(engine || policy) from the engine's samples, nats: a token, and a completion.

    Args:
        log_ratios_BT: log pi - log mu of the drawn tokens.
        drawn_BT: 1 where there is one.
    """
    terms_BT = log_ratios_BT.clamp(-20.0, 20.0)
    terms_BT = (terms_BT.expm1() - terms_BT) * drawn_BT
    return float(terms_BT.sum() / drawn_BT.sum()), float(terms_BT.sum(1).mean())


def check_engine(kl_token: float, kl: float, tolerance: float, step: int) -> None:
    """The engine draws from the policy, up to rounding.

    Args:
        kl_token, kl: from `token_kl`, over all processes.
        tolerance: nats a token that its precision may make.
        step: of training.

    Raises:
        InputError: it does not.
    """
    covered = _SLACK / kl if kl > _SLACK else 1.0  # the share that the slack covers
    if kl_token * (1.0 - covered) <= tolerance:  # NaN is not
        return
    why = "its model, temperature or precision is another" if step == 0 else "the weights were not brought over to it"
    raise InputError(
        f"rollouts of vLLM are not the policy's: KL {kl:.3g} nats a completion, {kl_token:.2g} a token, at step {step} "
        f"(vllm_tolerance {tolerance:g} a token): {why}; look at the server and its dtype, or raise vllm_tolerance "
        "where the engine is quantised"
    )


def importance_weights(log_ratios_B: Tensor, mode: str, lowest: float | None, highest: float | None) -> Tensor:
    """(B,) weights pi/mu of whole completions, bounded.

    Args:
        log_ratios_B: log pi - log mu, summed over tokens.
        mode: one of `MODES`.
        lowest, highest: the bounds; None is none.

    >>> importance_weights(torch.tensor([0.0, 2.0]), "sequence_mask", None, 3.0).tolist()
    [1.0, 0.0]
    """
    weights_B = log_ratios_B.double().clamp(-50.0, 50.0).exp()
    if mode == "sequence_truncate":
        return weights_B.clamp(lowest, highest) if (lowest, highest) != (None, None) else weights_B
    outside_B = torch.zeros_like(weights_B, dtype=torch.bool)
    if lowest is not None:
        outside_B |= weights_B < lowest
    if highest is not None:
        outside_B |= weights_B > highest
    return weights_B.masked_fill(outside_B, 0.0)
