"""Requests of OpenAI's API, checked field by field: what would change the answer is honoured or refused.

Fields of our own stand in the object `infalign` (the client's `extra_body`): `n`, the candidates of each decoding, and
`return_candidates`. OpenAI's `n` counts choices, each decoded on its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from infalign.serving.engine import Setting
from infalign.serving.refusal import Refusal
from infalign.types import Messages, SamplingSettings

Kind = Literal["chat", "text"]

MAX_CHOICES = 64
MAX_STOPS = 16
ROLES = ("system", "developer", "user", "assistant", "tool")
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that change no answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
}
"""Fields that are not supported, with the values at which they say nothing."""
_OURS = {
    "chat": {"messages", "max_completion_tokens"},
    "text": {"prompt", "best_of"},
}
_SHARED = {"model", "n", "seed", "max_tokens", "temperature", "top_p", "stop", "stream", "stream_options", "infalign"}


@dataclass(frozen=True)
class Ask:
    """A checked request: `contents` are chats or texts, each decoded `choices` times from `seed` on."""

    kind: Kind
    contents: tuple[str | Messages, ...]
    setting: Setting
    choices: int
    seed: int
    stream: bool
    include_usage: bool
    return_candidates: bool


def read_request(body: Any, kind: Kind, own: SamplingSettings, model: str) -> Ask:
    """The request that a JSON body is.

    Args:
        body: what was sent.
        kind: chat for /v1/chat/completions, text for /v1/completions.
        own: the recipe's sampling settings, which hold where the request says nothing; no completion may be longer.
        model: the name that is served.

    Raises:
        Refusal: 400 with the field at fault, or 404 for another model.
    """
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object, got {type(body).__name__}")
    _check_names(body, kind)
    given = {name: value for name, value in body.items() if value is not None}
    if not isinstance(given.get("model"), str):
        raise _bad("model", f"must be the name of a model, got {_shown(given.get('model'))}: this one is {model!r}")
    if given["model"] != model:
        raise Refusal(
            404, f"no model {given['model']!r:.80} here, only {model!r}", param="model", code="model_not_found"
        )
    contents = (_chat(given.get("messages")),) if kind == "chat" else _texts(given.get("prompt"))
    extension = _extension(given)
    options = _object(given, "stream_options", {"include_usage": bool, "include_obfuscation": bool})
    stream = _typed(given, "stream", bool, False)
    if options and not stream:
        raise _bad("stream_options", "goes with stream: true only")
    choices = _whole(given, "n", 1, 1, MAX_CHOICES)
    if len(contents) * choices > MAX_CHOICES:
        raise _bad("n", f"times the prompts is at most {MAX_CHOICES}, got {choices} times {len(contents)}")
    return Ask(
        kind=kind,
        contents=contents,
        setting=Setting(_sampling(given, own), _stops(given.get("stop")), _candidates(given, extension)),
        choices=choices,
        seed=_whole(given, "seed", secrets.randbits(48), -(2**63), 2**63 - 1),
        stream=stream,
        include_usage=options.get("include_usage", False),
        return_candidates=extension.get("return_candidates", False),
    )


def _check_names(body: Mapping[str, Any], kind: Kind) -> None:
    known = _SHARED | _OURS[kind] | HARMLESS
    for name, value in body.items():
        if name in known or value is None or any(_same(value, one) for one in NEUTRAL.get(name, ())):
            continue
        if name in NEUTRAL:
            raise _bad(name, f"is not supported here: leave it out, got {_shown(value)}", code="unsupported_parameter")
        allowed = ", ".join(sorted(_SHARED | _OURS[kind]))
        raise _bad(name[:80], f"is unknown here; what is read: {allowed}", code="unknown_parameter")


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


# --- prompts ------------------------------------------------------------------------------------------------------


def _chat(messages: Any) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", f"must be a list of turns, got {_shown(messages)}")
    chat = [_turn(turn, f"messages[{place}]") for place, turn in enumerate(messages)]
    if chat[-1]["role"] not in ("user", "tool"):
        raise _bad("messages", f"must end with the user's turn, the last one is the {chat[-1]['role']}'s")
    if not chat[-1]["content"].strip():
        raise _bad("messages", "must not end with an empty turn")
    return chat


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise _bad(where, f"must be an object with role and content, got {_shown(turn)}")
    if turn.get("role") not in ROLES:
        raise _bad(f"{where}.role", f"is one of {', '.join(ROLES)}, got {_shown(turn.get('role'))}")
    more = [name for name, value in turn.items() if name not in ("role", "content", "name") and value]
    if more:
        raise _bad(f"{where}.{more[0]}"[:80], "is not supported here", code="unsupported_parameter")
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    return {"role": turn["role"], "content": _text(content, f"{where}.content")}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise _bad(where, f"must be a text part, got {_shown(part)}: this model reads text only")
    return _text(part.get("text"), where)


def _texts(prompt: Any) -> tuple[str, ...]:
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _bad("prompt", f"must be a text or a list of texts, got {_shown(prompt)}: token ids are not read here")
    for text in texts:
        if not _text(text, "prompt").strip():
            raise _bad("prompt", "must not be empty")
    return tuple(texts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _bad(where, f"must be a text, got {_shown(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _bad(where, "holds half a surrogate pair, which is no text")
    return value


# --- settings -----------------------------------------------------------------------------------------------------


def _sampling(given: Mapping[str, Any], own: SamplingSettings) -> SamplingSettings:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(names) == 2 and given[names[0]] != given[names[1]]:
        raise _bad("max_tokens", "and max_completion_tokens differ: give one")
    name = names[0] if names else "max_tokens"
    count = _whole(given, name, own.max_tokens, 1, None)
    if count > own.max_tokens:
        raise _bad(name, f"is at most {own.max_tokens} here (the recipe's max_completion_length), got {count}")
    temperature = _number(given, "temperature", own.temperature)
    if not 0 < temperature <= 2:
        what = "is above 0 and at most 2: at 0 all candidates would be alike"
        raise _bad("temperature", f"{what}; got {temperature:g}")
    top_p = _number(given, "top_p", own.top_p)
    if not 0 < top_p <= 1:
        raise _bad("top_p", f"is above 0 and at most 1, got {top_p:g}")
    return replace(own, max_tokens=count, temperature=temperature, top_p=top_p)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if len(stops) > MAX_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise _bad("stop", f"must be a text or a list of at most {MAX_STOPS} texts, none empty, got {_shown(stop)}")
    return tuple(dict.fromkeys(stops))


def _extension(given: Mapping[str, Any]) -> dict[str, Any]:
    return _object(given, "infalign", {"n": int, "return_candidates": bool})


def _candidates(given: Mapping[str, Any], extension: Mapping[str, Any]) -> int | None:
    """N of a decoding: `infalign.n`, or OpenAI's older `best_of`, which says the same of one choice."""
    best_of = _whole(given, "best_of", None, 1, None)
    asked = _whole(extension, "n", None, 1, None, "infalign.n")
    if best_of is not None and (given.get("n", 1) != 1 or asked is not None):
        raise _bad("best_of", "goes with n: 1 only; with more choices, or instead, give infalign.n")
    return asked if best_of is None else best_of


