"""Hidden states of a classifier's sequences, what several share at their beginning computed once.

The completions of one prompt share its tokens, and with a causal backbone the hidden states of these. Sequences are
grouped by the longest beginning that they have in common, in the reward model's own tokens: it is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infalign.models.shared_prefix import buckets, continuation, encode_prefixes, pad_left, pad_right, pass_cost

Reader = Callable[[dict[str, Any], tuple[Tensor, Tensor]], Tensor]

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
    # lists compare token by token, so what the lowest and the highest share, all in between share
    first, last = min(sequences), max(sequences)
    return next(
        (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )


def worth_sharing(groups: Sequence[Group], cost: int) -> list[Group]:
    """The groups that share something, if that saves more tokens than the pass over what is shared costs."""
    shared = [group for group in groups if group.shared]
    return shared if sum((len(group.rows) - 1) * group.shared for group in shared) > cost else []


def shared_states(
    model: Any,
    sequences: Sequence[list[int]],
    groups: Sequence[Group],
    last: Sequence[int],
    pad_id: int,
    tokens: int,
    *,
    read: Reader | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Rows in batches, with the (B, width) hidden states at position `last[row]` of each.

    Shared beginnings of like length are computed together, then the rest of their sequences, again by length.

    Args:
        model: the classifier; its backbone is causal.
        sequences: all sequences.
        groups: each shares at least one token.
        last: by sequence, not before its group's last shared token.
        pad_id: any token id.
        tokens: most tokens of a batch, repeated caches and padding included; one row at least.
        read: what is taken from a forward pass, by the model's inputs and (rows, places); the last layer's states.
    """
    read = read or (lambda inputs, places: model.base_model(**inputs).last_hidden_state[places])
    device, cost = next(model.parameters()).device, pass_cost(model)
    for chosen in buckets([group.shared for group in groups], tokens, cost=cost):
        batch = [groups[number] for number in chosen]
        beginnings = [sequences[group.rows[0]][: group.shared] for group in batch]
        prefix = encode_prefixes(model, *pad_left(beginnings, pad_id, device))
        members = [(number, row) for number, group in enumerate(batch) for row in group.rows]
        # a continuation goes from the last shared token, which `encode_prefixes` leaves out, to the token at `last`
        lengths = [last[row] - batch[number].shared + 2 for number, row in members]
        for bucket in buckets(lengths, tokens, beside=prefix.mask_UP.shape[1], cost=cost):
            rows = [members[place] for place in bucket]
            tails = [sequences[row][batch[number].shared - 1 : last[row] + 1] for number, row in rows]
            ids_BT, mask_BT = pad_right(tails, pad_id, device)
            of_row = torch.tensor([number for number, _ in rows], device=device)
            places = torch.arange(len(rows), device=device), mask_BT.sum(1) - 1
            yield [row for _, row in rows], read(continuation(prefix, of_row, ids_BT, mask_BT), places)
