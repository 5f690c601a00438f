"""Learning DAM's coefficients: examples of each parent, what the parents say of them, and the loop.

A step takes a batch of each parent's examples. The merged weights are made once a step; the losses' gradients are
gathered on them and then passed to the coefficients in one go, so that memory holds one gradient of the model's size
however many parents there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infalign.data.examples import Example
from infalign.merging.dam import TeacherLogits, Weights, divergence, equal_coefficients, merged, merged_logits, penalty
from infalign.models.shared_prefix import pad_right, positions
from infalign.runtime.artifacts import fingerprint, write_whole
from infalign.runtime.distributed import is_main, my_share, world_size
from infalign.runtime.seeds import stream

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class DAMSettings:
    """How coefficients are learned.

    Attributes:
        steps: batches of every parent; the examples are gone through again where they do not suffice.
        batch_size: examples of each parent a step, over all processes.
        learning_rate: Adam's, constant.
        temperature: of the divergences.
        cosine, l1, l2: weights of the penalties.
        top_k: logits of the parents that are kept for a position.
        seed: of the order of the examples.
    """

    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 1e-3
    temperature: float = 2.0
    cosine: float = 0.01
    l1: float = 0.0
    l2: float = 0.0
    top_k: int = 128
    seed: int = 42


@dataclass(frozen=True)
class Learned:
    """Coefficients (S, ...) by parameter, and the losses on the way: a row a step, the divergence of each parent."""

    coefficients: dict[str, Tensor]
    losses: list[list[float]]


def padded(examples: Sequence[Example], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """A model's inputs (B, L), and (B, L) where its logits predict a token that counts."""
    ids_BL, mask_BL = pad_right([one.ids for one in examples], 0, device)
    counts_BL = torch.zeros_like(mask_BL, dtype=torch.bool)
    for row, one in enumerate(examples):
        counts_BL[row, one.start - 1 : len(one.ids) - 1] = True  # the logits at a place predict the next
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "position_ids": positions(mask_BL)}
    return inputs, counts_BL


def learn(
    model: nn.Module,
    parents: Sequence[Weights],
    examples: Sequence[Sequence[Example]],
    teach: Callable[[int, Sequence[int]], TeacherLogits],
    settings: DAMSettings,
    *,
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    advance: Callable[[str], None] = lambda note: None,
) -> Learned:
    """Minimise DAM's loss; a run that was killed goes on from its checkpoint.

    Args:
        model: of the parents' architecture; its own weights are not used.
        parents: S sets of weights.
        examples: those of each parent, at least one.
        teach: what parent s says of its examples of the given numbers, their counted positions one after the other.
        settings: how.
        checkpoint: a file that is written every minute and removed by whoever keeps the result.
        identity: what the run depends on beside the settings; a checkpoint of another run is ignored.
        advance: called after each step with a line about it.
    """
    device = next(iter(parents[0].values())).device
    coefficients = equal_coefficients(model, len(parents))
    for c_S in coefficients.values():
        c_S.data = c_S.data.to(device)
    optimizer = torch.optim.Adam(list(coefficients.values()), lr=settings.learning_rate)
    stamp = fingerprint({**asdict(settings), **(identity or {}), "parents": len(parents)})
    losses = _resumed(checkpoint, stamp, coefficients, optimizer)
    model.eval()
    saved = time.monotonic()
    for step in range(len(losses), settings.steps):
        losses.append(_step(model, parents, coefficients, examples, teach, settings, step))
        optimizer.step()
        optimizer.zero_grad()
        advance(" ".join(f"{loss:.4f}" for loss in losses[-1]))
        if checkpoint is not None and is_main() and time.monotonic() - saved > CHECKPOINT_SECONDS:
            _save(checkpoint, stamp, coefficients, optimizer, losses)
            saved = time.monotonic()
    return Learned({name: c_S.detach() for name, c_S in coefficients.items()}, losses)


def _step(
    model: nn.Module,
    parents: Sequence[Weights],
    coefficients: Mapping[str, nn.Parameter],
    examples: Sequence[Sequence[Example]],
    teach: Callable[[int, Sequence[int]], TeacherLogits],
    settings: DAMSettings,
    step: int,
) -> list[float]:
    """The gradients of one step, in the coefficients; returns each parent's divergence."""
    weights = merged(parents, coefficients)
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    losses: list[float] = []
    for parent, own in enumerate(examples):
        chosen = my_share(batch_of(len(own), settings.batch_size, settings.seed, parent, step))
        inputs, counts_BL = padded([own[number] for number in chosen], next(iter(leaves.values())).device)
        logits_RV = merged_logits(model, leaves, inputs)[counts_BL]
        # the mean over the positions of all processes, which the sum below completes
        loss = divergence(logits_RV, teach(parent, chosen), settings.temperature).sum() / _all_of(logits_RV.shape[0])
        loss.backward()
        losses.append(float(_summed(loss.detach())))
    torch.autograd.backward(list(weights.values()), [leaves[name].grad for name in weights])
    for c_S in coefficients.values():
        assert c_S.grad is not None
        c_S.grad = _summed(c_S.grad)
    penalty(coefficients, settings.cosine, settings.l1, settings.l2).backward()
    return losses


def batch_of(count: int, size: int, seed: int, parent: int, step: int) -> list[int]:
    """The examples of a parent in a step: whole passes, each in an order of its own.

    >>> sorted(batch_of(4, 2, 0, 0, 0) + batch_of(4, 2, 0, 0, 1))
    [0, 1, 2, 3]
    """
    found: list[int] = []
    for place in range(step * size, (step + 1) * size):
        order = stream(seed, "dam", parent, place // count).permutation(count)
        found.append(int(order[place % count]))
    return found


def _all_of(count: int) -> int:
    """A count summed over the processes."""
    return int(_summed(torch.tensor(count)))


def _summed(value: Tensor) -> Tensor:
    """A tensor summed over the processes."""
    if world_size() > 1:
        torch.distributed.all_reduce(value)
    return value


def _save(
    path: Path, stamp: str, coefficients: Weights, optimizer: torch.optim.Optimizer, losses: list[list[float]]
) -> None:
    state = {
        "stamp": stamp,
        "coefficients": {name: c_S.detach() for name, c_S in coefficients.items()},
        "optimizer": optimizer.state_dict(),
        "losses": losses,
    }
    write_whole(path, lambda temporary: torch.save(state, temporary))


def _resumed(
    path: Path | None, stamp: str, coefficients: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[list[float]]:
    """The losses of the steps that a checkpoint holds, whose state is loaded; none without one of this run."""
    if path is None or not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    if state["stamp"] != stamp:
        return []
    for name, c_S in coefficients.items():
        c_S.data.copy_(state["coefficients"][name])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])
