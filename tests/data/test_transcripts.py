"""Transcripts: the round trip, the refusals, and the real data."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from infalign.data.prompts import load_prompts
from infalign.data.transcripts import parse_transcript, prompt_of, render_transcript
from infalign.types import InputError

REAL = Path(__file__).parents[2] / "../shared/data/hh-harmless-base-test.jsonl.gz"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="../shared/data/hh-harmless-base-test.jsonl.gz is absent")


def test_turns_are_split_at_the_headers():
    text = "\n\nHuman: a\n\nb: Human: c\n\nAssistant: \n\nHuman: d "
    assert parse_transcript(text) == [
        {"role": "user", "content": "a\n\nb: Human: c"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "d "},
    ]


def test_an_open_last_turn_needs_no_space():
    assert parse_transcript("\n\nHuman: a\n\nAssistant:")[-1] == {"role": "assistant", "content": ""}
    assert parse_transcript("\n\nHuman: a\n\nAssistant:x")[-1]["content"] == "a\n\nAssistant:x"


def test_round_trip_on_random_chats():
    rng = random.Random(0)
    pieces = ["a", " ", "\n", "Human:", "Assistant: ", "\n\n", "\n\nHuman", "é"]
    for _ in range(300):
        turns = [("Human", "x")] + [
            (rng.choice(["Human", "Assistant"]), "y" + ".".join(rng.choices(pieces, k=rng.randint(0, 5))))
            for _ in range(rng.randint(0, 5))
        ]
        text = "".join(f"\n\n{name}: {content}" for name, content in turns)
        assert render_transcript(parse_transcript(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", r"a transcript starts with '.*Human: ', got 'hello'"),
        ("x\n\nHuman: a", "a transcript starts with"),
        ("\n\nAssistant: a", "a transcript starts with"),
        ("\n\nHuman: a\n\nHuman:  \n\nAssistant: b", "turn 2 of the transcript, a human one, is empty"),
        (3, "a transcript is a string, got int"),
    ],
)
def test_refused_transcripts(text, message):
    with pytest.raises(InputError, match=message):
        parse_transcript(text)


def test_render_knows_two_roles_and_a_prompt_needs_a_user():
    with pytest.raises(InputError, match="roles user and assistant only, got system"):
        render_transcript([{"role": "system", "content": "x"}])
    with pytest.raises(InputError, match="no user turn to answer"):
        prompt_of([{"role": "assistant", "content": "x"}])


@needs_real
def test_real_pairs_parse_round_trip_and_end_with_the_user():
    rows = [json.loads(line) for line in gzip.decompress(REAL.read_bytes()).decode().split("\n") if line]
    assert len(rows) == 2312
    for row in rows:
        for text in (row["chosen"], row["rejected"]):
            messages = parse_transcript(text)
            assert render_transcript(messages) == text
            chat = prompt_of(messages)
            assert chat[-1]["role"] == "user" and chat[-1]["content"].strip()
            assert all(a["role"] != b["role"] for a, b in pairwise(chat))


@needs_real
def test_real_data_loads_as_chats():
    loaded = load_prompts(str(REAL))
    assert (len(loaded.prompts), loaded.data_format) == (2312, "transcript")
    assert len({prompt.key for prompt in loaded.prompts}) == 2312 > len({prompt.group for prompt in loaded.prompts})
    assert all(prompt.content[-1]["role"] == "user" for prompt in loaded.prompts)
