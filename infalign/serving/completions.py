"""What happens to a completion request: read, rendered, queued, decoded, answered.

An answer is chosen among whole candidates, so that a stream begins once they are scored; until then a failure has a
status of its own, streamed or not.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from infalign.serving.answer import Answer
from infalign.serving.engine import Outcome, Setting, stream_key
from infalign.serving.metrics import Metrics
from infalign.serving.refusal import Refusal
from infalign.serving.request import CompletionRequest, Kind, read_request
from infalign.serving.worker import Job, QueueFullError, Worker
from infalign.types import InputError, Prompt, RewardError, SamplingSettings

MAX_BODY = 4 * 2**20
"""Bytes of a request's body."""

STOPPING = "the server is stopping: ask again later"

NOTE = "X-Infalign-Note"
"""The header that says what of a request was not done as asked."""
DRAINED = 64 * 2**20
"""Bytes of a body that is too long that are still read, so that the refusal arrives."""

Render = Callable[[Any, Mapping[str, Any]], tuple[Prompt, tuple[int, ...]]]


@dataclass(frozen=True)
class Service:
    """What is served.

    Args:
        model, procedure, fingerprint: as answers and health tell them.
        sampling: the recipe's settings.
        seed: the recipe's.
        most_tokens: tokens of prompt and completion together, None when unknown; `most_prompt` of the prompt alone.
        render: a prompt and its tokens as the model sees them, of a chat or a text and further variables of the chat
            template; raises InputError.
        token_text: the text of tokens.
        worker: decodes.
        metrics: counts.
        timeout: seconds for a request.
        token: the bearer token to ask for, None for none.
        cap: whether more tokens than the recipe's are cut at the recipe's number; else they are refused.
        rendering: held while a tokenizer works, which serves one thread at a time.
    """

    model: str
    procedure: str
    fingerprint: str
    sampling: SamplingSettings
    seed: int
    most_tokens: int | None
    most_prompt: int | None
    render: Render
    token_text: Callable[[Sequence[int]], str]
    worker: Worker
    metrics: Metrics
    timeout: float
    token: str | None
    cap: bool = True
    rendering: asyncio.Lock = field(default_factory=asyncio.Lock)


async def complete(service: Service, request: Request, kind: Kind) -> Response:
    """The answer to a request.

    Raises:
        Refusal: it can't be had, or not in time.
        ClientDisconnect: nobody waits for it.
    """
    with service.metrics.seconds.time():
        try:
            async with asyncio.timeout(service.timeout):
                return await _complete(service, request, kind)
        except TimeoutError:
            words = f"no answer within {service.timeout:g} s (request_timeout): try again later"
            raise Refusal(504, words, code="timeout") from None


async def _complete(service: Service, request: Request, kind: Kind) -> Response:
    ask = read_request(await _body(request), kind, service.model)
    async with service.rendering:
        job, prompt_tokens, notes = await asyncio.to_thread(_job, service, ask)
    if not service.worker.alive:
        raise Refusal(503, STOPPING, code="stopping")
    try:
        service.worker.submit(job)
    except QueueFullError:
        words = f"{service.worker.max_queue} requests wait already (max_queue): try again later"
        raise Refusal(429, words, code="queue_full", headers={"Retry-After": "1"}) from None
    outcomes = await _outcomes(service, job, request)
    if any(outcome.decoded.chosen is None for outcome in outcomes):
        raise Refusal(500, "the reward gave no candidate a score, so that none can be chosen", code="no_score")
    service.metrics.choices.inc(len(outcomes))
    service.metrics.tokens.labels("prompt").inc(prompt_tokens)
    answer = Answer(ask, outcomes, prompt_tokens, service.model, service.fingerprint, service.token_text, notes)
    headers = {NOTE: "; ".join(notes)} if notes else {}
    if ask.stream:
        headers["Cache-Control"] = "no-store"
        return StreamingResponse(answer.events(), media_type="text/event-stream", headers=headers)
    return JSONResponse(answer.whole(), headers=headers)


