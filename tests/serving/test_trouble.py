"""What goes wrong at the endpoint: refusals with OpenAI's error shape, a full queue, time-outs, backends that die."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest

from infalign.serving.completions import MAX_BODY
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.serve import ServeOptions, service_of, strategies
from infalign.types import InputError
from tests.generation.completions import Reply, serving
from tests.serving.running import running, tiny_keys

ASK = {"model": "tiny", "prompt": "the cat"}
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with running(folder, tiny_keys(folder)) as one:
        yield one


def error_of(response: httpx.Response) -> dict:
    """The error in an answer, which has OpenAI's shape and nothing else."""
    content = response.json()
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in content["error"]["message"] and "Traceback" not in response.text
    return content["error"]


# --- requests that are wrong


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": None}, "model", "must be the name of a model, got nothing: this one is 'tiny'"),
        ({"prompt": None}, "prompt", r"must be a text or a list of texts \(token ids are not read here\), got nothing"),
        ({"prompt": [1, 2]}, "prompt", "token ids are not read here"),
        ({"prompt": []}, "prompt", "must be a text or a list of texts"),
        ({"prompt": "  "}, "prompt", "must not be empty"),
        ({"prompt": "a \ud800"}, "prompt", "half a surrogate pair"),
        ({"prompt": "the cat " * 300}, "prompt", r"has 600 tokens, at most 506 fit beside 6 of completion: shorten it"),
        ({"n": 0}, "n", "must be a whole number between 1 and 64, got 0"),
        ({"n": 1.5}, "n", "must be a whole number between 1 and 64, got 1.5"),
        ({"n": True}, "n", "must be a whole number between 1 and 64, got True"),
        ({"n": 40, "prompt": ["a", "b"]}, "n", "times the prompts is at most 64, got 40 times 2"),
        ({"seed": "x"}, "seed", r"must be a whole number between -2\^63 and 2\^63 - 1, got 'x'"),
        ({"seed": 2**70}, "seed", "must be a whole number between .*, got 1180591620717411303424"),
        ({"max_tokens": 0}, "max_tokens", "must be a whole number of at least 1, got 0"),
        ({"temperature": -0.1}, "temperature", "must be a number between 0 and 2, got -0.1"),
        ({"temperature": "hot"}, "temperature", "must be a number between 0 and 2, got 'hot'"),
        ({"temperature": 1e999}, "temperature", "must be a number between 0 and 2"),
        ({"top_p": 1.5}, "top_p", "must be a number above 0 and at most 1, got 1.5"),
        ({"stop": [""]}, "stop", "a list of at most 16 texts, none empty"),
        ({"stop": ["a"] * 17}, "stop", "a list of at most 16 texts"),
        ({"stream": 1}, "stream", "must be true or false, got 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream: true only"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "is unknown here"),
        ({"logprobs": 1}, "logprobs", r"must be true or false, of a text 0 \(.*\), got 1"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs", "is unknown here"),
        ({"top_k": 5}, "top_k", "is not supported here: leave it out, got 5"),
        ({"ignore_eos": True}, "ignore_eos", "is not supported here"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "is not supported here"),
        ({"echo": True}, "echo", "is not supported here"),
        ({"presence_penalty": 0.5}, "presence_penalty", "is not supported here"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported here"),
        ({"temperature": True}, "temperature", "must be a number between 0 and 2, got True"),
        ({"best_of": 0}, "best_of", "must be a whole number of at least 1, got 0"),
        ({"half \ud800": 1}, "half \ud800", "is unknown here"),
        ({"frobnicate": 1}, "frobnicate", "is unknown here; what is read: best_of, infalign, logprobs, max_tokens"),
        ({"messages": CHAT}, "messages", "is unknown here"),
        ({"infalign": 3}, "infalign", "must be an object, got 3"),
        ({"infalign": {"m": 3}}, "infalign.m", "is unknown here; fields: n, return_candidates"),
        ({"infalign": {"n": "3"}}, "infalign.n", "must be a whole number of at least 1, got '3'"),
        ({"infalign": {"n": 0}}, "infalign.n", "must be a whole number of at least 1, got 0"),
        ({"infalign": {"return_candidates": 1}}, "infalign.return_candidates", "must be true or false, got 1"),
        ({"infalign": {"n": 51}}, "infalign.n", r"is at most 50 for this prompt \(tokens_per_batch\), got 51"),
        ({"best_of": 3, "n": 2}, "best_of", "goes with n: 1 only"),
        ({"best_of": 3, "infalign": {"n": 2}}, "best_of", "goes with n: 1 only"),
    ],
)
def test_a_wrong_field_is_named(change, param, message, served):
    response = served.post(content=json.dumps({**ASK, **change}), headers={"content-type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert re.search(message, error["message"])


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (None, "messages", "must be a list of turns, got nothing"),
        ([], "messages", "must be a list of turns"),
        (["hi"], "messages[0]", "must be an object with role and content, got 'hi'"),
        ([{"role": "robot", "content": "hi"}], "messages[0].role", "must be one of system, developer, user"),
        ([{"role": "user"}], "messages[0].content", "must be a text, got nothing"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "reads text only"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0]", "got 3"),
        ([{"role": "user", "content": "a \ud800"}], "messages[0].content[0]", "half a surrogate pair"),
        ([*CHAT, {"role": "assistant", "content": "x"}], "messages", "the last one is the assistant's"),
        ([{"role": "user", "content": " "}], "messages", "must not end with an empty turn"),
        ([{**CHAT[0], "tool_calls": [1]}], "messages[0].tool_calls", "is not supported here"),
    ],
)
def test_a_wrong_chat_is_named(messages, param, message, served):
    content = json.dumps({"model": "tiny", "messages": messages})
    response = served.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param) and message in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True, "top_logprobs": 3},
        {"chat_template_kwargs": {"chat_template": "{{ messages }}"}},
        {"chat_template_kwargs": [1]},
        {"max_tokens": 2, "max_completion_tokens": 3},
        {"best_of": 2},
    ],
)
def test_a_chat_that_asks_for_what_is_not_there(change, served):
    response = served.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT, **change})
    assert response.status_code == 400 and error_of(response)["param"] in {*change, "messages"}


