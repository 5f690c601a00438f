"""A reward that fails at a random step: one clear error and a sound checkpoint, or samples left out; never a number."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml

from infalign.calibration.table import SampleTable
from infalign.cli import main
from infalign.rewards.loader import load_reward
from infalign.theory.transforms import identity
from infalign.training.checkpoints import newest_whole
from infalign.training.config import CTRLConfig
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError, RewardError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal
from tests.training.test_resume import assert_same, final, rows
from tests.training.test_trainer import config, token_sum

STEPS = 3
LIKE_OTHERS = ("-inf", "integer overflow", "one too many", "a number")  # only in the slow tests
RESUMED = ("exception", "strings")  # of which the run is also mended and ended


def slow(value):
    """A parameter of the slow tests."""
    return pytest.param(value, marks=pytest.mark.slow)


SEEDS = [0, slow(1), slow(2)]


def late(rewards):
    time.sleep(0.6)
    return rewards


def raises(rewards):
    raise ConnectionError("the reward server is down")


def overflows(rewards):
    return [math.exp(value * 1e3) for value in rewards]  # OverflowError


FAILURES = {  # what comes in place of the rewards, and what the error says
    "inf": (lambda rewards: [math.inf, *rewards[1:]], "is not finite: inf at index 0"),
    "-inf": (lambda rewards: [*rewards[:-1], -math.inf], "is not finite: -inf at index {last}"),
    "float32 overflow": (lambda rewards: torch.tensor(rewards).exp() ** 2, "is not finite: inf at index"),
    "integer overflow": (lambda rewards: [10**400, *rewards[1:]], "is not finite: inf at index 0"),
    "exception": (raises, r"failed once \(ConnectionError: the reward server is down\)"),
    "overflow": (overflows, r"failed once \(OverflowError: math range error\)"),
    "time-out": (late, r"failed once \(TimeoutError: no answer after 0.3 s\)"),
}
BROKEN = {  # no score can be read out of these, whatever the policy
    "one too few": (lambda rewards: rewards[:-1], "returned {last} values for {count} completions"),
    "one too many": (lambda rewards: [*rewards, 0.0], "returned {more} values for {count} completions"),
    "strings": (lambda rewards: [*rewards[:3], "good", *rewards[4:]], r"returned 'good' \(str\) at index 3"),
    "a number": (lambda rewards: 1.0, r"returned 1.0 \(float\)"),
    "nothing": (lambda rewards: None, r"returned None \(NoneType\)"),
}
SILENT = {  # the contract's own "no score": no failure, whatever the policy
    "None": lambda rewards: [None, *rewards[1:]],
    "nan": lambda rewards: [math.nan, *rewards[1:]],
    "all None": lambda rewards: [None] * len(rewards),
}


def message_of(kind: str, count: int = 8) -> str:
    """What the error says of a failure among so many completions, as a pattern."""
    return {**FAILURES, **BROKEN}[kind][1].format(count=count, last=count - 1, more=count + 1)


def some_step(*names: object) -> int:
    """A step at which something goes wrong: any but the first, the same in every run of the test."""
    return random.Random(str(names)).randrange(1, STEPS)


class Outage:
    """`token_sum`, spoiled at one step until it is `over`: one reward, on a server that is down and up again."""

    def __init__(self, spoil, step: int) -> None:
        self.spoil, self.steps = spoil, {step}

    def __call__(self, completion_ids, trainer_state, **_):
        rewards = token_sum(completion_ids)
        return self.spoil(rewards) if trainer_state.global_step in self.steps else rewards

    def over(self) -> Outage:
        self.steps.clear()
        return self


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


def make(model, folder, function=token_sum, on_error="error", **changes):
    """A trainer with a checkpoint after every step."""
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, **changes}
    reward = load_reward(function, name="mine", on_error=on_error, retries=0, timeout=0.3)
    arguments = CTRLConfig(**config(folder, **settings))
    return CTRLTrainer(model, CTRLReward(reward, identity), arguments, train_dataset=rows())


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """The end of a run in which nothing goes wrong."""
    subject = make(llama, tmp_path_factory.mktemp("whole"))
    subject.train()
    return final(subject)


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("kind", [slow(kind) if kind in LIKE_OTHERS else kind for kind in (*FAILURES, *BROKEN)])
def test_error_is_one_message_and_the_checkpoint_before_it_is_sound(kind, seed, llama, tmp_path, whole):
    spoil, step = {**FAILURES, **BROKEN}[kind][0], some_step(kind, seed)
    reward = Outage(spoil, step)
    with pytest.raises(RewardError, match=f"^reward 'mine' {message_of(kind)}") as caught:
        make(llama, tmp_path, reward).train()
    assert "\n" not in str(caught.value)
    newest, skipped = newest_whole(tmp_path)
    assert newest == tmp_path / f"checkpoint-{step}" and not skipped
    if kind in RESUMED:  # when it works again, it goes on from there, to the end of a run in which nothing went wrong
        resumed = make(llama, tmp_path, reward.over())
        resumed.train(resume_from_checkpoint=True)
        assert_same(final(resumed), whole)


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_goes_on_without_a_number(seed, llama, tmp_path):
    """One training in which every failure comes once, in some order: each is logged, none becomes a number."""
    spoils = {**{kind: spoil for kind, (spoil, _) in FAILURES.items()}, **SILENT}
    order = random.Random(seed).sample(sorted(spoils), len(spoils))

    def reward(completion_ids, trainer_state, **_):
        rewards, step = token_sum(completion_ids), trainer_state.global_step
        return spoils[order[step - 1]](rewards) if 0 < step <= len(order) else rewards

    subject = make(llama, tmp_path, reward, on_error="mask", max_steps=len(order) + 2, save_strategy="no")
    subject.train()
    weights, log = final(subject)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    unscored = [row["reward/unscored"] for row in log if "reward/unscored" in row]
    whole = ("exception", "overflow", "time-out", "float32 overflow", "all None")
    assert unscored == [0.0, *(1.0 if kind in whole else 1 / 8 for kind in order), 0.0]
    assert all(abs(row["reward/raw"]) < 1e4 for row in log if "reward/raw" in row)


@pytest.mark.parametrize("kind", ["one too few", "strings"])
def test_mask_does_not_hide_a_broken_contract(kind, llama, tmp_path):
    with pytest.raises(RewardError, match=message_of(kind)):
        make(llama, tmp_path, Outage(BROKEN[kind][0], 1), on_error="mask").train()


@pytest.mark.parametrize("kind", SILENT)
def test_no_score_is_no_failure(kind, llama, tmp_path):
    """None and NaN are a reward's right, under `error` as well."""
    subject = make(llama, tmp_path, Outage(SILENT[kind], 1), "error", max_steps=2, save_strategy="no")
    subject.train()
    assert subject.state.log_history[1]["reward/unscored"] == (1.0 if kind == "all None" else 1 / 8)


