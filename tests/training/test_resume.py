"""Exact resume: a run that stops and goes on ends, bit by bit, with what an uninterrupted run ends with."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from infalign import BestOfN, WorstOfN
from infalign.stages.policy_folder import initial_model
from infalign.theory.transforms import identity
from infalign.training.checkpoints import check_resumable, newest_whole, seal
from infalign.training.config import CTRLConfig
from infalign.training.direct import Direct
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.tiny import tiny_causal
from tests.training.test_trainer import PROMPTS, config, token_sum

TIMED = ("runtime", "time", "per_second", "flos")

LAYOUTS = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "two iterations": {"num_iterations": 2},
    "buffered": {"steps_per_generation": 4, "per_device_train_batch_size": 4, "num_generations": 4},
    "buffered, accumulated, two iterations": {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
    },
    "beta comes down": {"beta_start": 1.0},
    "beta is steered": {"target_kl": 0.05, "beta": 0.3},
    "steered, two iterations": {"target_kl": 0.05, "beta": 0.3, "num_iterations": 2},
    "logs rarely": {"logging_steps": 4},
    "pooled": {"method": "pooled"},
    "pooled, direct, two iterations": {"method": "pooled", "direct": True, "num_iterations": 2},
    "two objectives, pooled": {"method": "pooled", "direct": True, "reward_weights": [1.0, 0.5]},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


def rows():
    """Prompts with reference rewards near those of the tiny model's samples."""
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"prompt": PROMPTS, "ref_rewards": [rng.normal(220, 40, 20).tolist() for _ in PROMPTS]})


def mirrored(completion_ids, **_):
    return [-one + 0.5 * ids[0] for one, ids in zip(token_sum(completion_ids), completion_ids, strict=True)]


def make(model, folder, method="midrank", direct=False, **changes):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **changes}
    arguments = CTRLConfig(**config(folder, **settings))
    reward = CTRLReward(token_sum, Direct(BestOfN(2)) if direct else identity, method=method)
    second = CTRLReward(mirrored, Direct(WorstOfN(2)), method=method, column="mirrored", name="second")
    rewards = [reward, second] if "reward_weights" in changes else reward
    data = rows().map(lambda row: {"mirrored": [-value for value in row["ref_rewards"]]})
    return CTRLTrainer(model, rewards, arguments, train_dataset=data, identity={"recipe": "tests"})


def final(subject) -> tuple[dict[str, torch.Tensor], list]:
    """Weights, and the log without what a clock measured (of the whole run or of the part that ran last)."""
    log = [
        {name: value for name, value in row.items() if not any(word in name for word in TIMED) and name != "train_loss"}
        for row in subject.state.log_history
    ]
    return {name: p.detach().clone() for name, p in subject.model.named_parameters()}, log


def assert_same(found, expected):
    assert found[1] == expected[1]
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resumed_equals_uninterrupted(layout, stop, llama, tmp_path):
    whole = make(llama, tmp_path / "whole", **LAYOUTS[layout])
    whole.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "resumed" / f"checkpoint-{stop}")
    resumed = make(llama, tmp_path / "resumed", **LAYOUTS[layout])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert_same(final(resumed), final(whole))
    first, last = final(make(llama, tmp_path / "fresh"))[0], final(whole)[0]
    assert any(not torch.equal(first[name], last[name]) for name in first), "training moves no weight"


def damage_truncate(folder: Path) -> str:
    (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:100])
    return r"optimizer.pt has 100 bytes of \d+"


def damage_remove(name: str):
    def damage(folder: Path) -> str:
        (folder / name).unlink()
        return f"{name} is missing" if name != "manifest.json" else "not written to its end"

    return damage


def damage_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"format": 1, "ki')
    return "is damaged"


@pytest.fixture(scope="module")
def three(llama, tmp_path_factory):
    """A finished run of six steps with all its checkpoints, and its end."""
    folder = tmp_path_factory.mktemp("three")
    subject = make(llama, folder)
    subject.train()
    return folder, final(subject)


