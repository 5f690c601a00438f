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
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from infalign.runtime.address import is_loopback
from infalign.serving.completions import Service, complete
from infalign.serving.described import openapi, page
from infalign.serving.refusal import Refusal

STOP_SECONDS = 10.0
"""How long the end waits for the batch that is under way."""

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


def build_app(service: Service) -> Starlette:
    """The application; its worker starts and stops with it."""
    card = {"id": service.model, "object": "model", "created": int(time.time()), "owned_by": "infalign"}

    async def chat(request: Request) -> Response:
        return await complete(service, request, "chat")

    async def text(request: Request) -> Response:
        return await complete(service, request, "text")

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.model:
            raise Refusal(404, f"no model {name!r:.80} here, only {service.model!r}", code="model_not_found")
        return JSONResponse(card)

    async def schema(_: Request) -> Response:
        return JSONResponse(openapi(service.model))

    async def docs(_: Request) -> Response:
        return HTMLResponse(page(service.model))

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(service.metrics.text(service.worker.gauges()))

    async def health(_: Request) -> Response:
        ready, failing = service.worker.alive, service.worker.failing
        content = {
            "status": "ready" if ready else "stopping",
            "model": service.model,
            "procedure": service.procedure,
            "last_batch": f"failed: {failing}" if failing else "well",
            **service.worker.gauges(),
        }
        return JSONResponse(content, 200 if ready else 503)

    async def refused(request: Request, error: Exception) -> Response:
        """Paths and methods that are not there."""
        assert isinstance(error, HTTPException)
        words = {404: f"no such path: {request.url.path[:80]}", 405: f"{request.method} is not for this path"}
        words = words.get(error.status_code, error.detail)
        service.metrics.requests.labels("other", error.status_code).inc()
        return Refusal(error.status_code, words, headers=error.headers).response()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop, STOP_SECONDS)

    routes = [
        _route(service, "/v1/chat/completions", "POST", chat),
        _route(service, "/v1/completions", "POST", text),
        _route(service, "/v1/models", "GET", models),
        _route(service, "/v1/models/{name:path}", "GET", one_model),
        _route(service, "/openapi.json", "GET", schema),
        _route(service, "/docs", "GET", docs),
        _route(service, "/metrics", "GET", metrics),
        _route(service, "/health", "GET", health, needs_token=False),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refused}, lifespan=lifespan)


def _route(service: Service, path: str, method: str, handle: Handler, *, needs_token: bool = True) -> Route:
    """A path behind the token, with its refusals as answers and every answer counted."""

    async def guarded(request: Request) -> Response:
        try:
            _check_caller(service.token, request, needs_token)
            response = await handle(request)
        except Refusal as refusal:
            response = refusal.response()
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; it is counted
        except Exception:  # a request may fail, the server goes on; the log has the traceback
            logger.exception("a request failed")
            response = Refusal(500, "an error of the server's own: the log here has it").response()
        service.metrics.requests.labels(path, response.status_code).inc()
        return response

    return Route(path, guarded, methods=[method])


def _check_caller(token: str | None, request: Request, needs_token: bool) -> None:
    """The token; without one, a page in a browser must not reach us under a name of its own (DNS rebinding).

    A browser always says which host it asks; HTTP/1.0 need not.
    """
    if token is None:
        if "host" not in request.headers:
            return
        with contextlib.suppress(ValueError):  # a bracket that is not closed
            if is_loopback(f"http://{request.headers.get('host', '')}"):
                return
        raise Refusal(403, "without a token only this machine is served: ask for 127.0.0.1 or localhost")
    given = request.headers.get("authorization", "")
    if needs_token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        words = "no token or a wrong one: send Authorization: Bearer TOKEN"
        raise Refusal(401, words, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
