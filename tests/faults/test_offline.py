"""`solver: offline` where something goes wrong: samples without a score, half checkpoints, a full disk, signals.

Rewards are read from a table and no rollouts are drawn, so that much of the list can't happen in its training; what can
is here, and in `test_numbers.py` (steps that are not finite) and `e2e/test_kill.py` (kills), which try both solvers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset

import infalign
from infalign.calibration.table import SampleTable
from infalign.cli import main
from infalign.training.checkpoints import defect, newest_whole
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.e2e.test_kill import policy_of
from tests.tiny import tiny_causal
from tests.training.test_offline import base_samples, trainer
from tests.training.test_resume import assert_same, final

pytest.importorskip("resource")
ROOT = Path(__file__).parents[2]
# what happens at the beginning of the fifth training step: argv[1] says what, the rest is a command's
AT_STEP_5 = """
import os, resource, signal, sys
from infalign.training.offline import OfflineSamples

plain, batches = OfflineSamples.batch, []


def batch(*args):
    batches.append(1)
    if len(batches) == 5:
        if sys.argv[1] == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return plain(*args)


OfflineSamples.batch = batch
from infalign.cli import main

sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def samples(llama):
    return base_samples(llama)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe, its calibration in `out`, and all of an uninterrupted training in `whole`."""
    folder = tmp_path_factory.mktemp("offline-faults")
    keys = {**tiny_experiment(folder), "solver": "offline", "max_steps": 8}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**keys, "save_strategy": "steps", "save_steps": 2}))
    assert main(command(folder, "calibrate", folder / "out")) == 0
    shutil.copytree(folder / "out", folder / "whole")
    assert main(command(folder, "train", folder / "whole")) == 0
    return folder


def command(folder: Path, verb: str, output: Path) -> list[str]:
    return [verb, "--config", str(folder / "recipe.yaml"), "--output_dir", str(output)]


@pytest.mark.parametrize(
    ("what", "code", "told", "newest"),
    [("SIGTERM", 143, "stopped by SIGTERM at step 5 of 8", 5), ("full disk", 1, "make room and run the same", 4)],
)
def test_a_run_that_is_stopped_is_run_again_to_the_same_policy(what, code, told, newest, folder, tmp_path, capsys):
    shutil.copytree(folder / "out", tmp_path / "out")
    words = [sys.executable, "-W", "ignore", "-c", AT_STEP_5, what, *command(folder, "train", tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count(told) == 1 and "Traceback" not in done.stderr
    policy = tmp_path / "out" / "policy"
    assert newest_whole(policy)[0] == policy / f"checkpoint-{newest}"
    assert defect(policy / f"checkpoint-{newest}") is None and not (policy / "manifest.json").exists()
    capsys.readouterr()
    assert main(command(folder, "train", tmp_path / "out")) == 0
    assert f"continuing from checkpoint-{newest}" in capsys.readouterr().out
    assert policy_of(tmp_path / "out") == policy_of(folder / "whole")


def test_samples_without_a_score_are_left_out_with_what_belongs_to_them(tmp_path):
    """A reward without a score where the first token is a multiple of 5: the columns stay aligned, and it trains."""
    keys = {**tiny_experiment(tmp_path), "solver": "offline", "max_steps": 2, "num_generations": 2}
    keys |= {"reward": f"{tmp_path / 'score.py'}:sometimes", "reward_on_error": "mask"}
    infalign.run(keys)
    calibration = tmp_path / "out" / "calibration"
    table = SampleTable.open(calibration, json.loads((calibration / "plan.json").read_text())["parts"])
    reward = json.loads((calibration / "manifest.json").read_text())["parts"]["reward"].split()[-1]
    (prompts,) = calibration.glob("segment-*/prompts.parquet")
    data = Dataset.from_dict({"prompt": [json.loads(one) for one in pq.read_table(prompts)["content"].to_pylist()]})
    left = 0
    for row in table.attach(data, reward, samples=True):
        for score, ids in zip(row["ref_rewards"], row["ref_completion_ids"], strict=True):
            assert score == sum(ids) and ids[0] % 5
        left += 12 - len(row["ref_logps"])
    assert left > 0, "every sample has a score: nothing was tried"


@pytest.mark.parametrize(
    ("column", "value"), [("ref_rewards", math.nan), ("ref_rewards", None), ("ref_logps", -math.inf)]
)
def test_numbers_that_are_not_finite_are_named_with_their_row(column, value, llama, samples, tmp_path):
    changed = [list(row) for row in samples[column]]
    changed[2][3] = value
    spoiled = samples.remove_columns(column).add_column(column, changed)
    with pytest.raises(InputError, match=f"^train_dataset, row 2: {column} must be finite numbers, got .* at index 3"):
        trainer(llama, tmp_path, spoiled)


def test_a_half_checkpoint_is_skipped(llama, samples, tmp_path, capsys):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = trainer(llama, tmp_path, samples, **settings)
    whole.train()
    for number in (3, 4):
        (tmp_path / f"checkpoint-{number}" / ("optimizer.pt" if number == 4 else "manifest.json")).unlink()
    resumed = trainer(llama, tmp_path, samples, **settings)
    resumed.train(resume_from_checkpoint=True)
    told = capsys.readouterr().err
    assert "checkpoint-4 is skipped" in told and "checkpoint-3 is skipped" in told
    assert_same(final(resumed), final(whole))


def test_dropout_is_off_and_the_temperature_is_that_of_the_samples(tmp_path):
    """At the first step the cached log-probabilities are the policy's own: of T = 0.7, and without dropout."""
    keys = {**tiny_experiment(tmp_path), "solver": "offline", "max_steps": 2, "temperature": 0.7}
    model = Path(str(keys["model_name_or_path"]))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    assert '"attention_dropout": 0.5' in (model / "config.json").read_text()
    infalign.run(keys)
    log = yaml.safe_load((tmp_path / "out" / "policy" / "training_log.json").read_text())
    assert abs(next(row["kl_seq"] for row in log if "kl_seq" in row)) < 1e-5
