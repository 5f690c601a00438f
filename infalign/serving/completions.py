"""What happens to a completion request: read, rendered, queued, decoded, answered.

An answer is chosen among whole candidates, so that a stream begins once they are scored; until then a failure has a
status of its own, streamed or not.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from infalign.serving.answer import Answer
from infalign.serving.engine import Outcome, stream_key
from infalign.serving.metrics import Metrics
from infalign.serving.refusal import Refusal
from infalign.serving.request import Ask, Kind, read_request
from infalign.serving.worker import Job, QueueFullError, Worker
from infalign.types import InputError, Prompt, RewardError, SamplingSettings

MAX_BODY = 4 * 2**20
"""Bytes of a request's body."""

STOPPING = "the server is stopping: ask again later"

Render = Callable[[Any], tuple[Prompt, tuple[int, ...]]]


@dataclass(frozen=True)
class Service:
    """What is served.

    Args:
        model, procedure, fingerprint: as answers and health tell them.
        sampling: the recipe's settings.
        seed: the recipe's.
        most_tokens: tokens of prompt and completion together, None when unknown; `most_prompt` of the prompt alone.
        render: a prompt and its tokens as the model sees them, of a chat or a text; raises InputError.
        worker: decodes.
        metrics: counts.
        timeout: seconds for a request.
        token: the bearer token to ask for, None for none.
    """

    model: str
    procedure: str
    fingerprint: str
    sampling: SamplingSettings
    seed: int
    most_tokens: int | None
    most_prompt: int | None
    render: Render
    worker: Worker
    metrics: Metrics
    timeout: float
    token: str | None


async def complete(service: Service, rendering: asyncio.Lock, request: Request, kind: Kind) -> Response:
    """The answer to a request; `rendering` is held while a tokenizer works, which serves one thread at a time.

    Raises:
        Refusal: it can't be had.
        ClientDisconnect: nobody waits for it.
    """
    ask = read_request(await _body(request), kind, service.sampling, service.model)
    async with rendering:
        job, prompt_tokens = await asyncio.to_thread(_job, service, ask)
    if not service.worker.alive:
        raise Refusal(503, STOPPING, code="stopping")
    try:
        service.worker.submit(job)
    except QueueFullError:
        raise Refusal(
            429,
            f"{service.worker.max_queue} requests wait already (max_queue): try again later",
            code="queue_full",
            headers={"Retry-After": "1"},
        ) from None
    outcomes = await _outcomes(service, job, request)
    if any(outcome.decoded.chosen is None for outcome in outcomes):
        raise Refusal(500, "the reward gave no candidate a score, so that none can be chosen", code="no_score")
    service.metrics.add("choices_total", len(outcomes))
    service.metrics.add("tokens_total", prompt_tokens, kind="prompt")
    answer = Answer(ask, outcomes, prompt_tokens, service.model, service.fingerprint)
    if ask.stream:
        return StreamingResponse(_sent(answer), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    return JSONResponse(answer.whole())


async def _sent(answer: Answer) -> AsyncIterator[str]:
    for event in answer.events():
        yield event


async def _body(request: Request) -> Any:
    """The JSON that was sent.

    Raises:
        Refusal: too long, or no JSON. A web page can send no `application/json` to another site unasked.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be JSON: send Content-Type: application/json")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY:
            raise Refusal(413, f"the body is longer than {MAX_BODY} bytes", headers={"Connection": "close"})
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested without end
        raise Refusal(400, "the body is not JSON") from None


def _job(service: Service, ask: Ask) -> tuple[Job, int]:
    """The work that a request asks for, and the tokens of its prompts.

    Raises:
        Refusal: a prompt that can't be rendered or is too long, or a number of candidates that is none.
    """
    _check_candidates(service, ask)
    prompts: dict[str, Prompt] = {}
    prompt_ids: list[tuple[int, ...]] = []
    for content in ask.contents:
        try:
            prompt, ids = service.render(content)
        except InputError as error:
            raise Refusal(400, str(error), param=_field(ask)) from None
        _check_length(service, ask, len(ids))
        for choice in range(ask.choices):
            key = stream_key(prompt.key, ask.seed, choice, service.seed)
            key = f"{key}#{len(prompts)}" if key in prompts else key  # the same prompt twice in a list
            prompts[key] = Prompt(prompt.content, key)
            prompt_ids.append(ids)
    job = Job(ask.setting, tuple(prompts.values()), tuple(prompt_ids))
    return job, sum(len(ids) for ids in prompt_ids[:: ask.choices])


def _field(ask: Ask) -> str:
    return "messages" if ask.kind == "chat" else "prompt"


def _check_candidates(service: Service, ask: Ask) -> None:
    try:
        service.worker.engine.procedure(ask.setting.candidates)
    except InputError as error:
        raise Refusal(400, str(error), param="infalign.n") from None


def _check_length(service: Service, ask: Ask, length: int) -> None:
    count = ask.setting.sampling.max_tokens
    room = math.inf if service.most_tokens is None else service.most_tokens - count
    most = min(room, math.inf if service.most_prompt is None else service.most_prompt)
    if length > most:
        raise Refusal(
            400,
            f"the prompt has {length} tokens, at most {max(most, 0):g} fit beside {count} of completion: shorten it",
            param=_field(ask),
            code="context_length_exceeded",
        )
    if ask.setting.candidates is not None:
        fit = max(1, service.worker.engine.tokens_per_batch // (length + count))
        if ask.setting.candidates > fit:
            raise Refusal(
                400,
                f"infalign.n (or best_of) is at most {fit} for this prompt (tokens_per_batch), got "
                f"{ask.setting.candidates}",
                param="infalign.n",
            )


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
    except (ClientDisconnect, Refusal):
        raise
    except Exception:  # the worker's boundary has logged it
        raise Refusal(500, "an error of the server's own: the log here has it", code="internal") from None
    finally:
        gone.cancel()
        result.cancel()  # and with it the job, unless it has been started


async def _left(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
