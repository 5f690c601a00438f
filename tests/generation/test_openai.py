"""Sampling from a server: the model's distribution, no failure that passes for a sample, no other model unnoticed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from transformers import AutoModelForCausalLM

from infalign.calibration.table import SampleTable
from infalign.cli import main
from infalign.generation.openai import OpenAISampler
from infalign.generation.plan import Request
from infalign.generation.server import Server
from infalign.models.loading import end_token_ids, load_policy, load_tokenizer
from infalign.stages.experiment import CALIBRATION, Experiment
from infalign.stages.recipe import load_recipe
from infalign.types import InputError, SamplingSettings
from tests.e2e.experiment import tiny_experiment
from tests.generation.completions import Reply, Served, scripted, serving
from tests.tiny import EOS, SPECIALS, tiny_causal, tiny_tokenizer

CPU = torch.device("cpu")
PROMPTS = [(20, 21, 22), (30, 31), (25,)]
STYLES = ["vllm", "llamacpp", "sglang", "text"]
ANSWER = {
    "choices": [{"text": "the cat", "finish_reason": "stop", "token_ids": [8, 10, 2]}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 3},
}


def textual(path: Path, seed: int = 0) -> str:
    """A tiny model that draws no special token but the end token: its completions survive as texts."""
    tiny_causal(path, "phi", seed=seed, layers=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), load_tokenizer(str(path))
    with torch.no_grad():
        model.lm_head.bias[tokenizer.convert_tokens_to_ids(list(SPECIALS))] = -1e4
        model.lm_head.bias[tokenizer.convert_tokens_to_ids(EOS)] = 2.0
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return textual(tmp_path_factory.mktemp("textual"))


@pytest.fixture(scope="module")
def pair(path):
    return load_policy(path, device=CPU), load_tokenizer(path)


@pytest.fixture(scope="module")
def ends(pair):
    return end_token_ids(*pair)


@pytest.fixture(scope="module", autouse=True)
def starting(path, tmp_path_factory):
    """A real `transformers serve` of the model at `path`, ended by its process id; it takes seconds to come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    command = [Path(sys.executable).with_name("transformers"), "serve", path]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process, f"http://127.0.0.1:{port}", home / "log"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def transformers_serve(starting):
    process, url, log = starting
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return f"{url}/v1"
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def sampler(url, pair, ends, max_tokens=6, local="same", **more):
    """A sampler of what is served at `url`, compared with the model of `pair` or with nothing."""
    model, tokenizer = pair
    server = Server(url, **{"concurrency": 4, "timeout": 5.0, "retries": 2, "backoff": 0.01, **more.pop("server", {})})
    settings = SamplingSettings(max_tokens, **more.pop("settings", {}))
    loads = (lambda: model) if local == "same" else local
    return OpenAISampler(server, tokenizer, settings, ends, 0, local=loads, **more)


def requests(per_prompt=4, prompts=PROMPTS):
    return [Request(f"p{number}", index, ids) for number, ids in enumerate(prompts) for index in range(per_prompt)]


def next_probabilities(model, ids, temperature=1.0):
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([ids])).logits[0, -1].double() / temperature, -1).numpy()


def fits(counts: Counter, expected: np.ndarray, total: int) -> float:
    """p-value of counts of outcomes against expected probabilities, rare ones taken together."""
    common = np.flatnonzero(expected * total >= 5)
    observed = [counts[one] for one in common.tolist()]
    rest = max(1.0 - expected[common].sum(), 1e-12)
    observed, probabilities = [*observed, total - sum(observed)], np.array([*expected[common], rest])
    return float(stats.chisquare(observed, probabilities / probabilities.sum() * total).pvalue)


# -- samples


