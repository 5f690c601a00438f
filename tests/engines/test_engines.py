"""Real vLLM: rollouts of `use_vllm` and samples of `generation: vllm`; run by `make test-engines`, minutes.

Each test trains or samples in a process of its own, because an engine and its memory end with their process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-engines has an environment with it")

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from tests.engines.samples import WIDE
from tests.tiny import tiny_causal

ROOT = Path(__file__).parents[2]
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def found(module: str, folder: Path, **job) -> dict:
    """What a worker of this folder prints for a job."""
    words = [sys.executable, "-W", "ignore", "-m", f"tests.engines.{module}", str(folder), json.dumps(job)]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **CPU}, timeout=1500, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, (done.stdout + done.stderr)[-3000:]
    return json.loads(lines[-1].removeprefix("FOUND "))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    tiny_causal(folder / "model", "llama", **WIDE)
    return folder


def logged(result: dict, name: str) -> list[float]:
    return [row[name] for row in result["log"] if name in row]


@pytest.mark.parametrize("lora", [False, True])
def test_rollouts_are_the_policys(lora, folder):
    """KL(engine || policy) is what half precision makes, also after the weights have moved by nats."""
    result = found("rollouts", folder, out=f"lora-{lora}", lora=lora)
    assert result["steps"] == 4 and max(logged(result, "vllm/kl_token")) < 2e-3
    assert abs(logged(result, "kl_seq")[0]) < 1e-4 and max(logged(result, "kl_seq")) > 0.2
    assert logged(result, "vllm/weight") == pytest.approx([1.0] * 4, abs=0.2)


def test_weights_that_are_not_synced_stop_the_run(folder):
    assert "the weights were not brought over to it" in found("rollouts", folder, broken="not synced")["error"]


def test_another_temperature_stops_the_run(folder):
    error = found("rollouts", folder, broken="temperature")["error"]
    assert "at step 0" in error and "its model, temperature or precision is another" in error


def test_a_run_resumes(folder):
    keys = {"save_strategy": "steps", "save_steps": 2}
    assert found("rollouts", folder, out="resumed", keys={**keys, "max_steps": 2})["steps"] == 2
    result = found("rollouts", folder, out="resumed", keys=keys, resume=True)
    assert result["steps"] == 4 and max(logged(result, "vllm/kl_token")) < 2e-3


def test_samples_have_the_models_own_log_probabilities(tmp_path):
    """Calibration and evaluation draw from the engine; token by token as a plain forward pass in float32, T = 0.7."""
    assert found("samples", tmp_path, temperature=0.7) == {"drawn": 6 * 12 + 2 * 4 * 8, "trained": True}
    (folder,) = (tmp_path / "out" / "calibration").glob("segment-*")
    prompts = {row["key"]: row["prompt_ids"] for row in pq.read_table(folder / "prompts.parquet").to_pylist()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    rows = [row for path in folder.glob("[0-9]*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 72 and len({tuple(row["token_ids"]) for row in rows}) > 60
    for row in rows:
        prompt, ids = prompts[row["key"]], row["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["token_logps"]), exact, atol=2e-5, rtol=0)


def test_a_model_that_vllm_does_not_take_is_one_line(tmp_path):
    error = found("samples", tmp_path, dtype="float64")["error"]
    assert error.startswith("vLLM can't run ") and error.endswith("; or leave generation out")
