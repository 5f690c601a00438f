"""Process reward models: a token classifier scores every step of a completion, and the steps' scores become one.

Such a model is trained to label the token that ends each step (TRL's process supervision, Qwen's PRMs, Math-Shepherd):
right so far, or not. Best-of-N is often decoded by one. What it sees is what TRL trains on: the beginning token,
the prompt, and each step's tokens with those of the marker after it, each piece tokenized by itself; of a chat, the
template's text with a marker after every step of the answer.

A step's score is the probability of `label` after it; the completion's is the smallest of them, the last, their mean
or their product (Lightman et al., arXiv 2305.20050, take the product; Snell et al., arXiv 2408.03314, the last).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from infalign.models.shared_prefix import buckets, pass_cost
from infalign.rewards.classifier_loading import (
    check_batching,
    choose_label,
    keep_head_in_float32,
    load_classifier,
    longest,
    model_fingerprint,
    padding_of,
)
from infalign.rewards.contract import Text, completion_text
from infalign.rewards.encoding import rendered, shown
from infalign.runtime.console import say
from infalign.types import TEMPLATE_COLUMNS, InputError, RewardError, template_variables

_STAND_IN = "\u241eanswer\u241e"  # in an answer's place it shows where the template puts it
Array = NDArray[np.float64]
Aggregate = Literal["min", "last", "mean", "prod"]
AGGREGATES: dict[str, Callable[[Array], float]] = {
    "min": lambda scores_S: float(scores_S.min()),
    "last": lambda scores_S: float(scores_S[-1]),
    "mean": lambda scores_S: float(scores_S.mean()),
    "prod": lambda scores_S: float(scores_S.prod()),
}
"""What becomes of the scores of S steps."""


class ProcessReward:
    """A token classifier that scores steps, as a TRL reward function.

    Args:
        model_or_path: folder, Hub id, or a model (evaluation mode is set, gradients are switched off).
        tokenizer: the reward model's own; None loads it from the same place.
        label: index or name of the label that means a right step; needed unless the model has one label, whose
            sigmoid then counts.
        aggregate: how steps become one score: `min`, `last`, `mean` or `prod`.
        separator: what stands between two steps of a completion.
        marker: what stands after each step in what the model sees, e.g. `<extra_0>`; None is the separator.
        batch_tokens: padded tokens per forward pass, at least one sequence; None is 16,384, on a GPU 65,536.
        max_length: tokens of prompt and completion; None takes the model's context.
        too_long: a longer sequence is an `error`, or gets no score (`mask`).
        device: None is this process's GPU or the CPU.
        dtype: of the backbone, "auto" as stored.
        chat_template: jinja text to use in place of the tokenizer's.
        chat_template_kwargs: extra variables of the template.
        trust_remote_code: run Python code that comes with the model.

    Attributes:
        counts: `scored`, `masked` (completions), `steps`.
        fingerprint: of weights, tokenizer and the options that shape scores.

    Raises:
        InputError: no trained head, no choice of label, an unknown option, or scores that depend on the batch.
    """

    reads_columns: tuple[str, ...] = TEMPLATE_COLUMNS

    def __init__(
        self,
        model_or_path: Any,
        *,
        tokenizer: Any = None,
        label: int | str | None = None,
        aggregate: Aggregate = "min",
        separator: str = "\n",
        marker: str | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        too_long: Literal["error", "mask"] = "error",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        _check_options(aggregate, too_long, separator, marker, batch_tokens, max_length)
        loaded = load_classifier(
            model_or_path,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            of="token",
        )
        self.model, self.tokenizer, self.name = loaded.model, loaded.tokenizer, loaded.name
        self.__name__ = self.name.rstrip("/").split("/")[-1]
        self.label = choose_label(self.model.config, label, self.name)
        self.aggregate, self.separator, self.marker = aggregate, separator, separator if marker is None else marker
        self.too_long = too_long
        on_gpu = next(self.model.parameters()).device.type == "cuda"
        self.batch_tokens = batch_tokens or (65_536 if on_gpu else 16_384)
        self.chat_template = chat_template or getattr(self.tokenizer, "chat_template", None)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.counts = {"scored": 0, "masked": 0, "steps": 0}
        self._shown = False
        self._backbone = keep_head_in_float32(self.model)
        self._reads_states = (
            isinstance(getattr(self.model, "score", None), nn.Module) and self._backbone is not self.model
        )
        self._pad_id = padding_of(self.model, self.tokenizer)
        self._marker_ids = self._tokens(self.marker)
        if not self._marker_ids:
            raise InputError(f"reward model {self.name!r}: its tokenizer makes no token of the marker {self.marker!r}")
        self.max_length = longest(self.model, self.tokenizer, self.name, max_length, self._pad_id)
        how = repr((
            self.label, aggregate, separator, self.marker, self.max_length, too_long, self.chat_template,
            sorted(self.chat_template_kwargs.items()),
        ))  # fmt: skip
        shaped = hashlib.blake2b(how.encode(), digest_size=4).hexdigest()
        self.fingerprint = f"{model_fingerprint(self.model, self.tokenizer)}:{shaped}"
        check_batching(self.name, self.tokenizer, self._backbone, self._of_last_tokens, self.max_length, self._pad_id)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> Array:
        """Scores (B,) in [0, 1], one per completion; NaN where `too_long="mask"` left one out.

        Of the data's columns `tools` and `chat_template_kwargs` go to the chat template, as in training.

        Raises:
            RewardError: a sequence is too long under `too_long="error"`.
            InputError: chats for a tokenizer without chat template.
        """
        made = AGGREGATES[self.aggregate]
        return np.array([made(scores_S) if len(scores_S) else np.nan for scores_S in
                         self.step_scores(prompts, completions, **columns)])  # fmt: skip

    def step_scores(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Array]:
        """The score of every step, (S,) for each completion; empty where it is masked.

        Raises:
            RewardError, InputError: as for a call.
        """
        given = [columns.get(name) or [None] * len(prompts) for name in TEMPLATE_COLUMNS]
        variables = [
            template_variables(dict(zip(TEMPLATE_COLUMNS, row, strict=True))) for row in zip(*given, strict=True)
        ]
        pairs = [self.encode(*row) for row in zip(prompts, completions, variables, strict=True)]
        if pairs and not self._shown:
            self._shown = True
            ids, places = pairs[0]
            example = f"{shown(self.tokenizer.decode(ids))}, of {len(places)} step{'s' if len(places) > 1 else ''}"
            say(f"  what the process reward model {self.__name__} sees, for example: {example}")
        kept = [index for index, (ids, _) in enumerate(pairs) if self._fits(ids, index)]
        scores: list[Array] = [np.empty(0)] * len(pairs)
        lengths = [len(pairs[index][0]) for index in kept]
        for bucket in buckets(lengths, self.batch_tokens, cost=pass_cost(self.model)):
            rows = [kept[place] for place in bucket]
            for row, scores_S in zip(rows, self._forward([pairs[row] for row in rows]), strict=True):
                scores[row] = scores_S
        self.counts["scored"] += len(kept)
        self.counts["steps"] += sum(map(len, scores))
        return scores

    def steps(self, completion: Text) -> list[str]:
        """The steps of a completion, without those that are white space; at least one, which may be empty."""
        text = completion_text(completion)
        return [step for step in text.split(self.separator) if step.strip()] or [""]

    def encode(
        self, prompt: Text, completion: Text, variables: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids as the model sees them, and the places (S,) at which its steps are scored.

        Args:
            prompt, completion: texts or messages.
            variables: the row's own for the chat template.

        Raises:
            InputError: a chat and no template, or a template that hides or changes the answer.
        """
        if not isinstance(prompt, str) or not isinstance(completion, str):
            return self._encoded_chat(prompt, self.steps(completion), variables or {})
        bos = self.tokenizer.bos_token_id
        ids = [*([] if bos is None else [bos]), *self._tokens(prompt)]
        places: list[int] = []
        for step in self.steps(completion):
            ids += self._tokens(step) + self._marker_ids
            places.append(len(ids) - 1)
        return ids, places

    def _encoded_chat(
        self, prompt: Text, steps: Sequence[str], variables: Mapping[str, Any]
    ) -> tuple[list[int], list[int]]:
        answer = "".join(step + self.marker for step in steps)
        if not self.tokenizer.is_fast:
            raise InputError(f"reward model {self.name!r}: its tokenizer tells no places of tokens: use text prompts")
        text, elsewhere = (
            rendered(
                self.tokenizer,
                prompt,
                one,
                name=self.name,
                chat_template=self.chat_template,
                variables={**self.chat_template_kwargs, **variables},
            )
            for one in (answer, _STAND_IN)
        )
        start = elsewhere.rfind(_STAND_IN)
        # a template may leave out the white space that an answer begins with
        lost = 0 if text.startswith(answer, start) else len(answer) - len(answer.lstrip())
        if start < 0 or text[:start] != elsewhere[:start] or not text.startswith(answer[lost:], start):
            raise InputError(
                f"reward model {self.name!r}: its chat template changes the answer (the marker {self.marker!r} "
                "is after every step, also the last): give a marker that is no white space, or chat_template"
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = [first for first, after in encoded["offset_mapping"] if after > first]
        tokens = [token for token, (first, after) in enumerate(encoded["offset_mapping"]) if after > first]
        ends = (
            np.cumsum([len(step) + len(self.marker) for step in steps]) + start - lost - 1
        )  # the markers' last characters
        return list(encoded["input_ids"]), [tokens[bisect_right(begins, end) - 1] for end in ends]

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fits(self, ids: list[int], index: int) -> bool:
        if self.max_length is None or len(ids) <= self.max_length:
            return True
        if self.too_long == "error":
            raise RewardError(
                f"completion {index} has {len(ids)} tokens with its prompt and markers, the reward model {self.name!r} "
                f"takes {self.max_length}; shorten prompts or completions, or set too_long to mask"
            )
        self.counts["masked"] += 1
        return False

    @torch.inference_mode()
    def _forward(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Array]:
        """Probabilities (S,) of the label at the places of each sequence, in one padded pass."""
        logits = self._logits(pairs).double().cpu()
        chances = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
        return np.split(chances[:, self.label].numpy(), np.cumsum([len(places) for _, places in pairs])[:-1])

    def _logits(self, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
        """Logits (all places, labels)."""
        lengths = torch.tensor([len(ids) for ids, _ in pairs])
        width = int(lengths.max())
        device = next(self.model.parameters()).device
        inputs = torch.tensor([ids + [self._pad_id] * (width - len(ids)) for ids, _ in pairs], device=device)
        mask = (torch.arange(width) < lengths[:, None]).long().to(device)
        rows = torch.tensor([row for row, (_, places) in enumerate(pairs) for _ in places], device=device)
        columns = torch.tensor([place for _, places in pairs for place in places], device=device)
        if self._reads_states:
            hidden = self._backbone(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
            return self.model.score(hidden[rows, columns])
        found = self.model(input_ids=inputs, attention_mask=mask)
        return (found.logits if hasattr(found, "logits") else found[0])[rows, columns]

    def _of_last_tokens(self, sequences: Sequence[list[int]]) -> Array:
        with torch.inference_mode():
            return self._logits([(ids, [len(ids) - 1]) for ids in sequences])[:, self.label].double().cpu().numpy()


def _check_options(
    aggregate: str, too_long: str, separator: str, marker: str | None, batch_tokens: Any, max_length: Any
) -> None:
    if not isinstance(aggregate, str) or aggregate not in AGGREGATES:
        raise InputError(f"aggregate is one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    if too_long not in ("error", "mask"):
        raise InputError(f"too_long is error or mask for a process reward model, got {too_long!r}")
    for name, value in (("separator", separator), ("marker", marker)):
        if value is not None and not (isinstance(value, str) and value):
            raise InputError(f"{name} is a text of at least one character, got {value!r}")
    for name, value in (("batch_tokens", batch_tokens), ("max_length", max_length)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} is a whole number of tokens, at least 1, got {value!r}")