@pytest.mark.parametrize(("style", "temperature"), [("vllm", 1.0), ("llamacpp", 0.6), ("text", 0.6)])
def test_samples_have_the_models_distribution(style, temperature, pair, ends):
    """First tokens, and second tokens after the commonest first one, by chi-square."""
    model, tokenizer = pair
    wanted = [Request("a", index, PROMPTS[0]) for index in range(400)]
    with serving(Served(model, tokenizer, style, ends=ends)) as url:
        subject = sampler(url, pair, ends, max_tokens=2, local=None, settings={"temperature": temperature})
        drawn = subject.sample(wanted)
    first = next_probabilities(model, PROMPTS[0], temperature)
    assert fits(Counter(sample.token_ids[0] for sample in drawn), first, len(drawn)) > 1e-3
    top = Counter(sample.token_ids[0] for sample in drawn if sample.token_ids[0] not in ends).most_common(1)[0][0]
    after = [sample.token_ids[1] for sample in drawn if sample.token_ids[0] == top]
    assert fits(Counter(after), next_probabilities(model, (*PROMPTS[0], top), temperature), len(after)) > 1e-3


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_comes_back(style, temperature, pair, ends, capsys):
    """Token ids with the end token, decoded text, log-probabilities where the server's are the samples'; one line."""
    model, tokenizer = pair
    with serving(Served(model, tokenizer, style, ends=ends)) as url:
        drawn = sampler(url, pair, ends, settings={"temperature": temperature}).sample(requests(6))
    out, err = capsys.readouterr()
    assert (out + err).count("\n") == 1 and ("prompts as text" in out + err) == (style == "text")
    if style == "text":
        assert err.startswith("warning: model 'tiny' at http://127.0.0.1") and "those are not compared" in err
    else:
        assert "follow the recipe's model, log-probabilities within" in out
    assert [(s.key, s.index) for s in drawn] == [(r.key, r.index) for r in requests(6)]
    assert {sample.finished for sample in drawn} == {True, False}
    known = {"vllm": temperature == 1, "llamacpp": temperature == 1, "sglang": True, "text": False}[style]
    for request, sample in zip(requests(6), drawn, strict=True):
        assert sample.finished == (sample.token_ids[-1] in ends)
        assert sample.finished or len(sample.token_ids) == 6
        assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        ids = (*request.prompt_ids, *sample.token_ids)
        expected = [
            np.log(next_probabilities(model, ids[:end], temperature)[ids[end]])
            for end in range(len(request.prompt_ids), len(ids))
        ]
        assert len(sample.token_logps) == len(sample.token_ids)
        if known:
            np.testing.assert_allclose(sample.token_logps, expected, atol=2e-5)
        else:
            assert np.isnan(sample.token_logps).all()


def test_a_sample_depends_on_its_own_seed_alone(pair, ends):
    """As ranks need that share the work out: neither order nor batches matter."""
    with serving(Served(*pair, ends=ends)) as url:
        together = sampler(url, pair, ends).sample(requests())
        backwards = sampler(url, pair, ends).sample(requests()[::-1])[::-1]
        alone = [sampler(url, pair, ends, local=None).sample([request])[0] for request in requests()]
    assert [s.token_ids for s in together] == [s.token_ids for s in backwards] == [s.token_ids for s in alone]
    assert len({s.token_ids for s in together}) > 6


def test_every_field_is_in_the_request(pair, ends):
    served = Served(*pair, ends=ends)
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}
    with serving(served) as url:
        sampler(url, pair, ends, local=None, settings=settings).sample(requests(3))
    bodies = served.bodies[1:]  # the first one asks what the server takes
    assert len(bodies) == 9 and len({body["seed"] for body in bodies}) == 9
    assert sorted(map(tuple, (body["prompt"] for body in bodies))) == sorted(3 * PROMPTS)
    for body in bodies:
        told = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        assert told == settings and (body["max_tokens"], body["n"], body["stop_token_ids"]) == (6, 1, list(ends))
    served.bodies.clear()
    with serving(served) as url:
        sampler(url, pair, ends, local=None).sample(requests(1))
    assert {(b["temperature"], b["top_p"], b["top_k"], b["min_p"]) for b in served.bodies} == {(1.0, 1.0, -1, 0.0)}