def test_openais_client_raises_its_own_errors(served):
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="temperature must be a number between 0 and 2") as caught:
        client.completions.create(model="tiny", prompt="the cat", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here, only 'tiny'") as caught:
        client.completions.create(model="gpt", prompt="the cat")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "the body is not JSON"),
        ({"content": b"[" * 10**6, "headers": {"content-type": "application/json"}}, 400, "the body is not JSON"),
        ({"content": b"\xff", "headers": {"content-type": "application/json"}}, 400, "the body is not JSON"),
        ({"json": [1]}, 400, "the body must be a JSON object, got list"),
        ({"content": json.dumps(ASK)}, 415, "send Content-Type: application/json"),
        ({"json": {**ASK, "prompt": "x" * MAX_BODY}}, 413, f"the body is longer than {MAX_BODY} bytes"),
        ({"json": ASK, "headers": {"host": "evil.example"}}, 403, "without a token only this machine is served"),
        ({"json": ASK, "headers": {"host": "[::1"}}, 403, "without a token only this machine is served"),
    ],
)
def test_a_request_that_is_none(request_, status, message, served):
    response = served.post(**request_)
    assert response.status_code == status and message in error_of(response)["message"]
    assert served.post(json=ASK).status_code == 200


@pytest.mark.parametrize(("verb", "path", "status"), [("GET", "/v1", 404), ("GET", "/v1/completions", 405)])
def test_paths_that_are_not_there(verb, path, status, served):
    response = httpx.request(verb, served.url + path, trust_env=False)
    assert response.status_code == status and error_of(response)["message"]


def test_a_chat_template_that_refuses(tmp_path):
    keys = tiny_keys(tmp_path)
    config = tmp_path / "tiny" / "chat_template.jinja"
    config.write_text("{{ raise_exception('no talking') }}")
    with running(tmp_path, keys) as served:
        response = served.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT})
        assert response.status_code == 400 and "refuses a chat with the roles user: no talking" in response.text


