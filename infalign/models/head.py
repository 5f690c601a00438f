"""The head of a causal language model, some tokens at a time: log-probabilities without (B, T, V) logits.

At a vocabulary of 128,000 the logits of 1,000 tokens take half a GB, and a softmax with its gradient three times that.
Here a piece of `PIECE_BYTES` is computed, read and overwritten, and computed again for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from infalign.runtime.console import notice

PIECE_BYTES = 32 * 2**20
"""Of the float32 logits that are held at a time; two such buffers are."""


@dataclass(frozen=True)
class Head:
    """From last hidden states to logits: `cap * tanh(scale * (W h + b) / cap)`, without cap `scale * (W h + b)`."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None

    def logits(self, states: Tensor) -> Tensor:
        """(..., V) float32 logits of states (..., H)."""
        logits = nn.functional.linear(states, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def logps(
        self, states_TH: Tensor, labels_T: Tensor, temperature: float = 1.0, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(T,) log-probabilities of the labels in nats, differentiable, and (T,) entropies (not differentiable)."""
        found = _Logps.apply(states_TH, self.weight, self.bias, labels_T, self.scale, self.cap, temperature, entropy)
        logps, entropies = found  # pyright: ignore[reportGeneralTypeIssues] - autograd types its functions as None
        return logps, entropies if entropy else None


def head_of(model: Any) -> Head | None:
    """The head of `model`, or None when its logits are something else (seen by comparing them, once a model)."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:  # an adapter on it, or none
        return None
    config = model.config.get_text_config()
    head = Head(layer.weight, layer.bias, _scale(config), getattr(config, "final_logit_softcapping", None))
    if model not in _agrees:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                ids = torch.arange(1, 5, device=layer.weight.device)[None]
                own = model(input_ids=ids, use_cache=False).logits
                found = head.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        finally:
            model.train(training)
        # logits that bfloat16 holds without loss were computed in it, whatever type they came in
        coarse = torch.equal(own, own.to(torch.bfloat16).to(own.dtype)) or own.dtype == torch.float16
        tolerance = (5e-2 if coarse else 1e-3) * float(own.abs().max())
        _agrees[model] = float((found - own.float()).abs().max()) <= tolerance
        if not _agrees[model]:
            notice(f"{type(model).__name__}: its logits are not those of its head alone, and are made whole")
    return head if _agrees[model] else None


_agrees: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _scale(config: Any) -> float:
    """What a model multiplies its logits by: Cohere, Muse and Falcon-H1 by name, Granite and MiniCPM as a divisor."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling


def pieces(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Tokens in pieces whose float32 logits take about `PIECE_BYTES`."""
    size = max(16, PIECE_BYTES // (4 * vocabulary))  # 4 bytes a logit
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


class _Logps(torch.autograd.Function):
    """log softmax(logits / temperature) at the labels; a piece's logits are made twice and never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        cap: float | None,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        states, weight = states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        # normal (T,) is log sum_v e^z: all that backward needs to make the softmax again
        logps, normal = (states.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
        entropies = torch.zeros_like(logps)
        for piece in pieces(len(labels), len(weight)):
            logits = _scaled(states[piece], weight, bias, scale, cap, temperature)
            chosen = logits.gather(1, labels[piece, None])[:, 0]  # a copy: logits are overwritten below
            highest = logits.amax(1)
            logits -= highest[:, None]
            weights = logits.exp()
            total = weights.sum(1)
            normal[piece] = highest + total.log()
            logps[piece] = chosen - normal[piece]
            if entropy:
                # H = log sum_v e^z - sum_v z e^z / sum_v e^z, for z less its maximum
                entropies[piece] = total.log() - torch.linalg.vecdot(weights, logits) / total
        ctx.save_for_backward(states, weight, bias, labels, normal)
        ctx.how = (scale, cap, temperature)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        states, weight, bias, labels, normal = ctx.saved_tensors
        scale, cap, temperature = ctx.how
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grads[0].float()
        by_states = torch.zeros_like(states) if need_states else None
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for piece in pieces(len(labels), len(weight)):
            logits = _scaled(states[piece], weight, bias, scale, cap, temperature)
            # z = (cap / T) tanh(.), so tanh' = 1 - tanh^2 follows from z itself
            slope = None if cap is None else 1 - (logits * (temperature / cap)).square()
            # d logp / dz = onehot(label) - softmax(z), times the incoming gradient, in the memory of the logits
            logits.sub_(normal[piece, None]).exp_().mul_(-grad[piece, None])
            logits.scatter_add_(1, labels[piece, None], grad[piece, None])
            # from z back to W h + b
            logits *= scale / temperature
            if slope is not None:
                logits *= slope
            by_logits = logits.to(weight.dtype)
            if by_states is not None:
                by_states[piece] = by_logits @ weight
            if by_weight is not None:
                _add_product(by_weight, by_logits, states[piece])
            if by_bias is not None:
                by_bias += logits.sum(0)
        return by_states, by_weight, by_bias, None, None, None, None, None


def _add_product(total_VH: Tensor, left_tV: Tensor, right_tH: Tensor) -> None:
    """total += left^T right, summed in float32."""
    if left_tV.dtype == total_VH.dtype:
        total_VH.addmm_(left_tV.t(), right_tH)
    else:
        total_VH += left_tV.t() @ right_tH


def _scaled(
    states: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, temperature: float
) -> Tensor:
    """(t, V) float32 logits over the temperature, in memory of their own."""
    logits = nn.functional.linear(states, weight, bias).float()
    if cap is not None:
        return logits.mul_(scale / cap).tanh_().mul_(cap / temperature)
    return logits if scale == temperature else logits.mul_(scale / temperature)
