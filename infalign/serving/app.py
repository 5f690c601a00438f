"""The HTTP application: OpenAI's paths, health and metrics, and who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from infalign.runtime.address import is_loopback
from infalign.serving.completions import Service, complete
from infalign.serving.refusal import Refusal
from infalign.serving.request import Kind

STOP_SECONDS = 10.0
"""How long the end waits for the batch that is under way."""

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


def build_app(service: Service) -> Starlette:
    """The application; its worker starts and stops with it."""

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(service.metrics.text(service.worker.gauges()))

    async def health(_: Request) -> Response:
        return _health(service)

    async def refused(request: Request, error: Exception) -> Response:
        """Paths and methods that are not there."""
        assert isinstance(error, HTTPException)
        words = {404: f"no such path: {request.url.path[:80]}", 405: f"{request.method} is not for this path"}
        words = words.get(error.status_code, error.detail)
        return _refusal(service, "other", Refusal(error.status_code, words, headers=error.headers))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop, STOP_SECONDS)

    rendering = asyncio.Lock()
    routes = [
        _route(service, "/v1/chat/completions", "POST", _completions(service, rendering, "chat")),
        _route(service, "/v1/completions", "POST", _completions(service, rendering, "text")),
        _route(service, "/v1/models", "GET", _models(service)),
        _route(service, "/metrics", "GET", metrics),
        _route(service, "/health", "GET", health, needs_token=False),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refused}, lifespan=lifespan)


def _completions(service: Service, rendering: asyncio.Lock, kind: Kind) -> Handler:
    async def handle(request: Request) -> Response:
        begin = time.monotonic()
        try:
            async with asyncio.timeout(service.timeout):
                return await complete(service, rendering, request, kind)
        except TimeoutError:
            raise Refusal(
                504, f"no answer within {service.timeout:g} s (request_timeout): try again later", code="timeout"
            ) from None
        finally:
            service.metrics.observe(time.monotonic() - begin)

    return handle


def _models(service: Service) -> Handler:
    entry = {"id": service.model, "object": "model", "created": int(time.time()), "owned_by": "infalign"}

    async def handle(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    return handle


def _route(service: Service, path: str, method: str, handle: Handler, *, needs_token: bool = True) -> Route:
    """A path behind the token, with its refusals as answers and every answer counted."""

    async def guarded(request: Request) -> Response:
        try:
            _check_caller(service, request, needs_token)
            response = await handle(request)
        except Refusal as refusal:
            return _refusal(service, path, refusal)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; it is counted
        except Exception:  # a request may fail, the server goes on; the log has the traceback
            logger.exception("a request failed")
            return _refusal(service, path, Refusal(500, "an error of the server's own: the log here has it"))
        service.metrics.add("requests_total", path=path, status=str(response.status_code))
        return response

    return Route(path, guarded, methods=[method])


def _refusal(service: Service, path: str, refusal: Refusal) -> Response:
    service.metrics.add("requests_total", path=path, status=str(refusal.status))
    return JSONResponse(refusal.content(), refusal.status, headers=refusal.headers)


def _check_caller(service: Service, request: Request, needs_token: bool) -> None:
    """The token; without one, a page in a browser must not reach us under a name of its own (DNS rebinding)."""
    if service.token is None:
        if not _is_own(request.headers.get("host", "")):
            raise Refusal(403, "without a token only this machine is served: ask for 127.0.0.1 or localhost")
        return
    given = request.headers.get("authorization", "")
    if needs_token and not hmac.compare_digest(given.encode(), f"Bearer {service.token}".encode()):
        raise Refusal(
            401,
            "no token or a wrong one: send Authorization: Bearer TOKEN",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_own(host: str) -> bool:
    try:
        return is_loopback(f"http://{host}")
    except ValueError:  # a bracket that is not closed
        return False


def _health(service: Service) -> Response:
    ready, failing = service.worker.alive, service.worker.failing
    content = {
        "status": "ready" if ready else "stopping",
        "model": service.model,
        "procedure": service.procedure,
        "last_batch": f"failed: {failing}" if failing else "well",
        **{name: int(value) for name, value in service.worker.gauges().items()},
    }
    return JSONResponse(content, 200 if ready else 503)
