"""What procedures and transforms are called on a plot or a page."""

from __future__ import annotations

import re
from typing import Any

from infalign.theory.transforms import Exponential, Identity, Log, LogMirror, NormalIcdf

_OF_N = re.compile(r"(Best|Worst)OfN\((\d+)\)")


def procedure_name(label: str) -> str:
    """A procedure's repr as a person says it.

    >>> procedure_name("BestOfN(4)"), procedure_name("WorstOfN(1)"), procedure_name("KthOfN(2, 4)")
    ('Best-of-4', 'one sample', 'KthOfN(2, 4)')
    """
    found = _OF_N.fullmatch(label)
    if not found:
        return label
    return "one sample" if found[2] == "1" else f"{found[1]}-of-{found[2]}"


def short_transform(label: str) -> str:
    """A transform's repr without the numbers that an optimal one carries.

    >>> short_transform("OptimalTransform(procedure=BestOfN(4), kl=0.5)"), short_transform("Exponential(t=10.0)")
    ('optimal', 'Exponential(t=10.0)')
    """
    return "optimal" if label.startswith("OptimalTransform(") else label


def transform_name(transform: Any) -> str:
    """A transform as a formula, or its name.

    >>> transform_name(Identity()), transform_name(Exponential(10.0))
    ('identity u', 'exponential, t = 10')
    """
    if isinstance(transform, Exponential):
        return f"exponential, t = {transform.t:g}".replace("-", "\N{MINUS SIGN}")
    mirror = "\N{MINUS SIGN}log(1\N{MINUS SIGN}u)"
    known = {Identity: "identity u", Log: "log u", LogMirror: mirror, NormalIcdf: "normal quantile"}
    default = getattr(transform, "name", None) or getattr(transform, "__name__", None) or repr(transform)
    return known.get(type(transform), str(default))
