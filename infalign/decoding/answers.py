r"""The answer in a completion, so that completions that mean the same can vote for it.

An extractor maps a text to its answer, or to None where there is none. Two answers are the same when their normal forms
are: numbers by value (1,000 = 1000.0), anything else as text, ignoring case, white space and dollar signs around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from infalign.types import InputError

Extractor = Callable[[str], str | None]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|[-+]?\.\d+")
_HASHES = re.compile(r"####\s*(.+)")


def boxed(text: str) -> str | None:
    r"""What stands in the last whole `\boxed{...}`; braces inside may be nested.

    >>> boxed(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    for start in reversed([found.end() for found in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number of a text.

    >>> last_number("3 apples and 1,200.50 pears.")
    '1,200.50'
    """
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def hashes(text: str) -> str | None:
    """What follows the last `####`, as in GSM8K."""
    found = _HASHES.findall(text)
    return found[-1].strip() if found else None


def marked(text: str) -> str | None:
    r"""What is boxed, else what follows `####`, else the last number."""
    return next((found for one in (boxed, hashes, last_number) if (found := one(text)) is not None), None)


def whole_text(text: str) -> str | None:
    """The completion itself; None when it is blank."""
    return text if text.strip() else None


EXTRACTORS: dict[str, Extractor] = {
    "marked": marked,
    "boxed": boxed,
    "hashes": hashes,
    "number": last_number,
    "text": whole_text,
}
"""Extractors that a recipe knows by name."""


def extractor(spec: str) -> Extractor:
    r"""The extractor of that name; anything else is a regular expression whose last match is the answer.

    Its first group counts where it has one, else the whole match.

    Raises:
        InputError: the expression is not valid.

    >>> extractor(r"answer is (\w+)")("the answer is Yes. No: the answer is no.")
    'no'
    """
    if spec in EXTRACTORS:
        return EXTRACTORS[spec]
    try:
        pattern = re.compile(spec)
    except (re.error, TypeError) as error:
        raise InputError(
            f"answer {spec!r} is neither one of {', '.join(EXTRACTORS)} nor a regular expression ({error})"
        ) from error
    return lambda text: _last_match(pattern, text)


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    found = list(pattern.finditer(text))
    return found[-1][1 if pattern.groups else 0] if found else None


def normal_form(answer: str) -> str:
    """What equal answers have in common.

    >>> normal_form("$1,000.0 "), normal_form("1000"), normal_form("  New   York.")
    ('1000', '1000', 'new york')
    """
    text = " ".join(answer.casefold().split()).strip("$ ").rstrip(". ")
    if not _NUMBER.fullmatch(text):
        return text
    try:
        value = Decimal(text.replace(",", "")).normalize()
    except InvalidOperation:  # beyond Decimal's range: compared as text
        return text
    return "0" if value == 0 else f"{value:f}"
