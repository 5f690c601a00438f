"""Nothing that is run, sent or written down unasked: pickles, remote code, telemetry, secrets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from infalign.cli import main
from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.loader import load_reward
from infalign.runtime.artifacts import (
    SECRET,
    differences,
    fingerprint,
    read_manifest,
    without_secrets,
    write_manifest,
)
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_classifier


def cli(folder: Path, keys: dict, verb: str, *flags: str) -> int:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return main([verb, "--config", str(folder / "recipe.yaml"), *flags])


def pickled(folder: Path, kind) -> Path:
    """The model in `folder` with its weights as a pickle only."""
    torch.save(kind.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


# -- pickles


@pytest.mark.parametrize("verb", ["run", "calibrate"])
def test_a_policy_that_is_a_pickle_is_refused(verb, tmp_path, capsys):
    keys = tiny_experiment(tmp_path)
    pickled(tmp_path / "model", AutoModelForCausalLM)
    capsys.readouterr()
    assert cli(tmp_path, keys, verb) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("infalign: error: can't load the model of model_name_or_path")
    assert "safetensors" in err


def test_a_trained_policy_that_is_a_pickle_is_refused(tmp_path, capsys):
    keys = tiny_experiment(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "policy")
    pickled(tmp_path / "policy", AutoModelForCausalLM)
    capsys.readouterr()
    assert cli(tmp_path, keys, "evaluate", "--policy_name_or_path", str(tmp_path / "policy")) == 2
    err = capsys.readouterr().err
    assert err.count("infalign: error: can't load the model of") == 1 and "safetensors" in err


def test_a_reward_model_that_is_a_pickle_is_refused(tmp_path, capsys):
    keys = tiny_experiment(tmp_path)
    tiny_classifier(tmp_path / "rm")
    pickled(tmp_path / "rm", AutoModelForSequenceClassification)
    capsys.readouterr()
    assert cli(tmp_path, {**keys, "reward": str(tmp_path / "rm")}, "calibrate") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be loaded as a sequence classifier" in err and "safetensors" in err


# -- code that ships with a model


def test_remote_code_is_announced(tmp_path, capsys):
    keys = tiny_experiment(tmp_path)
    capsys.readouterr()
    assert cli(tmp_path, keys, "calibrate", "--trust_remote_code", "true") == 0
    assert "warning: trust_remote_code: true runs Python code that ships with a model" in capsys.readouterr().err
    assert cli(tmp_path, keys, "calibrate") == 0
    assert "trust_remote_code" not in capsys.readouterr().err
    path = tiny_classifier(tmp_path / "rm")
    ClassifierReward(path, device="cpu", trust_remote_code=True)
    assert "trust_remote_code runs Python code that ships with it" in capsys.readouterr().err


def test_remote_code_does_not_run_unasked(tmp_path, capsys):
    """A model whose config names code in its own folder: refused, and the code has not run."""
    keys = tiny_experiment(tmp_path)
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config.write_text(json.dumps({**values, "model_type": "mine", "auto_map": auto_map}))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    capsys.readouterr()
    assert cli(tmp_path, keys, "calibrate") == 2
    err = capsys.readouterr().err
    assert err.count("infalign: ") == 1 and "needs Python code that ships with it" in err
    assert not (tmp_path / "ran").exists()


# -- telemetry

SHOW = "import infalign, os; print(os.environ['HF_HUB_DISABLE_TELEMETRY'], os.environ['TRACKIO_TELEMETRY'])"


@pytest.mark.parametrize(("given", "expected"), [({}, "1 0"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "0 0")])
def test_telemetry_is_off_also_from_python_unless_the_user_says_otherwise(given, expected):
    environment = {n: v for n, v in os.environ.items() if n not in ("HF_HUB_DISABLE_TELEMETRY", "TRACKIO_TELEMETRY")}
    code = f"{SHOW}; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == [expected, str(expected[0] == "1")]


# -- secrets

PUBLIC = ("pad_token", "eos_token", "bos_token", "unk_token", "max_tokens", "token_ids", "tokens", "secretary", "keys")
PRIVATE = (
    "api_key", "token", "secret", "password", "authorization", "Authorization", "openai_api_key", "x-api-key",
    "hub_token", "push_to_hub_token", "client_secret", "db_password",
)  # fmt: skip


def test_what_is_secret_is_known_by_its_name():
    for name in PUBLIC:
        assert without_secrets({name: "x"}) == {name: "x"}, name
    for name in PRIVATE:
        assert without_secrets({name: "x"}) == {name: SECRET}, name
        assert without_secrets({"a": [{name: 7}]}) == {"a": [{name: SECRET}]}, name
        assert without_secrets({name: None}) == {name: None} and without_secrets({name: True}) == {name: True}
    value = {"a": (1, "b"), "c": [None, {"d": 2.5}]}
    assert without_secrets(value) == value and without_secrets("token") == "token"


def test_a_secret_is_no_part_of_what_an_artifact_is(tmp_path):
    parts = {"beta": 0.1, "hub_token": "hf_first", "headers": {"Authorization": "Bearer one"}}
    other = {"beta": 0.1, "hub_token": "hf_second", "headers": {"Authorization": "Bearer two"}}
    write_manifest(tmp_path, "policy", parts, note={"api_key": "sk-note"})
    text = (tmp_path / "manifest.json").read_text()
    assert not any(secret in text for secret in ("hf_first", "Bearer", "sk-note")) and text.count(SECRET) == 3
    manifest = read_manifest(tmp_path, "policy")
    assert manifest["fingerprint"] == fingerprint(without_secrets(other))
    assert differences(manifest["parts"], other) == differences(parts, other) == []
    assert differences(parts, {**other, "beta": 0.2}) == ["beta: 0.1 -> 0.2"]


def build(api_key: str, scale: float = 1.0):
    return lambda completions, **_: [scale * len(one) for one in completions]


def fails(api_key: str):
    raise ValueError("no such server")


def test_another_key_to_the_same_server_is_the_same_reward():
    one, two = (load_reward(build, {"api_key": key}) for key in ("sk-one", "sk-two"))
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != load_reward(build, {"api_key": "sk-one", "scale": 2.0}).fingerprint
    with pytest.raises(InputError, match=r"building it with \{'api_key': '<secret>'\} failed") as caught:
        load_reward(fails, {"api_key": "sk-one"})
    assert "sk-one" not in str(caught.value)


REWARD = """
class Judge:
    def __init__(self, api_key, headers, max_tokens):
        self.api_key, self.headers, self.max_tokens = api_key, headers, max_tokens

    def __call__(self, completion_ids, **_):
        assert self.api_key.startswith("sk-") and self.headers["Authorization"].startswith("Bearer ")
        return [sum(ids) + 0.01 * ids[0] for ids in completion_ids]
