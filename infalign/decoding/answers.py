r"""The answer in a completion, so that completions that mean the same can vote for it.

An extractor maps a text to its answer, or to None where there is none. Two answers are the same when their normal forms
are: numbers by value (1,000 = 1000.0, 1/2 = 0.5, 5 cm = 5), anything else as text, ignoring case, white space, dollar
signs and LaTeX that only changes the looks. `reward_models/verifier.py`, which is made to be copied and so imports
nothing from here, reads answers in the same way; the tests hold the two together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from infalign.types import InputError

Extractor = Callable[[str], str | None]

_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|\.\d+)"
_FRACTION = r"\\[dt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))\s*(?:\{\s*([\d.]+)\s*\}|(\d))"
_SIGN = r"(?:(?<![\w.)\]}])[-+])?"  # in 1-5 it is none
_IN_TEXT = re.compile(rf"{_SIGN}(?:\d+ +)?{_NUMBER} ?/ ?{_NUMBER}|{_SIGN}{_NUMBER}")
_SHORT = r"(?:[cmk]m|[mk]g|m[ls]|hrs?|min|mph|kph|ft|in|lbs?|oz|[ap]m)"  # units; 6xy is a product
_UNIT = rf" ?%| ?{_SHORT}(?: ?\^\d)?| (?:[a-z]{{3,}}|[a-z]{{2,}}(?: [a-z]{{2,}})+)(?: ?\^\d)?"
_VALUE = re.compile(rf"([-+]?)(?:(?:(\d+) )?({_NUMBER})/({_NUMBER})|({_NUMBER}))(?:{_UNIT})?")
_STYLE = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\left|\\right|(?<!\\)\\[,;:! ]|\^\s*\{?\\circ\}?|°|\\[()\[\]]|\\?\$")
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
    r"""The last number of a text; a fraction is one number, and a minus between two numbers is no sign.

    >>> last_number("3 apples and 1,200.50 pears."), last_number("within 1-5"), last_number(r"at \frac{1}{2}")
    ('1,200.50', '5', '1/2')
    """
    found = _IN_TEXT.findall(_simple(text))
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

    def last_match(text: str) -> str | None:
        found = list(pattern.finditer(text))
        return found[-1][1 if pattern.groups else 0] if found else None

    return last_match


def normal_form(answer: str) -> str:
    r"""What equal answers have in common: the number in lowest terms, without its unit, or the plain text.

    >>> normal_form("$1,000.0 "), normal_form("1000"), normal_form("  New   York.")
    ('1000', '1000', 'new york')
    >>> normal_form(r"\dfrac{2}{4}"), normal_form("0.5"), normal_form(r"5\text{ cm}"), normal_form(r"\text{E}")
    ('1/2', '1/2', '5', 'e')
    """
    text = _plain(answer)
    found = _VALUE.fullmatch(text)
    if found is None:
        return text
    sign, whole, above, below, number = found.groups()
    try:
        value = _exact(number) if number else _exact(whole or "0") + _exact(above) / _exact(below)
        return str(-value if sign == "-" else value)
    except (ZeroDivisionError, ValueError):  # 1/0, and thousands of digits: compared as text
        return text


def _exact(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def _simple(text: str) -> str:
    r"""One way to write a fraction, a minus and a comma: 1\frac{1}{2} as 1 1/2."""
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ",", text).replace("\\%", "%").replace("\N{MINUS SIGN}", "-")
    return re.sub(_FRACTION, r"\1\2/\3\4", re.sub(rf"(?<=\d)\s*(?={_FRACTION})", " ", text))


def _plain(text: str) -> str:
    """A text without what only changes its looks."""
    text = _SPACING.sub(" ", _STYLE.sub(r" \1 ", _simple(text)))
    text = " ".join(text.casefold().split()).rstrip(". ")
    text = re.sub(r"(?<!\w) | (?!\w)", "", text)  # white space counts between two words only
    text = re.sub(r"\{(\w)\}", r"\1", text)  # x^{2}
    text = re.sub(r"^[a-z]=", "", text)  # x = 5
    return re.sub(r"^\((\w)\)$", r"\1", text)  # (E)
