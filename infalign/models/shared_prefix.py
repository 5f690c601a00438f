"""Each prompt is computed once: all of its completions continue from, or attend to, one copy of its keys and values.

Rows of a batch that share a prompt share everything that a causal model computes on it, so this is exact, gradients
included (plain autograd runs through the cache). Forward passes repeat a prompt's cache for its rows, which saves a
factor of about K(P+R)/(P+KR) in tokens for K completions of R tokens on a prompt of P; decoding does not even repeat
it: the queries of all rows of a prompt meet its keys in one product. The prompt's last token is left out of the shared
part: it is the first input of every continuation.

Before a model is trusted with this, `why_plain` compares it with the plain path on a few tokens; caches that are not
plain (sliding windows, recurrent states), gradient checkpointing and attention that cannot be replaced all show there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

PASS_COST = 64
"""What one more forward pass costs on a CPU, in tokens: `buckets` weighs it against padding."""
LAUNCH_SECONDS = 0.8e-3
"""How long a host takes to start the kernels of one layer on a GPU (0.8 ms on an H200's host, recipes/LOG.md)."""


def pass_cost(model: Any) -> int:
    """What one more forward pass of `model` costs, in tokens: on a GPU, those it could compute while kernels start."""
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return PASS_COST
    tokens_per_second = min(4e5, 2e14 / sum(p.numel() for p in model.parameters()))
    return round(model.config.get_text_config().num_hidden_layers * LAUNCH_SECONDS * tokens_per_second)


# --- rows and their padding -------------------------------------------------------------------------------------------


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


def buckets(lengths: Sequence[int], tokens: int, beside: int = 0, cost: int = PASS_COST) -> list[list[int]]:
    """Rows of like length together: the cut into batches with the least padding, a pass counting as `cost` tokens.

    Args:
        lengths: by row, in tokens.
        tokens: most tokens of a batch, padding included; a batch has one row at least.
        beside: tokens that every row also takes of that budget, at no cost (its prompt's repeated cache).
        cost: of a pass, in tokens (`pass_cost`).

    Returns:
        The rows of each batch, longest first.

    >>> buckets([4, 100, 5, 90, 5], tokens=1000)
    [[1, 3], [2, 4, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    width = np.array([lengths[row] for row in order], dtype=np.int64)
    best, cut = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    for end in range(1, len(order) + 1):
        # the last batch is order[start:end] for some start (all of them at once); its longest row comes first
        sizes = end - np.arange(end)
        fits = (sizes == 1) | (sizes * (width[:end] + beside) <= tokens)
        costs = np.where(fits, best[:end] + sizes * width[:end] + cost, np.inf)
        cut[end] = int(costs.argmin())
        best[end] = costs[cut[end]]
    found = []
    end = len(order)  # walk back from the last cut
    while end:
        found.append(order[cut[end] : end])
        end = cut[end]
    return found[::-1]


# --- forward passes ---------------------------------------------------------------------------------------------------


@dataclass
class SharedPrefix:
    """The computed prefixes of U prompts: `cache` (None when every prefix is empty) and `mask_UP`, left-padded."""

    cache: DynamicCache | None
    mask_UP: Tensor


def without_router_logits(model: Any) -> dict[str, bool]:
    """What keeps a mixture of experts from its load-balancing loss, which counts whole rows and fails on a part of one.

    Its config may ask for that loss (`output_router_logits: true`); neither sampling nor log-probabilities need it.
    """
    return {"output_router_logits": False} if hasattr(model.config.get_text_config(), "output_router_logits") else {}


def new_cache(model: Any) -> DynamicCache:
    """An empty cache of the layout that `model` asks for."""
    return DynamicCache(config=model.config.get_text_config())


def encode_prefixes(model: Any, ids_UP: Tensor, mask_UP: Tensor) -> SharedPrefix:
    """Run U left-padded prompts, all but each one's last token, through the backbone once.

    Args:
        model: a causal language model or classifier (unwrapped); its head is not used.
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

    Every call repeats the prefixes anew; they can be continued again.
    """
    mask = torch.cat([prefix.mask_UP[rows_B], mask_BT], dim=1)
    inputs: dict[str, Any] = {
        "input_ids": ids_BT,
        "attention_mask": mask,
        "position_ids": positions(mask)[:, -ids_BT.shape[1] :],
    }
    if prefix.cache is not None:
        pairs = _keys_and_values(prefix.cache)  # repeated one by one: the cache copies what it is given
        inputs["past_key_values"] = DynamicCache(
            (k.index_select(0, rows_B), v.index_select(0, rows_B)) for k, v in pairs
        )
    return inputs


def _keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


# --- decoding ---------------------------------------------------------------------------------------------------------

ATTENTION = "infalign_shared_prefix"
_decoding: ContextVar[Decoding] = ContextVar("decoding")


class Decoding:
    """B rows that are decoded together, a token each a step, their U prompts computed and kept once.

    Args:
        model: a causal language model for which `why_plain` is None.
        prompts: B prompts' token ids.
        room: most tokens that will be decoded.
    """

    KEPT = 7 / 8
    """Finished rows leave when at most this share goes on: leaving copies the cache of those that do."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], room: int) -> None:
        self.model, self.room = model, room
        self.own_bias: Tensor | None = None  # added to the scores of a row's own tokens
        ids, mask = pad_left(prompts, 0, model.device)
        first, self.prompt_of_row = unique_rows(ids, mask)
        prefix = encode_prefixes(model, ids[first], mask[first])
        self.prefixes = [] if prefix.cache is None else _keys_and_values(prefix.cache)
        self.bias = _bias(prefix.mask_UP, self.prefixes[0][0].dtype if self.prefixes else torch.float32)
        self.attended = 0
        self.positions = mask.sum(1, keepdim=True) - 1  # (B, 1): where each prompt's last token stands, the first input
        self.own = new_cache(model)
        layers: list[Any] = self.own.layers
        layers[:] = [self._layer(len(prompts)) for _ in layers]
        self._arrange()

    def _layer(self, rows: int) -> OwnLayer:
        return OwnLayer(rows, self.room)

    def logits(self, ids_B: Tensor) -> Tensor:
        """(B, V) logits of the next token after one more input token a row (at first: the prompts' last tokens)."""
        logits = self._forward(ids_B)
        self.positions = self.positions + 1
        return logits

    def _forward(self, ids_B: Tensor) -> Tensor:
        with _attending(self):
            output = self.model(
                input_ids=ids_B[:, None],
                position_ids=self.positions,
                past_key_values=self.own,
                use_cache=True,
                logits_to_keep=1,
                **without_router_logits(self.model),
            )
        return output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only; prompts without rows are dropped."""
        self.own.batch_select_indices(rows)
        self.positions = self.positions[rows]
        left, self.prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        if len(left) < self.prompts:
            self.prefixes = [(keys[left], values[left]) for keys, values in self.prefixes]
            self.bias = None if self.bias is None else self.bias[left]
        self._arrange()

    def _arrange(self) -> None:
        """Give the rows of every prompt places 0, 1, ... beside it; places that stay empty repeat row 0."""
        # Slots are U * places; prompt u has slots u * places, u * places + 1, ... for its rows. In sorted order a row's
        # place among those of its prompt is its index less where its prompt starts.
        order = self.prompt_of_row.argsort(stable=True)
        counts = self.prompt_of_row.bincount()
        self.prompts, self.places = len(counts), int(counts.max())
        start = counts.cumsum(0) - counts
        of_sorted = self.prompt_of_row[order]
        slots = of_sorted * self.places + torch.arange(len(order), device=order.device) - start[of_sorted]
        self._row_of_slot = order.new_zeros(self.prompts * self.places).scatter_(0, slots, order)
        self._slot_of_row = torch.empty_like(order).scatter_(0, order, slots)
        # rows that stand in their slots already (equal counts, prompts in order) need no copy at every layer
        in_place = torch.equal(self._row_of_slot, torch.arange(len(order), device=order.device))
        self._regular = in_place and len(self._row_of_slot) == len(order)

    def by_prompt(self, x_BHGW: Tensor) -> Tensor:
        """(B, H, G, W) of rows as (U, H, places * G, W) of prompts."""
        _, heads, group, width = x_BHGW.shape
        x = x_BHGW if self._regular else x_BHGW.index_select(0, self._row_of_slot)
        x = x.reshape(self.prompts, self.places, heads, group, width).transpose(1, 2)  # (U, H, places, G, W)
        return x.reshape(self.prompts, heads, self.places * group, width)

    def by_row(self, x_UHQW: Tensor) -> Tensor:
        """The way back from `by_prompt`."""
        prompts, heads, queries, width = x_UHQW.shape
        group = queries // self.places
        x = x_UHQW.view(prompts, heads, self.places, group, width).transpose(1, 2)  # (U, places, H, G, W)
        x = x.reshape(prompts * self.places, heads, group, width)
        return x if self._regular else x.index_select(0, self._slot_of_row)


class OwnLayer(DynamicLayer):
    """One layer's keys and values of the decoded tokens, written in place into room for all of them."""

    def __init__(self, rows: int, room: int) -> None:
        super().__init__()
        self.rows, self.room, self.length = rows, room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one token's keys and values (B, heads, 1, width); returns all of the row's own so far."""
        if not self.is_initialized:
            self.make_room(key_states, value_states)
        self._keys[:, :, self.length] = key_states[:, :, 0]
        self._values[:, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return self.show(self.length)

    def make_room(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all places, like the keys and values of the first token."""
        self.lazy_initialization(key_states, value_states)
        self._keys, self._values = (
            part.new_zeros(self.rows, part.shape[1], self.room, part.shape[3]) for part in (key_states, value_states)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.rows = len(indices)
        kept = [part[indices, :, : self.length] for part in (self._keys, self._values)]
        self._keys, self._values = (torch.nn.functional.pad(part, (0, 0, 0, self.room - self.length)) for part in kept)
        self.show(self.length)

    def show(self, places: int) -> tuple[Tensor, Tensor]:
        """The keys and values at the first places."""
        keys, values = self._keys[:, :, :places], self._values[:, :, :places]
        self.keys, self.values = keys, values
        return keys, values


_KNOWN = {
    *("dropout", "is_causal", "position_ids", "use_cache", "cache_position"),
    *("output_attentions", "output_router_logits", "logits_to_keep"),
}
"""What models hand to their attention that changes nothing for one query in eval mode."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **kw: Any
) -> tuple[Tensor, None]:
    """Attention of one query a row (B, heads, 1, D) over its prompt's shared keys and its own (B, kv heads, T, D)."""
    unknown = [name for name, value in kw.items() if value is not None and name not in _KNOWN]
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask of its own'}")
    decoding = _decoding.get()
    decoding.attended += 1
    rows, heads, _, width = query.shape
    # (B, H, G, D) queries for H key heads: the G query heads that share one take the place of a sequence
    query = (query * (width**-0.5 if scaling is None else scaling)).view(rows, key.shape[1], -1, width)
    scores = query @ key.transpose(-1, -2)  # (B, H, G, T), T own tokens
    if decoding.own_bias is not None:
        scores += decoding.own_bias
    if not decoding.prefixes:
        return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).view(rows, 1, heads, -1), None
    prefix_keys, prefix_values = decoding.prefixes[module.layer_idx]
    # (U, H, places * G, P): all rows of a prompt meet its one copy of the keys, which is why no copy a row is made
    shared = decoding.by_prompt(query) @ prefix_keys.transpose(-1, -2)
    if decoding.bias is not None:
        shared += decoding.bias
    # one softmax over prompt and own tokens together: (B, H, G, P + T), in float32 like transformers' own
    weights = torch.cat([decoding.by_row(shared), scores], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    prefix = prefix_keys.shape[2]
    out = weights[..., prefix:] @ value
    # padding of other prompts has weight 0 by its -inf; slots without a row repeat row 0, and by_row leaves them out
    out += decoding.by_row(decoding.by_prompt(weights[..., :prefix]) @ prefix_values)
    return out.view(rows, 1, heads, -1), None


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def _attending(decoding: Decoding) -> Iterator[None]:
    """Attention of `decoding.model` is `_attend`, for this decoding."""
    config = decoding.model.config.get_text_config()
    before, token = config._attn_implementation, _decoding.set(decoding)
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        _decoding.reset(token)


def _bias(mask_UP: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(U, 1, 1, P) to add to scores, -inf at padding; None where there is none."""
    if bool(mask_UP.all()):
        return None
    bias = torch.zeros(mask_UP.shape, dtype=dtype, device=mask_UP.device)
    return bias.masked_fill_(mask_UP == 0, -torch.inf)[:, None, None]


# --- trust ------------------------------------------------------------------------------------------------------------

_verdicts: WeakKeyDictionary[Any, dict[Any, str | None]] = WeakKeyDictionary()


def why_plain(model: Any) -> str | None:
    """Why `model` must take the plain path, or None when shared prefixes give what it gives.

    The first call for a model (and for an autocast type) runs a dozen tokens both ways, in eval mode and without
    gradients.

    Args:
        model: a causal language model, or a classifier with a causal backbone (unwrapped, its weights in place).
    """
    if keeps_no_cache(model):
        return "gradient checkpointing keeps no cache"
    verdicts = _verdicts.setdefault(model, {})
    key = precision(model)
    if key not in verdicts:
        verdicts[key] = _verdict(model)
    return verdicts[key]


def precision(model: Any) -> torch.dtype | None:
    """The type that autocast would compute `model` in here and now; None without autocast."""
    kind = next(model.parameters()).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def keeps_no_cache(model: Any) -> bool:
    """Whether gradient checkpointing is on, now: TRL turns it off and on again around every pass without gradients."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())


def _verdict(model: Any) -> str | None:
    layers = new_cache(model).layers
    other = next((type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer), None)
    if other or not layers:
        return f"its cache has {other or 'no'} layers, which cannot be repeated row by row"
    ropes = {str(getattr(module, "rope_type", "")) for module in model.modules()}
    changing = next((rope for rope in ropes if "longrope" in rope or "dynamic" in rope), None)
    if changing:
        return f"its positions turn at other speeds once a sequence is long ({changing})"
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _compared(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with inputs that it was not written for
        return f"it fails with shared prefixes ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    finally:
        model.train(training)


def _compared(model: Any) -> str | None:
    """Continued prefixes, and decoding, beside plain passes: as close as two plain passes are to each other."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    numbers = np.random.default_rng(0).integers(0, vocabulary, (3, 9)).tolist()
    # two rows share a prompt, the third is shorter: sharing, padding and the way back to rows all count
    prompts = [numbers[0][:5], numbers[1][:3], numbers[0][:5]]
    tails = [numbers[0][5:], numbers[1][5:], numbers[2][5:]]
    device = next(model.parameters()).device
    whole = [[*prompt, *tail] for prompt, tail in zip(prompts, tails, strict=True)]
    ids, mask = pad_left(whole, 0, device)

    def plainly(run: Any, read: str) -> tuple[Tensor, float]:
        """What `run` gives for the last 5 places, and how far off it is limited to be by its own rounding."""
        padded = run(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        alone = [run(input_ids=torch.tensor([row], device=device), use_cache=False) for row in whole]
        given = getattr(padded, read)[:, -5:]
        noise = apart(torch.cat([getattr(one, read)[:, -5:] for one in alone]), given)
        # Padded and alone, the plain path differs from itself by its kernels; sharing may be a few times as far off.
        return given, max(rounding(given), 4 * noise)

    ids_BP, mask_BP = pad_left(prompts, 0, device)
    first, of_row = unique_rows(ids_BP, mask_BP)
    prefix = encode_prefixes(model, ids_BP[first], mask_BP[first])
    # the last prompt token comes first, so the 5 inputs stand at the last 5 places of the plain pass
    inputs = torch.cat([ids_BP[:, -1:], torch.tensor(tails, device=device)], dim=1)
    shared = model.base_model(**continuation(prefix, of_row, inputs, torch.ones_like(inputs))).last_hidden_state
    plain, limit = plainly(model.base_model, "last_hidden_state")
    if not (difference := apart(shared, plain)) <= limit:
        return f"shared prefixes change its results by {difference:.2g}"
    if model.get_output_embeddings() is None:
        return None
    plain, limit = plainly(model, "logits")
    decoding = Decoding(model, prompts, room=5)
    for place in range(5):
        # a row leaves before the last step, and with it a prompt's second use
        rows = torch.arange(3, device=device)
        if place == 4:
            rows = torch.tensor([1, 2], device=device)
            decoding.keep(rows)
        if not (difference := apart(decoding.logits(inputs[rows, place]), plain[rows, place])) <= limit:
            return f"decoding with shared prefixes changes its results by {difference:.2g}"
    return (
        None if decoding.attended == 5 * len(decoding.own.layers) else "some of its layers have attention of their own"
    )


def apart(a: Tensor, b: Tensor) -> float:
    """The largest root mean square difference of two vectors (..., H), over the typical size of a number in `b`."""
    differences = (a.double() - b.double()).square().mean(-1).sqrt()
    return float(differences.max() / b.double().abs().median().clamp(min=1e-12))


def rounding(values: Tensor) -> float:
    """How far apart, in the sense of `apart`, results may be by the precision that `values` were computed in.

    That shows in the values: mixed precision hands out float32 tensors that hold bfloat16 numbers. SmolLM2-135M in
    bfloat16 is 0.05 apart between two kernels of attention, and 0.94 with positions off by one.
    """
    if torch.equal(values, values.to(torch.bfloat16).to(values.dtype)):  # nothing was lost: bfloat16 all along
        return 0.15
    if torch.equal(values, values.to(torch.float16).to(values.dtype)) or values.device.type == "cuda":  # or TF32
        return 0.03
    return 1e-4
