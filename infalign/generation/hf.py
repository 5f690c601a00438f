"""Sampling with a transformers model, from its own distribution and nothing else.

Every sampling field is explicit: what a model's `generation_config` says about temperature or top-k is ignored (a model
that ships top_k=1 would make calibration worthless). A token is drawn by inverse CDF from one uniform of its sample's
own stream. Each distinct prompt is computed once; finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
from infalign.runtime.distributed import any_rank
from infalign.runtime.seeds import uniforms
from infalign.runtime.shared_prefix import (
    continuation,
    encode_prefixes,
    is_shareable,
    pad_left,
    positions,
    unique_rows,
    with_room,
)
from infalign.types import Sample, SamplingSettings

Uniforms = Callable[[str, int, int], np.ndarray]


@dataclass
class HFSampler:
    """Draws samples from `model`.

    Args:
        model: a causal language model, in eval mode and on its device.
        tokenizer: its tokenizer (only decodes here).
        settings: the sampling distribution.
        end_ids: the tokens that end a completion.
        seed: keys every sample's stream together with prompt key and sample index.
    """

    model: Any
    tokenizer: Any
    settings: SamplingSettings
    end_ids: tuple[int, ...]
    seed: int | str

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample a request, in their order, as one batch; `token_logps` are the model's, in nats."""
        count = self.settings.max_tokens
        uniforms_BT = np.stack([uniforms(self.seed, request.key, request.index, count) for request in requests])
        rows = decode_rows(
            self.model, [request.prompt_ids for request in requests], uniforms_BT, self.settings, self.end_ids
        )
        texts = self.tokenizer.batch_decode([ids for ids, _ in rows], skip_special_tokens=True)
        return [
            Sample(
                key=request.key,
                index=request.index,
                token_ids=tuple(ids),
                token_logps=np.asarray(logps, dtype=np.float32),
                text=text,
                finished=ids[-1] in self.end_ids,
            )
            for request, (ids, logps), text in zip(requests, rows, texts, strict=True)
        ]


def decode_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms_BT: np.ndarray,
    settings: SamplingSettings,
    end_ids: Sequence[int],
    *,
    in_step: bool = False,
) -> list[tuple[list[int], list[float]]]:
    """Decode one completion a prompt, T tokens at most; row b is a function of prompt b and `uniforms_BT[b]`.

    Args:
        model: a causal language model.
        prompts: B prompts' token ids.
        uniforms_BT: one uniform a token.
        settings: the sampling distribution; its `max_tokens` is T.
        end_ids: tokens that end a completion.
        in_step: all ranks make equally many forward passes, as weights that are sharded over them need.

    Returns:
        For each row its token ids (end token included) and their log-probabilities in nats.
    """
    device = model.device
    uniforms = torch.as_tensor(uniforms_BT, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    state = _prefill(model, prompts, pad_id=end_ids[0] if end_ids else 0, room=0 if in_step else uniforms.shape[1])
    active = torch.arange(len(prompts), device=device)
    tokens_BT = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
    logps_BT = torch.zeros(uniforms.shape, dtype=torch.float32, device=device)
    lengths_B = torch.full((len(prompts),), uniforms.shape[1], device=device)
    processors = _processors(settings)
    for step in range(uniforms.shape[1]):
        logits = _next_logits(model, state).float() / settings.temperature
        if processors:
            logits = processors(torch.cat([state["seen"], tokens_BT[active, :step]], dim=1), logits)
        chosen, logps = _draw(logits, uniforms[active, step])
        tokens_BT[active, step], logps_BT[active, step] = chosen, logps
        ended = active[torch.isin(chosen, ends)]
        lengths_B[ended] = lengths_B[ended].clamp(max=step + 1)
        going = lengths_B[active] > step + 1
        unfinished = bool(going.any())
        if not (any_rank(unfinished) if in_step else unfinished):
            break
        if unfinished:
            active, chosen = _drop_finished(state, active, chosen, going)
        state["input_ids"] = chosen[:, None]
    return [
        (tokens[:length], logps[:length])
        for tokens, logps, length in zip(tokens_BT.tolist(), logps_BT.tolist(), lengths_B.tolist(), strict=True)
    ]


def _draw(logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draws and their log-probabilities: the first token whose cumulative probability exceeds u."""
    logps_BV = torch.log_softmax(logits_BV, dim=-1)
    cdf_BV = logps_BV.exp().cumsum(-1, dtype=torch.float64)
    if not bool(torch.isfinite(cdf_BV[:, -1]).all()):
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or training diverged")
    targets = (uniforms_B * cdf_BV[:, -1])[:, None]
    chosen = torch.searchsorted(cdf_BV, targets, right=True).clamp(max=logits_BV.shape[1] - 1)
    return chosen[:, 0], logps_BV.gather(1, chosen)[:, 0]


def _prefill(model: Any, prompts: Sequence[Sequence[int]], pad_id: int, room: int) -> dict[str, Any]:
    """The state of decoding after the prompts: the last prompt token is the next input of every row.

    With `room` for so many tokens prompts are computed once each; without, in one plain pass.
    """
    ids_BP, mask_BP = pad_left(prompts, pad_id, model.device)
    if not room or not is_shareable(model):
        return {"input_ids": ids_BP, "mask": mask_BP, "cache": None, "seen": ids_BP, "compact": False}
    first, of_row = unique_rows(ids_BP, mask_BP)
    prefix = encode_prefixes(model, ids_BP[first], mask_BP[first])
    inputs = continuation(prefix, of_row, ids_BP[:, -1:], mask_BP[:, -1:])
    cache = inputs.get("past_key_values")
    return {
        "input_ids": ids_BP[:, -1:],
        "mask": inputs["attention_mask"],
        "cache": None if cache is None else with_room(cache, room),
        "seen": ids_BP,
        "compact": True,
    }


def _next_logits(model: Any, state: dict[str, Any]) -> Tensor:
    """(B, V) logits of the next token; advances the state's cache and mask."""
    width = state["input_ids"].shape[1]
    output = model(
        input_ids=state["input_ids"],
        attention_mask=state["mask"],
        position_ids=positions(state["mask"])[:, -width:],
        past_key_values=state["cache"],
        use_cache=True,
        logits_to_keep=1,
    )
    state["cache"] = output.past_key_values
    state["mask"] = torch.cat([state["mask"], state["mask"].new_ones(len(state["mask"]), 1)], dim=1)
    return output.logits[:, -1]


def _drop_finished(state: dict[str, Any], active: Tensor, chosen: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """Take finished rows out of the batch once they are an eighth of it (cutting the cache copies it).

    Rows that stay although they have finished, or because the model's cache can't be cut, are decoded on and ignored.
    """
    keep = going.nonzero()[:, 0]
    if not state["compact"] or len(keep) > 7 / 8 * len(active):
        return active, chosen
    state["cache"].batch_select_indices(keep)
    state["mask"], state["seen"] = state["mask"][keep], state["seen"][keep]
    return active[keep], chosen[keep]


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
