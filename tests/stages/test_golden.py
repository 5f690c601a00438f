"""Results of before, frozen: whatever is rearranged must give them again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infalign.stages.compare import compare, load_comparison

GOLDEN = Path(__file__).parents[1] / "evaluation" / "golden"


@pytest.mark.parametrize(
    ("name", "files", "flags"),
    [
        ("plain", "_plain", {"kl": 0.4, "eval_n": [1, 2, 4]}),
        ("gold", "", {"eval_n": [1, 2, 4]}),
        ("kth", "_plain", {"procedure": "kth_of_n", "n": 5, "procedure_kwargs": {"k": 2}, "eval_n": [3], "kl": 1.5}),
    ],
)
def test_a_comparison_of_files(name, files, flags, tmp_path):
    sides = {side: str(GOLDEN / f"{side}{files}.jsonl") for side in ("base", "policy")}
    compare(load_comparison({**sides, **flags, "output": str(tmp_path / "result.json")}))
    found, wanted = (json.loads(path.read_text()) for path in (tmp_path / "result.json", GOLDEN / f"{name}.json"))
    assert same(found, wanted)


def same(found, wanted):
    """Equal, numbers to 1e-8 (the limits come from a solver); what was added since does not count."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(name in found and same(found[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found == pytest.approx(wanted, rel=1e-8, abs=1e-8) if isinstance(wanted, float) else found == wanted
