"""The parts by themselves: stop strings in tokens, the queue, the numbers, the listening socket, strategies."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest

from infalign.serving.engine import Engine, Setting, cut, stream_key
from infalign.serving.listen import address, bind, is_loopback_host
from infalign.serving.metrics import BUCKETS, Metrics
from infalign.serving.worker import Job, QueueFullError, Worker
from infalign.theory.procedures import BestOfN
from infalign.types import InputError, Prompt, RewardError, Sample, SamplingSettings
from tests.serving.running import running, tiny_keys
from tests.tiny import tiny_tokenizer

SETTING = Setting(SamplingSettings(4))


# --- stop strings


@pytest.mark.parametrize(
    ("stops", "text", "count"),
    [
        (["ran"], "the cat sat ", None),
        (["cat"], "the ", None),
        ([" cat"], "the", 1),
        ([" sat", " cat"], "the", 1),
        (["the"], "", 0),
        (["at"], "the c", None),
        (["moon"], "the cat sat ran", 4),
    ],
)
def test_a_cut_sample_is_one_that_ended_there(stops, text, count):
    """Its own first tokens where they make the text; the text's tokens where the cut goes through one."""
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer("the cat sat ran").input_ids)
    logps = np.arange(4, dtype=np.float32)
    found = cut(Sample("p", 3, ids, logps, "the cat sat ran", False), stops, tokenizer)
    assert (found.text, found.finished, found.key, found.index) == (text, text != "the cat sat ran", "p", 3)
    if count is not None:
        assert found.token_ids == ids[:count] and found.token_logps.tolist() == list(range(count))
    else:
        assert found.token_ids == tuple(tokenizer(text).input_ids) and np.isnan(found.token_logps).all()


def test_streams_differ_by_prompt_seed_and_choice():
    keys = [stream_key(prompt, seed, choice, 42) for prompt in "ab" for seed in (1, 42) for choice in range(3)]
    assert len(set(keys)) == len(keys) and stream_key("a", 42, 0, 42) == "a"


# --- the queue


class Scripted:
    """A sampler whose samples are known, and which can be made to wait or to fail."""

    def __init__(self) -> None:
        self.settings, self.tokenizer = SamplingSettings(4), tiny_tokenizer()
        self.free, self.drawn, self.fails = threading.Event(), [], None
        self.free.set()

    def sample(self, requests):
        self.drawn.append((self.settings, [request.key for request in requests]))
        assert self.free.wait(10)
        if self.fails:
            raise self.fails
        logps = np.zeros(1, np.float32)
        return [Sample(r.key, r.index, (8 + r.index,), logps, f"{r.key}{r.index}", True) for r in requests]


@pytest.fixture
def work():
    sampler = Scripted()
    engine = Engine(
        sampler, lambda _, samples: np.array([float(one.index) for one in samples]), lambda n: BestOfN(n or 2), 0, 100
    )
    worker = Worker(engine, max_queue=8, metrics=Metrics())
    worker.start()
    yield sampler, worker
    sampler.free.set()
    worker.stop(10)
    assert not worker.alive


def job(*keys, setting=SETTING, length=2):
    return Job(setting, tuple(Prompt(key, key) for key in keys), tuple((1,) * length for _ in keys))


def busy(sampler, worker):
    """Keep the worker at one job until the sampler is free."""
    sampler.free.clear()
    first = job("busy")
    worker.submit(first)
    end = time.monotonic() + 60
    while not sampler.drawn:
        assert time.monotonic() < end
        time.sleep(0.001)
    return first


def test_jobs_of_like_settings_go_together_in_order(work):
    """Other settings wait for the next batch, as do the same keys, and what does not fit (12 tokens each, of 100)."""
    sampler, worker = work
    first = busy(sampler, worker)
    other = Setting(SamplingSettings(4, temperature=0.5))
    jobs = [job("a"), job("b", setting=other), job("c", "d"), job("a"), job(*"efghik"), job("j")]
    for one in jobs:
        worker.submit(one)
    assert worker.gauges() == {"queue_length": 6, "in_progress": 1}
    sampler.free.set()
    for one in [first, *jobs]:
        outcomes = one.result.result(10)
        assert [outcome.decoded.text for outcome in outcomes] == [f"{prompt.key}1" for prompt in one.prompts]
    batches = [sorted(set(keys)) for _, keys in sampler.drawn]
    assert batches == [["busy"], ["a", "c", "d", "j"], ["b"], ["a", *"efghik"]]
    assert [settings.temperature for settings, _ in sampler.drawn] == [1.0, 1.0, 0.5, 1.0]


def test_a_job_beyond_the_budget_is_decoded_in_parts(work):
    sampler, worker = work
    big = job(*"abcdefghijkl")
    worker.submit(big)
    assert len(big.result.result(10)) == 12 and len(sampler.drawn) == 2


def test_what_was_given_up_frees_its_place(work):
    sampler, worker = work
    first = busy(sampler, worker)
    jobs = [job(str(number)) for number in range(8)]
    for one in jobs:
        worker.submit(one)
    with pytest.raises(QueueFullError):
        worker.submit(job("x"))
    assert jobs[3].result.cancel()
    worker.submit(job("x"))
    sampler.free.set()
    assert first.result.result(10) and jobs[7].result.result(10)
    assert not any("3" in keys for _, keys in sampler.drawn)


