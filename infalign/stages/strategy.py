"""A recipe's decoding strategy, from its name to an object."""

from __future__ import annotations

from typing import Any

from infalign.decoding.answers import EXTRACTORS
from infalign.decoding.strategies import STRATEGIES, TAKES_PROCEDURE
from infalign.decoding.strategy import Strategy
from infalign.runtime.plugins import built, find_object, find_own
from infalign.stages.recipe import Recipe
from infalign.theory.procedures import Procedure
from infalign.types import InputError


def load_strategy(recipe: Recipe, procedure: Procedure) -> Strategy:
    """The recipe's strategy: a built-in name with `n` and `strategy_kwargs`, or `path.py:name`.

    `procedure` and `early_rejection` choose by the recipe's procedure; the other built-ins choose in their own way
    among at most `n` candidates. One's own is an object with `n`, `width` and `step`, or what makes one from
    `strategy_kwargs`.

    Raises:
        InputError: an unknown name, arguments that it does not take, or an object that is no strategy.
    """
    name, arguments = recipe.strategy, dict(recipe.strategy_kwargs)
    if name in STRATEGIES:
        first = {"procedure": procedure} if name in TAKES_PROCEDURE else {"n": recipe.n}
        if name == "majority_vote":
            arguments = _with_extractor(arguments, recipe)
        strategy = built(STRATEGIES[name], {**first, **arguments}, name, what="strategy", kwargs=recipe.strategy_kwargs)
        _check_beginning(strategy, recipe.max_completion_length)
        return strategy
    strategy = find_own(name, STRATEGIES, recipe.base_dir, what="strategy")
    if isinstance(strategy, type) or not hasattr(strategy, "step"):
        strategy = built(strategy, arguments, name, what="strategy", kwargs=recipe.strategy_kwargs)
    missing = [part for part in ("n", "width", "step") if not hasattr(strategy, part)]
    if missing:
        raise InputError(f"strategy {name!r} gave {type(strategy).__name__}, which lacks {', '.join(missing)}")
    return strategy


def _check_beginning(strategy: Any, limit: int) -> None:
    """Early rejection needs something left to save."""
    tokens = getattr(strategy, "check_tokens", None)
    if tokens is not None and tokens >= limit:
        raise InputError(
            f"strategy 'early_rejection': check_tokens is {tokens} and completions have {limit} tokens at most "
            "(max_completion_length): nothing would be saved; lower check_tokens"
        )


def _with_extractor(arguments: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """`answer: path.py:name` as the function itself."""
    answer = arguments.get("answer")
    if not isinstance(answer, str) or answer in EXTRACTORS or ".py:" not in answer:
        return arguments
    found = find_object(answer, recipe.base_dir, what="answer")
    if found is None or not callable(found.value):
        raise InputError(f"answer {answer!r} must name a function that maps a completion to its answer, or None")
    return {**arguments, "extract": found.value}