DAMAGES = {
    "truncated": damage_truncate,
    "no optimizer": damage_remove("optimizer.pt"),
    "no rng": damage_remove("rng_state.pth"),
    "no scheduler": damage_remove("scheduler.pt"),
    "no weights": damage_remove("model.safetensors"),
    "no rollouts": damage_remove("rollouts-0.safetensors"),
    "no manifest": damage_remove("manifest.json"),
    "half a manifest": damage_manifest,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken(kind, three, llama, tmp_path, capsys):
    folder, expected = three
    for step in (2, 3):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    why = DAMAGES[kind](tmp_path / "checkpoint-3")
    found, skipped = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert [path.name for path, _ in skipped] == ["checkpoint-3"]
    assert re.search(why, skipped[0][1])
    if kind in ("truncated", "no manifest"):
        resumed = make(llama, tmp_path)
        resumed.train(resume_from_checkpoint=True)
        assert_same(final(resumed), expected)
        assert re.search(f"checkpoint-3 is skipped: .*{why}", capsys.readouterr().err)
    with pytest.raises(InputError, match="no whole checkpoint"):
        check_resumable(folder / "nothing", {})


def test_a_checkpoint_that_is_not_infaligns_is_called_what_it_is(three, llama, tmp_path):
    """TRL's trainer writes no rollouts and no manifest; a model folder has no trainer_state.json either."""
    theirs, model = tmp_path / "checkpoint-7", tmp_path / "model"
    shutil.copytree(three[0] / "checkpoint-3", theirs)
    for name in ("manifest.json", "rollouts-0.safetensors"):
        (theirs / name).unlink()
    shutil.copytree(llama, model)
    (tmp_path / "empty").mkdir()
    for folder, what in (
        (theirs, "it has no rollouts and no manifest: TRL's own trainer wrote it, or infalign was stopped"),
        (model, "it is a model, without the state of a training run"),
        (tmp_path / "empty", "it was not written to its end"),
    ):
        with pytest.raises(InputError, match=f"{what}.*--initial_weights {folder}"):
            make(llama, tmp_path / "out").train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 2}, r"processes: 1 -> 2"),
        ({"recipe": "another"}, r'recipe: "tests" -> "another"'),
        ({"sharding": "zero3"}, r'sharding: "none" -> "zero3"'),
    ],
)
def test_another_runs_checkpoint_is_refused_before_loading(change, message, three, llama, tmp_path, monkeypatch):
    subject = make(llama, tmp_path)
    subject.identity |= change
    monkeypatch.setattr("infalign.training.trainer.load_rollout_state", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match=f"{message}.*--initial_weights"):
        subject.train(resume_from_checkpoint=str(three[0] / "checkpoint-3"))


def test_weights_only_is_the_way_out(three, llama, tmp_path):
    weights = load_file(three[0] / "checkpoint-3" / "model.safetensors")
    arguments = CTRLConfig(**config(tmp_path, initial_weights=str(three[0] / "checkpoint-3"), max_steps=1))
    model = initial_model(arguments, llama)
    subject = CTRLTrainer(model, CTRLReward(token_sum, identity), arguments, train_dataset=rows())
    for name, value in subject.model.state_dict().items():
        assert name not in weights or torch.equal(weights[name], value)
    base = load_file(Path(llama) / "model.safetensors")
    for name, value in subject.ref_model.state_dict().items():
        assert name not in base or torch.equal(base[name], value)
    subject.train()
    assert subject.state.global_step == 1
    assert subject.state.log_history[0]["kl_seq"] > 0.01


@pytest.mark.parametrize("named", ["nowhere", "."])
def test_initial_weights_must_be_a_model(named, llama, tmp_path):
    arguments = CTRLConfig(**config(tmp_path, initial_weights=str(tmp_path / named)))
    with pytest.raises(InputError, match=r"initial_weights .* is no folder with"):
        initial_model(arguments, llama)


def test_old_checkpoints_go_only_when_the_new_one_is_whole(llama, tmp_path, monkeypatch):
    kept = []

    def watch(folder, identity, **options):
        kept.append(sorted(path.name for path in folder.parent.glob("checkpoint-*")))
        seal(folder, identity, **options)

    monkeypatch.setattr("infalign.training.trainer.seal", watch)
    make(llama, tmp_path, max_steps=3, save_total_limit=1).train()
    assert kept == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not list(tmp_path.rglob("training_args.bin"))