def test_no_more_requests_at_a_time_than_asked_for(pair, ends):
    under_way, most = 0, 0

    def answer(path, body, handler):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.02)
        under_way -= 1
        return ANSWER

    with serving(answer) as url:
        subject = sampler(url, pair, ends, local=None, server={"concurrency": 3, "model": "m"})
        subject.sample(requests(12, [(25,)]))
    assert most == 3


def test_a_prompt_travels_as_the_text_of_its_tokens(pair, ends):
    """BOS is not doubled, and a prompt that is no text's tokens is refused rather than changed."""
    model, _ = pair
    tokenizer = tiny_tokenizer(add_bos=True)
    served = Served(model, tokenizer, "text", ends=ends)
    ids = tuple(tokenizer("the cat sat").input_ids)
    with serving(served) as url:
        sampler(url, (model, tokenizer), ends, local=None).sample([Request("a", 0, ids)])
        assert served.bodies[-1]["prompt"] == "the cat sat"
        without = sampler(url, (model, tokenizer), ends, local=None)
        with pytest.raises(InputError, match="takes prompts as text only, and no text encodes to this one's tokens"):
            without.sample([Request("a", 0, ids[1:])])


def test_a_prompt_that_the_server_adds_to_is_refused(pair, ends):
    served = Served(pair[0], tiny_tokenizer(add_bos=True), "text", ends=ends)
    with serving(served) as url, pytest.raises(InputError, match="reads a prompt of 3 tokens as 4: it adds to it"):
        sampler(url, pair, ends, local=None).sample(requests(1))


def test_an_end_token_that_the_server_does_not_know_ends(pair, ends):
    """One rule for the end of base samples and rollouts, whatever the server was told."""
    content = {"choices": [{"text": "x", "finish_reason": "length", "token_ids": [8, ends[0], 9, 10]}]}
    with serving(lambda *_: content) as url:
        sample = sampler(url, pair, ends, 4, local=None, server={"model": "m"}).sample(requests(1, [(25,)]))[0]
    assert (sample.token_ids, sample.finished) == ((8, ends[0]), True)


# -- is it the recipe's model?


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return load_policy(textual(tmp_path_factory.mktemp("other"), seed=1), device=CPU)


@pytest.mark.parametrize("style", ["vllm", "sglang", "text"])
def test_another_model_is_refused(style, pair, other, ends):
    stale = Served(other, pair[1], style, ends=ends)
    why = "does not sample from" if style == "text" else "is not the recipe's model: log-probabilities .* nats"
    with serving(stale) as url, pytest.raises(InputError, match=f"model 'tiny' at .* {why}"):
        sampler(url, pair, ends).sample(requests())


def test_weights_that_are_a_little_stale_are_refused(pair, ends):
    """As after a weight sync that failed: 10 % of noise on every matrix; at 0.1 % (rounding) they pass."""
    model, tokenizer = pair
    for scale, refused in ((0.001, False), (0.1, True)):
        moved = AutoModelForCausalLM.from_config(model.config).eval()
        moved.load_state_dict(model.state_dict())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in (one for one in moved.parameters() if one.ndim == 2):
                weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)
        with serving(Served(moved, tokenizer, ends=ends)) as url:
            subject = sampler(url, pair, ends)
            if refused:
                with pytest.raises(InputError, match=r"is not the recipe's model.* server_tolerance is 0\.2"):
                    subject.sample(requests())
            else:
                subject.sample(requests())


@pytest.mark.parametrize("own_top_k", [1, 8])
@pytest.mark.parametrize("style", ["vllm", "text"])
def test_a_server_that_truncates_by_itself_is_refused(style, own_top_k, pair, ends):
    """Greedy at temperature 1, as transformers serve is by default, or a top_k of its own: the right weights."""
    served = Served(*pair, style, ends=ends, own_top_k=own_top_k)
    with serving(served) as url, pytest.raises(InputError, match="samples otherwise than asked"):
        sampler(url, pair, ends).sample(requests())