def test_a_token_is_asked_for_and_not_told(tmp_path, caplog):
    with running(tmp_path, tiny_keys(tmp_path), token="open sesame") as served:
        for given in ({}, {"authorization": "Bearer open"}, {"authorization": "open sesame"}, {"authorization": "é"}):
            headers = {name: value.encode() for name, value in given.items()}
            for path in ("/v1/completions", "/v1/chat/completions"):
                response = served.post(path, json=ASK, headers=headers)
                assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
            for path in ("/v1/models", "/metrics"):
                assert httpx.get(served.url + path, headers=headers, trust_env=False).status_code == 401
            assert "sesame" not in response.text
        assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200
        assert served.client(api_key="open sesame").completions.create(**ASK).choices
        with pytest.raises(openai.AuthenticationError, match="no token or a wrong one"):
            served.client(api_key="Open sesame").completions.create(**ASK)
        behind = served.post(json=ASK, headers={"host": "api.example", "authorization": "Bearer open sesame"})
        assert behind.status_code == 200


# --- a full queue, and time


@contextlib.contextmanager
def gate(served):
    """The reward waits on prompts that hold "wind" until the block ends."""
    path = served.folder / "gate"
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def in_thread(call, *args, **kwargs):
    """A call under way, and where its result will be."""
    results: list = []
    thread = threading.Thread(target=lambda: results.append(call(*args, **kwargs)))
    thread.start()
    return thread, results


def test_beyond_the_queue_is_429_and_what_waits_is_answered(tmp_path):
    wind = {**ASK, "prompt": "wind"}
    with running(tmp_path, tiny_keys(tmp_path), max_queue=2) as served:
        with gate(served):
            first = in_thread(served.post, json=wind)
            wait_for(lambda: served.metrics()["infalign_in_progress"] == 1)
            waiting = [in_thread(served.post, json={**wind, "seed": seed}) for seed in range(2)]
            wait_for(lambda: served.metrics()["infalign_queue_length"] == 2)
            refused = served.post(json=ASK)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            error = error_of(refused)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert "2 requests wait already (max_queue)" in error["message"]
            with pytest.raises(openai.RateLimitError):
                served.client().completions.create(**ASK)
        for thread, results in [first, *waiting]:
            thread.join(30)
            assert results[0].status_code == 200
        assert served.post(json=ASK).status_code == 200


def test_a_late_answer_is_504_and_what_was_not_started_is_dropped(tmp_path):
    with running(tmp_path, tiny_keys(tmp_path), request_timeout=0.6) as served:
        with gate(served):
            first = in_thread(served.post, json={**ASK, "prompt": "wind"})
            wait_for(lambda: served.metrics()["infalign_in_progress"] == 1)
            second = served.post(json=ASK)
            assert second.status_code == 504 and error_of(second)["code"] == "timeout"
            assert "no answer within 0.6 s (request_timeout)" in second.text
            assert served.metrics()["infalign_queue_length"] == 0
        first[0].join(30)
        assert first[1][0].status_code == 504
        wait_for(lambda: served.metrics()["infalign_in_progress"] == 0)
        assert served.metrics()["infalign_candidates_total"] == 4, "the one that was dropped was decoded"
        assert served.post(json=ASK).status_code == 200


def test_who_has_gone_is_not_decoded_for(tmp_path):
    with running(tmp_path, tiny_keys(tmp_path)) as served:
        with gate(served):
            first = in_thread(served.post, json={**ASK, "prompt": "wind"})
            wait_for(lambda: served.metrics()["infalign_in_progress"] == 1)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.url}/v1/completions", json=ASK, timeout=0.3, trust_env=False)
            wait_for(lambda: served.metrics()["infalign_queue_length"] == 0)
        first[0].join(30)
        assert served.post(json=ASK).status_code == 200
        metrics = served.metrics()
        assert metrics["infalign_candidates_total"] == 8
        assert metrics['infalign_requests_total{path="/v1/completions",status="499"}'] == 1