async def _body(request: Request) -> Any:
    """The JSON that was sent.

    Raises:
        Refusal: too long, or no JSON. A web page can send no `application/json` to another site unasked.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be JSON: send Content-Type: application/json")
    content, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY:
            content += part
        elif size > DRAINED:
            break
    if size > MAX_BODY:
        raise Refusal(413, f"the body is longer than {MAX_BODY} bytes", headers={"Connection": "close"})
    try:
        return json.loads(content, object_hook=_without_nulls)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested without end
        raise Refusal(400, "the body is not JSON") from None


def _without_nulls(found: dict[str, Any]) -> dict[str, Any]:
    """A null says as much as leaving the field out."""
    return {name: value for name, value in found.items() if value is not None}


def _job(service: Service, ask: CompletionRequest) -> tuple[Job, int, tuple[str, ...]]:
    """The work that a request asks for, the tokens of its prompts, and what of it is not done as asked.

    Raises:
        Refusal: a prompt that can't be rendered or is too long, or a number of candidates that is none.
    """
    setting, notes = ask.setting(service.sampling, cap=service.cap)
    if ask.is_greedy:
        one = _takes_one(service)
        alike = "would be alike, so one is drawn" if one else "are alike"
        notes = (*notes, f"temperature 0: all candidates {alike}")
        setting = replace(setting, candidates=1) if one else setting
    try:
        service.worker.engine.procedure(setting.candidates)
    except InputError as error:
        raise Refusal(400, str(error), param="infalign.n") from None
    prompts: dict[str, Prompt] = {}
    prompt_ids: list[tuple[int, ...]] = []
    param = "messages" if ask.messages else "prompt"
    for content in ask.contents:
        try:
            prompt, ids = service.render(content, ask.chat_template_kwargs)
        except InputError as error:
            raise Refusal(400, str(error), param=param) from None
        _check_length(service, setting, len(ids), param)
        for choice in range(ask.n):
            key = stream_key(prompt.key, ask.seed, choice, service.seed)
            key = f"{key}#{len(prompts)}" if key in prompts else key  # the same prompt twice in a list
            prompts[key] = Prompt(prompt.content, key)
            prompt_ids.append(ids)
    job = Job(setting, tuple(prompts.values()), tuple(prompt_ids))
    return job, sum(len(ids) for ids in prompt_ids[:: ask.n]), notes


def _takes_one(service: Service) -> bool:
    """Whether the procedure can choose among one candidate."""
    try:
        service.worker.engine.procedure(1)
    except InputError:
        return False
    return True


def _check_length(service: Service, setting: Setting, length: int, param: str) -> None:
    count = setting.sampling.max_tokens
    room = math.inf if service.most_tokens is None else service.most_tokens - count
    most = min(room, math.inf if service.most_prompt is None else service.most_prompt)
    if length > most:
        words = f"the prompt has {length} tokens, at most {max(most, 0):g} fit beside {count} of completion: shorten it"
        raise Refusal(400, words, param=param, code="context_length_exceeded")
    fit = max(1, service.worker.engine.tokens_per_batch // (length + count))
    if setting.candidates is not None and setting.candidates > fit:
        words = f"infalign.n (or best_of) is at most {fit} for this prompt (tokens_per_batch), got {setting.candidates}"
        raise Refusal(400, words, param="infalign.n")


async def _outcomes(service: Service, job: Job, request: Request) -> list[Outcome]:
    """What the worker makes of a job; given up when the caller goes or the time is over.

    Raises:
        Refusal: it failed.
        ClientDisconnect: the caller is gone.
    """
    result = asyncio.ensure_future(asyncio.wrap_future(job.result))
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    except asyncio.CancelledError:
        if job.result.cancelled():  # the worker has stopped
            raise Refusal(503, STOPPING, code="stopping") from None
        raise
    except InputError:
        if service.worker.engine.remote:
            words = "the server that samples the candidates fails: try again; the log here says why"
            raise Refusal(502, words, code="backend") from None
        raise Refusal(500, "this request could not be decoded: the log here says why", code="decoding") from None
    except RewardError:
        raise Refusal(500, "the reward failed on this request: the log here says why", code="reward") from None
    except ClientDisconnect:
        raise
    except Exception:  # the worker's boundary has logged it
        raise Refusal(500, "an error of the server's own: the log here has it", code="internal") from None
    finally:
        gone.cancel()
        result.cancel()  # and with it the job, unless it has been started
        job.gone = True  # then it ends at its next token


async def _left(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
