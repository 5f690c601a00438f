"""What a merge's YAML says: mergekit's own format, checked before anything is loaded.

mergekit ignores keys that it does not know: a misspelt `desnity` merges with the default. Here every key is known, at
every level, parameters are those of the method, and what can be seen to fail later is refused now.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infalign.runtime.config import nearest
from infalign.types import InputError

OLDEST_MERGEKIT = (0, 1, 5)
"""0.1.0 to 0.1.3 are under a business licence, and 0.1.4 lacks transformers 5."""
DAM, MIXTURE = "dam", "logit_mixture"
"""Methods of this package: learned coefficients, and the parents themselves, whose log-probabilities are added."""
TIES_DENSITY = 0.2
"""What TIES and DARE-TIES keep of each task vector where the YAML does not say: the TIES paper's (arXiv:2306.01708)."""
_TRIMMED = ("ties", "dare_ties")

TOP = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
"""mergekit's keys."""
DAM_PARAMETERS = (
    *("steps", "batch_size", "learning_rate", "temperature", "cosine", "l1", "l2", "top_k"),
    *("max_length", "num_examples"),
)


@dataclass(frozen=True)
class Method:
    """A merge method's parameters: those of the merge, those of each model, and which must be given.

    Attributes:
        shared, own: names of the two kinds; `own` may also stand at the top, for all models.
        required: of them.
        normalizes: whether weights are divided by their sum unless the YAML says otherwise.
        needs_base: whether `base_model` must be given.
        most: models at most, without the base; None for any number.
    """

    name: str
    shared: frozenset[str]
    own: frozenset[str]
    required: frozenset[str]
    normalizes: bool
    needs_base: bool
    most: int | None


@dataclass(frozen=True)
class Parent:
    """One of the models that are merged.

    Attributes:
        model: folder or Hub id, `MODEL+ADAPTER` for an adapter on a model.
        parameters: its own.
        data: for DAM, a file of its examples.
    """

    model: str
    parameters: dict[str, Any] = field(default_factory=dict)
    data: str | None = None


@dataclass(frozen=True)
class MergePlan:
    """A checked merge.

    Attributes:
        method: its name.
        parents: what is merged; of `slices` and `modules` every model that they name.
        base: the model that task vectors are taken from, where there is one.
        yaml: the mapping that mergekit gets.
        notes: what was filled in or is worth knowing, a line each.
    """

    method: str
    parents: tuple[Parent, ...]
    base: str | None
    yaml: dict[str, Any]
    notes: tuple[str, ...] = ()


def methods() -> dict[str, Method]:
    """mergekit's methods, as the installed version declares them, and this package's own.

    Raises:
        InputError: mergekit is not installed, or too old.
    """
    check_mergekit()
    from mergekit.merge_methods.base import MISSING, BasePolicy, ParameterScope  # noqa: PLC0415 - an extra, and seconds
    from mergekit.merge_methods.registry import registered_methods  # noqa: PLC0415

    found = dict(own_methods())
    for one in registered_methods():
        spec, contract = one.spec, one.spec.contract
        shared = frozenset(p.name for p in spec.parameters if p.scope == ParameterScope.SHARED)
        needs_base = contract.base == BasePolicy.REQUIRED
        most = contract.max_non_base
        if most is None and contract.max_inputs is not None:
            most = contract.max_inputs - int(needs_base)
        found[spec.name] = Method(
            spec.name,
            shared,
            frozenset(p.name for p in spec.parameters) - shared,
            frozenset(p.name for p in spec.parameters if p.default is MISSING),
            any(p.name == "normalize" and p.default is True for p in spec.parameters),
            needs_base,
            most,
        )
    return found


def own_methods() -> dict[str, Method]:
    """Those of this package, which need no mergekit."""
    nothing, weight = frozenset[str](), frozenset(["weight"])
    return {
        DAM: Method(DAM, frozenset(DAM_PARAMETERS), nothing, nothing, False, False, None),
        MIXTURE: Method(MIXTURE, nothing, weight, weight, False, False, None),
    }


def check_mergekit() -> None:
    """See that mergekit is there and young enough.

    Raises:
        InputError: it is not.
    """
    try:
        version = importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError as error:
        ours = " and ".join(own_methods())
        raise InputError(f"merging needs mergekit: pip install 'infalign[merge]' ({ours} work without)") from error
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST_MERGEKIT:
        oldest = ".".join(map(str, OLDEST_MERGEKIT))
        raise InputError(f"mergekit {version} is too old (and 0.1.0 to 0.1.3 are not free software): {oldest} or newer")


