"""Checks of strategies' arguments, each with one clear line."""

from __future__ import annotations

from infalign.types import InputError


def whole(name: str, value: object, least: int) -> None:
    """Raises InputError unless `value` is a whole number of at least `least`; True and 4.0 are mistakes."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}; got {value!r}")


def fraction(name: str, value: object) -> None:
    """Raises InputError unless `value` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(f"{name} must be a number above 0 and at most 1; got {value!r}")
