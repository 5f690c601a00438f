"""What hidden states say of a task: their total variance before training, linear probes before and after forgetting.

Both look at the fifth-to-last layer, as arXiv:2409.02228 does (section 5). The paper's probes read a question's last
token and stop early; here a probe reads the last token of each answer, because the answers are not part of a question,
and its L2 penalty is chosen on a fifth of its training part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, special

from infalign.forgetting.scoring import Encoded
from infalign.models.shared_prefix import pad_left, positions

Array = NDArray[np.float64]

LAYER = -5
PENALTIES = tuple(10.0**power for power in range(-4, 3))


@torch.no_grad()
def last_states(model: Any, sequences: Sequence[Sequence[int]], tokens_per_batch: int, layer: int = LAYER) -> Array:
    """(I, H) hidden states of a layer at the last token of I sequences.

    Args:
        model: a causal language model.
        sequences: token ids.
        tokens_per_batch: tokens of a forward pass, padding included.
        layer: counted from the end; a model with fewer layers gives its first.
    """
    found = np.zeros((len(sequences), int(model.config.get_text_config().hidden_size)))
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and len(sequences[order[stop]]) * (stop + 1 - start) <= tokens_per_batch:
            stop += 1
        rows = order[start:stop]
        ids, mask = pad_left([sequences[row] for row in rows], 0, model.device)
        states = model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states  # the embeddings first, then one of each layer
        found[rows] = states[max(layer, 1 - len(states))][:, -1].double().cpu().numpy()
        start = stop
    return found


def total_variance(states_IH: Array) -> float:
    """The trace of the covariance of I hidden states.

    >>> total_variance(np.array([[0.0, 1.0], [2.0, 1.0]]))
    2.0
    """
    return float(states_IH.var(axis=0, ddof=1).sum()) if len(states_IH) > 1 else float("nan")


def answer_differences(model: Any, rows: Sequence[tuple[Encoded, Encoded]], tokens_per_batch: int) -> Array:
    """(I, H) states at the end of the first answer minus those at the end of the second."""
    flat = [[*one.context, *one.answer] for pair in rows for one in pair]
    states = last_states(model, flat, tokens_per_batch)
    return states[0::2] - states[1::2]


def probe(
    train_IH: Array, labels_I: NDArray[np.int64], test_JH: Array, test_labels_J: NDArray[np.int64], seed: int
) -> Array:
    """(J,) 1 where a linear probe of the differences finds the right answer of a test question.

    Logistic regression without an intercept: swapping the answers swaps what it says. The L2 penalty is the one of
    `PENALTIES` with the smallest loss on a fifth of the training part; then all of it is fitted.

    Args:
        train_IH, test_JH: from `answer_differences`.
        labels_I, test_labels_J: 0 where the first answer is right, 1 where the second is.
        seed: of the fifth.
    """
    scale = np.sqrt((train_IH**2).mean(axis=0)) + 1e-12  # no centring: the two answers are alike but for their order
    x, y = train_IH / scale, (1 - 2 * labels_I).astype(np.float64)
    order = np.random.default_rng(seed).permutation(len(x))
    held, rest = order[: max(1, len(x) // 5)], order[max(1, len(x) // 5) :]
    if len(rest) == 0:
        rest = held
    losses = [_loss(_fitted(x[rest], y[rest], penalty), x[held], y[held]) for penalty in PENALTIES]
    weights = _fitted(x, y, PENALTIES[int(np.argmin(losses))])
    return ((test_JH / scale @ weights < 0).astype(np.int64) == test_labels_J).astype(np.float64)


def _fitted(x_IH: Array, y_I: Array, penalty: float) -> Array:
    def loss_and_gradient(weights: Array) -> tuple[float, Array]:
        margins = y_I * (x_IH @ weights)
        slope = -y_I * special.expit(-margins) / len(y_I)
        value = float(np.logaddexp(0.0, -margins).mean() + 0.5 * penalty * weights @ weights)
        return value, x_IH.T @ slope + penalty * weights

    found = optimize.minimize(loss_and_gradient, np.zeros(x_IH.shape[1]), jac=True, method="L-BFGS-B")
    return np.asarray(found.x)


def _loss(weights: Array, x_IH: Array, y_I: Array) -> float:
    return float(np.logaddexp(0.0, -y_I * (x_IH @ weights)).mean())
