"""The guard: retries, time-outs, masks, counts, async."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time

import httpx
import numpy as np
import pytest

from infalign.rewards.guard import GuardedReward
from infalign.types import InputError, RewardError

PROMPTS, COMPLETIONS = ["p", "q"], ["x", "yy"]


def lengths(completions, **_):
    return [len(completion) for completion in completions]


def failing(times: int, error: Exception | None = None):
    """A reward that raises `times` times and then works; `.calls` counts."""

    def function(completions, **_):
        function.calls += 1
        if function.calls <= times:
            raise error or ConnectionError("server gone\nmore")
        return [1.0] * len(completions)

    function.calls = 0
    return function


def guard(function, **options):
    return GuardedReward(function, name="mine", **{"backoff": 0.001, **options})


def test_scores_pass_through_and_are_counted():
    reward = guard(lambda completions, **_: [1.5, None])
    np.testing.assert_array_equal(reward(PROMPTS, COMPLETIONS), [1.5, np.nan])
    assert reward.counts == {
        "calls": 1, "scored": 1, "missing": 1, "infinite": 0, "failures": 0, "timeouts": 0, "retries": 0,
    }  # fmt: skip
    assert reward.__name__ == "mine"


def test_the_first_retry_is_announced(capsys):
    GuardedReward(failing(2, ValueError("odd")), name="announced", retries=2, backoff=0.0)(PROMPTS, COMPLETIONS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: reward 'announced' failed (ValueError: odd): attempt 2 of 3 in ")


def test_retries_until_it_works():
    function = failing(2)
    reward = guard(function)
    assert reward(PROMPTS, COMPLETIONS).tolist() == [1.0, 1.0]
    assert function.calls == 3 and reward.counts["retries"] == 2 and reward.counts["failures"] == 0


def test_after_the_last_attempt_error_raises_one_line_with_the_cause():
    function = failing(9)
    with pytest.raises(RewardError, match=r"'mine' failed 3 times in a row \(ConnectionError: server gone\)") as caught:
        guard(function)(PROMPTS, COMPLETIONS)
    assert function.calls == 3 and isinstance(caught.value.__cause__, ConnectionError)


def test_after_the_last_attempt_mask_gives_no_score(caplog):
    reward = guard(failing(9, ValueError()), on_error="mask", retries=0)
    with caplog.at_level(logging.WARNING):
        assert np.isnan(reward(PROMPTS, COMPLETIONS)).all()
    assert (reward.counts["failures"], reward.counts["missing"], reward.counts["scored"]) == (1, 2, 0)
    assert "failed once (ValueError); 2 completions have no score" in caplog.text


def test_backoff_doubles(monkeypatch):
    pauses = []
    monkeypatch.setattr("infalign.rewards.guard.time.sleep", pauses.append)
    guard(failing(9), on_error="mask", retries=3, backoff=1.0)(PROMPTS, COMPLETIONS)
    for pause, centre in zip(pauses, [1, 2, 4], strict=True):
        assert 0.5 * centre <= pause <= 1.5 * centre


def http_error(status, **headers):
    """What a reward's own client raises: httpx here, alike with requests, openai and huggingface_hub."""
    request = httpx.Request("POST", "http://h")
    return httpx.HTTPStatusError(f"HTTP {status}", request=request, response=httpx.Response(status, headers=headers))


def test_a_status_that_says_no_is_not_asked_again():
    function = failing(9, http_error(401))
    with pytest.raises(RewardError, match=r"'mine' failed once \(HTTPStatusError: HTTP 401\); fix it, or set on_error"):
        guard(function)(PROMPTS, COMPLETIONS)
    assert function.calls == 1
    assert np.isnan(guard(function, on_error="mask")(PROMPTS, COMPLETIONS)).all() and function.calls == 2


def test_a_rewards_own_server_says_how_long_to_wait(monkeypatch):
    pauses = []
    monkeypatch.setattr("infalign.rewards.guard.time.sleep", pauses.append)
    assert guard(failing(1, http_error(429, **{"Retry-After": "7"})))(PROMPTS, COMPLETIONS).tolist() == [1.0, 1.0]
    assert pauses == [7.0]