def test_who_has_gone_frees_the_place_at_once(tmp_path):
    """Eight requests of 400 tokens whose callers leave: far fewer tokens are drawn, and the next one is answered."""
    long = {**ASK, "max_tokens": 400, "infalign": {"n": 2}}
    keys = tiny_keys(tmp_path, max_completion_length=400, tokens_per_batch=900)
    with running(tmp_path, keys) as served:
        tokens = 'infalign_tokens_total{kind="completion"}'
        with contextlib.ExitStack() as stack:
            for seed in range(8):
                raw = stack.enter_context(socket.create_connection(served.url.removeprefix("http://").split(":")))
                body = json.dumps({**long, "seed": seed}).encode()
                head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: served.metrics()["infalign_in_progress"] == 1)
        assert served.post(json={**ASK, "max_tokens": 2}).status_code == 200
        metrics = served.metrics()
        # whole they would be 8 * 2 * 400, less those that end by themselves
        assert metrics.get(tokens, 0) < 2 * 2 * 400
        assert metrics['infalign_requests_total{path="/v1/completions",status="499"}'] == 8


def test_who_waits_is_not_disturbed_by_who_has_gone(tmp_path):
    """In one batch: the neighbour of a request that is given up gets what it gets alone."""
    keys = tiny_keys(tmp_path, max_completion_length=200, tokens_per_batch=20_000)
    with running(tmp_path, keys) as served:
        alone = served.post(json={**ASK, "seed": 5}).json()["choices"]
        with gate(served):
            first = in_thread(served.post, json={**ASK, "prompt": "wind"})
            wait_for(lambda: served.metrics()["infalign_in_progress"] == 1)
            beside = in_thread(served.post, json={**ASK, "seed": 5})
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.url}/v1/completions", json={**ASK, "seed": 6}, timeout=0.3, trust_env=False)
        for thread, _ in (first, beside):
            thread.join(60)
        assert beside[1][0].json()["choices"] == alone


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused_and_not_reset(served, chunked):
    content = json.dumps({**ASK, "prompt": "x" * (8 * 2**20)}).encode()
    sent = (content[at : at + 2**16] for at in range(0, len(content), 2**16)) if chunked else content
    response = served.post(content=sent, headers={"content-type": "application/json"})
    assert response.status_code == 413 and "longer than" in error_of(response)["message"]
    assert served.post(json=ASK).status_code == 200


def test_idle_connections_shut_nobody_out(served):
    host, port = served.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection((host, int(port))))
        assert served.post(json=ASK).status_code == 200
    assert served.post(json=ASK).status_code == 200


@pytest.mark.parametrize("host", ["", "Host: 127.0.0.1\r\n"])
@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0(served, host, stream):
    body = json.dumps({**ASK, "seed": 2, "stream": stream}).encode()
    name, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((name, int(port)), timeout=30) as raw:
        head = f"POST /v1/completions HTTP/1.0\r\n{host}Content-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        got = b"".join(iter(lambda: raw.recv(65536), b""))  # until the server closes
    assert got.startswith(b"HTTP/1.1 200") and (b"[DONE]" in got if stream else b'"choices"' in got)
    assert b"chunked" not in got.lower()


def test_a_long_prompt_does_not_keep_health_waiting(tmp_path):
    """While four MB of prompt are tokenized, health answers; the longest answer takes a small part of that time."""
    keys = tiny_keys(tmp_path)
    with running(tmp_path, keys) as served:
        body = {**ASK, "prompt": "the cat " * 490_000}
        start = time.monotonic()
        long = in_thread(served.post, json=body)
        waits = []
        while long[0].is_alive():
            asked = time.monotonic()
            assert httpx.get(f"{served.url}/health", trust_env=False, timeout=60).status_code == 200
            waits.append(time.monotonic() - asked)
        whole = time.monotonic() - start
        assert long[1][0].status_code == 400 and "tokens, at most" in error_of(long[1][0])["message"]
        assert len(waits) > 3 and np.median(waits) < whole / 3


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path):
    with running(tmp_path, tiny_keys(tmp_path), request_timeout=0.3) as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 504")


# --- what fails behind it


