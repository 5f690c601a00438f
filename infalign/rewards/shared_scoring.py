"""Hidden states of a classifier's sequences, what several share at their beginning computed once.

The completions of one prompt share its tokens, and with a causal backbone the hidden states of these. Sequences are
grouped by the longest beginning that they have in common, in the reward model's own tokens: it is computed once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infalign.runtime.shared_prefix import continuation, encode_prefixes, pad_left, pad_right

LEAST = 8
"""Tokens that a group must share for sharing to pay."""


@dataclass(frozen=True)
class Group:
    """Sequences `rows` that begin with the same `shared` tokens."""

    rows: tuple[int, ...]
    shared: int


def groups_of(sequences: Sequence[list[int]], names: Sequence[Hashable]) -> list[Group]:
    """Sequences of one name with their common beginning, longest beginning first; 0 shared where it is too short.

    At least one token of every sequence is left out of it: the last that it is read at.

    >>> groups_of([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6, 7, 8, 11]], ["p", "p"])
    [Group(rows=(0, 1), shared=8)]
    """
    found: dict[Hashable, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    groups = []
    for rows in found.values():
        shared = _common([sequences[row][:-1] for row in rows]) if len(rows) > 1 else 0
        groups.append(Group(tuple(rows), shared if shared >= LEAST else 0))
    return sorted(groups, key=lambda group: -group.shared)


def _common(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with: as many as the first and the last in order."""
    first, last = min(sequences), max(sequences)
    return next(
        (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )


def batches_of(sequences: Sequence[list[int]], groups: Sequence[Group], tokens: int) -> Iterator[list[Group]]:
    """Groups, cut where they are too large, in batches of at most `tokens` cached tokens (one row at least)."""
    batch: list[Group] = []
    rows = longest = 0
    for group in groups:
        tail = max(len(sequences[row]) for row in group.rows) - group.shared + 1
        most = max(1, tokens // (group.shared + tail))
        for start in range(0, len(group.rows), most):
            part = Group(group.rows[start : start + most], group.shared)
            width = max(longest, tail) + max([one.shared for one in batch], default=group.shared)
            if batch and (rows + len(part.rows)) * width > tokens:
                yield batch
                batch, rows, longest = [], 0, 0
            batch.append(part)
            rows, longest = rows + len(part.rows), max(longest, tail)
    if batch:
        yield batch


def last_hidden(
    model: Any, backbone: Any, sequences: Sequence[list[int]], batch: Sequence[Group], last: Sequence[int], pad_id: int
) -> Tensor:
    """(B, width) hidden states at position `last[row]` of every sequence of a batch, in the groups' order.

    Args:
        model: the classifier, for its configuration and its backbone's cache.
        backbone: the causal model inside it.
        sequences: all sequences.
        batch: of `batches_of`; every group shares at least one token.
        last: by sequence, not before its group's last shared token.
        pad_id: any token id.
    """
    device = next(backbone.parameters()).device
    order = [(number, row) for number, group in enumerate(batch) for row in group.rows]
    prefixes = [sequences[group.rows[0]][: group.shared] for group in batch]
    ids_UP, mask_UP = pad_left(prefixes, pad_id, device)
    prefix = encode_prefixes(model, ids_UP, mask_UP)
    tails = [sequences[row][batch[number].shared - 1 :] for number, row in order]
    ids_BT, mask_BT = pad_right(tails, pad_id, device)
    of_row = torch.tensor([number for number, _ in order], device=device)
    hidden = backbone(**continuation(prefix, of_row, ids_BT, mask_BT)).last_hidden_state
    places = [last[row] - batch[number].shared + 1 for number, row in order]
    return hidden[torch.arange(len(order), device=device), torch.tensor(places, device=device)]
