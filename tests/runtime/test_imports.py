"""A reward's fingerprint covers the local modules that it imports, and what runs is what the fingerprint says."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from infalign.calibration.table import SampleTable
from infalign.rewards.fingerprint import callable_digest
from infalign.rewards.loader import load_reward
from infalign.runtime.imports import local_modules
from infalign.runtime.plugins import find_object
from infalign.stages.calibrate import calibrate
from infalign.stages.recipe import load_recipe
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment

CALLS = "def reward(completions, **_):\n    return [float(value())] * len(completions)\n"
SHAPES = {
    "import": {"mine.py": "import rw_a\nvalue = lambda: rw_a.VALUE\n" + CALLS, "rw_a.py": "VALUE = 1\n"},
    "from": {"mine.py": "from rw_a import value\n" + CALLS, "rw_a.py": "def value():\n    return 1\n"},
    "in a function": {
        "mine.py": "def build():\n    from rw_a import VALUE\n"
        "    return lambda completions: [VALUE] * len(completions)\n",
        "rw_a.py": "VALUE = 1\n",
    },
    "through another": {
        "mine.py": "from rw_b import value\n" + CALLS,
        "rw_b.py": "import rw_a\ndef value():\n    return rw_a.VALUE\n",
        "rw_a.py": "VALUE = 1\n",
    },
    "relative, in a package": {
        "mine.py": "from rw_pkg.top import value\n" + CALLS,
        "rw_pkg/__init__.py": "",
        "rw_pkg/top.py": "from .deep.rw_a import VALUE\nfrom . import other\ndef value():\n    return VALUE\n",
        "rw_pkg/other.py": "from . import deep\n",
        "rw_pkg/deep/__init__.py": "",
        "rw_pkg/deep/rw_a.py": "VALUE = 1\n",
    },
    "in folders without __init__": {
        "mine.py": "from rw_bare.deep import rw_a\nvalue = lambda: rw_a.VALUE\n" + CALLS,
        "rw_bare/deep/rw_a.py": "VALUE = 1\n",
    },
    "by name": {
        "mine.py": "import importlib\nvalue = lambda: importlib.import_module('rw_a').VALUE\n"
        "importlib.import_module('rw_a')\n" + CALLS,
        "rw_a.py": "VALUE = 1\n",
    },
    "by a name made by the builder": {
        "mine.py": "import importlib\ndef build(name='rw'):\n    return importlib.import_module(name + '_a').score\n",
        "rw_a.py": "VALUE = 1\ndef score(completions):\n    return [VALUE] * len(completions)\n",
    },
    "what a built object holds": {
        "mine.py": "import importlib\nclass Mine:\n    def __init__(self):\n"
        "        self.held = importlib.import_module('rw_' + 'a')\n"
        "    def __call__(self, completions):\n        return [self.held.VALUE] * len(completions)\n",
        "rw_a.py": "VALUE = 1\n",
    },
}


@pytest.fixture
def forgotten():
    """No module of a test is left for the next one."""
    yield
    for name in [name for name in sys.modules if name.startswith("rw_")]:
        del sys.modules[name]


def lay(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return next(folder / name for name in files if name.endswith("rw_a.py"))


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("shape", SHAPES)
def test_an_edited_helper_is_another_reward_and_runs(shape, tmp_path):
    """In one process: the module is there already, of the same size and in the same second."""
    helper = lay(tmp_path, SHAPES[shape])
    spec = "mine.py:" + ("Mine" if "class" in SHAPES[shape]["mine.py"] else "reward")
    spec = spec.replace("reward", "build") if "def build" in SHAPES[shape]["mine.py"] else spec

    def load():
        reward = load_reward(spec, base_dir=tmp_path)
        return reward.fingerprint, reward(["p"], ["c"]).tolist()

    first = load()
    assert first[1] == [1.0] and load() == first
    time = helper.stat().st_mtime
    helper.write_text(helper.read_text().replace("1", "2"))
    os.utime(helper, (time, time))
    second = load()
    assert second[1] == [2.0] and second[0] != first[0]
    helper.write_text(helper.read_text().replace("2", "1"))
    assert load() == first


@pytest.mark.usefixtures("forgotten")
def test_modules_of_a_package_are_followed_as_files_are(tmp_path):
    files = {
        "rw_pack/__init__.py": "",
        "rw_pack/score.py": "from rw_pack.rw_a import VALUE\ndef reward(completions):\n    return [VALUE] * 1\n",
        "rw_pack/rw_a.py": "VALUE = 1\n",
    }
    helper = lay(tmp_path, files)
    first = load_reward("rw_pack.score:reward", base_dir=tmp_path)
    helper.write_text("VALUE = 2\n")
    second = load_reward("rw_pack.score:reward", base_dir=tmp_path)
    assert (first(["p"], ["c"])[0], second(["p"], ["c"])[0]) == (1.0, 2.0)
    assert first.fingerprint != second.fingerprint


@pytest.mark.usefixtures("forgotten")
def test_two_recipes_may_each_have_a_helper_of_the_same_name(tmp_path):
    found = []
    for number in (1, 2, 1):
        folder = tmp_path / str(number)
        lay(folder, {"mine.py": "from rw_a import value\n" + CALLS, "rw_a.py": f"def value():\n    return {number}\n"})
        found.append(load_reward("mine.py:reward", base_dir=folder))
    assert [reward(["p"], ["c"]).tolist() for reward in found] == [[1.0], [2.0], [1.0]]
    assert found[0].fingerprint == found[2].fingerprint != found[1].fingerprint


def test_what_is_installed_is_not_local(tmp_path, monkeypatch):
    """The standard library, site-packages (of an environment in the working directory too) and infalign itself."""
    lay(tmp_path, {"mine.py": "import json, numpy, rw_venv\nfrom infalign.rewards import loader\n", "rw_a.py": ""})
    inside = tmp_path / "venv" / "lib" / "site-packages"
    lay(inside, {"rw_venv.py": "", "rw_a.py": ""})
    monkeypatch.syspath_prepend(str(inside))
    monkeypatch.chdir(Path(__file__).parents[2])  # where infalign lies, in a checkout
    assert local_modules(tmp_path / "mine.py", (tmp_path,)) == {}
    lay(tmp_path, {"mine.py": "import rw_b, os\n", "rw_b.py": "", "rw_a.py": ""})
    assert local_modules(tmp_path / "mine.py", (tmp_path,)) == {"rw_b": (tmp_path / "rw_b.py").resolve()}


@pytest.mark.usefixtures("forgotten")
def test_a_transform_follows_its_imports_and_stays_what_it_was_without(tmp_path):
    """`train` records one's own transform by its digest: another one must not pass for it."""
    files = {"mine.py": "from rw_a import power\ndef bend(u):\n    return power(u)\n\ndef line(u):\n    return u\n"}
    helper = lay(tmp_path, {**files, "rw_a.py": "def power(u):\n    return u**2\n"})
    digests = []
    for exponent in (2, 3):
        helper.write_text(f"def power(u):\n    return u**{exponent}\n")
        digests.append(callable_digest(find_object("mine.py:bend", tmp_path, what="transform").value))
    assert digests[0] != digests[1]
    lay(tmp_path, {"mine.py": "def line(u):\n    return u\n", "rw_a.py": ""})
    alone = find_object("mine.py:line", tmp_path, what="transform").value
    assert callable_digest(alone)[:2] == ["line", "def line(u):\n    return u\n"] and len(callable_digest(alone)) == 3


