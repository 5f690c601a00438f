"""Short hashes of where a reward comes from, so that a changed reward never passes for the old one.

They cover the source file (or the package version, or the source text of a function), the local modules that a source
file imports (`runtime.imports`), the name, the keyword arguments, and the plain values (numbers, text, lists of them)
that a function's closure or an object holds; not data files that the source reads, nor other objects it holds, nor
secrets (`runtime.artifacts.without_secrets`): another key to the same server is the same reward. An object with a
`fingerprint` attribute speaks for itself.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from infalign.runtime.artifacts import without_secrets
from infalign.runtime.imports import IMPORTED, digests


def digest(*parts: Any) -> str:
    """16 hex digits over the parts, written as JSON with sorted keys (other objects by their `repr`).

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def callable_digest(function: Callable[..., Any]) -> list[Any]:
    """Name, source text and plain state of a callable (or of its class); of a `partial` also what is bound.

    Of one from a reward's file also the local modules that this imports.
    """
    if isinstance(function, partial):
        return [callable_digest(function.func), list(map(repr, function.args)), _plain(function.keywords)]
    described = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        source = inspect.getsource(described)
    except (OSError, TypeError):  # built in, or typed at a prompt
        source = ""
    imported = digests(IMPORTED.get(getattr(described, "__module__", None) or "", {}))
    return [getattr(described, "__qualname__", repr(described)), source, _state(function), *imported]


def _state(function: Callable[..., Any]) -> dict[str, Any]:
    """Plain values in the closure, the defaults or the attributes; of a lambda, which shares its line, the code."""
    state = {} if inspect.isclass(function) else dict(getattr(function, "__dict__", {}))
    if inspect.isfunction(function):
        state |= inspect.getclosurevars(function).nonlocals
        state |= {"(defaults)": function.__defaults__, "(keyword defaults)": function.__kwdefaults__}
        if function.__name__ == "<lambda>":
            code = function.__code__
            state |= {"(code)": code.co_code.hex(), "(names)": code.co_names, "(constants)": code.co_consts}
    return _plain({name: value for name, value in state.items() if _is_plain(value)})


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_plain(list(value)) and _is_plain(list(value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bytes, int, float, complex))


def _plain(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in sorted(without_secrets(values).items())}
