"""Scores from a sequence-classification model, independent of how the batch is padded.

Deviations from TRL's scoring: chats are rendered and text is tokenized by the reward model's own tokenizer with its
own special tokens (TRL adds none to text); a decoder's score is read at the last real token by the attention mask
(transformers looks for the last token that is not the padding token, so with pad = eos it skips a closing eos); the
head is float32. Logits only, no softmax.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from infalign.models.shared_prefix import buckets, pass_cost, why_plain
from infalign.rewards.classifier_loading import (
    check_batching,
    choose_label,
    keep_head_in_float32,
    load_classifier,
    longest,
    model_fingerprint,
    padding_of,
    takes_types,
    text_config,
)
from infalign.rewards.contract import Text
from infalign.rewards.encoding import as_chat as wrapped
from infalign.rewards.encoding import encode_as_pair, encode_pair, last_index, shown
from infalign.rewards.shared_scoring import groups_of, shared_states, worth_sharing
from infalign.runtime.console import notice, say
from infalign.types import TEMPLATE_COLUMNS, InputError, RewardError, template_variables

TooLong = Literal["error", "truncate", "mask"]
TOO_LONG = ("error", "truncate", "mask")


class ClassifierReward:
    """A reward model as a TRL reward function.

    Args:
        model_or_path: folder, Hub id, or a model (evaluation mode is set, gradients are switched off).
        tokenizer: the reward model's own; None loads it from the same place.
        label: index or name of the logit that is the reward; needed unless the model has one label.
        batch_tokens: padded tokens per forward pass, at least one sequence; None is 16,384, on a GPU 65,536.
        max_length: tokens of prompt and completion; None takes the model's context.
        too_long: a longer sequence is an `error`, loses tokens at the left (`truncate`; a leading special token
            stays), or gets no score (`mask`). The last two are counted.
        device: None is this process's GPU or the CPU.
        dtype: of the backbone, "auto" as stored.
        chat_template: jinja text to use in place of the tokenizer's.
        chat_template_kwargs: extra variables of the template.
        pair: encode prompt and completion as a pair of texts with token types, `tokenizer(prompt, completion)`, as
            cross-encoders (DeBERTa, BERT) are mostly trained. None is False, with a notice for an encoder.
        as_chat: put text prompts and completions through the chat template, as turns of the user and the assistant.
            None is False, with a notice where the model has a template.
        trust_remote_code: run Python code that comes with the model.

    Attributes:
        counts: `scored`, `truncated`, `masked` (completions).
        fingerprint: of weights, tokenizer and the options that shape scores.

    Raises:
        InputError: no trained head, no choice of label, chats without template, or scores that depend on the batch.
    """

    reads_columns: tuple[str, ...] = TEMPLATE_COLUMNS

    def __init__(
        self,
        model_or_path: Any,
        *,
        tokenizer: Any = None,
        label: int | str | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        too_long: TooLong = "error",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        pair: bool | None = None,
        as_chat: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        _check_options(batch_tokens, max_length, too_long, pair=pair, as_chat=as_chat)
        loaded = load_classifier(
            model_or_path, tokenizer=tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        self.model, self.tokenizer, self.name = loaded.model, loaded.tokenizer, loaded.name
        self.__name__ = self.name.rstrip("/").split("/")[-1]
        self.label = choose_label(self.model.config, label, self.name)
        on_gpu = next(self.model.parameters()).device.type == "cuda"
        self.batch_tokens, self.too_long = batch_tokens or (65_536 if on_gpu else 16_384), too_long
        self.chat_template = chat_template or getattr(self.tokenizer, "chat_template", None)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.pair, self.as_chat = pair, as_chat
        if as_chat and not self.chat_template:
            raise InputError(
                f"as_chat: the tokenizer of the reward model {self.name!r} has no chat template; give chat_template"
            )
        self.counts = {"scored": 0, "truncated": 0, "masked": 0}
        self._shown = self._told_of_chats = False
        self._backbone = keep_head_in_float32(self.model)
        self._is_decoder = (
            isinstance(getattr(self.model, "score", None), nn.Module) and self._backbone is not self.model
        )
        self._skipped_id = getattr(text_config(self.model), "pad_token_id", None)
        self._pad_id = padding_of(self.model, self.tokenizer)
        config = text_config(self.model)
        if not self._is_decoder and getattr(config, "pad_token_id", None) is None:  # such a model pools by itself
            config.pad_token_id = self._pad_id
        self._takes_types = not self._is_decoder and takes_types(self.model)
        self.max_length = longest(self.model, self.tokenizer, self.name, max_length, self._pad_id)
        weights = model_fingerprint(self.model, self.tokenizer)
        shown = repr((self.chat_template, sorted(self.chat_template_kwargs.items())))
        template = hashlib.blake2b(shown.encode(), digest_size=4).hexdigest()
        how = "".join(f":{name}" for name, on in (("pair", pair), ("as_chat", as_chat)) if on)
        self.fingerprint = f"{weights}:{self.label}:{self.max_length}:{too_long}:{template}{how}"
        check_batching(self.name, self.tokenizer, self._backbone, self._forward, self.max_length, self._pad_id)
        if pair is None and not self._is_decoder:
            notice(
                f"reward model {self.name!r} is an encoder and is given prompt and completion as one text: if it was "
                "trained on pairs of texts, as most are, set reward_kwargs: {pair: true}; {pair: false} if not"
            )
        why = why_plain(self.model) if self._is_decoder else None
        self._shares = self._is_decoder and why is None
        if why is not None:
            notice(f"reward model {self.name!r}: prompts are scored once per completion: {why}")

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> NDArray[np.float64]:
        """Scores (B,), one logit per completion; NaN where `too_long="mask"` left one out.

        Of the data's columns `tools` and `chat_template_kwargs` go to the chat template, as in training.

        Raises:
            RewardError: a sequence is too long under `too_long="error"`.
            InputError: chats for a tokenizer without chat template.
        """
        given = [columns.get(name) or [None] * len(prompts) for name in TEMPLATE_COLUMNS]
        variables = [
            template_variables(dict(zip(TEMPLATE_COLUMNS, row, strict=True))) for row in zip(*given, strict=True)
        ]
        pairs = [self._encoded(*row) for row in zip(prompts, completions, variables, strict=True)]
        self._show([ids for ids, _ in pairs])
        kept = [self._places_kept(ids, index) for index, (ids, _) in enumerate(pairs)]
        scores = np.full(len(kept), np.nan)
        chosen = [(index, places) for index, places in enumerate(kept) if places is not None]
        sequences, types = (
            [[pairs[index][side][place] for place in places] for index, places in chosen] for side in (0, 1)
        )
        names = [repr(prompts[index]) for index, _ in chosen]
        scores[[index for index, _ in chosen]] = self.score(sequences, names, types if self.pair else None)
        self.counts["scored"] += len(chosen)
        return scores

    def encode(self, prompt: Text, completion: Text) -> list[int]:
        """Token ids of prompt and completion as this model sees them: one beginning token at most.

        Raises:
            InputError: a chat and no template, or a template that refuses it.
        """
        return self._encoded(prompt, completion)[0]

    def _encoded(
        self, prompt: Text, completion: Text, variables: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids and token types; `variables` are the row's own for the chat template."""
        if self.as_chat:
            prompt, completion = wrapped(prompt, completion)
        elif self.as_chat is None and self.chat_template and isinstance(prompt, str) and isinstance(completion, str):
            self._tell_of_chats()
        options: dict[str, Any] = {
            "name": self.name,
            "chat_template": self.chat_template,
            "chat_template_kwargs": {**self.chat_template_kwargs, **(variables or {})},
        }
        if self.pair:
            return encode_as_pair(self.tokenizer, prompt, completion, **options)
        ids = encode_pair(self.tokenizer, prompt, completion, **options)
        return ids, [0] * len(ids)

    def _tell_of_chats(self) -> None:
        if not self._told_of_chats:
            self._told_of_chats = True
            notice(
                f"reward model {self.name!r} has a chat template, and the prompts are texts: they are scored without "
                "it; set reward_kwargs: {as_chat: true} to wrap prompt and completion as turns of a chat, {as_chat: "
                "false} if bare text is right"
            )

    def render(self, prompt: Text, completion: Text) -> str:
        """The text that `encode` stands for, special tokens shown: to print one example."""
        return self.tokenizer.decode(self.encode(prompt, completion))

    def _show(self, sequences: Sequence[list[int]]) -> None:
        """Print the first sequence ever scored as this model sees it: a wrong template shows here first."""
        if not self._shown and sequences:
            self._shown = True
            example = shown(self.tokenizer.decode(sequences[0]))
            say(f"  what the reward model {self.__name__} sees, for example: {example}")

    def score(
        self,
        sequences: Sequence[list[int]],
        names: Sequence[Hashable] | None = None,
        types: Sequence[list[int]] | None = None,
    ) -> NDArray[np.float64]:
        """Logits (B,) of token sequences, in length-bucketed batches, longest first.

        Args:
            sequences: token ids.
            names: sequences of one name (a prompt) go through the backbone with their common beginning computed once.
            types: token types of each sequence, for an encoder; None is 0 throughout.
        """
        scores = np.empty(len(sequences))
        groups = groups_of(sequences, names) if names is not None and self._shares else []
        last = [last_index(ids, self._skipped_id) for ids in sequences]
        # a score that is read before the shared beginning ends needs a state that continuations do not have
        whole = [group for group in groups if all(last[row] >= group.shared - 1 for row in group.rows)]
        shared = worth_sharing(whole, pass_cost(self.model))
        with torch.inference_mode():
            for rows, states in shared_states(self.model, sequences, shared, last, self._pad_id, self.batch_tokens):
                scores[rows] = self.model.score(states)[:, self.label].double().cpu().numpy()
        done = {row for group in shared for row in group.rows}
        rest = [row for row in range(len(sequences)) if row not in done]
        for bucket in buckets([len(sequences[row]) for row in rest], self.batch_tokens, cost=pass_cost(self.model)):
            rows = [rest[index] for index in bucket]
            of_rows = None if types is None else [types[row] for row in rows]
            scores[rows] = self._forward([sequences[row] for row in rows], of_rows)
        return scores

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[list[int]], types: Sequence[list[int]] | None = None) -> NDArray[np.float64]:
        lengths = torch.tensor([len(ids) for ids in sequences])
        width = int(lengths.max())
        padded = [ids + [self._pad_id] * (width - len(ids)) for ids in sequences]
        device = next(self.model.parameters()).device
        inputs = torch.tensor(padded, device=device)
        mask = (torch.arange(width) < lengths[:, None]).long().to(device)
        if self._is_decoder:
            hidden = self._backbone(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
            last = torch.tensor([last_index(ids, self._skipped_id) for ids in sequences], device=device)
            logits = self.model.score(hidden[torch.arange(len(sequences), device=device), last])
        else:
            more = {}
            if types is not None and self._takes_types:
                more["token_type_ids"] = torch.tensor([row + [0] * (width - len(row)) for row in types], device=device)
            logits = self.model(input_ids=inputs, attention_mask=mask, **more).logits
        return logits[:, self.label].double().cpu().numpy()

    def _places_kept(self, ids: list[int], index: int) -> Sequence[int] | None:
        """Which tokens of a sequence are scored; None when it gets no score."""
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return range(len(ids))
        if self.too_long == "error":
            raise RewardError(
                f"completion {index} has {len(ids)} tokens with its prompt, the reward model {self.name!r} takes "
                f"{limit}; shorten prompts or completions, or set too_long to truncate or mask"
            )
        self.counts["truncated" if self.too_long == "truncate" else "masked"] += 1
        if self.too_long == "mask":
            return None
        # truncation takes from the front, where the prompt begins; only a beginning-of-text token stays
        first = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        kept = [0] if ids[0] in first and limit > 1 else []
        return [*kept, *range(len(ids) - limit + len(kept), len(ids))]


def _check_options(batch_tokens: int | None, max_length: int | None, too_long: str, **switches: Any) -> None:
    for name, value in (("batch_tokens", batch_tokens), ("max_length", max_length)):
        if value is not None and value < 1:
            raise InputError(f"{name} is at least 1 token, got {value}")
    if too_long not in TOO_LONG:
        raise InputError(f"too_long is one of {', '.join(TOO_LONG)}, got {too_long!r}")
    for name, value in switches.items():
        if value not in (None, True, False):
            raise InputError(f"{name} is true or false, got {value!r}")
