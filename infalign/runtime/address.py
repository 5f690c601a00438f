"""Address and key of a server: what may stand in a recipe. Loads no HTTP library, so that recipes are checked fast."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from infalign.types import InputError


def address_problem(url: str) -> str | None:
    """What is wrong with the root of an API, with the value unless it may hold a secret; None for nothing.

    >>> address_problem("localhost:8000/v1")
    "must be http:// or https:// with a host, got 'localhost:8000/v1'"
    """
    if "@" in url or "?" in url or "#" in url:
        return "must hold no user, password, query or fragment: a key goes into the environment (api_key_env)"
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not set(url) & set(" \t\n")
    except ValueError:  # a port that is no number, a bracket that is not closed
        whole = False
    return None if whole else f"must be http:// or https:// with a host, got {url!r}"


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine.

    >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("http://gpu7:8000/v1")
    (True, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def exposes_key(url: str) -> bool:
    """Whether a key that is sent there can be read on the way: plain http to another machine."""
    return urlsplit(url).scheme == "http" and not is_loopback(url)


def key_in_environment(variable: str | None) -> str | None:
    """The API key in an environment variable, None when no variable is named.

    Raises:
        InputError: it is not set, or holds what no header takes; the message never shows it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"api_key_env: the environment variable {variable} is not set: export it, or leave it out")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"api_key_env: what {variable} holds is no API key: it has characters that no header takes")
    return key