def read_plan(yaml: Mapping[str, Any]) -> MergePlan:
    """A plan from mergekit's YAML (or DAM's, which has `data` for each model).

    Raises:
        InputError: everything that is wrong with it, at once.
    """
    yaml = {str(name): value for name, value in yaml.items()}
    problems = [f"unknown key {name}{nearest(name, TOP)}" for name in yaml if name not in TOP]
    name = yaml.get("merge_method")
    known = own_methods() if name in own_methods() else methods()
    if not isinstance(name, str) or name not in known:
        given = "missing" if name is None else f"{name!r} is unknown{nearest(str(name), known)}"
        problems.append(f"merge_method {given} (one of {', '.join(sorted(known))})")
        raise InputError("; ".join(problems))
    method = known[name]
    parents = list(_parents(yaml, method, problems))
    _check_inputs(yaml, method, parents, problems)
    _check_parameters(yaml.get("parameters"), method.shared | method.own, method, "parameters", problems)
    _check_required(yaml, method, parents, problems)
    _check_weights(yaml, method, parents, problems)
    if problems:
        raise InputError("; ".join(problems) if len(problems) < 3 else "\n  ".join(["several problems:", *problems]))
    filled, notes = _filled(yaml, method, parents)
    return MergePlan(name, tuple(parents), yaml.get("base_model"), filled, tuple(notes))


def _parents(yaml: Mapping[str, Any], method: Method, problems: list[str]) -> Iterator[Parent]:
    """Every model that is named, with its parameters checked."""
    ways = [name for name in ("models", "slices", "modules") if yaml.get(name)]
    if len(ways) != 1:
        given = f"got {' and '.join(ways)}" if ways else "none is given"
        problems.append(f"exactly one of models, slices and modules says what is merged: {given}")
        return
    allowed = ("model", "parameters", "data") if method.name == DAM else ("model", "parameters")
    for where, entry in _entries(yaml, ways[0], problems):
        in_slices = "sources" in where
        keys = (*allowed, "layer_range") if in_slices else allowed
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            problems.append(f"{where} must name a model: {{model: FOLDER_OR_HUB_ID}}, got {entry!r}")
            continue
        problems += [f"{where}: unknown key {name}{nearest(str(name), keys)}" for name in entry if name not in keys]
        own = entry.get("parameters") or {}
        _check_parameters(own, method.own, method, f"{where}: parameters", problems)
        yield Parent(entry["model"], dict(own) if isinstance(own, Mapping) else {}, entry.get("data"))


def _entries(yaml: Mapping[str, Any], way: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """What names a model, and where it stands."""
    if way == "models":
        yield from ((f"models[{at}]", one) for at, one in enumerate(_listed(yaml["models"], "models", problems)))
        return
    outputs = {"": yaml} if way == "slices" else yaml["modules"]
    if not isinstance(outputs, Mapping):
        problems.append(f"modules must map names to merges, got {outputs!r}")
        return
    for name, output in outputs.items():
        prefix = f"modules.{name}." if name else ""
        if not isinstance(output, Mapping):
            problems.append(f"{prefix[:-1]} must hold slices or models, got {output!r}")
            continue
        for at, one in enumerate(_listed(output.get("models") if name else None, f"{prefix}models", problems)):
            yield f"{prefix}models[{at}]", one
        for at, piece in enumerate(_listed(output.get("slices"), f"{prefix}slices", problems)):
            where = f"{prefix}slices[{at}]"
            if not isinstance(piece, Mapping):
                problems.append(f"{where} must hold sources, got {piece!r}")
                continue
            for number, source in enumerate(_listed(piece.get("sources"), f"{where}.sources", problems)):
                yield f"{where}.sources[{number}]", source


def _listed(value: Any, where: str, problems: list[str]) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list):
        problems.append(f"{where} must be a list, got {value!r}")
        return ()
    return value


