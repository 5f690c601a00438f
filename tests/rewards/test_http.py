"""A reward on a server: both shapes of JSON, what is tried again, what is an error at once, and the key."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from infalign.rewards.loader import load_reward
from infalign.types import InputError, RewardError
from tests.generation.completions import Reply, serving
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

KEY = "sk-very-secret-1234"
QUICK = {"backoff": 0.01, "retries": 2, "timeout": 5.0}
PROMPTS = [f"p{number}" for number in range(7)]
COMPLETIONS = ["x" * (7 - number) for number in range(7)]


def lengths(path, body, handler):
    return {"rewards": [len(text) for text in body["completions"]]}


def scores(url, prompts=PROMPTS, completions=COMPLETIONS, data=None, **options):
    reward = load_reward(url + "/score", {**QUICK, **options}, backoff=0.01)
    return reward(prompts, completions, [[1]] * len(prompts), **(data or {}))


def test_the_contract_batch_by_batch_in_order():
    bodies = []

    def answer(path, body, handler):
        assert path == "/v1/score"
        bodies.append(body)
        time.sleep(0.02 * len(body["prompts"]))  # the short last batch is answered first
        pairs = zip(body["prompts"], body["completions"], strict=True)
        return {"rewards": [None if prompt == "p2" else len(text) for prompt, text in pairs]}

    with serving(answer) as url:
        found = scores(url, batch_size=3, data={"answer": list("abcdefg"), "trainer_state": object()})
    np.testing.assert_array_equal(found, [7, 6, np.nan, 4, 3, 2, 1])
    bodies.sort(key=lambda body: body["prompts"])
    assert bodies[1] == {
        "prompts": ["p3", "p4", "p5"],
        "completions": ["xxxx", "xxx", "xx"],
        "columns": {"answer": ["d", "e", "f"]},
    }
    assert [len(body["prompts"]) for body in bodies] == [3, 3, 1]


def test_chats_travel_as_messages_and_columns_can_be_chosen():
    bodies = []

    def answer(path, body, handler):
        bodies.append(body)
        return {"rewards": [0.5]}

    chat, said = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}]
    with serving(answer) as url:
        scores(url, [chat], [said], {"a": [1], "b": [object()]}, columns=["a"])
        with pytest.raises(RewardError, match=r"the column 'b' cannot be sent as JSON .*name those to send in columns"):
            scores(url, [chat], [said], {"b": [object()]})
        with pytest.raises(RewardError, match="the data has no column 'z'; it has a"):
            scores(url, [chat], [said], {"a": [1]}, columns=["z"])
    assert bodies == [{"prompts": [chat], "completions": [said], "columns": {"a": [1]}}]


def test_no_more_requests_at_a_time_than_allowed():
    lock, now, most = threading.Lock(), [0], [0]

    def answer(path, body, handler):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return lengths(path, body, handler)

    with serving(answer) as url:
        assert scores(url, batch_size=1, concurrency=3).tolist() == [7, 6, 5, 4, 3, 2, 1]
    assert most[0] == 3


def test_openrlhfs_shape():
    bodies = []

    def answer(path, body, handler):
        bodies.append(body)
        return {"rewards": [float(len(query)) for query in body["query"]], "scores": [], "extra_logs": {}}

    with serving(answer) as url:
        found = scores(url, ["p", "qq"], ["x", "y"], {"gold": ["4", "5"]}, shape="openrlhf", label_column="gold")
        assert found.tolist() == [2.0, 3.0]
        assert bodies.pop() == {"query": ["px", "qqy"], "prompts": ["p", "qq"], "labels": ["4", "5"]}
        scores(url, ["p"], ["x"], shape="openrlhf")
        assert bodies.pop()["labels"] == [""]


def test_openrlhfs_shape_renders_chats_with_the_policys_template(tmp_path):
    tokenizer = tiny_tokenizer(["hi", "ho"])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    chat, said = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    bodies = []

    def answer(path, body, handler):
        bodies.append(body)
        return {"rewards": [0.0]}

    with serving(answer) as url:
        scores(url, [chat], [said], shape="openrlhf", tokenizer=str(tmp_path))
        assert bodies == [{"query": [expected + "ho"], "prompts": [expected], "labels": [""]}]
        with pytest.raises(RewardError, match="the prompts are chats: give tokenizer"):
            scores(url, [chat], [said], shape="openrlhf")


PASSING = {
    "429": lambda: Reply(429, {"error": "slow down"}, Retry_After="0"),
    "503": lambda: Reply(503, "<html>busy"),
    "a lost connection": lambda: None,
    "half an answer": lambda: Reply(200, '{"rewards": [1'),
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_may_pass_is_tried_again(kind):
    asked = []

    def answer(path, body, handler):
        asked.append(body)
        if len(asked) > 2:
            return lengths(path, body, handler)
        found = PASSING[kind]()
        if found is None:
            return None
        raise found

    with serving(answer) as url:
        assert scores(url).tolist() == [7, 6, 5, 4, 3, 2, 1]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda: Reply(503, {"detail": "no GPU"}), "HTTP 503: no GPU"),
        (lambda: time.sleep(0.4), r"no answer after 0.1 s \(reward_kwargs: {timeout: ...}\)"),
    ],
)
def test_a_failure_that_stays_is_an_error_or_no_score_and_never_a_number(reply, words):
    asked = []

    def answer(path, body, handler):
        asked.append(body)
        found = reply()
        if found is not None:
            raise found

    with serving(answer) as url:
        with pytest.raises(RewardError, match=rf"failed 3 times in a row \({words}"):
            scores(url, timeout=0.1 if "no answer" in words else 5.0)
        assert len(asked) == 3  # the guard does not try the whole again
        masked = load_reward(f"{url}/score", {**QUICK, "retries": 0, "timeout": 0.1}, on_error="mask", backoff=0.01)
        assert np.isnan(masked(PROMPTS, COMPLETIONS)).all()


def test_the_server_says_how_long_to_wait():
    times = []

    def answer(path, body, handler):
        times.append(time.monotonic())
        if len(times) == 1:
            raise Reply(503, "later", Retry_After="0.5")
        return lengths(path, body, handler)

    with serving(answer) as url:
        scores(url)
    assert 0.5 <= times[1] - times[0] < 5.0


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_refusal_is_an_error_at_once_also_under_mask(status):
    asked = []

    def answer(path, body, handler):
        asked.append(body)
        raise Reply(status, {"error": {"message": f"not so, {KEY}"}}, Location="http://127.0.0.1:1/")

    with serving(answer) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_KEY", KEY)
        reward = load_reward(f"{url}/score", {**QUICK, "api_key_env": "REWARD_KEY"}, on_error="mask")
        with pytest.raises(RewardError, match=f"refuses: HTTP {status}: not so, <secret>") as caught:
            reward(PROMPTS, COMPLETIONS)
    assert len(asked) == 1 and KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"rewards": [1, 2]}', "returned 2 rewards for 3 completions"),
        ('{"rewards": [1, 2, 3, 4]}', "returned 4 rewards for 3 completions"),
        ('{"rewards": [1, "good", 2]}', 'returned "good" for completion 1; a finite number'),
        ('{"rewards": [1, 2, true]}', "returned true for completion 2"),
        ('{"rewards": [1, NaN, 2]}', "returned NaN for completion 1"),
        ('{"rewards": [1, 2, Infinity]}', "returned Infinity for completion 2"),
        ('{"rewards": [[1], 2, 3]}', r"returned \[1\] for completion 0"),
        ('{"scores": [1, 2, 3]}', r'answered {"scores": .*is wanted'),
        ("[1, 2, 3]", r"answered \[1, 2, 3\]"),
        ("0.0", "answered 0.0"),
    ],
)
@pytest.mark.parametrize("on_error", ["error", "mask"])
def test_an_answer_that_is_no_reward_is_named_at_once(content, words, on_error):
    asked = []

    def answer(path, body, handler):
        asked.append(body)
        raise Reply(200, content)

    with serving(answer) as url:
        reward = load_reward(f"{url}/score", QUICK, on_error=on_error)
        with pytest.raises(RewardError, match=words):
            reward(["p"] * 3, ["x"] * 3)
    assert len(asked) == 1


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, capsys):
    seen = []

    def answer(path, body, handler):
        seen.append(handler.headers["authorization"])
        return lengths(path, body, handler)

    monkeypatch.setenv("REWARD_KEY", KEY)
    with serving(answer) as url:
        reward = load_reward(f"{url}/score", {**QUICK, "api_key_env": "REWARD_KEY"})
        without = load_reward(f"{url}/score", QUICK)
        reward(["p"], ["x"])
        without(["p"], ["x"])
    assert seen == [f"Bearer {KEY}", None]
    assert reward.fingerprint == without.fingerprint  # another key is the same reward
    assert KEY not in repr(reward) + repr(reward.function.endpoint) + json.dumps(reward.counts)
    assert capsys.readouterr().err == ""


def test_a_key_over_plain_http_is_told(monkeypatch, capsys):
    monkeypatch.setenv("REWARD_KEY", KEY)
    load_reward("http://gpu7:5000/score", {"api_key_env": "REWARD_KEY"})
    load_reward("https://gpu7:5000/score", {"api_key_env": "REWARD_KEY"})
    load_reward("http://gpu7:5000/score")
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "warning: the API key in REWARD_KEY goes to http://gpu7:5000/score over plain http: use https, or an SSH tunnel"
    ]


def test_no_proxy_stands_before_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving(lengths) as url:
        assert scores(url, retries=0).tolist() == [7, 6, 5, 4, 3, 2, 1]


def test_what_the_fingerprint_covers():
    def fingerprint(url="http://127.0.0.1:1/score", **options):
        return load_reward(url, options).fingerprint

    assert fingerprint() == fingerprint(concurrency=2, batch_size=1, timeout=1.0, retries=0)
    others = [
        fingerprint("http://127.0.0.1:1/other"),
        fingerprint(shape="openrlhf"),
        fingerprint(version=2),
        fingerprint(version="2024-06"),
        fingerprint(columns=["a"]),
    ]
    assert len({fingerprint(), *others}) == 6


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("http://me:secret@host/x", {}, "must hold no user, password"),
        ("http://host/x?key=secret", {}, "must hold no user, password, query"),
        ("http://host", {"shape": "trl"}, "shape is one of infalign, openrlhf, got 'trl'"),
        ("http://host", {"batch_size": 0, "timeout": 0}, "batch_size is a whole number, 1 or more, got 0; timeout is"),
        ("http://host", {"retries": -1}, "retries is a whole number, 0 or more, got -1"),
        ("http://host", {"concurrency": 1.5}, "concurrency is a whole number, 1 or more, got 1.5"),
        ("http://host", {"label_column": "a"}, "belong to shape: openrlhf"),
        ("http://host", {"api_key_env": "NOT_SET_AT_ALL"}, "NOT_SET_AT_ALL is not set"),
        ("http://host", {"api_key": "sk"}, "unexpected keyword argument 'api_key'"),
    ],
)
def test_refused_when_loaded(url, options, words):
    with pytest.raises(InputError, match=words) as caught:
        load_reward(url, options)
    assert "secret" not in str(caught.value).replace("<secret>", "")


def test_the_example_server():
    path = Path(__file__).parents[2] / "reward_models" / "server.py"
    with subprocess.Popen([sys.executable, str(path), "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]
            reward = load_reward(url, {"retries": 0})
            chat = [{"role": "user", "content": "p"}], [{"role": "assistant", "content": "a b c"}]
            np.testing.assert_array_equal(reward(["p", chat[0], "p"], ["a b", chat[1], ""]), [-2, -3, np.nan])
        finally:
            process.kill()