def test_all_ways_to_have_no_score_train_alike(llama, tmp_path):
    """The first completion of a step has no score: infinite, NaN or None, the weights are the same; 0 gives others."""
    ends = {}
    for kind, value in {"inf": math.inf, "nan": math.nan, "None": None, "zero": 0.0}.items():
        function = Outage(lambda rewards, value=value: [value, *rewards[1:]], 1)
        subject = make(llama, tmp_path / kind, function, on_error="mask", max_steps=2, save_strategy="no")
        subject.train()
        ends[kind] = final(subject)[0]
    for kind in ("nan", "None"):
        assert all(torch.equal(value, ends[kind][name]) for name, value in ends["inf"].items()), kind
    assert any(not torch.equal(value, ends["zero"][name]) for name, value in ends["inf"].items())


def test_the_baseline_is_that_of_the_scored_siblings(llama, tmp_path):
    """At step 0 the KL is 0: advantages by their definition, over the rollouts that have a score, 0 for the others."""
    seen = {}

    def spoiled(completion_ids, **_):
        rewards = token_sum(completion_ids)
        return [None if row in (1, 6) else value for row, value in enumerate(rewards)]

    subject = make(llama, tmp_path, spoiled, max_steps=1, save_strategy="no", num_generations=4)
    plain, reward = subject._generate_and_score_completions, subject.reward_funcs[0]

    def spy(inputs):
        seen["advantages"] = plain(inputs)["advantages"]
        raise KeyboardInterrupt

    def keep(*args, plain=reward._transformed, **kwargs):
        seen["rewards"] = plain(*args, **kwargs)
        return seen["rewards"]

    subject._generate_and_score_completions, reward._transformed = spy, keep
    with pytest.raises(KeyboardInterrupt):
        subject.train()
    expected = []
    for first in (0, 4):
        group = seen["rewards"][first : first + 4]
        for row, value in enumerate(group):
            others = [other for place, other in enumerate(group) if place != row and other is not None]
            expected.append(0.0 if value is None else value - sum(others) / len(others))
    np.testing.assert_allclose(seen["advantages"].numpy(), expected, atol=1e-4)
    assert expected[1] == expected[6] == 0.0 and np.ptp(expected) > 0.1


