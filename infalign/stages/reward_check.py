"""`infalign reward check`: a reward on a few samples: what it returns, how fast, and whether it holds its contract."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.data.columns import parse_columns, renamed
from infalign.data.completions import read_completions
from infalign.data.prompts import prompts_from_rows
from infalign.data.sources import iter_rows
from infalign.rewards.contract import Text, shape_completions
from infalign.rewards.loader import Reward, load_reward
from infalign.runtime.config import check
from infalign.runtime.console import notice, say
from infalign.types import InputError, Prompt, RewardError, prompt_key

Floats = NDArray[np.float64]
Rows = list[tuple[Prompt, str]]
"""A prompt and one of its completions."""

QUESTIONS = ("How do I boil an egg?", "Who wrote Hamlet?")
ANSWERS = (
    "Thanks for asking! Put it into boiling water for eight minutes, then, please, into cold water.",
    "William Shakespeare wrote it around 1600.",
    "I don't know, and I don't care.",
    "42",
    "",
)
MOST = 24
"""Completions that are scored at most."""


@dataclass(frozen=True)
class Checked:
    """What a reward did with samples of one form.

    Attributes:
        form: "text" or "chat".
        rows: the samples.
        scores_B: (B,) what it returned, NaN for no score; None when it broke.
        problem: in one line, when it broke.
        unread: of a language model as judge, an answer that gave no score.
        seconds: of one call with all samples, the second of two.
        again, alone, reversed: largest difference from `scores_B` when called again, one by one, in the other order;
            infinite when a score was missing in one of them only.
        tied: completions that share their score with another text of the same prompt.
    """

    form: str
    rows: Rows
    scores_B: Floats | None = None
    problem: str = ""
    unread: str = ""
    seconds: float = 0.0
    again: float = 0.0
    alone: float = 0.0
    reversed: float = 0.0
    tied: int = 0


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of `infalign reward check`."""
    parser.add_argument("spec", metavar="SPEC", help="as a recipe's reward: file.py:name, module:name, model, URL")
    parser.add_argument("--reward_kwargs", default="{}", help="keyword arguments, e.g. '{target: 20}'")
    parser.add_argument("--prompts", help="file of prompts with their columns, in place of the built-in ones")
    parser.add_argument("--samples", help="file of rows of prompt and completions, in place of the built-in ones")
    parser.add_argument("--columns", help="other names of the file's columns, e.g. prompt=question,completions=answers")
    parser.add_argument("--split", help="split of a folder that has several")


def reward_verb(given: Namespace) -> None:
    """Check the reward of parsed arguments, and print what was found."""
    kwargs = check({}, {"reward_kwargs": given.reward_kwargs}, {"reward_kwargs": dict[str, Any]})["reward_kwargs"]
    results = reward_check(
        given.spec,
        kwargs,
        prompts=given.prompts,
        samples=given.samples,
        columns=parse_columns(given.columns),
        split=given.split,
    )
    tell(given.spec, results)


def reward_check(
    spec: str,
    reward_kwargs: Mapping[str, Any] | None = None,
    *,
    prompts: str | None = None,
    samples: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
) -> list[Checked]:
    """Load a reward and try it on samples, once in each form.

    Args:
        spec: as the recipe's `reward`.
        reward_kwargs: as in a recipe.
        prompts: a file of prompts with their columns, in place of the built-in ones.
        samples: a file of rows of a prompt with its completions, in place of all built-in ones.
        columns: our name -> the file's.
        split: of a folder that has several.

    Raises:
        InputError: the reward can't be loaded, or a file can't be read.
    """
    if prompts is not None and samples is not None:
        raise InputError("give --prompts or --samples, not both: a file of samples has its prompts")
    forms = _samples(prompts, samples, columns or {}, split)  # first: a reward may change the folder
    reward = load_reward(spec, reward_kwargs, base_dir=Path(), retries=0)
    return [_checked(reward, form, rows) for form, rows in forms.items()]