def _object(given: Mapping[str, Any], name: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """An object with known fields of known types, those at null left out."""
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise _bad(name, f"must be an object, got {_shown(value)}")
    for field, one in value.items():
        if field not in fields:
            raise _bad(f"{name}.{field}"[:80], f"is unknown here; fields: {', '.join(fields)}", "unknown_parameter")
        if one is not None:
            _typed(value, field, fields[field], None, f"{name}.{field}")
    return {field: one for field, one in value.items() if one is not None}


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any, where: str | None = None) -> Any:
    value = given.get(name, default)
    if name in given and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
        words = {bool: "true or false", int: "a whole number"}[kind]
        raise _bad(where or name, f"must be {words}, got {_shown(value)}")
    return value


def _whole(
    given: Mapping[str, Any], name: str, default: Any, least: int, most: int | None, where: str | None = None
) -> Any:
    value = _typed(given, name, int, default, where)
    if name in given and (value < least or (most is not None and value > most)):
        limits = f"at least {least}" if most is None else f"between {least} and {most}"
        raise _bad(where or name, f"must be {limits}, got {_shown(value)}")
    return value


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _bad(name, f"must be a number, got {_shown(value)}")
    return float(min(max(value, -1e9), 1e9))


def _bad(param: str, problem: str, code: str | None = None) -> Refusal:
    return Refusal(400, f"{param} {problem}", param=param, code=code)


def _shown(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."
