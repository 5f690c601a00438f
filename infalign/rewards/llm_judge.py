"""A language model as a judge: of pairs (`LLMJudge`), or as a reward (`LLMReward`), over an OpenAI-compatible API.

    judge: infalign.rewards.llm_judge:LLMJudge        # for `evaluate`
    judge_kwargs: {base_url: http://127.0.0.1:8000/v1, model: NAME}

    reward: infalign.rewards.llm_judge:LLMReward      # 1 to 10, or against a column of references
    reward_kwargs: {base_url: ..., model: NAME, mode: pairwise, reference_column: reference}

The answer is read strictly, by its last line; what is no verdict there, or was cut at `max_tokens`, is no score,
counted, and the first such answer is shown. A server that fails is an error. Judges prefer what is shown first, what is
longer and what they wrote themselves: both orders are asked wherever two answers are compared, and `evaluate` reports
how far they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from infalign.rewards.contract import Text, completion_text
from infalign.rewards.fingerprint import digest
from infalign.rewards.http import option_problems, warn_of_key
from infalign.rewards.judge_prompts import (
    PAIRWISE,
    POINTWISE,
    expected_score,
    filled,
    pairwise_fields,
    read_score,
    read_verdict,
    shown,
)
from infalign.runtime.address import address_problem, key_in_environment
from infalign.runtime.console import notice
from infalign.runtime.http import Endpoint, Refused, at_a_time, words_of
from infalign.runtime.retry import RetryPolicy
from infalign.types import InputError, RewardError

Mode = Literal["pointwise", "pairwise"]


class Said(NamedTuple):
    """A model's answer: its text (None for null), its tokens with log-probabilities if asked for, why it ended."""

    text: str | None
    tokens: list[dict[str, Any]] | None
    finish: str

    def __str__(self) -> str:
        """The answer in one short line."""
        shown = "null" if self.text is None else repr(" ".join(self.text.split()))
        shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[: _MOST_SHOWN // 2]} ... {shown[-_MOST_SHOWN // 2 :]}"
        return f"{shown} (finish reason {self.finish})"


_MOST_SHOWN = 200  # characters; the end counts as much as the beginning


class Answers:
    """What became of a judge's answers.

    Args:
        wanted: how an answer must end, for messages.
        max_tokens: of an answer.

    Attributes:
        counts: `judged`, `unreadable` and `cut` answers.
        unread: the first answer that gave no score, with the reason; empty when all did.
    """

    def __init__(self, wanted: str, max_tokens: int) -> None:
        self.counts = {"judged": 0, "unreadable": 0, "cut": 0}
        self.unread = ""
        self._wanted, self._max_tokens = wanted, max_tokens

    def counted(self, said: Said, value: float | None) -> float | None:
        """The value of an answer, None when it was cut; counts what it was, and tells of the first that is none."""
        cut = said.finish == "length"
        self.counts["cut" if cut else "unreadable" if value is None else "judged"] += 1
        if (cut or value is None) and not self.unread:
            why = (
                f"it was cut at max_tokens ({self._max_tokens}): raise it"
                if cut
                else f"it must end with a line {self._wanted}"
            )
            self.unread = f"{said}; {why}"
            notice(f"LLM judge: an answer can't be read and gives no score: {self.unread}")
        return None if cut else value


class ChatModel:
    """A model behind /chat/completions.

    Args:
        base_url: the API's root, mostly ending with /v1.
        model: the name that it is served under.
        api_key_env: environment variable with the key that is sent as a bearer token; shown and recorded nowhere.
        concurrency: requests under way at a time.
        temperature: of the answer; 0 is greedy.
        max_tokens: of the answer.
        timeout: seconds for one request.
        retries: further attempts of a request.
        backoff: seconds before the first retry.
        extra: further fields of the request, e.g. `{seed: 0}`.
        version: anything; cached scores of another version are not used.

    Raises:
        InputError: an option that is not allowed, or no key in the environment.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 8,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 1.0,
        extra: Mapping[str, Any] | None = None,
        version: str | float | None = None,
    ) -> None:
        base_url = str(base_url).rstrip("/")
        problems = [f"base_url {problem}"] if (problem := address_problem(base_url)) else []
        problems += option_problems(concurrency=concurrency, max_tokens=max_tokens, timeout=timeout, retries=retries)
        if problems:
            raise InputError(f"LLM judge: {'; '.join(problems)}")
        key, retry = key_in_environment(api_key_env), RetryPolicy(retries, backoff)
        self.endpoint = Endpoint(base_url, timeout, retry, key)
        warn_of_key(base_url, api_key_env)
        self.concurrency, self.max_tokens = concurrency, max_tokens
        self._body = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **(extra or {})}
        self.fingerprint = digest("chat", 1, base_url, self._body, version)

    async def ask(self, requests: Sequence[str], **more: Any) -> list[Said]:
        """The answers to user messages, in order.

        Raises:
            RewardError: the server refuses.
            ConnectionError: it does not answer.
        """
        async with self.endpoint.client() as client:

            async def one(request: str) -> Said:
                body = {**self._body, "messages": [{"role": "user", "content": request}], **more}
                return await self.endpoint.ask(client, "chat/completions", body, _said)

            try:
                return await at_a_time(self.concurrency, requests, one)
            except Refused as refusal:
                raise RewardError(f"the judge at {self.endpoint.url} refuses: {refusal}") from None


def _said(answer: Any) -> Said:
    """What stands in an answer of /chat/completions; ValueError for one that is not whole, or an error in its place."""
    if isinstance(answer, dict) and answer.get("error"):
        raise ValueError(f"the server's error: {words_of(answer)}")
    try:
        choice = answer["choices"][0]
        if choice.get("error"):
            raise ValueError(f"the server's error: {words_of(choice)}")
        text = choice["message"]["content"]
        tokens = (choice.get("logprobs") or {}).get("content")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no choices[0].message.content ({type(error).__name__})") from error
    if text is not None and not isinstance(text, str):
        raise ValueError(f"message.content is {text!r:.40}, no text")
    return Said(text, tokens, str(choice.get("finish_reason")))


class LLMJudge:
    """A pairwise judge in the form of `rewards.judge`: 1 for A, 0 for B, 1/2 for a tie, None for no verdict.

    Args:
        base_url, model: see `ChatModel`, as for `server`.
        template: the request, with {prompt}, {first}, {second} and {tag}; its answer ends with a line `Verdict: A`,
            `B` or `tie`.
        server: further arguments of `ChatModel`.

    Attributes:
        counts: `judged`, `unreadable` and `cut` answers.
        unread: the first answer that gave no score, with the reason; empty when all did.
    """

    tries_again = True

    def __init__(self, base_url: str, model: str, *, template: str = PAIRWISE, **server: Any) -> None:
        _check_template(template, "prompt", "first", "second")
        self.chat, self.template = _chat(base_url, model, server), template
        self.answers = Answers("`Verdict: A`, `Verdict: B` or `Verdict: tie`", self.chat.max_tokens)
        self.fingerprint = digest("pairwise", self.chat.fingerprint, template)

    async def __call__(
        self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]
    ) -> list[float | None]:
        """The verdicts (B,) on B pairs in this one order."""
        triples = zip(prompts, firsts, seconds, strict=True)
        said = await self.chat.ask([filled(self.template, pairwise_fields(*triple)) for triple in triples])
        return [self.answers.counted(one, read_verdict(one.text or "")) for one in said]

    @property
    def counts(self) -> dict[str, int]:
        """Answers by what they were, live."""
        return self.answers.counts

    @property
    def unread(self) -> str:
        """The first answer that gave no score."""
        return self.answers.unread


class LLMReward:
    """A judging model as a reward function.

    Args:
        base_url, model: see `ChatModel`, as for `server`.
        mode: `pointwise` is a score from low to high; `pairwise` the probability of beating the reference, the mean of
            both orders.
        template: the request. Pointwise with {prompt}, {completion}, {low}, {high} and {tag}, answered with a last line
            `Score: N`; pairwise as for `LLMJudge`.
        scale: (low, high) of a pointwise score.
        expected: the mean score under the probabilities that the server tells of its score's token (`top_logprobs`), in
            place of the one it wrote: far fewer ties. Scores of one digit only, e.g. scale (1, 9).
        reference_column: the data's column with the completion to beat, for pairwise.
        server: further arguments of `ChatModel`.

    Attributes:
        counts: `judged`, `unreadable` and `cut` answers.
        unread: the first answer that gave no score, with the reason; empty when all did.
    """

    tries_again = True

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        mode: Mode = "pointwise",
        template: str | None = None,
        scale: tuple[int, int] = (1, 10),
        expected: bool = False,
        reference_column: str = "reference",
        **server: Any,
    ) -> None:
        _check_reward(mode, scale, expected)
        template = template or (PAIRWISE if mode == "pairwise" else POINTWISE)
        _check_template(template, "prompt", *(("first", "second") if mode == "pairwise" else ("completion",)))
        self.mode, self.scale, self.expected = mode, (scale[0], scale[1]), expected
        self.template, self.reference_column = template, reference_column
        self.judge = LLMJudge(base_url, model, template=template, **server) if mode == "pairwise" else None
        self.chat = self.judge.chat if self.judge else _chat(base_url, model, server)
        wanted = f"`Score: N`, N a number from {self.scale[0]} to {self.scale[1]}"
        self.answers = self.judge.answers if self.judge else Answers(wanted, self.chat.max_tokens)
        what = [reference_column] if mode == "pairwise" else [list(scale), expected]
        self.fingerprint = digest("llm", mode, self.chat.fingerprint, template, what)
        self.__name__ = f"{mode} judge"

    async def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """One score per completion, None where the judge's answer has none.

        Raises:
            RewardError: the data lacks the references, or the server tells no log-probabilities.
        """
        if self.judge is not None:
            return await self._against(self.judge, prompts, completions, columns)
        low, high = self.scale
        fields = [
            {"prompt": shown(p), "completion": completion_text(c), "low": str(low), "high": str(high)}
            for p, c in zip(prompts, completions, strict=True)
        ]
        more = {"logprobs": True, "top_logprobs": 20} if self.expected else {}
        said = await self.chat.ask([filled(self.template, one) for one in fields], **more)
        return [self.answers.counted(one, self._score(one)) for one in said]

    @property
    def counts(self) -> dict[str, int]:
        """Answers by what they were, live."""
        return self.answers.counts

    @property
    def unread(self) -> str:
        """The first answer that gave no score."""
        return self.answers.unread

    def _score(self, said: Said) -> float | None:
        score = read_score(said.text or "", *self.scale)
        if score is None or not self.expected:
            return score
        try:
            return expected_score(said.tokens or [], *self.scale) if said.tokens else _no_logprobs(self.chat)
        except (KeyError, TypeError, AttributeError):
            return _no_logprobs(self.chat)

    async def _against(
        self, judge: LLMJudge, prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]
    ) -> list[float | None]:
        if self.reference_column not in columns:
            raise RewardError(
                f"LLM judge: the data has no column {self.reference_column!r} with the completions to beat; set "
                f"reference_column to one of {', '.join(columns) or 'none'}"
            )
        references = columns[self.reference_column]
        rows = [row for row, reference in enumerate(references) if reference]
        asked, ours, theirs = ([values[row] for row in rows] for values in (prompts, completions, references))
        first, second = await judge(asked, ours, theirs), await judge(asked, theirs, ours)
        scores: list[float | None] = [None] * len(completions)
        for row, one, other in zip(rows, first, second, strict=True):
            scores[row] = None if one is None or other is None else (one + 1.0 - other) / 2.0
        return scores


def _chat(base_url: str, model: str, server: dict[str, Any]) -> ChatModel:
    try:
        return ChatModel(base_url, model, **server)
    except TypeError as error:
        raise InputError(f"LLM judge: {str(error).partition(') ')[2] or error}") from error


def _no_logprobs(chat: ChatModel) -> float:
    raise RewardError(
        f"the judge at {chat.endpoint.url} tells no log-probabilities (top_logprobs): leave `expected` out"
    )


def _check_reward(mode: str, scale: Any, expected: bool) -> None:
    if mode not in ("pointwise", "pairwise"):
        raise InputError(f"LLM judge: mode is pointwise or pairwise, got {mode!r}")
    whole = isinstance(scale, (list, tuple)) and len(scale) == 2 and all(isinstance(one, int) for one in scale)
    if not whole or not scale[0] < scale[1]:
        raise InputError(f"LLM judge: scale is two whole numbers, the lower first, got {scale!r}")
    if expected and not 0 <= scale[0] < scale[1] <= 9:
        raise InputError(
            f"LLM judge: expected scores have one digit: set scale within 0 to 9, e.g. [1, 9], got {scale!r}"
        )


def _check_template(template: str, *names: str) -> None:
    lacking = [name for name in names if f"{{{name}}}" not in template]
    if lacking:
        raise InputError(f"LLM judge: the template has no {{{lacking[0]}}}; it needs {', '.join(names)}")
