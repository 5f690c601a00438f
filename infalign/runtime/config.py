"""Strict recipes: one flat YAML, checked before anything is loaded.

TRL's own parser takes `n: 4.5` for an int, a wrong Literal, a key given twice and an abbreviated flag. So recipes are
read here: duplicate keys refused, `1e-5` read as a number (YAML 1.2), every key known and of its type, all problems
shown together, each with the nearest name. Flags (`--beta 0.1`, `--eval_n 1 4`, `--use_cpu`) use the same names and the
same checks as the YAML and win over it.

This module receives the dataclasses that declare the keys as arguments; it knows none of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import yaml

from infalign.types import InputError

Hints = dict[str, Any]


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `1e-5` as a float."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise InputError(f"line {key_node.start_mark.line + 1}: a key must be a word, got {key!r}")
            if key in seen:
                raise InputError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice: keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: no such file, not YAML, a key given twice, or no mapping at the top.
    """
    if not path.is_file():
        raise InputError(f"no recipe at {path}: give --config the path of a YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold `key: value` lines, it holds {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """`--key value ...` pairs as a mapping; no value means true, several make a list.

    >>> read_flags(["--beta", "0.1", "--eval_n", "1", "4", "--use_cpu"])
    {'beta': '0.1', 'eval_n': ['1', '4'], 'use_cpu': True}

    Raises:
        InputError: a word that belongs to no flag, or a flag given twice.
    """
    flags: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{word!r} belongs to no flag: flags start with two dashes, --name value")
        name, given, inline = word[2:].partition("=")
        values = [inline] if given else []
        while words and not given and not words[0].startswith("--"):
            values.append(words.pop(0))
        name = name.replace("-", "_")
        if name in flags:
            raise InputError(f"--{name} is given twice: keep one")
        flags[name] = True if not values else values[0] if len(values) == 1 else values
    return flags


def field_hints(*declarations: type) -> Hints:
    """Every field of the dataclasses with its type; the first to declare a name wins."""
    hints: Hints = {}
    for declaration in declarations:
        resolved = typing.get_type_hints(declaration)
        for field in dataclasses.fields(declaration):
            if field.init:
                hints.setdefault(field.name, resolved[field.name])
    return hints


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]!r}?" if close else ""


def check(
    values: Mapping[str, Any],
    flags: Mapping[str, Any],
    hints: Hints,
    explain: Callable[[str], str | None] = lambda name: None,
) -> dict[str, Any]:
    """YAML values and flags together, each known and of its type.

    Args:
        values: from the YAML file.
        flags: from `read_flags`; strings are read as YAML scalars first, then as text where the type is text.
        hints: the known names with their types.
        explain: what a name that is not known is here, where that is known; else the nearest name is given.

    Raises:
        InputError: all problems at once, one a line.
    """
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for source, given in (("", values), ("--", flags)):
        for name, value in given.items():
            if name not in hints:
                explanation = explain(name)
                near = f": {explanation}" if explanation else nearest(name, hints)
                problems.append(f"unknown {'flag' if source else 'key'} {source}{name}{near}")
                continue
            try:
                checked[name] = _from_text(value, hints[name]) if source else coerce(value, hints[name])
            except TypeError as error:
                problems.append(f"{source}{name}: {error}")
    if problems:
        raise InputError("; ".join(problems) if len(problems) < 3 else "\n  ".join(["several problems:", *problems]))
    return checked


def _from_text(value: Any, hint: Any) -> Any:
    """A flag's text as the type asks: first as a YAML scalar, then as the text itself, then as a list of one."""
    words = value if isinstance(value, list) else [value]
    read = [flag_value(word) if isinstance(word, str) else word for word in words]
    attempts = [read, words] if isinstance(value, list) else [read[0], value, read, words]
    error = TypeError("no value")
    for attempt in attempts:
        try:
            return coerce(attempt, hint)
        except TypeError as problem:
            error = problem if attempt is attempts[0] else error
    raise error


def flag_value(word: str) -> Any:
    """A word as YAML reads it; a text as it was typed, with its quotes, line breaks and ` #`."""
    try:
        read = yaml.load(word, Loader=_StrictLoader)
    except (yaml.YAMLError, InputError):  # `--system_prompt "Answer: yes: no"`
        return word
    return word if isinstance(read, str) else read


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` says, without guessing: 4.5 is no int, "yes" no bool, 4 is a fine float.

    >>> coerce(4, float)
    4.0

    Raises:
        TypeError: "expected int, got 4.5 (float)".
    """
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, get_args(hint))
    if origin is Literal:
        return _expect(value in get_args(hint), value, value, " or ".join(map(repr, get_args(hint))))
    if origin in (list, tuple, Sequence, set) or hint in (list, tuple):
        return _coerce_items(value, hint)
    if origin in (dict, Mapping) or hint in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return _expect(isinstance(value, dict), value, value, "a mapping")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        allowed = [member.value for member in hint]
        return _expect(value in allowed, value, value, f"one of {', '.join(map(str, allowed))}")
    return _coerce_scalar(value, hint)


def _coerce_scalar(value: Any, hint: Any) -> Any:
    if hint in (None, type(None)):
        return _expect(value is None, None, value, "nothing")
    if isinstance(value, np.generic):  # from a notebook
        value = value.item()
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hint is str and isinstance(value, str) and not _is_text(value):
        raise TypeError(f"expected text, got {value!r}, which holds half a surrogate pair")
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return _expect(number, float(value) if number else None, value, "a number")
    if hint is int:
        return _expect(isinstance(value, int) and not isinstance(value, bool), value, value, "an integer")
    if hint is Path:
        return _expect(isinstance(value, str), value, value, "a path")
    named: str = {str: "text", bool: "true or false"}.get(hint) or str(hint.__name__)
    return _expect(isinstance(value, hint), value, value, named)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    if value is None and type(None) in members:
        return None
    choices = [member for member in members if member is not type(None)]
    enums = [member for member in choices if isinstance(member, type) and issubclass(member, enum.Enum)]
    choices = enums or choices  # TRL declares `SchedulerType | str`: the enumeration is what is meant
    expected = []
    for member in choices:
        try:
            return coerce(value, member)
        except TypeError as error:
            expected.append(str(error).partition(", got")[0].removeprefix("expected "))
    raise TypeError(f"expected {' or '.join(dict.fromkeys(expected))}, got {value!r} ({type(value).__name__})")


def _coerce_items(value: Any, hint: Any) -> Any:
    _expect(isinstance(value, (list, tuple)), value, value, "a list")
    members: Any = get_args(hint)
    if not members:
        return list(value)
    if get_origin(hint) is tuple and len(members) > 1 and members[1] is not Ellipsis:
        _expect(len(value) == len(members), value, value, f"{len(members)} values")
        return tuple(coerce(item, member) for item, member in zip(value, members, strict=True))
    items = [coerce(item, members[0]) for item in value]
    return tuple(items) if get_origin(hint) is tuple else items


def _expect(holds: bool, result: Any, value: Any, expected: str) -> Any:
    if not holds:
        raise TypeError(f"expected {expected}, got {value!r} ({type(value).__name__})")
    return result
