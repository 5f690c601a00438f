"""`calibrate` and `train`, killed at random instants and run again, end with what an uninterrupted run makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from infalign.calibration.table import SampleTable
from infalign.cli import main
from infalign.stages.calibrate import calibrate
from infalign.stages.recipe import load_recipe
from tests.e2e.experiment import tiny_experiment
from tests.e2e.kills import killed


def table_of(folder: Path) -> tuple[list, list]:
    """Samples and rewards of a finished calibration, row by row."""
    plan = json.loads((folder / "calibration" / "plan.json").read_text())
    table = SampleTable.open(folder / "calibration", plan["parts"])
    manifest = json.loads((folder / "calibration" / "manifest.json").read_text())
    reward = manifest["parts"]["reward"].split()[-1]
    samples = [
        (s.key, s.index, s.token_ids, s.token_logps.tolist(), s.text) for rows in table.samples().values() for s in rows
    ]
    rewards = [(key, row.tolist()) for key, row in sorted(table.rewards(reward).items())]
    return sorted(samples), rewards


def harness(recipe: Path, stage: str, kills: int, longest: float) -> int:
    """Run a stage to its end through so many kills, each at most `longest` seconds into it; returns how many landed."""
    imports = f"from infalign.stages.{stage} import {stage}\nfrom infalign.stages.recipe import load_recipe"
    return killed(recipe.parent, imports, f"{stage}(load_recipe({str(recipe)!r}))", kills, longest)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [20])
def test_kills_lose_and_double_nothing(wanted, tmp_path):
    keys = {
        **tiny_experiment(tmp_path),
        "num_calibration_samples": 200,
        "max_completion_length": 8,
        "tokens_per_batch": 60,
    }
    recipe = tmp_path / "recipe.yaml"
    found = {}
    for name, kills in (("killed", wanted), ("whole", 0)):
        recipe.write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / name)}))
        landed = harness(recipe, "calibrate", kills, 0.5)
        found[name] = (table_of(tmp_path / name), landed)
    print(f"{found['killed'][1]} kills, {len(found['whole'][0][0])} samples")
    assert found["killed"][1] >= 5, "too few kills landed to say anything"
    assert len(found["whole"][0][0]) == 6 * 200
    assert found["killed"][0] == found["whole"][0]
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["online", "offline", "offline+online"])
def test_killed_training_ends_with_the_same_policy(solver, tmp_path):
    """A checkpoint after every step, in the middle of generations, too: weights and log are the uninterrupted run's."""
    keys = {
        **tiny_experiment(tmp_path),
        "max_steps": 40,
        "save_strategy": "steps",
        "save_steps": 1,
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
        "num_iterations": 2,
        "solver": solver,
    }
    if solver == "offline+online":
        keys |= {"offline_training": {"max_steps": 20}, "max_steps": 20}
    recipe = tmp_path / "recipe.yaml"
    found = {}
    for name, kills in (("whole", 0), ("killed", 20)):
        recipe.write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / name)}))
        assert harness(recipe, "calibrate", 0, 0.0) == 0
        landed = harness(recipe, "train", kills, 1.5)
        found[name] = (policy_of(tmp_path / name), landed)
    print(f"{found['killed'][1]} kills of train, {len(found['whole'][0])} files compared")
    assert found["killed"][1] >= 5, "too few kills landed to say anything"
    assert found["killed"][0] == found["whole"][0]
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_what_a_kill_left_half_written_goes_with_the_rerun(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tiny_experiment(tmp_path), "max_steps": 1}))
    assert main(["calibrate", "--config", str(recipe)]) == 0
    (tmp_path / "out" / "policy").mkdir()
    (tmp_path / "out" / "policy" / ".README.md.d3980731.tmp").touch()
    assert main(["train", "--config", str(recipe)]) == 0
    assert not list((tmp_path / "out").rglob("*.tmp"))


def policy_of(folder: Path) -> dict[str, object]:
    """Every file of a policy by name: its bytes, or of the log what no clock measured."""
    files = {path.name: path.read_bytes() for path in (folder / "policy").glob("*") if path.is_file()}
    for timed in ("README.md", "started.json", "manifest.json"):
        files.pop(timed, None)
    log = json.loads(files.pop("training_log.json")) if "training_log.json" in files else []
    words = ("runtime", "time", "per_second", "flos", "train_loss")
    return {
        **files,
        "log": [{name: v for name, v in row.items() if not any(word in name for word in words)} for row in log],
    }


def test_a_run_that_was_killed_at_its_first_file_continues(tmp_path):
    """The record of the recipe is the first thing in a folder: half of one must not make it somebody else's."""
    keys = tiny_experiment(tmp_path)
    output = Path(keys["output_dir"])
    output.mkdir(parents=True)
    (output / ".recipe.json.1f0c2a77.tmp").write_text('{"identity": {')
    assert calibrate(load_recipe(keys))["drawn"] > 0
    assert (output / "recipe.json").exists() and not list(output.glob("*.tmp"))