def _check_inputs(yaml: Mapping[str, Any], method: Method, parents: Sequence[Parent], problems: list[str]) -> None:
    """As many models as the method takes, and its base."""
    base = yaml.get("base_model")
    if base is not None and not isinstance(base, str):
        problems.append(f"base_model must be a folder or Hub id, got {base!r}")
        return
    if method.needs_base and base is None and not yaml.get("slices") and not yaml.get("modules"):
        problems.append(f"{method.name} needs base_model: the model that the others were trained from")
    if not yaml.get("models"):
        return
    others = [one for one in parents if one.model != base]
    if len({one.model for one in parents}) < len(parents):
        problems.append("models names one model twice: give it once, with the sum of its weights")
    if method.most is not None and len(others) > method.most:
        beside = " with its base" if method.needs_base else ""
        problems.append(f"{method.name} merges {method.most} at most{beside}, got {len(others)}")
    if method.name == DAM:
        if len(parents) < 2:
            problems.append(f"dam learns how to merge two models or more, got {len(parents)}")
        problems += [f"models[{at}] ({one.model}) needs data: a file" for at, one in enumerate(parents) if not one.data]
    if method.name == MIXTURE:
        problems += [
            f"models[{at}] ({one.model}): weight must be one number, got {one.parameters['weight']!r}"
            for at, one in enumerate(parents)
            if isinstance(one.parameters.get("weight", 0), (bool, str, list, Mapping))
        ]


def _check_parameters(given: Any, allowed: frozenset[str], method: Method, where: str, problems: list[str]) -> None:
    """Names and values of one mapping of parameters."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        problems.append(f"{where} must be a mapping, got {given!r}")
        return
    for name, value in given.items():
        if name not in allowed:
            if name in method.shared:
                problems.append(f"{where}: {name} is of the whole merge: it belongs under the top parameters")
            else:
                problems.append(f"{where}: {method.name} has no parameter {name}{nearest(str(name), allowed)}")
        elif not _is_setting(value):
            problems.append(f"{where}: {name} must be a number, true, false, a list of numbers or filters: {value!r}")


def _is_setting(value: Any) -> bool:
    """A scalar, a gradient over the layers, or conditions `{filter, value}`."""
    if isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, Mapping):
        return "value" in value and set(value) <= {"value", "filter"} and _is_setting(value["value"])
    return isinstance(value, list) and bool(value) and all(_is_setting(one) for one in value)


def _check_required(yaml: Mapping[str, Any], method: Method, parents: Sequence[Parent], problems: list[str]) -> None:
    """Parameters without a default are given: at the top, or for each model."""
    top = yaml.get("parameters")
    top = top if isinstance(top, Mapping) else {}
    inner = [*(yaml.get("slices") or []), *(yaml.get("modules") or {})]
    if inner:  # slices have parameters of their own, which mergekit looks up
        return
    for name in sorted(method.required - set(top)):
        lacking = [one.model for one in parents if one.model != yaml.get("base_model") and name not in one.parameters]
        if name in method.shared or lacking:
            where = "parameters" if name in method.shared else f"the parameters of {lacking[0]}, or of all, at the top"
            problems.append(f"{method.name} needs {name}: give it under {where}")


def _check_weights(yaml: Mapping[str, Any], method: Method, parents: Sequence[Parent], problems: list[str]) -> None:
    """Weights that are divided by their sum must not sum to zero: mergekit would write NaN."""
    top = yaml.get("parameters")
    if not (top if isinstance(top, Mapping) else {}).get("normalize", method.normalizes):
        return
    weights = [one.parameters.get("weight") for one in parents if one.model != yaml.get("base_model")]
    plain = [float(one) for one in weights if isinstance(one, (int, float)) and not isinstance(one, bool)]
    if len(plain) == len(weights) > 0 and sum(plain) == 0:
        problems.append(
            f"the weights {', '.join(f'{one:g}' for one in plain)} sum to zero, by which they are divided: change one"
        )


def _filled(yaml: dict[str, Any], method: Method, parents: Sequence[Parent]) -> tuple[dict[str, Any], list[str]]:
    """With the paper's density where none is given, and what a user would not expect of mergekit."""
    notes: list[str] = []
    filled = dict(yaml)
    top = dict(yaml.get("parameters") or {})
    given = "density" in top or any("density" in one.parameters for one in parents)
    if method.name in _TRIMMED and not given and yaml.get("models"):
        filled["parameters"] = {**top, "density": TIES_DENSITY}
        notes.append(
            f"density is not given: {TIES_DENSITY:g}, the TIES paper's (mergekit alone would trim nothing: 1.0)"
        )
    if method.name == "slerp":
        notes.append(
            "slerp of whole weights is linear for models this near to each other; to keep the length of the change, "
            "merge_method: nuslerp with base_model goes along the sphere of task vectors"
        )
    if any(isinstance(value, list) for one in (top, *(p.parameters for p in parents)) for value in one.values()):
        notes.append("a list of values is spread over the layers; embeddings, final norm and head get the first one")
    return filled, notes