def test_a_token_that_the_model_does_not_have_is_refused(pair, ends):
    content = {"choices": [{"text": "x", "finish_reason": "length", "token_ids": [8, 9999]}]}
    with (
        serving(lambda *_: content) as url,
        pytest.raises(InputError, match=r"returned token 9999, the .* has 100: it serves another"),
    ):
        sampler(url, pair, ends, server={"model": "m"}).sample(requests())


@pytest.mark.parametrize(
    "odd",
    [
        {"logprobs": {"content": [1, None]}, "token_ids": "8"},
        {"logprobs": {"token_logprobs": ["x"], "tokens": 3}, "token_ids": [None]},
        {"logprobs": [0.5], "token_ids": [-1]},
    ],
)
def test_odd_extras_count_as_absent(odd, pair, ends):
    content = {"choices": [{"text": "the cat", "finish_reason": "stop", **odd}], "usage": {"completion_tokens": "many"}}
    with serving(lambda *_: content) as url:
        sample = sampler(url, pair, ends, local=None, server={"model": "m"}).sample(requests(1))[0]
    assert sample.text == "the cat" and sample.finished and np.isnan(sample.token_logps).all()


def test_token_ids_of_older_vllm(pair, ends):
    told = {"tokens": ["token_id:8", f"token_id:{ends[0]}"], "token_logprobs": [-0.5, None]}
    content = {"choices": [{"text": "x", "finish_reason": "stop", "logprobs": told}]}
    with serving(lambda *_: content) as url:
        sample = sampler(url, pair, ends, local=None, server={"model": "m"}).sample(requests(1))[0]
    assert sample.token_ids == (8, ends[0])
    np.testing.assert_array_equal(sample.token_logps, [-0.5, np.nan])


def test_no_tolerance_no_check(pair, other, ends, capsys):
    with serving(Served(other, pair[1], ends=ends)) as url:
        sampler(url, pair, ends, local=None).sample(requests())
    assert "not compared with the recipe's model (server_tolerance is unset)" in capsys.readouterr().err