@pytest.mark.parametrize("on_error", ["error", "mask"])
def test_a_broken_contract_raises_at_once(on_error):
    calls = []

    def wrong(completions, **_):
        calls.append(1)
        return [1.0]

    with pytest.raises(RewardError, match="returned 1 values for 2 completions"):
        guard(wrong, on_error=on_error)(PROMPTS, COMPLETIONS)
    assert len(calls) == 1
    with pytest.raises(RewardError, match=r"'high' \(str\) at index 1"):
        guard(lambda completions: [1, "high"], on_error=on_error)(PROMPTS, COMPLETIONS)


def test_a_rewards_own_errors_are_not_retried():
    for error in (RewardError("too long"), InputError("no template")):
        function = failing(9, error)
        with pytest.raises(type(error), match=str(error)):
            guard(function, on_error="mask")(PROMPTS, COMPLETIONS)
        assert function.calls == 1


def test_infinite_values():
    with pytest.raises(RewardError, match="not finite: inf at index 0"):
        guard(lambda completions: [np.inf, 1.0])(PROMPTS, COMPLETIONS)
    reward = guard(lambda completions: [np.inf, 1.0], on_error="mask")
    np.testing.assert_array_equal(reward(PROMPTS, COMPLETIONS), [np.nan, 1.0])
    assert (reward.counts["infinite"], reward.counts["missing"], reward.counts["scored"]) == (1, 1, 1)


def test_a_hanging_function_times_out_and_is_left_in_a_daemon_thread():
    release = threading.Event()
    reward = guard(lambda completions: release.wait(120), timeout=0.05, retries=1)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"failed 2 times in a row \(TimeoutError: no answer after 0.05 s\)"):
        reward(PROMPTS, COMPLETIONS)
    assert time.monotonic() - start < 60 and reward.counts["timeouts"] == 2
    left = [thread for thread in threading.enumerate() if thread.name == "infalign-reward"]
    assert left and all(thread.daemon for thread in left)
    release.set()
    for thread in left:
        thread.join(2)


