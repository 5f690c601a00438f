"""A Bradley-Terry head on frozen features: convex, exact, minutes on a CPU.

P(chosen preferred) = sigmoid(w (f(chosen) - f(rejected))), f the backbone's normed hidden state at the last token
(Bradley and Terry 1952; logistic regression on differences). How strongly w is held down, and how many layers of the
backbone are kept, is chosen by cross-validation over prompts on the training pairs; the middle of a small language
model often knows more about a text than its last layer, which is busy with the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, special
from torch import Tensor

from infalign.models.shared_prefix import buckets, pad_right, pass_cost, why_plain
from infalign.rewards.encoding import last_index
from infalign.rewards.shared_scoring import groups_of, shared_states, worth_sharing
from infalign.runtime.console import Progress
from infalign.types import InputError

Array = NDArray[np.float64]

FOLDS = 5
PENALTIES = tuple(float(10.0**power) for power in np.arange(-3.0, 1.26, 0.25))
"""Of |w|^2 / 2 where differences have unit variance and the loss is a mean over pairs."""
_STEPS = 50  # of Newton's method; a handful is enough
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Head:
    """A fitted head: weights (H,), its penalty, the layers kept, and the cross-validated loss and accuracy."""

    weights_H: Array
    penalty: float
    depth: int
    cv_loss: float
    cv_accuracy: float


def candidate_depths(layers: int) -> tuple[int, ...]:
    """Depths that are tried: sixths of the backbone from a third on.

    >>> candidate_depths(30)
    (10, 15, 20, 25, 30)
    """
    return tuple(sorted({max(1, round(layers * share / 6)) for share in range(2, 7)}))


def features(
    model: Any, sequences: Sequence[list[int]], names: Sequence[str], depths: Sequence[int], *, tokens: int
) -> NDArray[np.float32]:
    """Normed hidden states of every sequence where its score will be read, (B, D, H), D the depths.

    Args:
        model: a decoder with a sequence-classification head, in eval mode.
        sequences: B token sequences; those of one name share their beginning, which is computed once.
        names: the prompt of each.
        depths: numbers of layers, in [1, all].
        tokens: most tokens of a batch.
    """
    skipped = model.config.get_text_config().pad_token_id
    found: NDArray[np.float32] = np.empty((len(sequences), len(depths), model.config.hidden_size), dtype=np.float32)
    sequences = [ids[: last_index(ids, skipped) + 1] for ids in sequences]
    last = [len(ids) - 1 for ids in sequences]
    pad_id = skipped or 0
    groups = [] if why_plain(model) else worth_sharing(groups_of(sequences, names), pass_cost(model))
    read = _reader(model, depths)
    with torch.inference_mode(), Progress("reward model: features", len(sequences), "sequences") as progress:
        for rows, states in shared_states(model, sequences, groups, last, pad_id, tokens, read=read):
            found[rows] = states.float().cpu().numpy()
            progress.advance(len(rows))
        done = {row for group in groups for row in group.rows}
        rest = [row for row in range(len(sequences)) if row not in done]
        device = next(model.parameters()).device
        for bucket in buckets([len(sequences[row]) for row in rest], tokens, cost=pass_cost(model)):
            rows = [rest[place] for place in bucket]  # buckets number what they are given
            ids, mask = pad_right([sequences[row] for row in rows], pad_id, device)
            places = torch.arange(len(rows), device=device), mask.sum(1) - 1
            states = read({"input_ids": ids, "attention_mask": mask, "use_cache": False}, places)
            found[rows] = states.float().cpu().numpy()
            progress.advance(len(rows))
    return found


def _reader(model: Any, depths: Sequence[int]) -> Any:
    """Model inputs and (rows, places) -> (B, D, H) states; all depths of one forward pass."""
    layers = int(model.config.num_hidden_layers)
    norm = next((getattr(model.base_model, name) for name in _NORMS if hasattr(model.base_model, name)), None)
    if norm is None and any(depth != layers for depth in depths):
        raise InputError(f"{type(model).__name__} has no final norm that is known: set keep_layers: {layers}")

    def read(inputs: dict[str, Any], places: tuple[Tensor, Tensor]) -> Tensor:
        states = model.base_model(**inputs, output_hidden_states=True).hidden_states
        picked = [states[depth][places] for depth in depths]
        return torch.stack([h if d == layers else norm(h) for h, d in zip(picked, depths, strict=True)], dim=1)  # pyright: ignore[reportOptionalCall]

    return read


def fit_head(
    differences_PDH: NDArray[np.float32],
    depths: Sequence[int],
    clusters_P: Sequence[str],
    seed: int,
    margins_P: Array | None = None,
) -> Head:
    """The head, depth and penalty with the smallest cross-validated loss, refitted on all pairs.

    Args:
        differences_PDH: f(chosen) - f(rejected) at every depth.
        depths: D numbers of layers.
        clusters_P: the prompt of each pair: pairs of one prompt are in one fold.
        seed: of the folds.
        margins_P: of the pairs, see `bradley_terry`; held-out pairs are judged without.

    Raises:
        InputError: fewer than `FOLDS` prompts.
    """
    prompts = sorted(set(clusters_P))
    if len(prompts) < FOLDS:
        raise InputError(f"a head needs pairs of at least {FOLDS} training prompts, there are {len(prompts)}")
    # a permutation modulo the number of folds: random folds whose sizes differ by one at most
    order = np.random.default_rng(seed).permutation(len(prompts)) % FOLDS
    fold_of = dict(zip(prompts, order.tolist(), strict=True))
    fold_P = np.array([fold_of[name] for name in clusters_P])
    best: tuple[float, float, int, float] | None = None
    for place in range(len(depths)):
        found = cross_validate(differences_PDH[:, place].astype(np.float64), fold_P, margins_P)
        loss, accuracy, penalty = min(found)
        if best is None or loss < best[0]:
            best = loss, accuracy, place, penalty
    assert best is not None
    loss, accuracy, place, penalty = best
    weights = bradley_terry(differences_PDH[:, place].astype(np.float64), penalty, margins_P=margins_P)
    return Head(weights, penalty, depths[place], loss, accuracy)


def cross_validate(
    differences_PH: Array, fold_P: NDArray[np.int_], margins_P: Array | None = None
) -> list[tuple[float, float, float]]:
    """(loss in nats, accuracy, penalty) for every penalty, over pairs that were held out of the fit."""
    margins = np.empty((len(PENALTIES), len(differences_PH)))
    for fold in np.unique(fold_P):
        out = fold_P == fold
        start: Array | None = None
        wanted = None if margins_P is None else margins_P[~out]
        for number, penalty in reversed(list(enumerate(PENALTIES))):  # strong to weak, each from the one before
            start = bradley_terry(differences_PH[~out], penalty, start, wanted)
            margins[number, out] = differences_PH[out] @ start
    right = (margins > 0.0) + 0.5 * (margins == 0.0)
    losses = -special.log_expit(margins).mean(1)
    return [
        (float(loss), float(share), penalty)
        for loss, share, penalty in zip(losses, right.mean(1), PENALTIES, strict=True)
    ]


def bradley_terry(
    differences_PH: Array, penalty: float, start_H: Array | None = None, margins_P: Array | None = None
) -> Array:
    """argmin_w mean softplus(m - w d) + penalty/2 |s w|^2, s the root mean square of each difference: (H,).

    The penalty acts where every difference has unit size, so that it means the same for every feature. Newton's method.

    Args:
        differences_PH: P pairs.
        penalty: above 0.
        start_H: where to start from.
        margins_P: m, by how much the chosen side should score higher (TRL's `margin`); None is 0.

    >>> w = bradley_terry(np.array([[1.0], [1.0], [1.0], [-1.0]]), 1e-6)
    >>> float(w[0].round(3))  # log(3/1): three of four prefer what has more of it
    1.099
    """
    scale_H = np.sqrt((differences_PH**2).mean(0))
    scale_H = np.where(scale_H > 0.0, scale_H, 1.0)  # a feature that never differs gets weight 0
    scaled = differences_PH / scale_H
    weights = np.zeros(scaled.shape[1]) if start_H is None else start_H * scale_H
    wanted = 0.0 if margins_P is None else margins_P
    loss = _penalised(scaled, weights, penalty, wanted)
    for _ in range(_STEPS):
        margin = scaled @ weights - wanted
        gradient = -(special.expit(-margin) @ scaled) / len(scaled) + penalty * weights
        if np.abs(gradient).max() < 1e-10:
            break
        # the second derivative of softplus(-m) is sigmoid(m) sigmoid(-m)
        spread = special.expit(margin) * special.expit(-margin) / len(scaled)
        curvature = (scaled * spread[:, None]).T @ scaled
        curvature[np.diag_indices_from(curvature)] += penalty
        step = linalg.solve(curvature, gradient, assume_a="pos")
        share, trial = 1.0, _penalised(scaled, weights - step, penalty, wanted)
        while trial > loss and share > 1e-6:  # far from the solution a whole step can go too far
            share /= 2.0
            trial = _penalised(scaled, weights - share * step, penalty, wanted)
        weights, loss = weights - share * step, min(trial, loss)
    return weights / scale_H


def _penalised(scaled_PH: Array, weights_H: Array, penalty: float, wanted: Array | float) -> float:
    return float(-special.log_expit(scaled_PH @ weights_H - wanted).mean() + penalty / 2.0 * weights_H @ weights_H)
