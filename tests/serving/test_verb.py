"""`infalign serve` as a user starts and ends it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml

from infalign.cli import main
from infalign.stages.recipe import load_recipe
from infalign.stages.serve import ServeOptions, service_of
from tests.serving.running import tiny_keys

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verb")
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(tiny_keys(folder)))
    return path


@contextlib.contextmanager
def started(recipe, *flags, **environment):
    """The command in a process of its own, and the lines it has printed once it listens."""
    with subprocess.Popen(
        [sys.executable, "-m", "infalign", "serve", "--config", str(recipe), "--port", "0", *flags], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    ) as process:  # fmt: skip
        try:
            yield process, process.stdout.readline() + process.stdout.readline()
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)]
)
def test_the_end_lets_what_is_under_way_finish(number, code, recipe):
    """The request that runs and the one that waits are answered; the curl line that is printed works."""
    gate = recipe.with_name("gate")
    with started(recipe) as (process, lines):
        url = re.search(r"serving tiny by BestOfN\(4\) at (http://127\.0\.0\.1:\d+)/v1", lines)[1]
        body = json.loads(re.search(r"-d '(.*)'", lines)[1])
        assert f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d " in lines
        assert httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False).status_code == 200
        gate.touch()
        results: list[httpx.Response] = []
        ask = {"model": "tiny", "prompt": "wind"}

        def request():
            results.append(httpx.post(f"{url}/v1/completions", json=ask, timeout=30, trust_env=False))

        threads = [threading.Thread(target=request) for _ in range(2)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while True:
            health = httpx.get(f"{url}/health", trust_env=False).json()
            if health["in_progress"] + health["queue_length"] == 2:
                break
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        time.sleep(0.3)
        assert process.poll() is None
        gate.unlink()
        out, err = process.communicate(timeout=30)
        for thread in threads:
            thread.join(10)
    assert [one.status_code for one in results] == [200, 200]
    assert process.returncode == code and "Traceback" not in err
    assert ("served until SIGTERM" in out) == (number == signal.SIGTERM)


@pytest.mark.slow
def test_a_token_from_the_environment(recipe):
    with started(
        recipe, "--api_token_env", "INFALIGN_TEST_TOKEN", "--host", "0.0.0.0", INFALIGN_TEST_TOKEN="xyzzy"
    ) as (
        process,
        lines,
    ):
        port = re.search(r"at http://0\.0\.0\.0:(\d+)/v1", lines)[1]
        assert '-H "Authorization: Bearer $INFALIGN_TEST_TOKEN"' in lines and "xyzzy" not in lines
        models = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(models, trust_env=False).status_code == 401
        headers = {"authorization": "Bearer xyzzy"}
        assert httpx.get(models, headers=headers, trust_env=False).json()["data"][0]["id"] == "tiny"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert "xyzzy" not in out + err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to other machines: give --api_token_env NAME"),
        (["--host", "192.0.2.1", "--api_token_env", "INFALIGN_TEST_TOKEN"], "can't listen on 192.0.2.1"),
        (["--api_token_env", "INFALIGN_NO_TOKEN"], "the environment variable INFALIGN_NO_TOKEN is not set"),
        (["--api_token_env", "sk-secret"], "--api_token_env must be the NAME of an environment variable"),
        (["--api_token_env", "INFALIGN_ODD_TOKEN"], "what INFALIGN_ODD_TOKEN holds has characters that no header"),
        (["--port", "eighty"], "--port: expected an integer, got 'eighty'"),
        (["--port", "70000"], "--port must be between 0"),
        (["--max_queue", "0"], "--max_queue must be at least 1, got 0"),
        (["--request_timeout", "0"], "--request_timeout must be seconds above 0, got 0"),
        (["--served", "both"], "--served: expected 'policy' or 'base', got 'both'"),
        (["--port", "0", "--strategy", "rejektion"], "strategy 'rejektion' is unknown"),
        (["--port", "0", "--policy_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
        (["--num_processes", "2"], "serve runs in one process: leave --num_processes out"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, message, recipe, capsys, monkeypatch):
    monkeypatch.setenv("INFALIGN_TEST_TOKEN", "xyzzy")
    monkeypatch.setenv("INFALIGN_ODD_TOKEN", "x\u00e9")
    assert main(["serve", "--config", str(recipe), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "xyzzy" not in err and "sk-secret" not in err


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(recipe, capsys, monkeypatch):
    monkeypatch.setattr("infalign.stages.serve.service_of", lambda *_: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--config", str(recipe), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"infalign: error: port {port} of 127.0.0.1 is taken: give another --port, or 0 for any free one\n"
    )


def test_without_the_extra(recipe, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["serve", "--config", str(recipe)]) == 2
    assert (
        "serve needs prometheus_client, pydantic, starlette, uvicorn: pip install 'infalign[serve]'"
        in capsys.readouterr().err
    )


def test_the_base_can_be_served(tmp_path):
    tiny_keys(tmp_path)
    (tmp_path / "tiny").rename(tmp_path / "policy")
    keys = {**tiny_keys(tmp_path), "policy_name_or_path": str(tmp_path / "policy")}
    found = {name: service_of(load_recipe(keys), ServeOptions(served=name)) for name in ("policy", "base")}
    assert {name: one.model for name, one in found.items()} == {"policy": "policy", "base": "tiny"}
