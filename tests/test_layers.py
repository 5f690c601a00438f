"""A module imports only from its own room and the rooms above it; imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import infalign

ROOT = Path(infalign.__file__).parent
ORDER = [
    "types",
    "theory",
    "runtime",
    "models",
    "calibration",
    "data",
    "rewards",
    "generation",
    "decoding",
    "evaluation",
    "training",
    "merging",
    "forgetting",
    "report",
    "serving",
    "stages",
    "cli",
]
BEYOND = {  # what a room may import beyond the standard library, infalign and numpy
    "types": set(),
    "theory": {"scipy"},
    "runtime": {"accelerate", "httpx", "psutil", "tqdm", "yaml"},
    "calibration": {"scipy", "pyarrow"},
    "data": {"datasets", "pyarrow"},
    "decoding": {"scipy"},
    "evaluation": {"scipy"},
    "report": {"matplotlib", "jinja2", "pyarrow"},
    "serving": {"prometheus_client", "pydantic", "starlette", "uvicorn"},
    "cli": set(),
}
PURE = ["theory", "calibration/quantile.py", "calibration/judged.py", "evaluation/winrate.py"]
FILES = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "infalign" else str(node.module) for alias in node.names
            }
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_upwards(path):
    if room(path) in ("__init__", "__main__"):
        return
    place = ORDER.index(room(path))
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "infalign" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= place, f"{path} imports {name}, a room below"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_use_only_their_packages(path):
    if room(path) not in BEYOND:
        return
    allowed = BEYOND[room(path)] | {"infalign", "numpy"} | set(sys.stdlib_module_names)
    packages = {name.partition(".")[0] for name in imported(path)}
    assert packages <= allowed, f"{path} imports {sorted(packages - allowed)}"


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms_know_no_files_and_no_runtime(name):
    paths = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py"))
    for path in paths:
        assert not {"infalign.runtime", "pathlib", "os"} & {
            n for full in imported(path) for n in (full, full.rpartition(".")[0])
        }


def test_only_the_list_of_rooms_is_there():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("__")} - {"share"}
    assert rooms <= set(ORDER)
    assert not {"utils", "common", "helpers"} & {path.stem for path in ROOT.rglob("*")}


LIGHT = ["infalign", "infalign.cli", "infalign.theory", "infalign.calibration.quantile", "infalign.evaluation.winrate"]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_no_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in infalign.__all__:
        assert getattr(infalign, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = infalign.nonsense


@pytest.mark.parametrize("leaf", ["merging", "forgetting"])
def test_only_stages_know_the_leaves(leaf):
    for path in FILES:
        if any(name.startswith(f"infalign.{leaf}") for name in imported(path)):
            assert room(path) in (leaf, "stages"), f"{path} imports {leaf}"
