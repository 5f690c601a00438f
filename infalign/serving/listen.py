"""A socket, a server on it, and an end that lets requests under way finish."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from infalign.types import InputError

DRAIN_SECONDS = 30
"""How long requests under way may still take once the server has been told to end."""
MOST_CONNECTIONS, FILES_KEPT = 8192, 128
"""Connections that may be open (more get 503), and files that are left to everything else where there may be few."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Connections wait in it until `listen` serves them.

    Raises:
        InputError: the address is not this machine's, the port is taken, or not ours to take.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be between 0 (any free one) and 65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is taken: give another --port, or 0 for any free one") from None
        words = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"can't listen on {host}, port {port} ({words}): give another --host or --port") from None


def is_loopback_host(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback_host("127.0.0.1"), is_loopback_host("0.0.0.0")
    (True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(bound: socket.socket) -> str:
    """The URL of a socket that listens."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def most_connections() -> int:
    """How many connections may be open: idle ones cost a file each, and must not shut others out."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        MOST_CONNECTIONS if allowed == resource.RLIM_INFINITY else max(64, min(MOST_CONNECTIONS, allowed - FILES_KEPT))
    )


def server_of(app: Any) -> uvicorn.Server:
    """uvicorn with our settings: no log of its own but errors, bounded connections, a bounded end."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        loop="asyncio",
        http="h11",
        limit_concurrency=most_connections(),
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return uvicorn.Server(config)


def listen(app: Any, bound: socket.socket, *, ready: Callable[[], None] = lambda: None) -> int | None:
    """Serve an application until a signal ends it; requests under way finish, a second Ctrl-C ends at once.

    Args:
        app: of ASGI.
        bound: from `bind`; closed in the end.
        ready: called once it is about to answer.

    Returns:
        The signal (SIGINT or SIGTERM).
    """
    server = server_of(app)
    with _caught() as signals:
        ready()
        if not signals:
            asyncio.run(server.serve(sockets=[bound]))
    return signals[0] if signals else None


@contextlib.contextmanager
def _caught() -> Iterator[list[int]]:
    """The signals that uvicorn has ended for: it raises them once more when it is done."""
    signals: list[int] = []

    def note(number: int, _: Any) -> None:
        signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
