"""A prompt and its completion as a reward model sees them, in training and in use: its own tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infalign.rewards.contract import Text, completion_text
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
        asked, answered = as_chat(prompt, completion)
        messages = asked + answered
        template = _template_for_chats(tokenizer, name, chat_template)
        variables = chat_template_kwargs or {}
        ids = list(_applied(tokenizer, messages, name, template, variables, tokenize=True, return_dict=False))
    ids = ids[_repeated_beginnings(tokenizer, ids) :]
    if not ids:
        raise InputError(f"reward model {name!r}: prompt and completion together have no tokens")
    return ids


def encode_as_pair(
    tokenizer: Any,
    prompt: Text,
    completion: Text,
    *,
    name: str,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids and token types of `tokenizer(prompt, completion)`: a pair, as cross-encoders are trained.

    A chat prompt is rendered by the template, without a beginning of the answer; of a completion its text counts.
    Arguments as for `encode_pair`. Types are all 0 where the tokenizer tells none.

    Raises:
        InputError: a chat prompt and no template, a template that refuses it, or no tokens at all.
    """
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if not isinstance(prompt, str):
        if not template:
            raise InputError(
                f"the prompts are chats and the reward model {name!r} takes pairs of texts: give a chat_template that "
                "makes a text of a chat, e.g. \"{{ messages[-1]['content'] }}\" for its last turn, or use text prompts"
            )
        prompt = str(_applied(tokenizer, list(prompt), name, template, chat_template_kwargs or {}, tokenize=False))
    encoded = tokenizer(prompt, completion_text(completion))
    ids = list(encoded["input_ids"])
    types = list(encoded.get("token_type_ids", [0] * len(ids)))
    skipped = _repeated_beginnings(tokenizer, ids)
    if not ids[skipped:]:
        raise InputError(f"reward model {name!r}: prompt and completion together have no tokens")
    return ids[skipped:], types[skipped:]


def rendered(
    tokenizer: Any,
    prompt: Text,
    completion: Text,
    *,
    name: str,
    chat_template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The chat of prompt and completion as the template writes it; arguments as for `encode_pair`.

    Raises:
        InputError: no template, or one that refuses the chat.
    """
    asked, answered = as_chat(prompt, completion)
    template = _template_for_chats(tokenizer, name, chat_template)
    return str(_applied(tokenizer, asked + answered, name, template, variables or {}, tokenize=False))


def shown(text: str, most: int = 600) -> str:
    """A text as `repr`, its middle left out when it is long."""
    return repr(text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}")


def as_chat(prompt: Text, completion: Text) -> tuple[Messages, Messages]:
    """A prompt and its completion as a chat; a text is the user's turn, or the assistant's.

    >>> as_chat("Hi", "there")
    ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'there'}])
    """
    return _as_messages(prompt, "user"), _as_messages(completion, "assistant")


def _repeated_beginnings(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many beginning tokens stand before the last of them."""
    bos, count = tokenizer.bos_token_id, 0
    while bos is not None and list(ids[count : count + 2]) == [bos, bos]:
        count += 1
    return count


def last_index(ids: Sequence[int], skipped_id: int | None) -> int:
    """Where a decoder's score is read: the last token that is not `skipped_id` (its config's pad token), 0 if none is.

    >>> last_index([5, 6, 0], 0)
    1
    """
    return max((index for index, token_id in enumerate(ids) if token_id != skipped_id), default=0)


def _template_for_chats(tokenizer: Any, name: str, chat_template: str | None) -> str:
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if not template:
        raise InputError(
            f"the prompts are chats but the tokenizer of the reward model {name!r} has no chat template; "
            f"give chat_template, or use text prompts"
        )
    return template


def _applied(
    tokenizer: Any, messages: Messages, name: str, template: str, variables: Mapping[str, Any], **how: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, **how, **variables)
    except Exception as error:  # jinja errors, and whatever a template raises by itself
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template of the reward model {name!r} refuses a chat with the roles {roles}: {error}"
        ) from error


def _as_messages(content: Text, role: str) -> Messages:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)
