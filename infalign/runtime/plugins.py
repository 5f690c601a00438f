"""Finding the object that a recipe names (a reward, judge, procedure, transform, strategy): in a file or a module."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from infalign.runtime.config import nearest
from infalign.runtime.imports import (
    IMPORTED,
    PREFIX,
    Modules,
    file_digest,
    import_path,
    local_modules,
    module_and_imports,
    module_digest,
    remember,
    renew,
)
from infalign.types import InputError

_EXECUTED: dict[Path, tuple[str, ModuleType]] = {}
"""The module made from each file, and the file's digest then: it runs once a process, and again when it was edited."""
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Found:
    """The object of a spec.

    Attributes:
        value: the object.
        name: for logs.
        source: what identifies its source, wherever that lies.
        modules: the local modules that its source imports.
        folders: where its source imports from, after the import path.
    """

    value: Any
    name: str
    source: list[str]
    modules: Modules = field(default_factory=dict)
    folders: tuple[Path, ...] = ()


def find_object(spec: str, base_dir: Path, *, what: str = "reward") -> Found | None:
    """The object named by `path/to/file.py:name`, `package.module:name` or `package.module.name`.

    Args:
        spec: the name. Files are looked for under `base_dir`, then under the working directory; modules on the
            import path, then in the same two folders.
        base_dir: folder of the recipe.
        what: what is looked for, the first word of every message.

    Returns:
        None when `spec` has none of these forms (a model's folder or Hub id).

    Raises:
        InputError: the file, module or name is missing, or importing it fails (the cause in one line).
    """
    left, colon, name = spec.rpartition(":")
    if spec.endswith(".py") or (colon and left.endswith(".py")):
        shown, name = (spec, "") if spec.endswith(".py") else (left, name)
        path = find_file(shown, base_dir, what=what)
        folders = (path.parent, base_dir)
        modules = local_modules(path, folders)
        with _as_it_is_now(modules):
            module = _executed(path, folders, what)
        IMPORTED[module.__name__] = modules
        value = _attribute(module, name, shown, what)
        return Found(value, _telling(name, path.stem), [name, file_digest(path)], modules, folders)
    if not (colon and all(part.isidentifier() for part in left.split("."))):
        if not _DOTTED.fullmatch(spec):
            return None
        left, _, name = spec.rpartition(".")
    folders = (base_dir, Path())
    modules = module_and_imports(left, folders)
    with _as_it_is_now(modules):
        module = _import(left, folders, spec, what)
    value = _attribute(module, name, left, what)
    defined_in = sys.modules.get(getattr(value, "__module__", None) or "", module)
    source = [name, *module_digest(defined_in)]
    others = {one: path for one, path in modules.items() if one != defined_in.__name__}
    return Found(value, _telling(name, left.rpartition(".")[2]), source, others, folders)


def find_own(name: str, known: Collection[str], base_dir: Path, *, what: str) -> Any:
    """The object that is named where a built-in one of `known` could be; as `find_object`.

    Raises:
        InputError: it is neither; the nearest name and all names are given.
    """
    found = find_object(name, base_dir, what=what) if ":" in name or "." in name else None
    if found is None:
        raise InputError(
            f"{what} {name!r} is unknown{nearest(name, known)} "
            f"(one of {', '.join(known)}, or path.py:name for your own)"
        )
    return found.value


def built(build: Any, arguments: Mapping[str, Any], name: str, *, what: str, kwargs: Mapping[str, Any]) -> Any:
    """What `build` makes of `arguments`, among which are the recipe's `kwargs`.

    Raises:
        InputError: it refuses them, or has not enough.
    """
    try:
        return build(**arguments)
    except InputError as error:
        raise InputError(f"{what} {name!r}: {error}") from error
    except (TypeError, ValueError) as error:
        verb = "needs more than" if "missing" in str(error) else "does not take"
        raise InputError(f"{what} {name!r} {verb} {what}_kwargs {dict(kwargs)}: {error}") from error


@contextlib.contextmanager
def _as_it_is_now(modules: Modules) -> Iterator[None]:
    """Import local modules as their files are now, also where this process imported them before."""
    if renew(modules):
        _EXECUTED.clear()  # what is kept would hold on to what it took from an edited one
    yield
    remember(modules)


def _telling(name: str, place: str) -> str:
    """`name`, or where it lies when the name says nothing."""
    return place if name in ("build", "reward", "main") else name


def find_file(path: str, base_dir: Path, *, what: str = "reward") -> Path:
    """The file under `base_dir` or the working directory.

    Raises:
        InputError: there is none; names the Python files in that folder.
    """
    wanted = Path(path).expanduser()
    for candidate in (base_dir / wanted, wanted):
        if candidate.is_file():
            return candidate.resolve()
    folder = (base_dir / wanted).resolve().parent
    there = sorted(found.name for found in folder.glob("*.py")) if folder.is_dir() else []
    hint = f"; that folder has {', '.join(there[:8])}" if there else ""
    start = "working directory" if base_dir.resolve() == Path.cwd() else "recipe"
    raise InputError(
        f"{what} {path!r}: no such file under {base_dir.resolve()}{hint}; paths are relative to the {start}"
    )


def _executed(path: Path, folders: tuple[Path, ...], what: str) -> ModuleType:
    content = file_digest(path)
    if path in _EXECUTED and _EXECUTED[path][0] == content:
        return _EXECUTED[path][1]
    # two files of one name must not be one module
    unique = hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()
    module_spec = importlib.util.spec_from_file_location(f"{PREFIX}{path.stem}_{unique}", path)
    assert module_spec is not None and module_spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        with import_path(*folders):
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code, at import: anything
        sys.modules.pop(module_spec.name, None)
        raise InputError(f"{what} {path}: importing the file failed ({one_line(error)})") from error
    _EXECUTED[path] = content, module
    return module


def _import(name: str, folders: tuple[Path, ...], spec: str, what: str) -> ModuleType:
    try:
        with import_path(*folders):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"{what} {spec!r}: no module named {error.name!r}; give package.module:name, path/to/file.py:name, "
                f"or a model's folder or Hub id (owner/name)"
            ) from error
        raise InputError(f"{what} {spec!r}: importing {name} failed ({one_line(error)})") from error
    except (Exception, SystemExit) as error:  # as above
        raise InputError(f"{what} {spec!r}: importing {name} failed ({one_line(error)})") from error


def _attribute(module: ModuleType, name: str, where: str, what: str) -> Any:
    public = public_names(module)
    if not name:
        raise InputError(f"{what} {where!r}: say which name of it, {where}:NAME; it has {', '.join(public) or 'none'}")
    try:
        return getattr(module, name)
    except AttributeError as error:
        near = get_close_matches(name, public, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"{what} {where!r} has no {name!r}; {hint}it has {', '.join(public) or 'none'}") from error
    except ImportError as error:  # lazy modules import on access
        raise InputError(f"{what} {where}:{name}: importing it failed ({one_line(error)})") from error


def public_names(module: ModuleType) -> list[str]:
    """Names of the callables a module offers: `__all__`, else what it defines itself, else what lazy ones list."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    )


def one_line(error: BaseException) -> str:
    """`TypeName: first line of the message`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
