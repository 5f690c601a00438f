"""Preference pairs: hh-rlhf transcripts, TRL's formats, and a split by prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from infalign.data.preferences import preferences_from_rows, split_pairs
from infalign.data.prompts import load_prompts
from infalign.data.sources import read_rows
from infalign.types import InputError, group_key

USER = {"role": "user", "content": "hi"}
HELLO, BYE = ({"role": "assistant", "content": text} for text in ("hello", "bye"))
CASES = Path(__file__).parent.parent / "cases"
HH = Path(__file__).parents[2].parent / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"


def pairs_of(*rows, **options):
    return preferences_from_rows(list(rows), "rows", **options).pairs


def test_the_four_formats_say_the_same():
    """A transcript, an implicit chat, an explicit chat and an explicit chat with texts: one pair."""
    transcript = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: bye"}
    implicit = {"chosen": [USER, HELLO], "rejected": [USER, BYE]}
    explicit = {"prompt": [USER], "chosen": [HELLO], "rejected": [BYE]}
    texts = {"prompt": [USER], "chosen": "hello", "rejected": "bye"}
    repeated = {"prompt": [USER], "chosen": [USER, HELLO], "rejected": [USER, BYE]}
    found = [pairs_of(row)[0] for row in (transcript, implicit, explicit, texts, repeated)]
    assert all(pair == found[0] for pair in found)
    assert (found[0].prompt, found[0].chosen, found[0].rejected) == ([USER], [HELLO], [BYE])
    assert found[0].key == group_key([USER])


def test_texts_stay_texts():
    pair = pairs_of({"prompt": "2+2=", "chosen": "4", "rejected": "5"})[0]
    assert (pair.prompt, pair.chosen, pair.rejected, pair.key) == ("2+2=", "4", "5", group_key("2+2="))


def test_a_prompt_column_of_another_name_and_transcripts_beside_a_prompt_column():
    assert pairs_of({"question": "q", "chosen": "a", "rejected": "b"}, prompt_column="question")[0].prompt == "q"
    row = {"prompt": "unused", "chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}
    assert pairs_of(row, data_format="transcript")[0].prompt == [USER]


def test_sides_that_part_early_are_compared_from_there():
    more = {"role": "user", "content": "more"}
    pair = pairs_of({"chosen": [USER, HELLO, more, HELLO], "rejected": [USER, BYE]})[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [HELLO, more, HELLO], [BYE])
    shorter = pairs_of({"chosen": [USER, HELLO, more, BYE], "rejected": [USER, HELLO]})[0]
    assert (shorter.prompt, shorter.chosen) == ([USER], [HELLO, more, BYE])  # the shared answer is part of a side
    other = {"role": "user", "content": "other"}
    asked = pairs_of({"chosen": [USER, HELLO, more, BYE], "rejected": [USER, HELLO, other, BYE]})[0]
    assert (asked.prompt, asked.chosen, asked.rejected) == ([USER], [HELLO, more, BYE], [HELLO, other, BYE])


def test_a_text_prompt_with_chat_answers():
    """UltraFeedback's form: the prompt is the user's turn, which the conversations repeat."""
    (pair,) = pairs_of({"prompt": "q", "chosen": [{"role": "user", "content": "q"}, HELLO], "rejected": [BYE]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([{"role": "user", "content": "q"}], [HELLO], [BYE])
    assert len(pairs_of(*read_rows(str(CASES / "mixed_ultrafeedback.jsonl")))) == 4


def test_prompts_under_other_tools_names():
    """Orca's question, alpaca's instruction, LLaMA-Factory's ShareGPT pairs; hh-rlhf's columns are read as before."""
    texts = {"chosen": "a", "rejected": "b"}
    for row, prompt in (
        ({"question": "q", **texts}, "q"),
        ({"instruction": "do", "input": "it", **texts}, "do\n\nit"),
    ):
        (pair,) = pairs_of(row)
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "a", "b")
    asked = [{"from": "human", "value": "hi"}]
    sides = {"chosen": {"from": "gpt", "value": "hello"}, "rejected": {"from": "gpt", "value": "bye"}}
    (pair,) = pairs_of({"conversations": asked, **sides})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [HELLO], [BYE])


def test_tool_calls_tools_and_margins_are_kept():
    loaded = preferences_from_rows(read_rows(str(CASES / "rm_tools.jsonl")), "rows")
    assert (len(loaded.pairs), loaded.identical) == (4, 0)
    first = loaded.pairs[0]
    cities = [side[0]["tool_calls"][0]["function"]["arguments"]["city"] for side in (first.chosen, first.rejected)]
    assert cities == ["Oslo", "Rome"] and first.template["tools"][0]["function"]["name"] == "weather"
    assert {pair.margin for pair in pairs_of(*read_rows(str(CASES / "margin.jsonl")))} == {5.0}
    assert pairs_of({"prompt": "p", "chosen": "a", "rejected": "b"})[0].margin is None


def test_equal_sides_and_repeated_rows_are_counted():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    loaded = preferences_from_rows([row, row, {"prompt": "p", "chosen": "a", "rejected": "a"}], "rows")
    assert (len(loaded.pairs), loaded.duplicates, loaded.identical) == (1, 1, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"prompt": "p", "chosen": "a"}], "no column 'rejected'"),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "the same in all 1 rows"),
        ([{"prompt": "p", "chosen": 3, "rejected": "a"}], "row 1: chosen is 3"),
        ([{"prompt": [USER], "chosen": [USER], "rejected": [BYE]}], "chosen does not end with an assistant turn"),
        ([{"chosen": [USER, HELLO], "rejected": [{"role": "user", "content": "x"}, BYE]}], "no first turn in common"),
        ([{"chosen": "hello", "rejected": "bye"}], "row 1: a transcript starts with"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "wide"}], "margin is 'wide'; a finite number"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400}], "margin is '10+'; a finite number"),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": [USER], "chosen": "a", "rejected": "b"}],
            "alike",
        ),
    ],
)
def test_what_is_no_pair_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        preferences_from_rows(rows, "rows")


def test_an_explicit_prompt_that_is_asked_for_must_be_there():
    with pytest.raises(InputError, match="no column 'prompt'; set prompt_column"):
        preferences_from_rows([{"chosen": [USER, HELLO], "rejected": [USER, BYE]}], "rows", data_format="prompt")


def test_no_prompt_is_in_both_parts():
    rows = [{"prompt": f"p{i % 7}", "chosen": f"a{i}", "rejected": "b"} for i in range(30)]
    pairs = pairs_of(*rows)
    held_out = {pair.key for pair in pairs[:2]}
    train, test = split_pairs(pairs, held_out)
    assert {pair.key for pair in test} == held_out and not held_out & {pair.key for pair in train}
    assert len(train) + len(test) == 30


@pytest.mark.skipif(not HH.exists(), reason="the hh-rlhf file is not beside the repository")
def test_real_pairs_have_the_keys_of_the_prompts_that_a_recipe_reads():
    """So that a reward model's held-out prompts and a policy's test prompts can be the same ones."""
    loaded = preferences_from_rows(read_rows(str(HH)), "hh", data_format="transcript")
    prompts = load_prompts(str(HH), data_format="transcript").prompts
    assert (loaded.rows, loaded.identical, loaded.duplicates, len(loaded.pairs)) == (2312, 0, 0, 2312)
    assert {pair.key for pair in loaded.pairs} == {prompt.group for prompt in prompts}
