"""The table of README.md: every row is there, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LINES = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
ROWS = [line for line in LINES if re.match(r"\| *(\d+ )?\| \w", line)]


def named(row: str) -> list[tuple[Path, list[str]]]:
    """The tests of a row: file, and the names inside it."""
    found: list[tuple[Path, list[str]]] = []
    for text in re.findall(r"`([\w/]*(?:\.py)?(?:::\w+)*)`", row):
        file, *names = text.split("::")
        if file.endswith(".py") and "test_" in file:
            path = HERE / file if (HERE / file).exists() else HERE.parent / file
        elif file or not names:
            continue
        else:
            path = found[-1][0]
        found.append((path, names))
    return found


def test_every_row_is_there():
    numbers = [int(found[1]) for row in ROWS if (found := re.match(r"\| (\d+) ", row))]
    assert numbers == list(range(1, 27)) and len(ROWS) == 31


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:40])
def test_every_test_exists(row):
    found = named(row)
    assert found or "not there yet" in row
    for path, names in found:
        assert path.is_file(), path
        text = path.read_text(encoding="utf-8")
        for name in names:
            assert re.search(rf"(def|class) {name}\b", text), f"{path}: {name}"
