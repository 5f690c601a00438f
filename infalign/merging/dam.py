"""Differentiable adaptive merging (DAM): learned coefficients in place of one weight for each model.

Gauthier-Caron et al., arXiv:2410.08371. Every parameter of the merged model is `sum_s W_s * c_s`, where the
coefficients `c_s` of parent s have one number for

- each input column of a linear layer, `sum_s W_s diag(c_s)`,
- each hidden dimension of an embedding, each element of a normalisation's weight, and
- a bias as a whole.

They start at 1/S. What is minimised, on examples of each parent's own data,

    sum_s T^2 KL(softmax(z_s / T) || softmax(z / T)) + cosine * sum_l mean_{s<r} cos(c_s_l, c_r_l) + l1 |c| + l2 |c|^2

with the parent's logits `z_s` and the merged model's `z` (nats, averaged over positions; layers l). The cosine pushes
the parents' coefficients apart. Coefficients are float32 whatever the model's precision: in bfloat16 a step of 1e-3
on a number near 1/2 is lost in rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

Weights = Mapping[str, Tensor]
"""A model's parameters by name."""


@dataclass(frozen=True)
class TeacherLogits:
    """A parent's next-token law at R positions: its top k logits, and how much the rest weighs.

    Attributes:
        top_RK: the largest logits over the temperature, less the log-normaliser: log-probabilities, float32.
        ids_RK: their tokens.
    """

    top_RK: Tensor
    ids_RK: Tensor


def coefficient_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """For each parameter of a model the shape of one parent's coefficients, which broadcasts against the parameter.

    Tied parameters appear once, as in `named_parameters`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    taken: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in taken:
                taken.add(id(parameter))
                shapes[f"{prefix}.{name}" if prefix else name] = _shape(module, name, tuple(parameter.shape))
    return shapes


def _shape(module: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name == "bias" or not shape:
        return (1,) * len(shape)
    if len(shape) == 1:
        return shape
    if isinstance(module, Conv1D):  # GPT-2's linear layers are stored (in, out)
        return (shape[0], 1)
    return (*(1,) * (len(shape) - 1), shape[-1])  # (out, in) of a linear layer, (V, H) of an embedding


def equal_coefficients(model: nn.Module, parents: int) -> dict[str, nn.Parameter]:
    """The coefficients (S, ...) of every parameter at 1/S, where the merged model is the parents' average."""
    shapes = coefficient_shapes(model)
    return {name: nn.Parameter(torch.full((parents, *shape), 1.0 / parents)) for name, shape in shapes.items()}


def merged(parents: Sequence[Weights], coefficients: Weights) -> dict[str, Tensor]:
    """`sum_s W_s * c_s` for every parameter, in the parents' precision and differentiable in the coefficients."""
    out: dict[str, Tensor] = {}
    for name, c_S in coefficients.items():
        total = sum(weights[name].to(c_S.device) * c for weights, c in zip(parents, c_S, strict=True))
        assert isinstance(total, Tensor)
        out[name] = total.to(parents[0][name].dtype)
    return out


def merged_logits(model: nn.Module, weights: Weights, inputs: Mapping[str, Any]) -> Tensor:
    """(B, L, V) logits of `model` with other weights; tied parameters follow the one that is named."""
    return functional_call(model, dict(weights), (), dict(inputs), tie_weights=True).logits


def teacher_logits(logits_RV: Tensor, top_k: int, temperature: float) -> TeacherLogits:
    """What is kept of a parent's logits at R positions; all of them where top_k is V or more."""
    logps_RV = (logits_RV.float() / temperature).log_softmax(-1)
    top_RK, ids_RK = logps_RV.topk(min(top_k, logps_RV.shape[-1]), dim=-1)
    return TeacherLogits(top_RK, ids_RK)


def divergence(logits_RV: Tensor, teacher: TeacherLogits, temperature: float) -> Tensor:
    """(R,) `T^2 KL(teacher || student)` in nats; the tokens outside the teacher's top k count as one.

    Joining tokens never raises the KL, and with all V tokens kept it is exact.
    """
    vocabulary = logits_RV.shape[-1]
    logps_RV = (logits_RV.float() / temperature).log_softmax(-1)
    ours_RK = logps_RV.gather(-1, teacher.ids_RK)
    kl_R = (teacher.top_RK.exp() * (teacher.top_RK - ours_RK)).sum(-1)
    if teacher.ids_RK.shape[-1] < vocabulary:
        theirs_rest, ours_rest = (_log_rest(kept) for kept in (teacher.top_RK, ours_RK))
        kl_R = kl_R + theirs_rest.exp() * (theirs_rest - ours_rest)
    return temperature**2 * kl_R


def _log_rest(logps_RK: Tensor) -> Tensor:
    """log(1 - sum of the probabilities), at least that of float32's rounding."""
    return (1.0 - logps_RK.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).eps).log()


def alikeness(coefficients: Weights) -> Tensor:
    """`sum_l mean_{s<r} cos(c_s_l, c_r_l)` over the parameters that have more than one coefficient a parent."""
    total = torch.zeros(())
    for c_S in coefficients.values():
        flat = c_S.flatten(1)
        if flat.shape[1] > 1:
            pairs = itertools.combinations(range(len(flat)), 2)
            cosines = [torch.cosine_similarity(flat[s], flat[r], dim=0) for s, r in pairs]
            total = total.to(flat.device) + torch.stack(cosines).mean() if cosines else total
    return total


def penalty(coefficients: Weights, cosine: float, l1: float, l2: float) -> Tensor:
    """What the loss adds to the divergences: `cosine * alikeness + l1 |c| + l2 |c|^2`."""
    total = cosine * alikeness(coefficients)
    for c_S in coefficients.values():
        total = total + l1 * c_S.abs().sum() + l2 * c_S.square().sum()
    return total
