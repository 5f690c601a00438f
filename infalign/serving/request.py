"""Requests of OpenAI's API as pydantic models: what would change the answer is honoured or refused.

Fields of our own stand in the object `infalign` (the client's `extra_body`): `n`, the candidates of each decoding, and
`return_candidates`. OpenAI's `n` counts choices, each decoded on its own.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from infalign.serving.engine import Setting
from infalign.serving.refusal import Refusal
from infalign.types import Messages, SamplingSettings

Kind = Literal["chat", "text"]

MAX_CHOICES = 64
MAX_STOPS = 16
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
}  # fmt: skip
"""Fields that change no answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
}
"""Fields that are not supported (the last ones are vLLM's), each with the values that change no answer."""
NOT_OF = {
    "chat": {"prompt", "best_of"},
    "text": {"messages", "max_completion_tokens", "chat_template_kwargs", "top_logprobs"},
}
"""Fields that a kind of request does not have."""
MUST_BE = {
    "messages": "a list of turns",
    "messages[]": "an object with role and content",
    "messages[].role": "one of system, developer, user, assistant, tool",
    "messages[].content": "a text",
    "messages[].content[]": "a text part (this model reads text only)",
    "prompt": "a text or a list of texts (token ids are not read here)",
    "n": f"a whole number between 1 and {MAX_CHOICES}",
    "seed": "a whole number between -2^63 and 2^63 - 1",
    "temperature": "a number between 0 and 2",
    "top_logprobs": "0: there are no log-probabilities of other tokens here",
    "chat_template_kwargs": "an object of the chat template's variables",
    "top_p": "a number above 0 and at most 1",
    "stop": f"a text or a list of at most {MAX_STOPS} texts, none empty",
    "bool_type": "true or false",
    "int_type": "a whole number of at least 1",
    "greater_than_equal": "a whole number of at least 1",
    "model_type": "an object",
    "string_unicode": "an object whose names are text",
}
"""What a field must be, in the words of a message: by its name, or else by the type of pydantic's error."""


def _check_text(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds half a surrogate pair, which is no text")
    return text


def _check_logprobs(value: Any) -> Any:
    if not isinstance(value, bool) and not (isinstance(value, int) and value == 0):
        told = "must be true or false, of a text 0 (the log-probabilities of the answer's own tokens)"
        raise ValueError(f"{told}, got {_shown(value)}")
    return value


def _check_prompts(texts: list[str]) -> list[str]:
    if not all(_check_text(text).strip() for text in texts):
        raise ValueError("must not be empty")
    return texts


def _check_chat(turns: list[Turn]) -> list[Turn]:
    for place, turn in enumerate(turns):
        for name, value in (turn.model_extra or {}).items():
            if value:  # an answer that is sent back may hold `annotations: []`
                raise _bad(f"messages[{place}].{name}"[:80], "is not supported here", "unsupported_parameter")
    if turns[-1].role not in ("user", "tool"):
        raise ValueError(f"must end with the user's turn, the last one is the {turns[-1].role}'s")
    if not turns[-1].text.strip():
        raise ValueError("must not end with an empty turn")
    return turns


Count = Annotated[int, Field(ge=1)]
as_list = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
as_parts = BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value)


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Part(_Object, extra="ignore"):
    """A part of a turn."""

    type: Literal["text"]
    text: Annotated[str, AfterValidator(_check_text)]


class Turn(_Object, extra="allow"):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], as_parts]
    name: Any = None

    @property
    def text(self) -> str:
        """Its parts together."""
        return "".join(part.text for part in self.content)


