"""A prompt and its completion as a reward model sees them, in training and in use: its own tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infalign.rewards.contract import Text
from infalign.types import InputError, Messages


def encode_pair(
    tokenizer: Any,
    prompt: Text,
    completion: Text,
    *,
    name: str,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of prompt and completion: one beginning token at most.

    Two texts are joined; anything else is a chat and goes through the template.

    Args:
        tokenizer: the reward model's.
        prompt, completion: texts or messages.
        name: the reward model's, for messages.
        chat_template: jinja text to use in place of the tokenizer's.
        chat_template_kwargs: extra variables of the template.

    Raises:
        InputError: a chat and no template, a template that refuses it, or no tokens at all.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        ids = list(tokenizer(prompt + completion)["input_ids"])
    else:
        messages = _as_messages(prompt, "user") + _as_messages(completion, "assistant")
        template = chat_template or getattr(tokenizer, "chat_template", None)
        ids = _encode_chat(tokenizer, messages, name, template, chat_template_kwargs or {})
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if not ids:
        raise InputError(f"reward model {name!r}: prompt and completion together have no tokens")
    return ids


def last_index(ids: Sequence[int], skipped_id: int | None) -> int:
    """Where a decoder's score is read: the last token that is not `skipped_id` (its config's pad token), 0 if none is.

    >>> last_index([5, 6, 0], 0)
    1
    """
    return max((index for index, token_id in enumerate(ids) if token_id != skipped_id), default=0)


def _encode_chat(
    tokenizer: Any, messages: Messages, name: str, template: str | None, variables: Mapping[str, Any]
) -> list[int]:
    if not template:
        raise InputError(
            f"the prompts are chats but the tokenizer of the reward model {name!r} has no chat template; "
            f"give chat_template, or use text prompts"
        )
    try:
        ids = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=False, **variables
        )
    except Exception as error:  # jinja errors, and whatever a template raises by itself
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template of the reward model {name!r} refuses a chat with the roles {roles}: {error}"
        ) from error
    return list(ids)


def _as_messages(content: Text, role: str) -> Messages:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)
