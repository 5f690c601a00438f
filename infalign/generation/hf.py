"""Sampling with a transformers model, from its own distribution and nothing else.

Every sampling field is explicit: what a model's `generation_config` says about temperature or top-k is ignored (a model
that ships top_k=1 would make calibration worthless). A token is drawn by inverse CDF from one uniform of its sample's
own stream. Each distinct prompt is computed and kept once; finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infalign.generation.plan import Request
from infalign.models.captured import decoding_for
from infalign.models.mixture import LogitMixture
from infalign.models.shared_prefix import Decoding, pad_left, positions, why_plain, without_router_logits
from infalign.runtime.console import notice
from infalign.runtime.distributed import any_rank
from infalign.runtime.seeds import uniforms
from infalign.types import Sample, SamplingSettings

BLOCK = 128
"""Tokens of the vocabulary whose probabilities are summed before one of them is looked for."""


@dataclass
class HFSampler:
    """Draws samples from `model`.

    Args:
        model: a causal language model, in eval mode and on its device.
        tokenizer: its tokenizer (only decodes here).
        settings: the sampling distribution.
        end_ids: the tokens that end a completion.
        seed: keys every sample's stream together with prompt key and sample index.
        gone: whether nobody waits any more for the samples of a prompt's key: they end at the next token. Asked at
            every token; None where all are waited for.
    """

    model: Any
    tokenizer: Any
    settings: SamplingSettings
    end_ids: tuple[int, ...]
    seed: int | str
    gone: Callable[[str], bool] | None = None

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample a request, in their order, as one batch; `token_logps` are the model's, in nats."""
        return self._continued(requests, [_NOTHING] * len(requests), self.settings.max_tokens)

    def begin(self, requests: Sequence[Request], tokens: int) -> list[Sample]:
        """The first `tokens` tokens of what `sample` draws for these requests; all of it, where it ends by then."""
        return self._continued(requests, [_NOTHING] * len(requests), min(tokens, self.settings.max_tokens))

    def resume(self, requests: Sequence[Request], begun: Sequence[Sample]) -> list[Sample]:
        """What `sample` draws for these requests, from its beginnings: each goes on in its own random stream.

        A beginning is read like a prompt, so that it is the same completion up to rounding, as in any other batch.

        Args:
            requests: those that were begun.
            begun: their unfinished beginnings, in the same order.
        """
        return self._continued(requests, [(one.token_ids, one.token_logps) for one in begun], self.settings.max_tokens)

    @torch.no_grad()
    def _continued(
        self, requests: Sequence[Request], begun: Sequence[tuple[tuple[int, ...], np.ndarray]], limit: int
    ) -> list[Sample]:
        """Samples of at most `limit` tokens that start with the tokens begun."""
        room = limit - min(len(ids) for ids, _ in begun)
        uniforms_BT = np.zeros((len(requests), room))
        for row, (request, (ids, _)) in enumerate(zip(requests, begun, strict=True)):
            uniforms_BT[row, : limit - len(ids)] = uniforms(self.seed, request.key, request.index, limit)[len(ids) :]
        prompts = [(*request.prompt_ids, *ids) for request, (ids, _) in zip(requests, begun, strict=True)]
        gone = self.gone
        left = None if gone is None else lambda: [gone(request.key) for request in requests]
        rows = decode_rows(self.model, prompts, uniforms_BT, self.settings, self.end_ids, left=left)
        whole = [
            ([*before, *ids][:limit], np.concatenate([earlier, np.asarray(logps, np.float32)])[:limit])
            for (before, earlier), (ids, logps) in zip(begun, rows, strict=True)
        ]
        texts = self.tokenizer.batch_decode([ids for ids, _ in whole], skip_special_tokens=True)
        return [
            Sample(request.key, request.index, tuple(ids), logps, text, finished=ids[-1] in self.end_ids)
            for request, (ids, logps), text in zip(requests, whole, texts, strict=True)
        ]


_NOTHING: tuple[tuple[int, ...], np.ndarray] = ((), np.empty(0, dtype=np.float32))
"""What a sample that starts afresh has of itself."""


