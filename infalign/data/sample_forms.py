"""How tools of the field write samples, and how a row of each is read.

| who | the prompt | its completions | rewards |
|---|---|---|---|
| infalign, TRL, vBoN, ... | as in `infalign.data.forms` | `completions`, `responses`, `outputs`, `generations`; a row a sample: `completion`, `response`, `output` | `rewards`, `scores`, `ratings`; `reward`, `score`; `gold_...` |
| QRPO | likewise | `ref_completions` | `ref_rewards` |
| UltraFeedback, vLLM | likewise | objects in such a list, each with its `response` or `text` | their `reward`, `score`, `overall_score` |
| `infalign generate` | `prompt` | `candidates`, each with its reward | theirs |
| AlpacaEval | `instruction` | `output` | |
| a chat with its answer | `messages`, `conversations` up to the assistant's last turn | that turn | `reward`, `score` |
| lm-eval's `--log_samples` | `arguments` | `resps`; `filtered_resps` where the metric has one value | a metric, by `--columns rewards=exact_match` |
| OpenAI's batch files | the request of the same `custom_id`, from `--requests` | `response.body.choices` | |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infalign.data.chats import from_text
from infalign.data.forms import find_form, from_prompt
from infalign.data.sources import Row
from infalign.types import InputError, Messages

MANY = ("completions", "responses", "outputs", "generations", "ref_completions")
ONE = ("completion", "response", "output")
REWARDS = ("rewards", "scores", "ratings", "ref_rewards")
REWARD = ("reward", "score")
GOLD = ("gold_rewards", "gold_scores")
GOLD_ONE = ("gold_reward", "gold_score")
LOGPS = ("logps", "ref_logps", "logprobs", "logp", "logprob")
"""Log-probabilities of completions under the model that drew them, nats: of each token, or their sum."""
_OURS = {*MANY, *ONE, *REWARDS, *REWARD, *GOLD, *GOLD_ONE, *LOGPS, "candidates", "chosen", "rejected", "spent", "error"}
_OWN_TEXTS = ("content", "text", "response", "completion", "output")
_OWN_SCORES = (*REWARD, "overall_score")
_CHATS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class SampleRow:
    """One row of samples: the prompt, its completions, what they scored (None where nothing is said), the rest."""

    content: str | Messages
    texts: list[str]
    rewards: list[Any] | None = None
    gold: list[Any] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    logps: list[Any] | None = None


@dataclass(frozen=True)
class SampleForm:
    """How a file's rows are read: `read` gives None for a row without samples (a request that failed).

    `single` forms have a row a sample; `note` says what was recognised, where that is worth a line.
    """

    read: Callable[[Row], SampleRow | None]
    single: bool = False
    note: str = ""


def find_sample_form(row: Row, source: str, requests: Mapping[str, Any] | None) -> SampleForm:
    """The form of rows like `row`.

    Args:
        row: with our names already in place of others (`--columns`).
        source: the file, for messages.
        requests: prompts by `custom_id`, from `read_requests`, for OpenAI's batch files.

    Raises:
        InputError: nothing that is known, in one line: what was found and what is accepted.
    """
    if "custom_id" in row and "response" in row:
        if requests is None:
            raise InputError(
                f"{source}: results of a batch have a custom_id and no prompt: give the request files, "
                "--requests FILE [FILE]"
            )
        return SampleForm(lambda one: _batch_row(one, requests), note="results of an OpenAI batch")
    if "resps" in row and "arguments" in row:
        return SampleForm(_lm_eval_row, note="lm-eval's logged samples (filtered_resps where a metric has one value)")
    if isinstance(row.get("candidates"), list):
        return SampleForm(_generated_row)
    many = next((name for name in MANY if name in row), None)
    one = next((name for name in ONE if name in row), None)
    chat = next((name for name in _CHATS if name in row and "prompt" not in row), None)
    if many is None and one is None and chat is not None:
        return SampleForm(lambda given: _answered_chat(given, chat), single=True, note=f"{chat!r} with the answer")
    if many is None and one is None:
        raise InputError(
            f"{source}: no completions; the row has {', '.join(map(repr, row)) or 'nothing'}. Accepted are a list in "
            f"{', '.join(MANY)}, a row a sample with {', '.join(ONE)}, or --columns prompt=...,completions=..."
        )
    form = find_form(row, source, "prompt", "auto")
    if form.format == "transcript":
        raise InputError(f"{source}: completions, but no prompt; the row has {', '.join(map(repr, row))}")
    taken = set(form.columns) | _OURS
    if many is not None:
        return SampleForm(lambda given: _listed(given, many, form.read, taken))
    assert one is not None
    return SampleForm(lambda given: _one(given, one, form.read, taken), single=True)


def read_requests(rows: Iterable[Row], source: str) -> dict[str, str | Messages]:
    """The prompts of an OpenAI batch's request file, by `custom_id`.

    Raises:
        InputError: a row that is no request, or one id with two prompts.
    """
    found: dict[str, str | Messages] = {}
    for number, row in enumerate(rows, start=1):
        body = row.get("body")
        if "custom_id" not in row or not isinstance(body, Mapping):
            raise InputError(
                f"{source}, row {number}: a request has custom_id and body, got {', '.join(map(repr, row))}"
            )
        try:
            content = from_prompt(body.get("messages", body.get("prompt")))
        except InputError as error:
            raise InputError(f"{source}, row {number}: {error}") from error
        if found.setdefault(str(row["custom_id"]), content) != content:
            raise InputError(f"{source}, row {number}: custom_id {row['custom_id']!r} stands for two prompts")
    return found


def _listed(row: Row, name: str, prompt: Callable[[Row], Any], taken: set[str]) -> SampleRow:
    value = row[name]
    texts = from_text(value) if isinstance(value, str) else value  # CSV holds a list as text
    if not isinstance(texts, (list, tuple)):
        hint = "; CSV can hold none: write a row a sample, or a JSON list" if isinstance(value, str) else ""
        raise InputError(f"{name} is a list of texts, got {value!r:.40}{hint}")
    rewards = _values(row, (*REWARDS, *REWARD), len(texts))
    if rewards is None and texts and all(isinstance(one, Mapping) for one in texts):
        own = next((key for key in _OWN_SCORES if all(key in one for one in texts)), None)
        rewards = None if own is None else [one[own] for one in texts]
    return SampleRow(
        prompt(row),
        [_text(one, place, name) for place, one in enumerate(texts)],
        rewards,
        _values(row, (*GOLD, *GOLD_ONE), len(texts)),
        _rest(row, taken),
        _values(row, LOGPS, len(texts)),
    )


def _one(row: Row, name: str, prompt: Callable[[Row], Any], taken: set[str]) -> SampleRow:
    values = [_values(row, names, 1) for names in ((*REWARD, *REWARDS), (*GOLD_ONE, *GOLD))]
    logps = next((row[one] for one in LOGPS if row.get(one) is not None), None)
    return SampleRow(
        prompt(row),
        [_text(row[name], 0, name)],
        values[0],
        values[1],
        _rest(row, taken),
        None if logps is None else [logps],
    )


def _answered_chat(row: Row, name: str) -> SampleRow:
    form = find_form({name: row.get(name)}, name, "prompt", "auto")
    content = form.read(row)
    turns = row[name] if isinstance(row[name], list) else from_text(row[name])
    last = turns[-1]
    answer = last.get("content", last.get("value"))
    if last.get("role", last.get("from")) not in ("assistant", "gpt", "chatgpt") or not isinstance(answer, str):
        raise InputError(f"{name} does not end with a text of the assistant's: there is no completion")
    values = [_values(row, names, 1) for names in ((*REWARD, *REWARDS), (*GOLD_ONE, *GOLD))]
    return SampleRow(content, [answer], values[0], values[1], _rest(row, {*form.columns, *_OURS}))


def _generated_row(row: Row) -> SampleRow | None:
    candidates = row.get("candidates")
    if not candidates and "error" in row:
        return None
    if not isinstance(candidates, list) or not all(isinstance(one, Mapping) for one in candidates):
        raise InputError(f"candidates is a list of objects with completion and reward, got {candidates!r:.40}")
    return SampleRow(
        from_prompt(row.get("prompt")),
        [_text(one.get("completion"), place, "candidates") for place, one in enumerate(candidates)],
        [one.get("reward") for one in candidates],
        _values(row, GOLD, len(candidates)),
        _rest(row, {"prompt", "input", *_OURS}),
    )


def _lm_eval_row(row: Row) -> SampleRow:
    arguments = row["arguments"]
    first = (
        next(iter(arguments.values()), None) if isinstance(arguments, Mapping) else arguments[0] if arguments else None
    )
    prompt = (
        first.get("arg_0") if isinstance(first, Mapping) else first[0] if isinstance(first, list) and first else first
    )
    texts = [text for group in row["resps"] for text in (group if isinstance(group, list) else [group])]
    filtered = row.get("filtered_resps")
    given = next((row[name] for name in (*REWARDS, *REWARD) if row.get(name) is not None), None)
    if given is not None and not isinstance(given, list):
        given = [given]
        texts = filtered if isinstance(filtered, list) and len(filtered) == 1 else texts
    return SampleRow(
        from_prompt(prompt),
        [_text(one, place, "resps") for place, one in enumerate(texts)],
        given,
        None,
        {name: row[name] for name in ("doc_id", "doc", "target", "filter") if name in row},
    )


def _batch_row(row: Row, requests: Mapping[str, Any]) -> SampleRow | None:
    response = row.get("response")
    response = response if isinstance(response, Mapping) else {}
    body = response.get("body")
    if row.get("error") or not isinstance(body, Mapping) or response.get("status_code", 200) != 200:
        return None
    name = str(row["custom_id"])
    if name not in requests:
        raise InputError(f"custom_id {name!r} is in no request file")
    choices = body.get("choices") or []
    texts = [
        choice.get("text") if "text" in choice else (choice.get("message") or {}).get("content") for choice in choices
    ]
    return SampleRow(requests[name], [_text(one, place, "choices") for place, one in enumerate(texts)])


def _text(completion: Any, place: int, name: str) -> str:
    """The text of a completion: also a chat (`[{"role": "assistant", "content": ...}]`), or an object with its text."""
    found = completion[-1] if isinstance(completion, list) and completion else completion
    if isinstance(found, Mapping):
        found = next((found[key] for key in _OWN_TEXTS if key in found), None)
    if not isinstance(found, str):
        raise InputError(f"{name}: completion {place} is {found!r:.40}, no text")
    return found


def _values(row: Row, names: Sequence[str], count: int) -> list[Any] | None:
    """What stands under the first of the names, a list as long as the completions; None for nothing."""
    name = next((name for name in names if row.get(name) not in (None, "")), None)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, str) and value.strip().startswith("["):
        value = from_text(value)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) != count:
        raise InputError(f"{name} must be a list of {count} numbers, one for each completion, got {row[name]!r:.40}")
    return values


def _rest(row: Row, taken: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in taken}
