"""A server for the tests: a tiny experiment behind a real socket on loopback, in a thread of this process."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from infalign.serving.app import build_app
from infalign.serving.completions import Service
from infalign.serving.listen import address, bind, server_of
from infalign.stages.recipe import load_recipe
from infalign.stages.serve import ServeOptions, service_of
from tests.tiny import tiny_causal

SCORES = '''
import time
from pathlib import Path


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def score(prompts, completions, completion_ids, **_):
    """Letters and the sum of the token ids; what a prompt says may make it fail, wait or give nothing."""
    told = str(prompts)
    if "sorry" in told:
        raise RuntimeError("hunter2 is the password of the reward")
    gate = Path(__file__).with_name("gate")
    while "wind" in told and gate.exists():
        time.sleep(0.01)
    rewards = [len(text_of(c)) + sum(ids) / 1000 for c, ids in zip(completions, completion_ids, strict=True)]
    return [None if "bye" in str(p) else reward for p, reward in zip(prompts, rewards, strict=True)]
'''


@dataclass(frozen=True)
class Running:
    """A server that runs: its root and what is behind it."""

    url: str
    service: Service
    folder: Path

    def client(self, **more: Any) -> OpenAI:
        """OpenAI's own client."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=more.pop("api_key", "none"), max_retries=0, **more)

    def post(self, path: str = "/v1/completions", **more: Any) -> httpx.Response:
        """A plain request."""
        return httpx.post(f"{self.url}{path}", timeout=60, trust_env=False, **more)

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", trust_env=False).text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def tiny_keys(folder: Path, **more: Any) -> dict[str, Any]:
    """A recipe to serve a tiny model with the reward `SCORES`, Best-of-4."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.py").write_text(SCORES)
    model = tiny_causal(folder / "tiny", "llama")
    return {
        "model_name_or_path": model,
        "policy_name_or_path": model,
        "reward": f"{folder / 'score.py'}:score",
        "reward_retries": 0,
        "procedure": "best_of_n",
        "n": 4,
        "max_completion_length": 6,
        "tokens_per_batch": 400,
        "use_cpu": True,
        "seed": 42,
        **more,
    }


@contextlib.contextmanager
def running(folder: Path, keys: dict[str, Any], token: str | None = None, **options: Any) -> Iterator[Running]:
    """Serve a recipe until the block ends."""
    chosen = ServeOptions(**options)
    service = service_of(load_recipe(keys), chosen, token)
    bound = bind("127.0.0.1", 0)
    server = server_of(build_app(service))
    url = address(bound)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(url, service, folder)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def events(text: str) -> list[Any]:
    """The JSON of a stream's events, [DONE] as it is."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
