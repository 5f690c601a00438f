"""One policy for requests and rewards: what is tried again, how often, and after what pause."""

from __future__ import annotations

import datetime
import email.utils
from types import SimpleNamespace

import httpx
import pytest

from infalign.runtime.retry import LONGEST_PAUSE, RetryPolicy, announce, may_pass


def failure(status, **headers):
    """As httpx raises it."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx.Response(status, headers=headers, request=httpx.Request("POST", "http://h"))
    with pytest.raises(httpx.HTTPStatusError) as caught:
        response.raise_for_status()
    return caught.value


def foreign(response):
    """As a library raises it that we do not know."""
    error = RuntimeError("its own")
    error.response = response  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "error", [*map(failure, (408, 429, 500, 503, 599)), TimeoutError(), KeyError("k"), SystemExit()]
)
def test_what_may_pass(error):
    assert may_pass(error)
    assert [RetryPolicy(2).pause(attempt, error) is None for attempt in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_a_status_that_says_no_is_final(status):
    for error in (failure(status, Retry_After="1"), foreign(SimpleNamespace(status_code=status))):
        assert not may_pass(error) and RetryPolicy(5).pause(1, error) is None


def test_pauses_double_up_to_the_longest():
    policy = RetryPolicy(retries=10, backoff=1.0)
    for attempt in range(1, 11):
        pauses = [policy.pause(attempt, TimeoutError()) for _ in range(200)]
        centre = 2 ** (attempt - 1)
        assert min(pauses) >= min(0.5 * centre, LONGEST_PAUSE) and max(pauses) <= min(1.5 * centre, LONGEST_PAUSE)
    assert RetryPolicy(3, backoff=0.0).pause(3, TimeoutError()) == 0.0


def in_seconds(seconds):
    return email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds))


def test_the_server_says_how_long():
    policy = RetryPolicy(retries=1, backoff=1000.0)
    assert policy.pause(1, failure(429, Retry_After="2.5")) == 2.5
    assert 8.0 < policy.pause(1, failure(503, Retry_After=in_seconds(10))) <= 10.0
    assert policy.pause(1, failure(503, Retry_After=in_seconds(-10))) == 0.0
    assert policy.pause(1, failure(503, Retry_After="-1")) == 0.0
    assert policy.pause(1, failure(503, Retry_After="86400")) == LONGEST_PAUSE


@pytest.mark.parametrize(
    "error",
    [
        failure(503),
        failure(503, Retry_After="soon"),
        foreign(None),
        foreign({"Error": "a dictionary, as botocore has it"}),
        foreign(SimpleNamespace(status_code="503", headers=[("retry-after", "9")])),
    ],
)
def test_an_odd_response_is_one_that_says_nothing(error):
    assert 0.5 <= RetryPolicy(retries=1).pause(1, error) <= 1.5


def test_the_first_retry_is_announced_once(capsys):
    """A dead server was silent for half a minute."""
    for attempt in (1, 2):
        announce("the server at http://nowhere", "ConnectError", attempt, 4, 1.25)
    assert capsys.readouterr().err == (
        "warning: the server at http://nowhere failed (ConnectError): attempt 2 of 5 in 1.2 s; "
        "further retries are not shown\n"
    )
