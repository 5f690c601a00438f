"""Each prompt is computed once and its KV cache repeated for all of its completions.

Rows of a batch that share a prompt share everything a causal model computes on it, so this is exact, gradients included
(plain autograd runs through the cache). It saves a factor of about K(P+R)/(P+KR) in tokens, for K completions of R
tokens on a prompt of P. The prompt's last token is left out of the shared part: it is the first input of every
continuation.

Caches that are not plain (sliding windows, recurrent states) cannot be repeated row by row: `is_shareable` says so and
callers then take the plain path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room to grow: a new token is written in place, where a plain cache copies all.

    For decoding without gradients. Attention sees the filled part of the buffers.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length = keys.shape[-2]
        self._key_room, self._value_room = (torch.nn.functional.pad(part, (0, 0, 0, room)) for part in (keys, values))
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens (B, heads, T, width); returns all keys and values so far."""
        end = self.length + key_states.shape[-2]
        self._key_room[..., self.length : end, :] = key_states
        self._value_room[..., self.length : end, :] = value_states
        self.length = end
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (part[..., : self.length, :] for part in (self._key_room, self._value_room))
        self.keys, self.values = keys, values
        return keys, values


def with_room(cache: DynamicCache, tokens: int) -> DynamicCache:
    """The cache with room for `tokens` more, so that decoding writes into it."""
    layers: list[Any] = cache.layers
    layers[:] = [RoomyLayer(layer.keys, layer.values, tokens) for layer in layers]
    return cache


@dataclass
class SharedPrefix:
    """The computed prefixes of U prompts: `cache` (None when every prefix is empty) and `mask_UP`, left-padded."""

    cache: DynamicCache | None
    mask_UP: Tensor


def new_cache(model: Any) -> DynamicCache:
    """An empty cache of the layout that `model` asks for."""
    return DynamicCache(config=model.config.get_text_config())


def is_shareable(model: Any) -> bool:
    """True when `model`'s cache can be repeated row by row: every layer is plain full attention."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    layers = new_cache(model).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and mask (B, T) of rows padded on the left."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and mask (B, T) of rows padded on the right."""
    width = max(map(len, rows))
    ids = [list(row) + [pad_id] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions(mask: Tensor) -> Tensor:
    """Position ids from a mask (B, T): real tokens count from 0, padding is at 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def encode_prefixes(model: Any, ids_UP: Tensor, mask_UP: Tensor) -> SharedPrefix:
    """Run U left-padded prompts, all but each one's last token, through the backbone once.

    Args:
        model: a causal language model (unwrapped); its head is not used.
        ids_UP: prompt tokens, padded on the left.
        mask_UP: 1 for real tokens.
    """
    ids, mask = ids_UP[:, :-1], mask_UP[:, :-1]
    if ids.shape[1] == 0:
        return SharedPrefix(None, mask)
    cache = new_cache(model)
    model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, use_cache=True
    )
    return SharedPrefix(cache, mask)


def continuation(prefix: SharedPrefix, rows_B: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
    """The model inputs that continue prompt `rows_B[b]` with `ids_BT[b]` (its last prompt token first).

    The prefix' cache is consumed: it is repeated to B rows in place.
    """
    mask = torch.cat([prefix.mask_UP[rows_B], mask_BT], dim=1)
    inputs: dict[str, Any] = {
        "input_ids": ids_BT,
        "attention_mask": mask,
        "position_ids": positions(mask)[:, -ids_BT.shape[1] :],
    }
    if prefix.cache is not None:
        prefix.cache.batch_select_indices(rows_B)
        inputs["past_key_values"] = prefix.cache
    return inputs


def unique_rows(ids_BP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of a batch share a prompt.

    Returns:
        (U,) the first row of each distinct prompt, in order of appearance; (B,) each row's prompt among those U.
    """
    seen: dict[tuple[int, ...], int] = {}
    first, of_row = [], []
    for row, (ids, mask) in enumerate(zip(ids_BP.tolist(), mask_BP.tolist(), strict=True)):
        name = tuple(token if real else -1 for token, real in zip(ids, mask, strict=True))
        if name not in seen:
            seen[name] = len(first)
            first.append(row)
        of_row.append(seen[name])
    return torch.tensor(first, device=ids_BP.device), torch.tensor(of_row, device=ids_BP.device)