SWITCHED = '''
import math
import os
from pathlib import Path

HERE = Path(__file__).parent


def reward(completion_ids, **_):
    """Spoiled where the file `fault` says so: at one call of the many."""
    rewards = [float(sum(ids)) for ids in completion_ids]
    if not (HERE / "fault").exists():
        return rewards
    kind, at = (HERE / "fault").read_text().split()
    calls = int((HERE / "calls").read_text()) if (HERE / "calls").exists() else 0
    (HERE / "calls").write_text(str(calls + 1))
    if calls != int(at):
        return rewards
    if kind == "exception":
        raise ConnectionError("gone")
    return [{"inf": math.inf, "nan": math.nan, "overflow": 10**400}[kind], *rewards[1:]]
'''


@pytest.mark.parametrize("policy", ["error", "mask"])
@pytest.mark.parametrize("kind", ["inf", "nan", "exception", slow("overflow")])
def test_calibration_tables_hold_no_such_number(kind, policy, tmp_path, capsys):
    """One batch goes wrong: an error keeps it out of the table and a rerun scores it; masked, it has no score."""
    keys = tiny_experiment(tmp_path, prompts=8) | {
        "num_train_prompts": 4,
        "num_test_prompts": 2,
        "tokens_per_batch": 60,
    }
    (tmp_path / "switched.py").write_text(SWITCHED)
    keys |= {"reward": f"{tmp_path / 'switched.py'}:reward", "reward_on_error": policy, "num_calibration_samples": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    (tmp_path / "fault").write_text(f"{kind} {random.Random(kind).randrange(1, 4)}")
    command = ["calibrate", "--config", str(tmp_path / "recipe.yaml")]
    failed = policy == "error" and kind != "nan"
    assert main(command) == (2 if failed else 0)
    err = capsys.readouterr().err
    if failed:
        assert err.count("\n") == 1 and err.startswith("infalign: error: reward ")
        assert all(math.isfinite(value) for value in scores(tmp_path / "out"))
    (tmp_path / "fault").unlink()
    assert main(command) == 0
    found = scores(tmp_path / "out")
    assert len(found) == 4 * 8 and not np.isinf(found).any()
    assert bool(np.isnan(found).any()) is not failed


def scores(output: Path) -> list[float]:
    """Every reward in a calibration table."""
    folder = output / "calibration"
    table = SampleTable.open(folder, json.loads((folder / "plan.json").read_text())["parts"])
    [name] = [path.name.partition("-")[2] for path in folder.glob("scores-*")]
    return [float(value) for row in table.rewards(name).values() for value in row]


def test_what_has_no_score_never_reaches_the_trainer():
    """`attach` leaves NaN out; an infinite reference reward, however it got there, is refused."""
    reward = CTRLReward(token_sum, identity)
    call = {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]]}
    assert reward(**call, ref_rewards=[[math.nan, 0.0, 2.0]]) == reward(**call, ref_rewards=[[0.0, 2.0]])
    with pytest.raises(InputError, match="prompt 0 has an infinite reference reward"):
        reward(**call, ref_rewards=[[math.inf, 0.0]])
    with pytest.raises(InputError, match="prompt 0 has no reference reward"):
        reward(**call, ref_rewards=[[math.nan]])


class Answer(BaseHTTPRequestHandler):
    """A reward server: an error at its first request, scores from then on."""

    def do_POST(self):
        self.server.requests += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(503 if self.server.requests <= self.server.failing else 200)
        self.end_headers()
        self.wfile.write(json.dumps([len(text) for text in body]).encode())

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server():
    """A server on the loopback interface, of which `failing` says how many requests it refuses."""
    found = HTTPServer(("127.0.0.1", 0), Answer)
    found.requests, found.failing = 0, 1
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def over_http(server):
    def reward(completions, **_):
        answer = httpx.post(f"http://127.0.0.1:{server.server_port}/", json=completions, trust_env=False)
        return answer.raise_for_status().json()

    return reward


def test_an_http_failure_is_no_number(server):
    """A server's 503 is tried again; when it stays, it is an error or no score, and never a 0."""
    call = {"prompts": ["p", "p"], "completions": ["a", "bcd"], "completion_ids": [[1], [2]]}
    assert load_reward(over_http(server), retries=1, backoff=0.01)(**call).tolist() == [1.0, 3.0]
    server.failing = 99
    with pytest.raises(RewardError, match=r"failed 2 times in a row \(HTTPStatusError: Server error '503"):
        load_reward(over_http(server), retries=1, backoff=0.01)(**call)
    assert np.isnan(load_reward(over_http(server), retries=0, on_error="mask")(**call)).all()