"""
SECRETS = ("sk-7f3a91", "Bearer 5d0c22", "hf_e81b40", "sk-a90d17", "Bearer 66be03", "hf_31c5aa")


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_secrets_appear_in_no_file_and_no_line(adapter, tmp_path, capfd):
    """A whole run with a Hub token and keys of two judges; then with other keys, which makes nothing anew."""
    folder = tmp_path / "private"
    keys = tiny_experiment(folder)
    (folder / "judge.py").write_text(REWARD)
    out = tmp_path / "out"
    keys |= {
        "reward": f"{folder / 'judge.py'}:Judge",
        "gold_reward": f"{folder / 'judge.py'}:Judge",
        "output_dir": str(out),
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "tensorboard",
        **({"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]} if adapter else {}),
    }

    def given(key: str, bearer: str, token: str) -> dict:
        of_a_judge = {"api_key": key, "headers": {"Authorization": bearer}, "max_tokens": 17}
        return {**keys, "hub_token": token, "reward_kwargs": of_a_judge, "gold_reward_kwargs": of_a_judge}

    assert cli(folder, given(*SECRETS[:3]), "run") == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"recipe.json", "started.json", "manifest.json", "training_log.json", "trainer_state.json", "README.md",
            "index.html", "evaluation.json"} <= {path.name for path in files}  # fmt: skip
    assert any(path.name.startswith("events.out.tfevents") for path in tmp_path.rglob("*"))
    recorded = json.loads((out / "recipe.json").read_text())["recipe"]
    assert recorded["reward_kwargs"] == {"api_key": SECRET, "headers": {"Authorization": SECRET}, "max_tokens": 17}
    assert recorded["training"]["hub_token"] == SECRET
    capfd_first = capfd.readouterr()
    assert cli(folder, given(*SECRETS[3:]), "run") == 0
    again = capfd.readouterr()
    assert "is trained already" in again.out and "(all of them cached)" in again.out
    assert cli(folder, {**given(*SECRETS[:3]), "learning_rate": 0.5}, "train") == 2
    refused = capfd.readouterr()
    assert "learning_rate" in refused.err
    shown = "".join(text for one in (capfd_first, again, refused) for text in one)
    for secret in SECRETS:
        for form in (secret, secret.removeprefix("Bearer ")):
            assert form not in shown, form
            found = [path for path in tmp_path.rglob("*") if path.is_file() and form.encode() in path.read_bytes()]
            assert {path.name for path in found} <= {"recipe.yaml"}, (form, found)
