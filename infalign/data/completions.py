"""Completions made elsewhere: rows of a prompt with its samples, and their rewards where they are known.

The forms are those of `infalign.data.sample_forms`. Files are read row by row; of texts that nobody will look at only
the lengths are kept, so that a million samples fit.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.data.columns import rename
from infalign.data.sample_forms import SampleForm, SampleRow, find_sample_form, read_requests
from infalign.data.sources import Row, iter_rows
from infalign.types import InputError, Prompt, prompt_key

Floats = NDArray[np.float64]
_SHOWN = 5


@dataclass(frozen=True)
class Completions:
    """M samples of one prompt: rewards and gold rewards (M,), NaN for no score, None where the file has none.

    `lengths_M` in characters; `texts` is None where they were not asked for. `logps_M` are log-probabilities of each
    sample's tokens, or one number, their sum.
    """

    prompt: Prompt
    texts: tuple[str, ...] | None
    lengths_M: NDArray[np.int32]
    rewards_M: Floats | None
    gold_M: Floats | None
    logps_M: tuple[Floats | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.lengths_M)


@dataclass(frozen=True)
class SampleFile:
    """The rows of a file, each as it stands there (nothing is joined yet); `single` where a row is one sample.

    `prompt.key` is that of the content alone. `notes` are lines on how the rows were read.
    """

    name: str
    rows: tuple[Completions, ...]
    single: bool
    notes: tuple[str, ...]

    @property
    def chats(self) -> bool:
        """Whether prompts are chats."""
        return not isinstance(self.rows[0].prompt.content, str)


def read_completions(
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    requests: Sequence[str] = (),
    keep_texts: bool = True,
) -> SampleFile:
    """The samples in a file.

    Args:
        name: a file or folder that `iter_rows` reads.
        columns: our name -> the file's, see `infalign.data.columns`.
        split: of a folder with several.
        requests: request files of OpenAI batches, where the prompts are.
        keep_texts: False keeps lengths only.

    Raises:
        InputError: nothing there, or rows that cannot be read (counted, the first five shown).
    """
    if not Path(name).exists():
        raise InputError(f"{name}: no such file of samples")
    by_id = _requests(requests)
    found: list[Completions] = []
    problems: list[str] = []
    contents: dict[str, Any] = {}
    forms: dict[frozenset[str], SampleForm] = {}  # rows with the same columns are of one form
    number = empty = 0
    filters: Counter[str] = Counter()
    for number, row in enumerate(_renamed(iter_rows(name, split=split), columns, name), start=1):
        kind = frozenset(row)
        if kind not in forms:
            forms[kind] = find_sample_form(row, name if not forms else f"{name}, row {number}", by_id)
        try:
            one = forms[kind].read(row)
            if one is None:
                empty += 1
                continue
            filters[str(one.columns.get("filter", ""))] += 1
            if len(filters) > 1 and str(one.columns.get("filter")) != next(iter(filters)):
                continue  # lm-eval writes every document once for each filter
            found.append(_completions(one, contents, keep_texts))
        except InputError as error:
            problems.append(f"row {number}: {error}")
    _raise_problems(problems, number, name)
    if not found:
        raise InputError(f"{name}: no rows" + (f" with samples ({empty} failed)" if empty else ""))
    notes = [f"read as {note}" for note in dict.fromkeys(form.note for form in forms.values()) if note]
    notes += [f"{empty} of {number} rows have no samples (failed) and are left out"] if empty else []
    if len(filters) > 1:
        notes.append(f"several filters ({', '.join(filters)}): rows of {next(iter(filters))!r} are read")
    return SampleFile(name, tuple(found), any(form.single for form in forms.values()), tuple(notes))


def _renamed(rows: Iterator[Row], columns: Mapping[str, str] | None, name: str) -> Iterator[Row]:
    """Rows with our names; the first must have what is read as prompt and completions, the rest some row."""
    unseen = dict(columns or {})
    for row in rows:
        first = len(unseen) == len(columns or {})
        unseen = {ours: theirs for ours, theirs in unseen.items() if theirs not in row}
        lacking = next((unseen[ours] for ours in ("prompt", "completions", "completion") if ours in unseen), None)
        if first and lacking is not None:
            there = ", ".join(map(repr, row))
            raise InputError(f"{name}: --columns: no column {lacking!r}; the columns are {there}")
        yield rename(row, columns) if columns else row
    if unseen:
        raise InputError(f"{name}: --columns: no row has a column {next(iter(unseen.values()))!r}")


def _requests(files: Sequence[str]) -> dict[str, Any] | None:
    if not files:
        return None
    found: dict[str, Any] = {}
    for file in files:
        for key, content in read_requests(iter_rows(file), file).items():
            if found.setdefault(key, content) != content:
                raise InputError(f"{file}: custom_id {key!r} stands for another prompt than in the files before it")
    return found


def _completions(row: SampleRow, contents: dict[str, Any], keep_texts: bool) -> Completions:
    if not row.texts:
        raise InputError("no completions")
    key = prompt_key(row.content)
    content = contents.setdefault(key, row.content)  # one copy of each prompt
    columns = {sys.intern(name): value for name, value in row.columns.items()}
    return Completions(
        Prompt(content, key, columns),
        tuple(row.texts) if keep_texts else None,
        np.array([len(text) for text in row.texts], dtype=np.int32),
        _scores(row.rewards, len(row.texts), "rewards"),
        _scores(row.gold, len(row.texts), "gold_rewards"),
        None if row.logps is None else tuple(_logps(value, place) for place, value in enumerate(row.logps)),
    )


def _logps(value: Any, place: int) -> Floats | None:
    """Numbers of at most 0; None where nothing is said."""
    if value is None:
        return None
    values = value if isinstance(value, (list, tuple)) else [value]
    found = np.array([_number(one, f"logps[{place}]") for one in values])
    if not len(found) or not np.all(found <= 1e-3):  # also NaN; rounding gives a token of chance 1 a little more than 0
        raise InputError(f"logps[{place}] must be log-probabilities in nats, none above 0, got {value!r:.40}")
    return found


def _scores(values: Sequence[Any] | None, count: int, name: str) -> Floats | None:
    if values is None:
        return None
    if len(values) != count:
        raise InputError(f"{name} must be a list of {count} numbers, one for each completion, got {len(values)}")
    scores = np.full(count, np.nan)
    for number, value in enumerate(values):
        if value is not None and value != "":
            scores[number] = _number(value, f"{name}[{number}]")
    return scores


def _number(value: Any, where: str) -> float:
    """A finite number or NaN, also as CSV writes it; true and false are 1 and 0."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) else math.inf
    except (ValueError, OverflowError):  # a word; an integer beyond floats
        found = math.inf
    if math.isinf(found):
        raise InputError(f"{where} is {str(value)[:40]!r}; a finite number or null is wanted")
    return found


def _raise_problems(problems: Sequence[str], rows: int, name: str) -> None:
    if problems:
        same = len({problem.partition(": ")[2] for problem in problems}) == 1
        shown = problems[:1] if same else problems[:_SHOWN]
        more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise InputError(f"{name}: {len(problems)} of {rows} rows cannot be used: {'; '.join(shown)}{more}")
