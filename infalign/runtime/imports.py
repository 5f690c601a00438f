"""The local modules that a reward's source imports: an edited helper is a changed reward.

Local is what lies under the folder of the reward's file, the recipe's folder or the working directory, and is neither
installed (site-packages, the standard library) nor part of infalign. Imports are read from the source, also those
inside functions, and followed from module to module; they are looked up as Python would and nothing is run. A module
whose name is made at run time is seen only where the built reward, or what it holds, comes from it.

Within one process Python imports a module once. `renew` lets go of local modules that were edited since, so that what
runs is what the fingerprint says.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

Modules = Mapping[str, Path]
"""Local modules by name, with their files."""

_INSTALLED = {"site-packages", "dist-packages"}
_NOT_THE_USERS = [Path(__file__).resolve().parents[1], Path(sysconfig.get_path("stdlib")).resolve()]
PREFIX = "infalign_reward_"
"""What the names of modules made from a reward's file begin with."""

IMPORTED: dict[str, Modules] = {}
"""What each module made from a reward's file imports."""

_LOADED: dict[str, tuple[Path, str]] = {}
"""The file and digest of every local module that a reward of this process imports."""


def file_digest(path: Path) -> str:
    """16 hex digits over the content of a file; none where it is gone."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    except OSError:
        return ""


def digests(modules: Modules) -> list[str]:
    """`name=digest` of each module, in order of their names: what tells their contents apart, wherever they lie."""
    return [f"{name}={file_digest(path)}" for name, path in sorted(modules.items())]


def module_digest(module: Any) -> list[str]:
    """Name, version of the distribution, and source hash of an imported module, as far as they can be found."""
    source = getattr(module, "__file__", None)
    content = file_digest(Path(source)) if source and Path(source).is_file() else ""
    try:
        version = importlib.metadata.version(module.__name__.partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return [module.__name__, version, content]


@contextlib.contextmanager
def import_path(*folders: Path) -> Iterator[None]:
    """Folders at the END of the import path for a moment: they can add modules, not shadow installed ones."""
    before = list(sys.path)
    sys.path.extend(str(folder.resolve()) for folder in folders)
    try:
        yield
    finally:
        sys.path[:] = before


def local_modules(source: Path, folders: Sequence[Path], name: str = "") -> dict[str, Path]:
    """The local modules that a file imports, directly or through others, by name.

    Args:
        source: the file.
        folders: where modules are looked for after the import path; local lies under these, the file's own folder or
            the working directory.
        name: the file's own, if it is a module: for relative imports.
    """
    roots = [folder.resolve() for folder in (source.parent, *folders, Path())]
    importlib.invalidate_caches()  # a helper that has just been written
    found: dict[str, Path] = {}
    todo, seen = _imported(source, name), set()
    with import_path(*folders):
        while todo - seen:
            one = (todo - seen).pop()
            seen.add(one)
            path = _file_of(one)
            if path is not None and _is_local(path, roots):
                found[one] = path
                todo |= _imported(path, one)
    return found


def module_and_imports(name: str, folders: Sequence[Path]) -> dict[str, Path]:
    """A module and the local modules that it imports; nothing for one that is installed, or not there.

    Args:
        name: of the module.
        folders: where it is looked for after the import path. Local lies under these, the working directory, or the
            folder that holds its outermost package.
    """
    with import_path(*folders):
        path = _file_of(name)
    if path is None:
        return {}
    outermost = path.parents[name.count(".") + (path.name == "__init__.py")]
    if not _is_local(path, [outermost]):
        return {}
    return {name: path, **local_modules(path, [*folders, outermost], name)}


def modules_behind(built: Any, folders: Sequence[Path]) -> dict[str, Path]:
    """The local modules that a built reward, or what it holds, was defined in, with all that they import."""
    while isinstance(built, partial):
        built = built.func
    held = list(getattr(built, "__dict__", {}).values())
    for cell in getattr(built, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            held.append(cell.cell_contents)
    roots = [folder.resolve() for folder in (*folders, Path())]
    found: dict[str, Path] = {}
    for value in (built, type(built), *held):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        file = getattr(sys.modules.get(str(name)), "__file__", None)
        if file and name != "__main__" and not str(name).startswith(PREFIX) and _is_local(Path(file), roots):
            found |= {str(name): Path(file).resolve(), **local_modules(Path(file), folders, str(name))}
    return found


def renew(modules: Modules) -> bool:
    """Let go of every local module that a reward imports, when one was edited or another file of its name is meant.

    All of them, since a module that is kept would hold on to what it took from an edited one.

    Args:
        modules: what is about to be imported.

    Returns:
        Whether it was necessary.
    """
    stale = [
        path
        for name, (path, digest) in _LOADED.items()
        if file_digest(path) != digest or modules.get(name, path) != path
    ]
    if not stale:
        return False
    for path in stale:  # Python takes compiled code for current when the source has its size and its second
        with contextlib.suppress(OSError, NotImplementedError):
            Path(importlib.util.cache_from_source(str(path))).unlink()
    for name in _LOADED:
        sys.modules.pop(name, None)
        for parent in _parents(name):
            if getattr(sys.modules.get(parent), "__file__", "") is None:  # a folder without __init__.py
                sys.modules.pop(parent)
    _LOADED.clear()
    return True


def remember(modules: Modules) -> None:
    """Note what the modules hold as they are imported."""
    _LOADED.update((name, (path, file_digest(path))) for name, path in modules.items())


def _imported(path: Path, name: str) -> set[str]:
    """The names of all modules that a file may import; of `from a import b` both `a` and `a.b`."""
    if path.suffix != ".py":
        return set()
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # importing it will say so
        return set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)} if base else set()
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found | {parent for one in found for parent in _parents(one)}


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names; empty for a relative one outside of a package."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    if not package or node.level > len(parts):
        return ""
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _file_of(name: str) -> Path | None:
    """The file that importing `name` would run, without importing its parents."""
    first, *rest = name.split(".")
    if not all(part.isidentifier() for part in (first, *rest)) or first in sys.stdlib_module_names:
        return None
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    spec = next((spec for find in finders if find and (spec := find(first, None)) is not None), None)
    place = list(spec.submodule_search_locations or ()) if spec else []
    for count, part in enumerate(rest, 2):
        # folder by folder: PathFinder asks parents without __init__.py, which need not be imported
        found = [pkgutil.get_importer(folder) for folder in place]
        specs = [finder.find_spec(".".join([first, *rest][:count])) for finder in found if finder]
        spec = next((one for one in specs if one and one.origin), None)
        place = [str(Path(folder) / part) for folder in place if (Path(folder) / part).is_dir()]
    return Path(spec.origin).resolve() if spec and spec.origin and spec.has_location else None


def _is_local(path: Path, roots: Iterable[Path]) -> bool:
    path = path.resolve()
    if _INSTALLED & set(path.parts) or any(path.is_relative_to(one) for one in _NOT_THE_USERS):
        return False
    return any(path.is_relative_to(root) for root in roots)