def test_a_reward_that_fails_is_500_for_its_request_alone(served, capsys):
    """Its neighbours in the batch are answered, its words stay in the log, and the next request works."""
    prompts = ["wind a", "the cat", "sorry cat", "a dog"]
    with gate(served):
        threads = [in_thread(served.post, json={**ASK, "prompt": prompts[0]})]
        wait_for(lambda: served.metrics()["infalign_in_progress"] == 1)
        threads += [in_thread(served.post, json={**ASK, "prompt": prompt, "stream": True}) for prompt in prompts[1:]]
        wait_for(lambda: served.metrics()["infalign_queue_length"] == 3)
    for thread, _ in threads:
        thread.join(30)
    assert [results[0].status_code for _, results in threads] == [200, 200, 500, 200]
    failed = threads[2][1][0]
    assert error_of(failed)["type"] == "server_error" and "the reward failed on this request" in failed.text
    assert "hunter2" not in failed.text and "hunter2" in capsys.readouterr().err
    assert served.metrics()['infalign_failures_total{cause="reward"}'] == 1
    with pytest.raises(openai.InternalServerError, match="the reward failed"):
        served.client().completions.create(model="tiny", prompt="sorry")
    assert httpx.get(f"{served.url}/health", trust_env=False).json()["last_batch"] == "failed: reward"
    assert served.post(json=ASK).status_code == 200
    assert httpx.get(f"{served.url}/health", trust_env=False).json()["last_batch"] == "well"


def test_no_score_is_no_answer(served):
    before = served.metrics()["infalign_unscored_total"]
    response = served.post(json={**ASK, "prompt": "bye"})
    assert response.status_code == 500 and error_of(response)["code"] == "no_score"
    assert served.metrics()["infalign_unscored_total"] - before == 4


def test_what_a_strategy_cannot_decode(tmp_path):
    keys = tiny_keys(tmp_path, strategy="rejection", strategy_kwargs={"threshold": 0.9, "num_references": 3})
    with running(tmp_path, keys) as served:
        response = served.post(json={**ASK, "prompt": "bye"})
        assert response.status_code == 500 and error_of(response)["code"] == "decoding"
        assert served.metrics()['infalign_failures_total{cause="decoding"}'] == 1
        assert served.post(json=ASK).status_code == 200


def test_an_error_nobody_thought_of(tmp_path, caplog):
    """Damaged weights: the log has the traceback, the caller a line; once they are whole again it works."""
    with running(tmp_path, tiny_keys(tmp_path)) as served:
        weight = served.service.worker.engine.sampler.model.lm_head.weight
        whole = weight.data.clone()
        weight.data.fill_(float("nan"))
        response = served.post(json=ASK)
        assert response.status_code == 500 and error_of(response)["code"] == "internal"
        assert "FloatingPointError" in caplog.text and "Float" not in response.text
        weight.data.copy_(whole)
        assert served.post(json=ASK).status_code == 200


def test_a_server_that_stops_says_so(tmp_path):
    with running(tmp_path, tiny_keys(tmp_path)) as served:
        with gate(served):
            first = in_thread(served.post, json={**ASK, "prompt": "wind"})
            wait_for(lambda: served.metrics()["infalign_in_progress"] == 1)
            waiting = in_thread(served.post, json=ASK)
            wait_for(lambda: served.metrics()["infalign_queue_length"] == 1)
            served.service.worker.stop(0)
            waiting[0].join(10)
            assert waiting[1][0].status_code == 503 and error_of(waiting[1][0])["code"] == "stopping"
            health = httpx.get(f"{served.url}/health", trust_env=False)
            assert (health.status_code, health.json()["status"]) == (503, "stopping")
            assert served.post(json=ASK).status_code == 503
        first[0].join(10)
        assert first[1][0].status_code == 200


class Backend:
    """A server of completions that does what it is told to: answer, hang up, or refuse."""

    def __init__(self) -> None:
        self.does, self.keys = "answer", set()

    def __call__(self, path, body, handler):
        self.keys.add(handler.headers["authorization"])
        if path == "/v1/models":
            return {"data": [{"id": "behind"}]}
        if self.does == "hang up":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return None
        if self.does == "refuse":
            raise Reply(500, {"error": {"message": "CUDA out of memory at 10.0.0.7"}})
        count = int(np.random.default_rng(body["seed"]).integers(1, 4))
        ids = [8, 9, 10][:count]
        return {
            "choices": [{"text": "x", "finish_reason": "length", "token_ids": ids}],
            "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": count},
        }