# -- faults


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("content-length", "4000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def hangs(_):
    time.sleep(0.6)
    return ANSWER


def with_choice(**changes):
    return {**ANSWER, "choices": [{**ANSWER["choices"][0], **changes}]}


DOWN = Reply(500, {"error": {"message": "CUDA out of memory"}})
FAULTS = {
    "500 twice": ([DOWN, DOWN], "HTTP 500: CUDA out of memory"),
    "429": ([Reply(429, {"error": "slow down"}, retry_after="0.05")], "HTTP 429: slow down"),
    "503 until a date": (
        [Reply(503, "busy", retry_after="Wed, 21 Oct 2015 07:28:00 GMT")],
        "HTTP 503: busy",
    ),
    "closed in the middle": ([cut_short], "RemoteProtocolError: peer closed connection"),
    "closed at once": ([lambda handler: None], "RemoteProtocolError: Server disconnected"),
    "time-out": ([hangs], r"no answer after 0.3 s \(server_timeout\)"),
    "no JSON": (["<html>bad gateway</html>"], "not a usable answer: Expecting value"),
    "no choices": ([{"choices": []}], "not a usable answer: 0 choices where 1 was asked for"),
    "an error with status 200": ([{"error": "engine died"}], "not a usable answer: no choices where 1 was asked for"),
    "too many choices": ([{**ANSWER, "choices": 2 * ANSWER["choices"]}], "not a usable answer: 2 choices where 1"),
    "no text": ([with_choice(text=None)], "not a usable answer: a choice has a text, got NoneType"),
    "aborted": (
        [with_choice(finish_reason="abort")],
        "not a usable answer: finish_reason is stop or length, got 'abort'",
    ),
}
QUICK = {"timeout": 0.3, "model": "m"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing(fault, pair, ends):
    steps, _ = FAULTS[fault]
    answer, times = scripted(ANSWER, *steps, ANSWER)
    with serving(answer) as url:
        sample = sampler(url, pair, ends, local=None, server=QUICK).sample(requests(1, [(25,)]))[0]
    assert sample.token_ids == (8, 10, 2) and sample.finished
    assert len(times) == 2 + len(steps)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_one_error_and_no_sample(fault, pair, ends):
    steps, words = FAULTS[fault]
    answer, times = scripted(ANSWER, steps[0])
    with serving(answer) as url:
        subject = sampler(url, pair, ends, local=None, server={**QUICK, "retries": 1})
        with pytest.raises(InputError, match=rf"the server at {url}/completions failed 2 times in a row \({words}"):
            subject.sample(requests(1, [(25,)]))
    assert len(times) == 3


def test_retry_after_is_heeded(pair, ends):
    answer, times = scripted(ANSWER, Reply(429, "", retry_after="0.4"), ANSWER)
    with serving(answer) as url:
        sampler(url, pair, ends, local=None, server={"model": "m"}).sample(requests(1, [(25,)]))
    assert times[2] - times[1] >= 0.4


def test_nobody_listens(pair, ends):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(InputError, match=r"models failed 3 times in a row \(ConnectError: .*see that it runs"):
        sampler(url, pair, ends).sample(requests())


def test_one_failure_cancels_the_other_requests(pair, ends):
    answer, times = scripted(ANSWER, Reply(400, {"error": "no"}), hangs)
    with serving(answer) as url:
        subject = sampler(url, pair, ends, local=None, server={"model": "m", "concurrency": 2})
        with pytest.raises(InputError, match="refuses a request: HTTP 400: no"):
            subject.sample(requests(20, [(25,)]))
    assert len(times) < 6


def test_which_model(pair, ends):
    served = Served(*pair, ends=ends)
    with serving(served) as url:
        with pytest.raises(InputError, match=r"as model 'llama' \(HTTP 404: The model `llama` does not exist"):
            sampler(url, pair, ends, server={"model": "llama"}).sample(requests())
        with pytest.raises(InputError, match=r"HTTP 404: no such path.* give the served model's name"):
            sampler(url.removesuffix("/v1"), pair, ends).sample(requests())
    two, _ = scripted({"data": [{"id": "a"}, {"id": "b"}]})
    with serving(two) as url, pytest.raises(InputError, match=r"lists 2 models \(a, b\): say which with served_model"):
        sampler(url, pair, ends).sample(requests())


def test_settings_that_a_server_can_not_be_told_are_not_dropped(pair, ends):
    """A server of OpenAI's own fields alone takes plain sampling, not a top_k."""
    plain = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n", "logprobs"}

    def answer(path, body, handler):
        if set(body) - plain:
            raise Reply(400, {"error": {"message": f"unknown: {sorted(set(body) - plain)}"}})
        return ANSWER

    with serving(answer) as url:
        assert sampler(url, pair, ends, local=None, server={"model": "m"}).sample(requests(1, [(25,)]))
        with pytest.raises(InputError, match=r"does not complete prompts as model 'm' \(HTTP 400: unknown"):
            told = sampler(url, pair, ends, local=None, server={"model": "m"}, settings={"top_k": 5})
            told.sample(requests(1, [(25,)]))


def test_a_key_is_sent_and_never_shown(pair, ends):
    def answer(path, body, handler):
        seen.append(handler.headers.get("authorization"))
        raise Reply(401, {"error": {"message": "wrong key: hunter2"}})

    seen: list[str | None] = []
    with serving(answer) as url:
        subject = sampler(url, pair, ends, server={"model": "m", "api_key": "hunter2"})
        assert "hunter2" not in repr(subject)
        with pytest.raises(InputError, match="HTTP 401: wrong key: <secret>"):
            subject.sample(requests())
    assert seen == ["Bearer hunter2"]


# -- recipes


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"generation": "openai"}, "generation: openai needs base_url or policy_base_url"),
        ({"base_url": "http://127.0.0.1:1/v1"}, "base_url is set, but generation is transformers"),
        ({"generation": "sglang"}, "generation: expected 'transformers' or 'openai' or 'vllm', got 'sglang'"),
        ({"base_url": "localhost:8000"}, "base_url must be http:// or https:// with a host, got 'localhost:8000'"),
        ({"base_url": "http://h:port/v1"}, "base_url must be http:// or https:// with a host"),
        ({"base_url": "http://me:hunter2@h/v1"}, "base_url must hold no user, password"),
        ({"policy_base_url": "http://h/v1?key=hunter2"}, "policy_base_url must hold no user, password, query"),
        ({"server_concurrency": 0}, "server_concurrency must be at least 1, got 0"),
        ({"server_timeout": 0.0}, "server_timeout must be seconds above 0, got 0.0"),
        ({"server_retries": -1}, "server_retries must be between 0 and 20, got -1"),
        ({"server_tolerance": -0.1}, "server_tolerance must be nats above 0, or unset for no check, got -0.1"),
        ({"api_key_env": "sk-hunter2"}, "api_key_env must be the NAME of an environment variable"),
        ({"api_key_env": "hf_hunter2"}, "api_key_env must be the NAME of an environment variable"),
    ],
)
def test_recipes_that_do_not_fit(keys, words, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model_name_or_path": "x", **keys}))
    assert main(["calibrate", "--config", str(tmp_path / "recipe.yaml")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and "hunter2" not in err


@pytest.fixture
def keys(tmp_path, path):
    return {
        **tiny_experiment(tmp_path),
        "model_name_or_path": path,
        "generation": "openai",
        "server_retries": 0,
        "server_concurrency": 4,
    }


def calibration(keys):
    experiment = Experiment(load_recipe(keys))
    table = SampleTable.open(
        Path(keys["output_dir"]) / "calibration", experiment.sampling_parts(experiment.base_path, CALIBRATION)
    )
    return {key: [(s.index, s.token_ids, s.text) for s in rows] for key, rows in table.samples().items()}


def cli(keys, verb, *flags):
    recipe = Path(keys["output_dir"]).parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    return main([verb, "--config", str(recipe), *flags])


def test_a_killed_server_costs_one_batch(keys, pair, ends, capsys):
    """What was sampled stays, the rerun (here on another port) draws the rest, and the table is that of one run."""
    keys |= {"server_tolerance": None}
    whole = Served(*pair, ends=ends)
    with serving(whole) as url:
        assert cli({**keys, "base_url": url, "output_dir": f"{keys['output_dir']}-whole"}, "calibrate") == 0
    uninterrupted = calibration({**keys, "base_url": url, "output_dir": f"{keys['output_dir']}-whole"})
    served = Served(*pair, ends=ends)

    def dies(*arguments):
        if len(served.bodies) > 36:  # 1 to find the dialect, then 72 samples in batches
            raise DOWN
        return served(*arguments)

    capsys.readouterr()
    with serving(dies) as url:
        assert cli({**keys, "base_url": url}, "calibrate") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "failed once (HTTP 500: CUDA out of memory)" in err and "is kept" in err
    kept = sum(map(len, calibration({**keys, "base_url": url}).values()))
    assert 0 < kept < 72
    with serving(whole) as url:
        assert cli({**keys, "base_url": url}, "calibrate") == 0
    assert f"({72 - kept} drawn now)" in capsys.readouterr().out
    assert calibration({**keys, "base_url": url}) == uninterrupted


def test_samples_of_a_server_are_not_those_of_this_process(keys, pair, ends, capsys):
    with serving(Served(*pair, ends=ends)) as url:
        assert cli({**keys, "base_url": url}, "calibrate") == 0
    capsys.readouterr()
    assert cli({**keys, "generation": "transformers"}, "calibrate") == 2
    assert "generation: " in capsys.readouterr().err


def test_evaluate_and_generate_ask_the_server_of_their_own_model(keys, other, pair, ends, tmp_path, capsys):
    other.save_pretrained(tmp_path / "policy")
    pair[1].save_pretrained(tmp_path / "policy")
    keys |= {"policy_name_or_path": str(tmp_path / "policy"), "policy_served_model_name": "tiny"}
    base, policy = Served(*pair, ends=ends), Served(other, pair[1], ends=ends)
    with serving(base) as base_url, serving(policy) as policy_url:
        served = {**keys, "base_url": base_url, "policy_base_url": policy_url}
        assert cli(served, "evaluate") == 0
        asked = len(base.bodies), len(policy.bodies)
        assert min(asked) > 32
        assert cli(served, "generate") == 0
        assert len(base.bodies) == asked[0] and len(policy.bodies) > asked[1]
        lines = (Path(keys["output_dir"]) / "generations.jsonl").read_text().splitlines()
        assert len(lines) == 4 and all(json.loads(line)["completion"] for line in lines)
        swapped = {**keys, "base_url": base_url, "policy_base_url": base_url, "output_dir": str(tmp_path / "swapped")}
        capsys.readouterr()
        assert cli(swapped, "evaluate") == 2
        assert "is not the recipe's model" in capsys.readouterr().err
        half = {**keys, "policy_base_url": policy_url, "output_dir": str(tmp_path / "half")}
        asked = len(base.bodies), len(policy.bodies)
        assert cli(half, "evaluate") == 0  # the base in this process
        assert len(base.bodies) == asked[0] and len(policy.bodies) > asked[1]


def test_the_key_is_in_no_record(keys, pair, ends, monkeypatch, capsys):
    keys |= {"api_key_env": "INFALIGN_TEST_KEY"}
    with serving(Served(*pair, ends=ends)) as url:
        assert cli({**keys, "base_url": url}, "calibrate") == 2
        assert "the environment variable INFALIGN_TEST_KEY is not set" in capsys.readouterr().err
        monkeypatch.setenv("INFALIGN_TEST_KEY", "hunter2")
        assert cli({**keys, "base_url": url}, "calibrate") == 0
    out, err = capsys.readouterr()
    assert "hunter2" not in out + err and "plain http" not in err
    files = [one for one in Path(keys["output_dir"]).rglob("*") if one.is_file()]
    assert files and not any(b"hunter2" in one.read_bytes() for one in files)


# -- transformers serve


def test_transformers_serve_samples_the_models_distribution(transformers_serve, path, pair, ends, capsys):
    """Also where a completion ends at the limit, which it reports as cut."""
    model, _ = pair
    subject = sampler(transformers_serve, pair, ends, max_tokens=1, server={"model": path, "timeout": 60.0})
    drawn = subject.sample([Request("a", index, PROMPTS[0]) for index in range(200)])
    assert "prompts as text" in capsys.readouterr().err
    first = next_probabilities(model, PROMPTS[0])
    assert fits(Counter(sample.token_ids[0] for sample in drawn), first, len(drawn)) > 1e-3
    assert all(sample.finished == (sample.token_ids[0] in ends) for sample in drawn)
    assert 0 < sum(sample.finished for sample in drawn) < len(drawn)


def test_transformers_serve_is_reproducible(transformers_serve, path, pair, ends):
    """It seeds one stream for all requests: they go one by one."""
    first, second = (
        sampler(transformers_serve, pair, ends, local=None, server={"model": path}).sample(requests()) for _ in range(2)
    )
    assert [s.token_ids for s in first] == [s.token_ids for s in second]
    assert len({s.token_ids for s in first}) > 6


def test_calibrate_through_transformers_serve(transformers_serve, path, keys, capsys):
    served = {**keys, "base_url": transformers_serve, "served_model_name": path, "num_calibration_samples": 4}
    assert cli(served, "calibrate") == 0
    assert "calibration: 24 base samples on 6 prompts (24 drawn now)" in capsys.readouterr().out
    assert cli(served, "calibrate") == 0
    assert "(all of them cached)" in capsys.readouterr().out
    assert cli({**served, "served_model_name": "llama", "output_dir": f"{keys['output_dir']}-2"}, "calibrate") == 2
    assert "requested 'llama'" in capsys.readouterr().err
