"""One door to every reward: a file, a module, a model, or an object, with or without keyword arguments.

What is called how, by its signature alone:
- a class is built with the keyword arguments;
- a callable that names `prompts`, `completions` or `completion_ids` is the reward; keyword arguments are bound to it;
- one that takes `**kwargs`, and is given none, is the reward as well;
- anything else is a builder: it is called with the keyword arguments and returns the reward (or a model).

A class or builder that names `load_member` is given `load_reward` with the recipe's folder, tries and policy bound,
for rewards made of others; one that names `recipe_dir` is given that folder. A URL is a reward on a server
(`rewards.http`).
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.rewards.contract import Text
from infalign.rewards.fingerprint import callable_digest, digest
from infalign.rewards.guard import GuardedReward, OnError
from infalign.runtime.artifacts import without_secrets
from infalign.runtime.calls import own_copy
from infalign.runtime.imports import digests, import_path, modules_behind, remember
from infalign.runtime.plugins import Found, find_object, one_line
from infalign.types import InputError

_LISTS = {"prompts", "completions", "completion_ids"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Reward:
    """A loaded reward: call it as TRL does, get float64 (B,) with NaN for no score.

    Attributes:
        name: short, for logs (also `__name__`, which TRL asks for).
        fingerprint: hex digits that change when the reward's source, weights or arguments do.
        function: the callable inside the guard (e.g. a `ClassifierReward`).
        counts: the guard's counters.
    """

    def __init__(self, guard: GuardedReward, fingerprint: str) -> None:
        self.guard = guard
        self.name = self.__name__ = guard.name
        self.fingerprint = fingerprint

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> NDArray[np.float64]:
        """Scores (B,) of B completions; see `GuardedReward`.

        Raises:
            RewardError: the reward failed, or returned what is no reward.
        """
        return self.guard(prompts, completions, completion_ids, **columns)

    @property
    def function(self) -> Callable[..., Any]:
        """The callable inside the guard."""
        return self.guard.function

    @property
    def reads_columns(self) -> frozenset[str] | None:
        """The data's columns that the reward may read; None for any."""
        return self.guard.reads_columns

    @property
    def required_columns(self) -> frozenset[str]:
        """The data's columns without which the reward can't be asked."""
        return self.guard.required_columns

    @property
    def counts(self) -> dict[str, int]:
        """The guard's counters, live."""
        return self.guard.counts

    def __repr__(self) -> str:
        return f"Reward({self.name!r}, fingerprint={self.fingerprint!r})"


def load_reward(
    spec: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    base_dir: str | Path = ".",
    name: str | None = None,
    on_error: OnError = "error",
    retries: int = 2,
    timeout: float | None = None,
    backoff: float = 1.0,
    strip_reasoning: tuple[str, str] | None = None,
) -> Reward:
    """The reward that `spec` names, inside a guard.

    Args:
        spec: `path/to/file.py:name`, `package.module:name`, `package.module.name`, a URL, the folder or Hub id of a
            sequence classifier or a process reward model, a callable, a class, or a model.
        kwargs: keyword arguments; for a model those of `ClassifierReward`, or of `ProcessReward` where it classifies
            tokens; for a URL those of `HTTPReward`.
        base_dir: folder of the recipe, for relative paths (the working directory is tried after it).
        name: for logs, instead of the object's own.
        on_error: see `GuardedReward`, as for the arguments that follow.
        retries: further attempts.
        timeout: seconds per attempt.
        backoff: seconds before the first retry.
        strip_reasoning: (opening tag, closing tag), or None.

    Raises:
        InputError: nothing of that name, an import or builder that fails, or an object that is no reward.

    >>> load_reward(lambda completions, **_: [len(c) for c in completions], name="length")(["a"], ["four"])
    array([4.])
    """
    options = dict(kwargs or {})
    found = _find(spec, Path(base_dir))
    policy: dict[str, Any] = {"on_error": on_error, "retries": retries, "timeout": timeout, "backoff": backoff}
    given = {"load_member": partial(load_reward, base_dir=base_dir, **policy), "recipe_dir": Path(base_dir)}
    with import_path(*found.folders):  # a builder may import
        function = _build(found.value, options, name or found.name, given)
    modules = {**found.modules, **(modules_behind(function, found.folders) if found.folders else {})}
    remember(modules)
    own = getattr(function, "fingerprint", None)
    # the fingerprints of this room's own classes say all that shapes their scores
    ours = type(function).__module__.startswith("infalign.rewards.")
    speaks_for_itself = ours and own and not modules
    identity = own if speaks_for_itself else [[*found.source, *digests(modules)], own, without_secrets(options)]
    if getattr(function, "tries_again", False):  # its parts have the time limit and the further attempts
        policy |= {"retries": 0, "timeout": None}
    guard = GuardedReward(function, name=name or found.name, strip_reasoning=strip_reasoning, **policy)
    return Reward(guard, digest(identity, strip_reasoning))