@pytest.mark.parametrize("fault", ["hang up", "refuse"])
def test_a_backend_that_dies_is_502_and_the_next_request_works(fault, tmp_path, monkeypatch):
    backend = Backend()
    monkeypatch.setenv("INFALIGN_TEST_KEY", "hunter2")
    with serving(backend) as url:
        keys = tiny_keys(
            tmp_path, generation="openai", policy_base_url=url, server_tolerance=None, server_retries=0,
            api_key_env="INFALIGN_TEST_KEY",
        )  # fmt: skip
        del keys["policy_name_or_path"]
        other = tmp_path / "policy"
        (tmp_path / "tiny").rename(other)
        keys |= {"policy_name_or_path": str(other), "model_name_or_path": tiny_keys(tmp_path)["model_name_or_path"]}
        with running(tmp_path, keys) as served:
            ask = {"model": "policy", "prompt": "the cat", "seed": 3, "infalign": {"return_candidates": True}}
            first = served.post(json=ask)
            assert first.status_code == 200 and backend.keys == {"Bearer hunter2"}
            candidates = first.json()["choices"][0]["infalign"]["candidates"]
            assert {one["text"] for one in candidates} <= {"cat", "cat the", "cat the a"} | _texts(keys)
            backend.does = fault
            for stream in (False, True):
                failed = served.post(json={**ask, "stream": stream})
                assert failed.status_code == 502
                error = error_of(failed)
                assert "the server that samples the candidates fails" in error["message"]
                assert error["code"] == "backend" and "hunter2" not in failed.text and "10.0.0.7" not in failed.text
            assert served.metrics()['infalign_failures_total{cause="backend"}'] == 2
            backend.does = "answer"
            again = served.post(json=ask)
            assert again.json()["choices"] == first.json()["choices"]


def _texts(keys):
    tokenizer = Experiment(load_recipe(keys)).tokenizer
    return {tokenizer.decode([8, 9, 10][:count]) for count in (1, 2, 3)}


def test_a_backend_that_is_not_there_is_told_at_the_start(tmp_path):
    with serving(Backend()) as url:
        pass
    keys = tiny_keys(tmp_path, generation="openai", policy_base_url=url, server_tolerance=None, server_retries=0)
    keys["policy_name_or_path"] = str(tmp_path / "tiny2")
    (tmp_path / "tiny").rename(tmp_path / "tiny2")
    keys["model_name_or_path"] = tiny_keys(tmp_path)["model_name_or_path"]
    with pytest.raises(InputError, match=r"the server at .* failed once"):
        service_of(load_recipe(keys), ServeOptions())


# --- procedures that do not take n


def test_a_procedure_that_does_not_take_n(tmp_path):
    keys = tiny_keys(tmp_path, procedure="random_n", procedure_kwargs={"pmf": [0.5, 0.5]})
    del keys["n"]
    with pytest.raises(InputError, match="draws 2 candidates, whatever is asked for"):
        strategies(load_recipe(keys))(3)
    with running(tmp_path, keys) as served:
        response = served.post(json={**ASK, "infalign": {"n": 3}})
        assert response.status_code == 400 and "draws 2 candidates, whatever is asked for" in response.text
        assert served.post(json={**ASK, "infalign": {"n": 2}}).status_code == 200


def test_a_procedure_that_keeps_one_of_several_ranks(tmp_path):
    keys = tiny_keys(tmp_path, procedure="top_of_n", n=3, procedure_kwargs={"k": 2})
    with running(tmp_path, keys) as served:
        assert served.post(json=ASK).status_code == 200
        assert served.post(json={**ASK, "infalign": {"n": 4}}).status_code == 200
        response = served.post(json={**ASK, "infalign": {"n": 1}})
        assert response.status_code == 400 and "k must be at most n" in response.text


def test_early_rejection_needs_a_sampler_that_stops_half_way(tmp_path):
    keys = tiny_keys(tmp_path, strategy="early_rejection", strategy_kwargs={"check_tokens": 2})
    (tmp_path / "tiny").rename(tmp_path / "policy")
    keys |= {"policy_name_or_path": str(tmp_path / "policy"), "generation": "openai", "server_tolerance": None}
    keys["model_name_or_path"] = tiny_keys(tmp_path)["model_name_or_path"]
    with serving(Backend()) as url, pytest.raises(InputError, match=r"strategy early_rejection .* generation: openai"):
        service_of(load_recipe({**keys, "policy_base_url": url}), ServeOptions())