def decode_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms_BT: np.ndarray,
    settings: SamplingSettings,
    end_ids: Sequence[int],
    *,
    in_step: bool = False,
    share: bool = True,
    left: Callable[[], Sequence[bool]] | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Decode one completion a prompt, T tokens at most; row b is a function of prompt b and `uniforms_BT[b]`.

    Args:
        model: a causal language model, or a mixture of several.
        prompts: B prompts' token ids.
        uniforms_BT: one uniform a token.
        settings: the sampling distribution; its `max_tokens` is T.
        end_ids: tokens that end a completion.
        in_step: all ranks make equally many forward passes, as weights that are sharded over them need.
        share: compute each prompt once for all of its rows, where the model allows it.
        left: asked at every token which of the B rows nobody waits for any more; they end there.

    Returns:
        For each row its token ids (end token included) and their log-probabilities in nats.
    """
    device = model.device
    uniforms = torch.as_tensor(uniforms_BT, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    count = uniforms.shape[1]
    rows = _decoding(model, prompts, count, share and not in_step)
    active = torch.arange(len(prompts), device=device)
    tokens_BT = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
    logps_BT = torch.zeros(uniforms.shape, dtype=torch.float32, device=device)
    # tokens, log-probabilities and lengths stay B long; `active` says which of those rows are still decoded
    lengths_B = torch.full((len(prompts),), count, device=device)
    processors = _processors(settings)
    ids_BP, _ = pad_left(prompts, end_ids[0] if end_ids else 0, device)
    chosen = ids_BP[:, -1]  # a shared prompt is computed without its last token, which is the first input
    for step in range(count):
        logits = rows.logits(chosen).float()
        if settings.temperature != 1.0:
            logits = logits / settings.temperature
        if processors:
            # a repetition penalty looks at all tokens so far, of the prompt too
            logits = processors(torch.cat([ids_BP[active], tokens_BT[active, :step]], dim=1), logits)
        chosen, logps = draw(logits, uniforms[active, step])
        tokens_BT[active, step], logps_BT[active, step] = chosen, logps
        ended = active[torch.isin(chosen, ends)]
        # Rows that have ended may be decoded on for a while: their first end counts, hence the minimum.
        lengths_B[ended] = lengths_B[ended].clamp(max=step + 1)
        if left is not None:
            given_up = torch.tensor(left(), device=device)
            lengths_B[given_up] = lengths_B[given_up].clamp(max=step + 1)
        going = lengths_B[active] > step + 1
        unfinished = bool(going.any())
        # where weights are sharded a pass takes all ranks, so one that is done goes on until the last is
        if not (any_rank(unfinished) if in_step else unfinished):
            break
        keep = going.nonzero()[:, 0]  # places among the active rows, not in the batch
        if unfinished and not isinstance(rows, _Plainly) and len(keep) <= rows.KEPT * len(active):
            rows.keep(keep)
            active, chosen = active[keep], chosen[keep]
    return [
        (tokens[:length], logps[:length])
        for tokens, logps, length in zip(tokens_BT.tolist(), logps_BT.tolist(), lengths_B.tolist(), strict=True)
    ]


def _decoding(model: Any, prompts: Sequence[Sequence[int]], room: int, share: bool) -> Decoding | _Plainly | _Mixed:
    """What gives the logits of the next tokens, some rows at a time."""
    if isinstance(model, LogitMixture):
        return _Mixed(model, [_decoding(one, prompts, room, share) for one in model.models])
    return decoding_for(model, prompts, room=room) if share and _shares(model) else _Plainly(model, prompts)


def _shares(model: Any) -> bool:
    """Whether prompts are computed once for all of their completions; says once a model why not."""
    why = why_plain(model)
    if why is not None and model not in _told:
        _told.add(model)
        notice(f"sampling computes each prompt once per completion: {why}")
    return why is None


_told: WeakSet[Any] = WeakSet()


class _Plainly:
    """Decoding for any model: every row computes its own prompt, and finished rows are decoded on and ignored."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.cache = model, None
        self.ids, self.mask = pad_left(prompts, 0, model.device)

    def logits(self, ids_B: Tensor) -> Tensor:
        """(B, V) logits of the next token after one more input token a row (at first: the prompts' last tokens)."""
        ids = self.ids if self.cache is None else ids_B[:, None]
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions(self.mask)[:, -ids.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **without_router_logits(self.model),
        )
        self.cache = output.past_key_values
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return output.logits[:, -1]


class _Mixed:
    """Decoding with several models at once."""

    def __init__(self, mixture: LogitMixture, parts: Sequence[Any]) -> None:
        self.mixture, self.parts = mixture, parts
        # all of them let go of finished rows, or none does
        self.KEPT = Decoding.KEPT if all(isinstance(part, Decoding) for part in parts) else -1.0

    def logits(self, ids_B: Tensor) -> Tensor:
        """(B, V) as of one model."""
        return self.mixture.mixed([part.logits(ids_B) for part in self.parts])

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        for part in self.parts:
            part.keep(rows)


def draw(logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draws and their log-probabilities: the first token whose cumulative probability exceeds u.

    First the block of `BLOCK` tokens, by sums over blocks, then the token in it: a vocabulary is summed, not scanned.

    Args:
        logits_BV: float32; overwritten.
        uniforms_B: float64 in [0, 1).

    Returns:
        (B,) token ids and (B,) log-probabilities in nats.

    Raises:
        FloatingPointError: a row's logits are not finite.
    """
    rows, size = logits_BV.shape
    weights = logits_BV.sub_(logits_BV.amax(-1, keepdim=True)).exp_()  # the softmax times its total
    if size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - size % BLOCK))  # of weight 0: never drawn
    weights = weights.reshape(rows, -1, BLOCK)
    # (B, V / BLOCK) cumulative weights at the blocks' ends; a running sum in float32 would lose small blocks
    ends = weights.sum(-1).double().cumsum(-1)
    total = ends[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or training diverged")
    target = uniforms_B[:, None] * total
    # the first block that ends above the target; the clamp is for a target that rounds up to the total
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    # where the block starts: the end of the one before it, 0 for block 0 (whose index there only has to be valid)
    start = torch.where(block > 0, ends.gather(1, block - 1 + (block == 0)), 0.0)
    # The target as a share of its block. The block's float32 sum and the float64 sum of its tokens differ by rounding,
    # so that the target itself could lie beyond the last token.
    share = (target - start) / (ends.gather(1, block) - start)
    inside = weights[torch.arange(rows, device=weights.device), block[:, 0]].double().cumsum(-1)
    # the share stays below 1, so that some token exceeds it; right=True skips tokens of weight 0, which add nothing
    place = torch.searchsorted(inside, share.clamp(max=1 - 2**-53) * inside[:, -1:], right=True)
    chosen = block * BLOCK + place.clamp(max=BLOCK - 1)
    weight = weights.view(rows, -1).gather(1, chosen).double()
    return chosen[:, 0], (weight / total).log()[:, 0].float()


def _processors(settings: SamplingSettings) -> Any:
    """transformers' own warpers for the fields that are not at their neutral value."""
    found = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.top_k:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        found.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        found.append(MinPLogitsWarper(settings.min_p))
    return found
