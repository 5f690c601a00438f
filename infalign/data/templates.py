"""Prompts as the model sees them: chat templates, beginning-of-text tokens, lengths. Needs a tokenizer, not torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from infalign.types import InputError, Messages

logger = logging.getLogger(__name__)

LengthPolicy = Literal["error", "drop", "truncate"]
LENGTH_POLICIES = ("error", "drop", "truncate")


@dataclass(frozen=True)
class CheckedLengths:
    """Prompts within `limit` tokens: `ids` by key; keys of those `dropped` or `truncated`; `longest` before that."""

    ids: dict[str, list[int]]
    longest: int
    limit: int | None
    dropped: tuple[str, ...] = field(default=())
    truncated: tuple[str, ...] = field(default=())


def with_system(content: str | Messages, system_prompt: str | None) -> str | Messages:
    """`content` with the system prompt in front: a system turn, or for plain text a first paragraph.

    A chat that has a system turn of its own keeps it; None or "" changes nothing.

    >>> with_system([{"role": "user", "content": "hi"}], "Be kind.")[0]
    {'role': 'system', 'content': 'Be kind.'}
    """
    if not system_prompt:
        return content
    if isinstance(content, str):
        return f"{system_prompt}\n\n{content}"
    if content and content[0]["role"] in ("system", "developer"):
        return content
    return [{"role": "system", "content": system_prompt}, *content]


def render(
    tokenizer: Any,
    prompt_content: str | Messages,
    *,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt as the model will see it.

    A chat goes through the tokenizer's template, with the header of the assistant's turn; plain text through the
    tokenizer, with its special tokens in front (an end token that the tokenizer appends is taken off). A doubled
    beginning-of-text token is reduced to one; one that the tokenizer adds to text but the template leaves out is
    worth a warning (the template decides, as it does in TRL and in serving engines).

    Args:
        tokenizer: a transformers tokenizer.
        prompt_content: text, or messages ending with the user's turn.
        system_prompt: see `with_system`.
        chat_template_kwargs: extra variables of the template, e.g. `{"enable_thinking": False}`; `tools` as well.

    Raises:
        InputError: a chat for a tokenizer without template, a template that refuses the chat, an empty result.
    """
    content = with_system(prompt_content, system_prompt)
    if isinstance(content, str):
        ids = _without_final_eos(tokenizer, tokenizer(content)["input_ids"])
    else:
        ids = render_chat(tokenizer, content, add_generation_prompt=True, chat_template_kwargs=chat_template_kwargs)
    if not ids:
        raise InputError(f"the prompt {prompt_content!r:.60} has no tokens")
    return single_bos(tokenizer, ids)


def render_chat(
    tokenizer: Any,
    messages: Messages,
    *,
    add_generation_prompt: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a chat through the tokenizer's own template.

    Raises:
        InputError: there is no template, or it refuses these messages (the template's own words are quoted).
    """
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InputError(
            f"the prompts are chats but the tokenizer of {name!r} has no chat template; use an instruction-tuned "
            f"model, give a chat template, or give plain-text prompts"
        )
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=add_generation_prompt,
            **dict(chat_template_kwargs or {}),
        )
    except Exception as error:  # jinja errors, and whatever a template raises by itself
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"the chat template refuses a chat with the roles {roles}: {error}") from error
    ids = single_bos(tokenizer, list(ids))
    _warn_without_bos(tokenizer, ids)
    return ids


def single_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """`ids` with a repeated beginning-of-text token at the front reduced to one."""
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def check_lengths(
    ids_by_key: Mapping[str, list[int]],
    max_prompt_length: int | None = None,
    policy: LengthPolicy = "error",
    model_max: int | None = None,
    *,
    reserve: int = 0,
    bos_token_id: int | None = None,
) -> CheckedLengths:
    """Hold all prompts to a length, counted before any work starts.

    Args:
        ids_by_key: token ids of every prompt.
        max_prompt_length: tokens, or None for no limit of one's own.
        policy: `error`; `drop` the long ones; `truncate` keeps the last tokens.
        model_max: the model's context in tokens, or None when unknown.
        reserve: tokens of the context kept free for the completion.
        bos_token_id: a leading token that truncation keeps.

    Raises:
        InputError: a limit below one token, prompts too long under `error`, or nothing left under `drop`.
    """
    if policy not in LENGTH_POLICIES:
        raise InputError(f"the policy for long prompts is one of {', '.join(LENGTH_POLICIES)}, got {policy!r}")
    limit = _limit(max_prompt_length, model_max, reserve)
    longest = max(map(len, ids_by_key.values()), default=0)
    long = [] if limit is None else [key for key, ids in ids_by_key.items() if len(ids) > limit]
    if limit is None or not long:
        return CheckedLengths(dict(ids_by_key), longest, limit)
    if policy == "error":
        raise InputError(
            f"{len(long)} of {len(ids_by_key)} prompts are longer than {limit} tokens (the longest has {longest}, "
            f"e.g. the prompt {long[0]}); raise max_prompt_length, or choose drop or truncate"
        )
    if policy == "truncate":
        cut = {key: last_tokens(ids, limit, bos_token_id) for key, ids in ids_by_key.items()}
        return CheckedLengths(cut, longest, limit, truncated=tuple(long))
    kept = {key: ids for key, ids in ids_by_key.items() if len(ids) <= limit}
    if not kept:
        raise InputError(f"all {len(long)} prompts are longer than {limit} tokens; raise max_prompt_length")
    return CheckedLengths(kept, longest, limit, dropped=tuple(long))


def _limit(max_prompt_length: int | None, model_max: int | None, reserve: int) -> int | None:
    room = None if model_max is None else model_max - reserve
    limits = [limit for limit in (max_prompt_length, room) if limit is not None]
    if limits and min(limits) < 1:
        raise InputError(
            f"no room for a prompt: max_prompt_length {max_prompt_length}, context {model_max} tokens, of which "
            f"{reserve} for the completion: lower max_completion_length"
        )
    return min(limits, default=None)


def last_tokens(ids: list[int], limit: int, bos_token_id: int | None) -> list[int]:
    """The last `limit` tokens; a beginning-of-text token in front stays there."""
    if len(ids) <= limit:
        return ids
    if bos_token_id is not None and ids[0] == bos_token_id and limit > 1:
        return [bos_token_id, *ids[len(ids) - limit + 1 :]]
    return ids[len(ids) - limit :]


def _without_final_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    plain = list(ids)
    final = tokenizer.eos_token_id
    adds_eos = final is not None and tokenizer("a")["input_ids"][-1:] == [final]
    return plain[:-1] if adds_eos and plain[-1:] == [final] else plain


def _warn_without_bos(tokenizer: Any, ids: list[int]) -> None:
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or getattr(tokenizer, "_infalign_bos_warned", False):
        return
    if tokenizer("a")["input_ids"][:1] == [bos]:
        tokenizer._infalign_bos_warned = True
        logger.warning(
            "the tokenizer puts %r before text but its chat template does not; the template is followed",
            tokenizer.bos_token,
        )