class StreamOptions(_Object):
    """OpenAI's."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Extension(_Object):
    """Our own fields."""

    n: Count | None = None
    return_candidates: bool = False


class CompletionRequest(_Object):
    """A request of either kind: of a chat with `messages`, of a text with `prompt`."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1), AfterValidator(_check_chat)] = []
    prompt: Annotated[list[str], as_list, Field(min_length=1), AfterValidator(_check_prompts)] = []
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    best_of: Count | None = None
    seed: int = Field(default_factory=lambda: secrets.randbits(48), ge=-(2**63), lt=2**63)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], as_list, Field(max_length=MAX_STOPS)] = []
    logprobs: Annotated[Any, Field(json_schema_extra={"enum": [False, True, 0]}), AfterValidator(_check_logprobs)] = (
        False
    )
    top_logprobs: Literal[0] = 0
    chat_template_kwargs: dict[str, Any] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    infalign: Extension = Extension()

    @property
    def contents(self) -> list[Messages] | list[str]:
        """The prompts, each to be decoded `n` times."""
        return [[{"role": turn.role, "content": turn.text} for turn in self.messages]] if self.messages else self.prompt

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer carries log-probabilities of its tokens; of a text 0 asks for them, false does not."""
        return self.logprobs is not False

    @property
    def is_greedy(self) -> bool:
        """Whether every candidate would be the same, the likeliest token at each place."""
        return self.temperature == 0

    def setting(self, own: SamplingSettings, *, cap: bool = True) -> tuple[Setting, tuple[str, ...]]:
        """What the decoder is asked for, and what of the request it is not (to be told with the answer).

        The recipe's `own` settings hold where the request says nothing. Longer completions than the recipe's are cut at
        its length, or refused where `cap` is false. At temperature 0 the likeliest token is drawn at every place.

        Raises:
            Refusal: 400 if completions may become longer than the recipe's.
        """
        given = self.model_dump(include={"temperature", "top_p"}, exclude_none=True)
        lengths = self.model_dump(include={"max_tokens", "max_completion_tokens"}, exclude_none=True)
        if len(set(lengths.values())) > 1:
            raise _bad("max_tokens", "and max_completion_tokens differ: give one")
        notes = []
        for name, count in lengths.items():
            if count > own.max_tokens and not cap:
                raise _bad(name, f"is at most {own.max_tokens} here (the recipe's max_completion_length), got {count}")
            if count > own.max_tokens:
                notes.append(f"{name} is {own.max_tokens}, the recipe's max_completion_length, and not {count}")
            given["max_tokens"] = min(count, own.max_tokens)
        if self.is_greedy:
            given |= {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
        setting = Setting(replace(own, **given), tuple(dict.fromkeys(self.stop)), self.best_of or self.infalign.n)
        return setting, tuple(notes)


def read_request(body: Any, kind: Kind, model: str) -> CompletionRequest:
    """The request that a JSON body is, its nulls left out; `model` is the name that is served.

    Raises:
        Refusal: 400 with the field at fault, or 404 for another model.
    """
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object, got {type(body).__name__}")
    given = {name: value for name, value in body.items() if name not in HARMLESS and not _is_neutral(name, value)}
    fields = sorted(CompletionRequest.model_fields.keys() - NOT_OF[kind])
    for name, value in given.items():
        if name in NEUTRAL:
            raise _bad(name, f"is not supported here: leave it out, got {_shown(value)}", "unsupported_parameter")
        if name not in fields:
            raise _bad(name[:80], f"is unknown here; what is read: {', '.join(fields)}", "unknown_parameter")
    if not isinstance(given.get("model"), str):
        raise _bad("model", f"must be the name of a model, got {_shown(given.get('model'))}: this one is {model!r}")
    if given["model"] != model:
        words = f"no model {given['model']!r:.80} here, only {model!r}"
        raise Refusal(404, words, param="model", code="model_not_found")
    given.setdefault("messages" if kind == "chat" else "prompt", None)
    try:
        ask = CompletionRequest.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None
    if ask.stream_options.model_fields_set and not ask.stream:
        raise _bad("stream_options", "goes with stream: true only")
    if len(ask.contents) * ask.n > MAX_CHOICES:
        raise _bad("n", f"times the prompts is at most {MAX_CHOICES}, got {ask.n} times {len(ask.contents)}")
    if ask.best_of is not None and (ask.n != 1 or ask.infalign.n is not None):
        raise _bad("best_of", "goes with n: 1 only; with more choices, or instead, give infalign.n")
    return ask


def _is_neutral(name: str, value: Any) -> bool:
    return any(  # 0 == False
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )


def _refusal(error: ValidationError) -> Refusal:
    """The first error that pydantic found, as one of the innermost field that `MUST_BE` names."""
    first = error.errors()[0]
    kind, paths = first["type"], [""]
    for part in first["loc"]:
        paths.append(paths[-1] + (f"[{part}]" if isinstance(part, int) else f".{part}" if paths[-1] else part))
    if kind == "extra_forbidden":
        allowed = {"infalign": Extension, "stream_options": StreamOptions}[paths[1]].model_fields
        return _bad(paths[-1][:80], f"is unknown here; fields: {', '.join(allowed)}", "unknown_parameter")
    names = {re.sub(r"\d+", "", path): path for path in paths}
    name = next((name for name in reversed(names) if name in MUST_BE), kind)
    param = names.get(name, paths[-1])
    if kind == "value_error":
        return _bad(param, str(first.get("ctx", {})["error"]))
    return _bad(param, f"must be {MUST_BE[name]}, got {_shown(None if kind == 'missing' else first['input'])}")


def _bad(param: str, problem: str, code: str | None = None) -> Refusal:
    return Refusal(400, f"{param} {problem}", param=param, code=code)


def _shown(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."