def _samples(
    prompts: str | None, samples: str | None, columns: Mapping[str, str], split: str | None
) -> dict[str, Rows]:
    """The rows by form, at most `MOST` of each."""
    if samples is not None:
        file = read_completions(samples, columns=columns, split=split)
        pairs = [(one.prompt, text) for one in file.rows for text in one.texts or ()]
    else:
        questions = [_prompt(question) for question in QUESTIONS]
        questions += [_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
        if prompts is not None:
            limit = MOST // len(ANSWERS)
            rows = renamed(list(islice(iter_rows(prompts, split=split), limit)), columns, prompts)
            questions = list(prompts_from_rows(rows, prompts).prompts)
        pairs = [(prompt, answer) for prompt in questions for answer in ANSWERS]
    forms = {
        "text": [pair for pair in pairs if isinstance(pair[0].content, str)],
        "chat": [pair for pair in pairs if not isinstance(pair[0].content, str)],
    }
    return {form: rows[:MOST] for form, rows in forms.items() if rows}


def _prompt(content: Text) -> Prompt:
    return Prompt(content, prompt_key(content))


def _checked(reward: Reward, form: str, rows: Rows) -> Checked:
    try:
        scores = _score(reward, rows)
        start = time.perf_counter()
        second = _score(reward, rows)
        seconds = time.perf_counter() - start
        alone = np.concatenate([_score(reward, [row]) for row in rows])
        turned = _score(reward, rows[::-1])[::-1]
    except (RewardError, InputError) as error:
        return Checked(form, rows, problem=str(error))
    return Checked(
        form,
        rows,
        scores,
        seconds=seconds,
        again=_difference(scores, second),
        alone=_difference(scores, alone),
        reversed=_difference(scores, turned),
        tied=_tied(rows, scores),
        unread=getattr(reward.function, "unread", ""),
    )


def _score(reward: Reward, rows: Rows) -> Floats:
    contents = [prompt.content for prompt, _ in rows]
    names = sorted({name for prompt, _ in rows for name in prompt.columns})
    columns: dict[str, Any] = {name: [prompt.columns.get(name) for prompt, _ in rows] for name in names}
    texts = [text for _, text in rows]
    ids = [list(text.encode()) for text in texts]  # no policy, no tokens: bytes stand for them
    return reward(prompts=contents, completions=shape_completions(contents, texts), completion_ids=ids, **columns)


def _difference(one: Floats, other: Floats) -> float:
    if (np.isnan(one) != np.isnan(other)).any():
        return np.inf
    scored = ~np.isnan(one)
    return float(np.abs(one[scored] - other[scored]).max()) if scored.any() else 0.0


def _tied(rows: Rows, scores_B: Floats) -> int:
    """Completions with the score of another text of their prompt."""
    texts: dict[tuple[str, float], set[str]] = {}
    for (prompt, text), score in zip(rows, scores_B.tolist(), strict=True):
        if not np.isnan(score):
            texts.setdefault((prompt.key, score), set()).add(text)
    return sum(len(same) for same in texts.values() if len(same) > 1)


def tell(spec: str, results: Sequence[Checked]) -> None:
    """Print the results.

    Raises:
        RewardError: the reward broke on every form of samples, or scored none of them.
    """
    worked = [one for one in results if one.scores_B is not None]
    if not worked:
        raise RewardError(
            f"{spec} scored no {' and no '.join(one.form for one in results)} prompts: {results[-1].problem}"
        )
    say(f"reward {spec}")
    for one in results:
        same = one is not worked[0] and _same(worked[0], one)
        say(f"\n{one.form} prompts, {len(one.rows)} completions")
        for line in [f"broke: {one.problem}"] if one.scores_B is None else _lines(one, listed=not same):
            say(f"  {line}".rstrip())
    scores = np.concatenate([one.scores_B for one in worked if one.scores_B is not None])
    if np.isnan(scores).all():
        unread = next((f"; one of the answers: {one.unread}" for one in worked if one.unread), "")
        raise RewardError(f"{spec} gave no sample a score: nothing can be calibrated or chosen with it{unread}")
    if np.nanmin(scores) == np.nanmax(scores):
        notice(f"every sample has the same reward, {scores[~np.isnan(scores)][0]:g}: try --samples of your own")


def _same(one: Checked, other: Checked) -> bool:
    """Whether two forms have the same completions and scores."""
    if one.scores_B is None or other.scores_B is None or [r[1] for r in one.rows] != [r[1] for r in other.rows]:
        return False
    return _difference(one.scores_B, other.scores_B) == 0.0


def _lines(one: Checked, *, listed: bool) -> list[str]:
    scores, count = one.scores_B, len(one.rows)
    assert scores is not None  # `tell` asks only then
    lines = _table(one) if listed else ["the same rewards as above"]
    missing = int(np.isnan(scores).sum())
    per = one.seconds / count
    facts = {
        "no score": f"{missing} of {count}",
        "ties": f"{one.tied} of {count} share their reward with another text of the same prompt",
        "speed": f"{per * 1e3:.3g} ms a completion, {1 / max(per, 1e-9):,.3g} per second (one call with all {count})",
        "called again": _verdict(one.again, scores, "the same rewards: deterministic", "other rewards"),
        "one by one": _verdict(one.alone, scores, "the same, whatever is scored with it", "other rewards"),
        "reversed": _verdict(one.reversed, scores, "the same in any order", "other rewards"),
    }
    width = max(map(len, facts))
    return [*lines, "", *(f"{name:<{width}}  {text}" for name, text in facts.items())]


def _verdict(difference: float, scores_B: Floats, same: str, other: str) -> str:
    if difference == 0.0:
        return same
    if np.isinf(difference):
        return f"{other}: a score in one and none in the other"
    scale = max(float(np.nanmax(np.abs(scores_B))), 1e-12)
    small = " (rounding)" if difference / scale < 1e-4 else ""
    return f"{other}, by up to {difference:.2g}{small}"


def _table(one: Checked) -> list[str]:
    assert one.scores_B is not None
    shown = ["none" if np.isnan(score) else f"{score:.6g}" for score in one.scores_B]
    width = max(len("reward"), *map(len, shown))
    lines, before = [f"{'reward':>{width}}  completion"], None
    for (prompt, text), score in zip(one.rows, shown, strict=True):
        if prompt.key != before:
            content = prompt.content if isinstance(prompt.content, str) else prompt.content[-1]["content"]
            lines.append(f"{'':>{width}}  to {_short(content)}")
            before = prompt.key
        lines.append(f"{score:>{width}}    {_short(text)}")
    return lines


def _short(text: str, most: int = 64) -> str:
    plain = repr(" ".join(text.split()))
    return plain if len(plain) <= most else f"{plain[: most - 4]}...{plain[-1]}"