def _find(spec: Any, base_dir: Path) -> Found:
    """The object that `spec` stands for; a model stays a path or id, as a string."""
    if isinstance(spec, Path):
        spec = str(spec)
    if not isinstance(spec, str):
        if not callable(spec):
            raise InputError(f"a reward is a spec, a callable or a model, got {spec!r:.60} ({type(spec).__name__})")
        return Found(spec, _name_of(spec), [] if _is_torch_module(spec) else callable_digest(spec))
    spec = spec.strip()
    if spec.startswith(("http://", "https://")):
        build = importlib.import_module("infalign.rewards.http").HTTPReward
        return Found(partial(build, spec), spec.rstrip("/").rpartition("/")[2] or "http", [])
    for folder in (base_dir / Path(spec).expanduser(), Path(spec).expanduser()):
        if spec and folder.is_dir():
            if not any((folder / config).is_file() for config in ("config.json", "adapter_config.json")):
                raise InputError(
                    f"reward {spec!r}: the folder {folder} holds no model (no config.json, no adapter_config.json)"
                )
            return Found(str(folder), folder.resolve().name, [])
    found = find_object(spec, base_dir)
    if found is not None:
        return found
    if spec.startswith(".") or not _HUB_ID.fullmatch(spec):
        raise InputError(
            f"reward {spec!r}: no such folder under {base_dir.resolve()} or {Path.cwd()}, and not of the form "
            f"path/to/file.py:name, package.module:name or owner/model"
        )
    return Found(spec, spec.split("/")[-1], [])


def _build(value: Any, options: dict[str, Any], name: str, given: Mapping[str, Any]) -> Callable[..., Any]:
    """The reward function that `value` is, builds, or (a model) is wrapped into."""
    if isinstance(value, str) or _is_torch_module(value):
        return _classifier(value, _with_tokenizer(options, given["recipe_dir"]), name)
    built = built_callable(value, options, f"reward {name!r}", _LISTS, given)
    if _is_torch_module(built):
        return _classifier(built, {}, name)
    if not callable(built):
        raise InputError(f"reward {name!r}: the builder returned {built!r:.60} ({type(built).__name__}), no callable")
    return built


def built_callable(
    value: Any, options: dict[str, Any], subject: str, lists: set[str], given: Mapping[str, Any] | None = None
) -> Any:
    """What `value` is with its keyword arguments bound, or builds, by the rules of this module.

    Args:
        value: what a spec names.
        options: the user's keyword arguments.
        subject: the first words of every message.
        lists: a callable that names one of these is no builder.
        given: what a builder gets that names it, beside `options`.

    Raises:
        InputError: not callable, or the builder fails.
    """
    if not callable(value):
        raise InputError(f"{subject} is not callable: {value!r:.60} ({type(value).__name__})")
    if not _is_builder(value, options, lists):
        return partial(value, **own_copy(options)) if options else value
    options = own_copy(options)  # a builder may change what it is given; the recipe's own stays
    wanted = {name: one for name, one in (given or {}).items() if name in _named(value) and name not in options}
    try:
        return value(**wanted, **options)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's code
        raise InputError(
            f"{subject}: building it with {without_secrets(options) or 'no arguments'} failed ({one_line(error)})"
        ) from error


def _named(value: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(value).parameters)
    except (TypeError, ValueError):  # a builtin without signature
        return set()


def _is_builder(value: Callable[..., Any], options: Mapping[str, Any], lists: set[str]) -> bool:
    if inspect.isclass(value) or (isinstance(value, partial) and inspect.isclass(value.func)):
        return True
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # a builtin without signature
        return bool(options)
    if any(parameter.name in lists for parameter in parameters):
        return False
    takes_anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return bool(options) or not takes_anything


def _with_tokenizer(options: dict[str, Any], recipe_dir: Path) -> dict[str, Any]:
    """Options whose `tokenizer`, if it is a folder's relative path, starts at the recipe's folder."""
    named = options.get("tokenizer")
    if isinstance(named, (str, Path)) and (beside := recipe_dir / Path(named).expanduser()).is_dir():
        return {**options, "tokenizer": str(beside)}
    return options


def _classifier(model: Any, options: dict[str, Any], name: str) -> Callable[..., Any]:
    of_steps = importlib.import_module("infalign.rewards.classifier_loading").scored_by(model) == "token"
    home, reward = ("process", "ProcessReward") if of_steps else ("classifier", "ClassifierReward")
    build = getattr(importlib.import_module(f"infalign.rewards.{home}"), reward)
    allowed = list(inspect.signature(build).parameters)[1:]
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise InputError(f"reward model {name!r} takes no argument {unknown[0]!r}; one of {', '.join(allowed)}")
    return build(model, **options)


def _is_torch_module(value: Any) -> bool:
    torch = sys.modules.get("torch")  # a module can only be given once torch is there
    return torch is not None and isinstance(value, torch.nn.Module)


def _name_of(value: Any) -> str:
    if isinstance(value, partial):
        return _name_of(value.func)
    if _is_torch_module(value):
        return (
            getattr(getattr(value, "config", None), "_name_or_path", "").rstrip("/").split("/")[-1]
            or type(value).__name__
        )
    name = getattr(value, "__name__", None) or type(value).__name__
    return "reward" if name == "<lambda>" else str(name)