def test_a_reward_without_local_imports_keeps_the_fingerprint_that_its_cached_scores_have(tmp_path):
    """Of 0.x before helpers were covered: digest([[name, file digest], None, {}], None)."""
    text = "def reward(completions):\n    return [1.0] * len(completions)\n"
    (tmp_path / "plain.py").write_text(text)
    inner = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    whole = hashlib.blake2b(json.dumps([[["reward", inner], None, {}], None]).encode(), digest_size=8).hexdigest()
    assert load_reward("plain.py:reward", base_dir=tmp_path).fingerprint == whole


def test_a_helper_that_breaks_is_named(tmp_path):
    lay(tmp_path, {"mine.py": "import rw_a\n" + CALLS, "rw_a.py": "def value(:\n"})
    with pytest.raises(InputError, match=r"importing the file failed \(SyntaxError"):
        load_reward("mine.py:reward", base_dir=tmp_path)


def rewards_in(folder: Path, fingerprint: str | None = None) -> dict[str, list[float]]:
    """The rewards of a calibration by the only reward, or that one."""
    table = SampleTable.open(folder, json.loads((folder / "plan.json").read_text())["parts"])
    found = {path.name.removeprefix("scores-") for path in folder.glob("scores-*")}
    chosen = found if fingerprint is None else {fingerprint}
    return {key: row.tolist() for key, row in table.rewards(chosen.pop()).items()}


@pytest.mark.usefixtures("forgotten")
def test_a_calibration_with_an_edited_helper_scores_its_samples_anew(tmp_path):
    """The same samples, no flag: the reward is 10 times what it was."""
    keys = tiny_experiment(tmp_path)
    (tmp_path / "score.py").write_text(
        "from rw_a import FACTOR\ndef reward(completion_ids, **_):\n"
        "    return [FACTOR * sum(ids) for ids in completion_ids]\n"
    )
    (tmp_path / "rw_a.py").write_text("FACTOR = 1.0\n")
    folder = tmp_path / "out" / "calibration"
    calibrate(load_recipe(keys))
    before = rewards_in(folder)
    (tmp_path / "rw_a.py").write_text("FACTOR = 10.0\n")
    assert calibrate(load_recipe(keys))["drawn"] == 0
    new = load_reward(f"{tmp_path}/score.py:reward").fingerprint
    assert rewards_in(folder, new) == {key: [10.0 * one for one in row] for key, row in before.items()}


def test_what_a_fingerprint_can_not_see_is_scored_anew_with_overwrite(tmp_path):
    """The reward reads a file of data; what the check at step 0 advises must work."""
    keys = tiny_experiment(tmp_path)
    (tmp_path / "score.py").write_text(
        "from pathlib import Path\ndef reward(completion_ids, **_):\n"
        "    factor = float((Path(__file__).parent / 'factor').read_text())\n"
        "    return [factor * sum(ids) for ids in completion_ids]\n"
    )
    (tmp_path / "factor").write_text("1")
    calibrate(load_recipe(keys))
    before = rewards_in(tmp_path / "out" / "calibration")
    (tmp_path / "factor").write_text("10")
    calibrate(load_recipe(keys))
    assert rewards_in(tmp_path / "out" / "calibration") == before
    assert calibrate(load_recipe({**keys, "overwrite": True}))["drawn"] == 0
    tenfold = {key: [10.0 * one for one in row] for key, row in before.items()}
    assert rewards_in(tmp_path / "out" / "calibration") == tenfold
