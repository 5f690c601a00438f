"""TRL's fused head, computed by `models/head.py` where TRL has no kernel for it.

On a GPU TRL's Triton kernel stays. Elsewhere TRL makes the logits of all tokens for 32,768 candidates at a time; this
makes those of a few tokens that count, which takes a fraction of the memory and of the time.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from infalign.models.head import head_of


def add_chunked_head(model: Any, temperature: float, *, entropy: bool) -> None:
    """Let `model(..., labels=..., fused_lm_head=True)` take this path, after TRL's `add_fused_lm_head`.

    Args:
        model: a causal language model, unwrapped, its weights whole.
        temperature: that logits are divided by.
        entropy: whether entropies are wanted too.
    """
    trl_forward = model.forward.__func__

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, labels: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        head = None
        if fused_lm_head and labels is not None and labels.device.type != "cuda" and not _routes(self, kwargs):
            head = head_of(self)
        if head is None:
            if labels is not None:
                kwargs["labels"] = labels
            return trl_forward(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        # the state at t predicts the token at t + 1: the last state and the first label drop out
        states = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        next_tokens = torch.as_tensor(labels)[:, 1:]
        real = next_tokens != -100  # (B, T): only tokens that count reach the head, as one (tokens, H) matrix
        logps, entropies = head.logps(states[real], next_tokens[real], temperature, entropy=entropy)
        logps = logps.new_zeros(real.shape).masked_scatter(real, logps)  # back to (B, T), 0 elsewhere
        if entropies is not None:
            entropies = entropies.new_zeros(real.shape).masked_scatter(real, entropies)
        loss = -logps.sum() / real.sum().clamp(min=1)
        return FusedCausalLMOutput(loss=loss, log_probs=logps, entropy=entropies, label_mask=real)

    model.forward = types.MethodType(forward, model)


def _routes(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether TRL's own path has more to do: a load-balancing loss of experts, labels that are shifted already."""
    wanted = kwargs.get("output_router_logits")
    balances = getattr(model.config.get_text_config(), "output_router_logits", False) if wanted is None else wanted
    return bool(balances) or any(kwargs.get(name) is not None for name in ("shift_labels", "num_items_in_batch"))