def test_what_was_given_up_is_not_started(work):
    sampler, worker = work
    first = busy(sampler, worker)
    given_up, kept = job("a"), job("b")
    worker.submit(given_up)
    worker.submit(kept)
    assert given_up.result.cancel()
    sampler.free.set()
    assert first.result.result(10) and kept.result.result(10)
    assert [set(keys) for _, keys in sampler.drawn] == [{"busy"}, {"b"}] and not kept.result.cancel()


@pytest.mark.parametrize(
    ("error", "cause"),
    [(InputError("gone"), "decoding"), (RewardError("no"), "reward"), (RuntimeError("x"), "internal")],
)
def test_it_survives_whatever_fails(error, cause, work, capsys):
    sampler, worker = work
    sampler.fails = error
    bad = job("a")
    worker.submit(bad)
    assert bad.result.exception(10) is error and worker.failing == cause
    sampler.fails = None
    good = job("a")
    worker.submit(good)
    assert good.result.result(10) and worker.failing is None and worker.alive


def test_stopping_cancels_what_waits(work):
    sampler, worker = work
    first = busy(sampler, worker)
    waits = job("a")
    worker.submit(waits)
    stopping = threading.Thread(target=worker.stop, args=(10,))
    stopping.start()
    while not waits.result.cancelled():
        time.sleep(0.001)
    sampler.free.set()
    stopping.join(10)
    assert first.result.result(1) and not worker.alive


# --- numbers


def test_the_histogram_counts_up():
    metrics, other = Metrics(), Metrics()
    for seconds in (0.05, 0.1, 0.2, 7.0, 1000.0):
        metrics.seconds.observe(seconds)
    metrics.requests.labels("/x", 200).inc()
    lines = metrics.text({"queue_length": 3, "in_progress": 1}).splitlines()
    counts = [float(line.split()[1]) for line in lines if "_bucket" in line]
    assert counts == [sum(one <= end for one in (0.05, 0.1, 0.2, 7.0, 1000.0)) for end in (*BUCKETS, np.inf)]
    assert "infalign_request_seconds_sum 1007.35" in lines and "infalign_request_seconds_count 5.0" in lines
    assert 'infalign_requests_total{path="/x",status="200"} 1.0' in lines and "infalign_queue_length 3.0" in lines
    assert "infalign_request_seconds_count 0.0" in other.text({}), "two servers share their numbers"


def test_the_names_of_the_metrics():
    """Each that a dashboard may ask for, and no more."""
    lines = Metrics().text({}).splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    counted = "requests choices candidates tokens reward_calls unscored batches failures"
    expected = [*(f"{one}_total" for one in counted.split()), "queue_length", "in_progress", "request_seconds"]
    assert names == {f"infalign_{one}" for one in expected}


# --- sockets


def test_a_port_that_is_taken_and_others():
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert address(bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is taken: give another --port"):
            bind("127.0.0.1", port)
    with pytest.raises(InputError, match="--port must be between 0"):
        bind("127.0.0.1", 70000)
    with pytest.raises(InputError, match=r"can't listen on 192\.0\.2\.1, port 0"):
        bind("192.0.2.1", 0)
    with pytest.raises(InputError, match="can't listen on no such host"):
        bind("no such host", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_has_brackets():
    try:
        bound = bind("::1", 0)
    except InputError:
        pytest.skip("no IPv6 loopback here")
    with bound:
        assert address(bound).startswith("http://[::1]:")


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.2", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_what_is_loopback(host, own):
    assert is_loopback_host(host) == own


# --- strategies beyond procedures


@pytest.mark.parametrize(
    ("strategy", "kwargs"),
    [
        ("EarlyRejection", {"check_tokens": 2, "keep": 0.5}),
        ("Adaptive", {"cost": 0.5}),
        ("Rejection", {"threshold": 0.9, "num_references": 6}),
    ],
)
def test_strategies_are_served(strategy, kwargs, tmp_path):
    """With and without a stop string; the tokens told are those drawn, also of what was given up or compared with."""
    name = {"EarlyRejection": "early_rejection"}.get(strategy, strategy.lower())
    keys = tiny_keys(tmp_path, strategy=name, strategy_kwargs=kwargs)
    with running(tmp_path, keys) as served:
        assert (
            strategy in served.service.procedure.lower().replace("rejection", "rejection") or served.service.procedure
        )
        body = {"model": "tiny", "prompt": "the cat sat", "seed": 5, "infalign": {"return_candidates": True}}
        for more in ({}, {"stop": [" "]}):
            answer = served.post(json={**body, **more}).json()
            (choice,) = answer["choices"]
            candidates = choice["infalign"]["candidates"]
            assert choice["text"] == candidates[choice["infalign"]["chosen"]]["text"]
            assert int(candidates[choice["infalign"]["chosen"]]["reward"]) == len(choice["text"])
            usage = answer["usage"]
            assert usage["infalign"]["candidates"] == len(candidates) <= 4
            if not more:
                beyond = usage["completion_tokens"] - sum(one["tokens"] for one in candidates)
                assert 6 <= beyond <= 36 if strategy == "Rejection" else beyond == 0
                scored_more = usage["infalign"]["reward_calls"] > len(candidates)
                assert scored_more == (strategy != "Adaptive")
