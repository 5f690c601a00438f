"""Servers for the tests, on loopback, port 0: a tiny model behind the completions contract, and one of a script.

`Served` draws by `torch.multinomial` from plain forwards, so what it returns is independent of infalign's own sampling.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Reply(Exception):
    """An HTTP status with a JSON body."""

    def __init__(self, status: int, content: Any, **headers: str) -> None:
        super().__init__(status)
        self.status, self.content, self.headers = status, content, headers


@contextlib.contextmanager
def serving(answer: Callable[[str, dict[str, Any] | None, Any], Any]) -> Iterator[str]:
    """The root of an API whose answer to (path, body, handler) is JSON, a `Reply` raised, or None: it wrote itself."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            self._do(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _do(self, body: dict[str, Any] | None) -> None:
            status, headers = 200, {}
            try:
                content = answer(self.path, body, self)
            except Reply as reply:
                status, content, headers = reply.status, reply.content, reply.headers
            if content is None:
                self.close_connection = True
                return
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name.replace("_", "-"), value)
            with contextlib.suppress(ConnectionError):  # the client waits no longer
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Threads(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            """A client that went away is no news."""

    server = Threads(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Served:
    """A model behind /v1/completions, in the manner of one server.

    `style`: vllm (token ids in and out, raw log-probabilities), llamacpp (ids inside `logprobs.content`, a top_k of
    3 unless told), sglang (no ids out, log-probabilities at the temperature), text (text in and out, nothing else;
    ignores what it does not know, but for `own_top_k`).
    """

    def __init__(self, model: Any, tokenizer: Any, style: str = "vllm", *, ends: Sequence[int], own_top_k: int = 0):
        self.model, self.tokenizer, self.style, self.ends, self.own_top_k = model, tokenizer, style, ends, own_top_k
        self.bodies: list[dict[str, Any]] = []
        self.name = "tiny"
        self._logits: dict[tuple[int, ...], torch.Tensor] = model.__dict__.setdefault("computed_before", {})
        self._lock = threading.Lock()

    def __call__(self, path: str, body: dict[str, Any] | None, _: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": self.name}]}
        if path != "/v1/completions" or body is None:
            raise Reply(404, {"error": {"message": "no such path"}})
        if body["model"] != self.name:
            raise Reply(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if self.style == "text" and not isinstance(body["prompt"], str):
            raise Reply(400, {"detail": "prompt must be a string."})
        with self._lock:
            self.bodies.append(body)
            return self._complete(body)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = list(self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt)
        generator = torch.Generator().manual_seed(body["seed"])
        drawn, raw, tempered = [], [], []
        while len(drawn) < body["max_tokens"] and not (drawn and drawn[-1] in self.ends):
            logits = self._next((*ids, *drawn))
            logps = torch.log_softmax(logits / body["temperature"], -1)
            token = int(torch.multinomial(self._truncated(logps.exp(), body), 1, generator=generator))
            drawn.append(token)
            raw.append(float(torch.log_softmax(logits, -1)[token]))
            tempered.append(float(logps[token]))
        ended = drawn[-1] in self.ends
        choice: dict[str, Any] = {
            "text": self.tokenizer.decode(drawn, skip_special_tokens=True),
            "finish_reason": "stop" if ended else "length",
        }
        if self.style == "vllm":
            choice |= {"token_ids": drawn, "logprobs": {"token_logprobs": raw, "tokens": [str(t) for t in drawn]}}
        if self.style == "llamacpp":
            content = [{"id": token, "logprob": logp} for token, logp in zip(drawn, raw, strict=True)]
            choice |= {"logprobs": {"content": content}}
        if self.style == "sglang":
            choice |= {"logprobs": {"token_logprobs": tempered, "tokens": self.tokenizer.convert_ids_to_tokens(drawn)}}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(drawn)}}

    def _truncated(self, probabilities: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
        told = body.get("top_k", 3) if self.style == "llamacpp" else -1
        top_k = self.own_top_k or told
        if top_k < 1:
            return probabilities
        return torch.where(probabilities >= probabilities.topk(top_k).values[-1], probabilities, 0.0)

    @torch.no_grad()
    def _next(self, ids: tuple[int, ...]) -> torch.Tensor:
        if ids not in self._logits:
            self._logits[ids] = self.model(torch.tensor([ids])).logits[0, -1].double()
        return self._logits[ids]


def scripted(*steps: Any) -> tuple[Callable[[str, Any, Any], Any], list[float]]:
    """An answer that plays one step a request, the last one for ever, and the times of the requests."""
    times: list[float] = []

    def answer(path: str, body: dict[str, Any] | None, handler: Any) -> Any:
        times.append(time.monotonic())
        step = steps[min(len(times), len(steps)) - 1]
        if isinstance(step, Reply):
            raise step
        return step(handler) if callable(step) else step

    return answer, times
