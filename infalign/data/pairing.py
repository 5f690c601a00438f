"""Two files of samples side by side: which rows of one are the same prompt as which rows of the other.

Rows belong together by their exact content. Where rows of equal content differ in columns (an `answer`, say), they are
different prompts, told apart by the columns whose values the two files mostly share (5, 5.0 and "5" are one value);
rows with a value that the other file does not have stand alone. In a file with a row a sample a column that is
different in every row may number the samples, or be an answer with one sample each: it tells nothing apart unless it is
named. Rows that nothing tells apart are samples of one prompt.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.data.completions import Completions, SampleFile
from infalign.types import InputError, prompt_key

Floats = NDArray[np.float64]
Pair = tuple[Completions, Completions]


@dataclass(frozen=True)
class Pairing:
    """(policy, base) samples of every prompt that two files share, in the policy's order, and how they were found.

    `alone`: prompts that the other file does not have, of (policy, base). `told_apart`: columns that tell prompts of
    equal content apart. `joined`: rows that were taken as further samples of a row before them. `unclear`: columns that
    might tell prompts apart, and were taken to number samples.
    """

    pairs: list[Pair]
    alone: tuple[int, int]
    told_apart: tuple[str, ...]
    joined: int
    unclear: tuple[str, ...] = ()


def paired(policy: SampleFile, base: SampleFile, match: Sequence[str] = ()) -> Pairing:
    """Pair two files' rows.

    Args:
        policy, base: the files.
        match: columns that tell prompts of equal content apart; none: they are found.

    Raises:
        InputError: no prompt in common, with the reason where it can be seen, or a column that is not there.
    """
    if policy.chats != base.chats:
        kinds = {True: "chats", False: "texts"}
        raise InputError(
            f"the prompts of {policy.name} are {kinds[policy.chats]} and those of {base.name} {kinds[base.chats]}: "
            "write them alike"
        )
    for name in match:
        for file in (policy, base):
            if not any(name in row.prompt.columns for row in file.rows):
                raise InputError(f"--match {name}: {file.name} has no such column besides prompt, samples and scores")
    ours, theirs = _by_content(policy.rows), _by_content(base.rows)
    pairs: list[Pair] = []
    joined = 0
    alone = [len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())]
    told_apart: set[str] = set()
    unclear: set[str] = set()
    for key in ours:
        if key not in theirs:
            continue
        found = telling_columns((ours[key], policy.single), (theirs[key], base.single))
        names = list(match) or found[0]
        told_apart.update(names)
        unclear.update(() if match else found[1])
        left, right = _by_values(ours[key], names), _by_values(theirs[key], names)
        alone[0] += len(left.keys() - right.keys())
        alone[1] += len(right.keys() - left.keys())
        shared = [values for values in left if values in right]
        for number, values in enumerate(shared):
            name = prompt_key(left[values][0].prompt.content, occurrence=number)
            joined += len(left[values]) + len(right[values]) - 2
            pairs.append((_joined(left[values], name), _joined(right[values], name)))
    if not pairs:
        raise InputError(f"{policy.name} and {base.name} have no prompt in common: sample the same prompts")
    return Pairing(pairs, (alone[0], alone[1]), tuple(sorted(told_apart)), joined, tuple(sorted(unclear)))


def prompts_of(file: SampleFile) -> list[Completions]:
    """The prompts of one file with all of their samples, in order.

    Rows of equal content are one prompt where their columns agree, or where a row is one sample.
    """
    groups: defaultdict[tuple[str, str], list[Completions]] = defaultdict(list)
    for row in file.rows:
        groups[row.prompt.key, "" if file.single else _frozen(dict(row.prompt.columns))].append(row)
    return [_joined(rows, key) for (key, _), rows in groups.items()]


Side = tuple[Sequence[Completions], bool]
"""A file's rows of one content, and whether a row there is one sample."""


def telling_columns(ours: Side, theirs: Side) -> tuple[list[str], list[str]]:
    """The columns that tell apart rows of one content, and those that may number samples instead."""
    telling: list[str] = []
    unclear: list[str] = []
    if len(ours[0]) == len(theirs[0]) == 1:
        return telling, unclear
    for name in sorted(set(ours[0][0].prompt.columns) & set(theirs[0][0].prompt.columns)):
        left, right = ([_frozen(row.prompt.columns.get(name)) for row in rows] for rows, _ in (ours, theirs))
        shared = set(left) & set(right)
        if len(set(left) | set(right)) == 1 or 2 * len(shared) < min(len(set(left)), len(set(right))) or not shared:
            continue
        numbers = any(
            single and len(set(values)) == len(values) > 1 for values, (_, single) in ((left, ours), (right, theirs))
        )
        (unclear if numbers else telling).append(name)
    return telling, unclear if not telling else []


def _by_content(rows: Sequence[Completions]) -> dict[str, list[Completions]]:
    found: defaultdict[str, list[Completions]] = defaultdict(list)
    for row in rows:
        found[row.prompt.key].append(row)
    return dict(found)


def _by_values(rows: Sequence[Completions], names: Sequence[str]) -> Mapping[tuple[str, ...], list[Completions]]:
    found: defaultdict[tuple[str, ...], list[Completions]] = defaultdict(list)
    for row in rows:
        found[tuple(_frozen(row.prompt.columns.get(name)) for name in names)].append(row)
    return found


def _frozen(value: Any) -> str:
    """What equal values have in common: numbers by value, also as text (CSV), anything else as JSON."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return repr(float(value))
    return json.dumps(value, sort_keys=True, default=str)


def _joined(parts: Sequence[Completions], key: str) -> Completions:
    """Rows of one prompt as one, under `key`."""
    prompt = replace(parts[0].prompt, key=key)
    if len(parts) == 1:
        return replace(parts[0], prompt=prompt)
    texts = None if parts[0].texts is None else tuple(text for part in parts for text in part.texts or ())
    lengths = np.concatenate([part.lengths_M for part in parts])
    rewards, gold = ([getattr(part, side) for part in parts] for side in ("rewards_M", "gold_M"))
    return Completions(prompt, texts, lengths, _concatenated(rewards, parts), _concatenated(gold, parts))


def _concatenated(scores: Sequence[Floats | None], parts: Sequence[Completions]) -> Floats | None:
    if all(one is None for one in scores):
        return None
    return np.concatenate([np.full(len(p), np.nan) if s is None else s for s, p in zip(scores, parts, strict=True)])