def stops_itself(completions, **_):
    """As many verifiers do: an alarm of its own."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, before)
    return [1.0] * len(completions)


def hides_its_alarm(completions, **_):
    try:
        return stops_itself(completions)
    except ValueError as error:
        raise RuntimeError("verification failed") from error


async def stops_itself_later(completions, **_):
    return stops_itself(completions)


@pytest.mark.parametrize("on_error", ["error", "mask"])
@pytest.mark.parametrize("function", [stops_itself, hides_its_alarm])
def test_a_reward_with_an_alarm_of_its_own_needs_the_main_thread(function, on_error):
    """Every call of it fails elsewhere, so that `mask` would mask everything: the cause and the way out, always."""
    assert guard(function)(PROMPTS, COMPLETIONS).tolist() == [1.0, 1.0]
    words = r"sets an alarm .* has a time limit here too \(20 s\): leave timeout .*reward_timeout\) unset"
    with pytest.raises(RewardError, match=words):
        guard(function, timeout=20.0, retries=0, on_error=on_error)(PROMPTS, COMPLETIONS)


def test_a_coroutine_with_an_alarm_is_told_to_do_without():
    for timeout in (None, 20.0):
        with pytest.raises(RewardError, match=r"sets an alarm .*: switch its own alarm off and set reward_timeout"):
            guard(stops_itself_later, timeout=timeout, retries=0)(PROMPTS, COMPLETIONS)


def test_errors_inside_a_time_limit_keep_their_type():
    with pytest.raises(RewardError, match="KeyError"):
        guard(failing(9, KeyError("k")), timeout=2, retries=0)(PROMPTS, COMPLETIONS)
    with pytest.raises(RewardError, match="TimeoutError: its own"):
        guard(failing(9, TimeoutError("its own")), timeout=2, retries=0)(PROMPTS, COMPLETIONS)
    assert guard(lengths, timeout=2)(PROMPTS, COMPLETIONS).tolist() == [1, 2]


async def async_lengths(completions, **_):
    await asyncio.sleep(0)
    return [len(completion) for completion in completions]


class AsyncObject:
    async def __call__(self, completions):
        return await async_lengths(completions)


@pytest.mark.parametrize("timeout", [None, 2.0])
@pytest.mark.parametrize("function", [async_lengths, AsyncObject(), lambda completions: async_lengths(completions)])
def test_async_functions_also_inside_a_running_loop(function, timeout):
    reward = guard(function, timeout=timeout)
    assert reward(PROMPTS, COMPLETIONS).tolist() == [1, 2]

    async def notebook():
        return reward(PROMPTS, COMPLETIONS)

    assert asyncio.run(notebook()).tolist() == [1, 2]


def test_async_calls_share_one_loop():
    loops = []

    async def note(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    reward = guard(note)
    reward(PROMPTS, COMPLETIONS)
    reward(PROMPTS, COMPLETIONS)
    assert loops[0] is loops[1]


def test_a_late_coroutine_is_cancelled_and_a_blocked_loop_replaced():
    cancelled = []

    async def late(completions):
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    with pytest.raises(RewardError, match=r"no answer after 0.05 s"):
        guard(late, timeout=0.05, retries=0)(PROMPTS, COMPLETIONS)
    assert cancelled

    first = []

    async def blocks_once(completions):
        if not first:
            first.append(1)
            time.sleep(1.0)
        return [1.0, 2.0]

    with pytest.raises(RewardError, match=r"no answer after 0.05 s"):
        guard(blocks_once, timeout=0.05, retries=0)(PROMPTS, COMPLETIONS)
    first.clear()
    reward = guard(blocks_once, timeout=0.05, retries=1)
    assert reward(PROMPTS, COMPLETIONS).tolist() == [1.0, 2.0] and reward.counts["timeouts"] == 1


def test_reasoning_is_hidden_from_the_function():
    reward = guard(lengths, strip_reasoning=("<think>", "</think>"))
    assert reward(PROMPTS, ["<think>long</think>ab", "abc"]).tolist() == [2, 3]


def test_columns_and_trl_arguments():
    seen = {}

    def function(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **rest):
        seen.update(rest, answer=answer, ids=completion_ids, state=trainer_state)
        log_extra("a", []), log_metric("b", 1.0)
        return [0, 0]

    guard(function)(PROMPTS, COMPLETIONS, [[1], [2]], answer=[3, 4], other=[5, 6], trainer_state="s")
    assert seen == {"answer": [3, 4], "ids": [[1], [2]], "state": "s", "other": [5, 6]}
    guard(function)(PROMPTS, COMPLETIONS, answer=[3, 4])
    assert seen["state"] is None
    with pytest.raises(RewardError, match="needs the column 'answer', which the data does not have; its columns are b"):
        guard(function)(PROMPTS, COMPLETIONS, b=[1, 2])


def test_no_completions_no_call():
    assert guard(failing(9))([], []).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "skip"}, "on_error is one of error, mask, got 'skip'"),
        ({"retries": -1}, "retries is a whole number >= 0, got -1"),
        ({"timeout": 0}, "timeout is seconds > 0 or None, got 0"),
        ({"backoff": -1}, "backoff is seconds >= 0, got -1"),
        ({"strip_reasoning": "<think>"}, "strip_reasoning is a pair of tags"),
        ({"retries": 0.5, "timeout": -1}, "retries is .*; timeout is"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        guard(lengths, **options)


def test_a_reward_for_chats_that_is_given_texts_says_what_to_do():
    guarded = GuardedReward(
        lambda completions: [len(one[0]["content"]) for one in completions], name="chats", retries=0
    )
    with pytest.raises(
        RewardError, match=r"does it read chats, as TRL's rewards do.*data_format: chat makes each prompt"
    ):
        guarded(["hi"], ["there"])
