"""Rendering: what the model sees, to the token."""

from __future__ import annotations

import logging

import pytest

from infalign.data.templates import check_lengths, render, single_bos, with_system
from infalign.types import InputError
from tests.tiny import BOS, CHAT_TEMPLATE, EOS, tiny_tokenizer

CHAT = [{"role": "user", "content": "the cat"}]


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_a_chat_goes_through_the_template_up_to_the_assistants_turn():
    tokenizer = tiny_tokenizer()
    expected = ["<|im_start|>", "user", "the", "cat", "<|im_end|>", "<|im_start|>", "assistant"]
    assert words(tokenizer, render(tokenizer, CHAT)) == expected
    with_one = words(tokenizer, render(tokenizer, CHAT, system_prompt="help"))
    assert with_one == ["<|im_start|>", "system", "help", "<|im_end|>", *expected]


def test_plain_text_goes_through_the_tokenizer():
    assert words(tiny_tokenizer(), render(tiny_tokenizer(), "the cat")) == ["the", "cat"]
    with_bos = tiny_tokenizer(add_bos=True)
    assert words(with_bos, render(with_bos, "the cat")) == [BOS, "the", "cat"]
    assert words(with_bos, render(with_bos, f"{BOS}the cat")) == [BOS, "the", "cat"]


def test_a_doubled_bos_in_a_template_becomes_one():
    tokenizer = tiny_tokenizer(chat_template=f"{{{{ '{BOS}{BOS}' }}}}{CHAT_TEMPLATE}", add_bos=True)
    assert words(tokenizer, render(tokenizer, CHAT))[:2] == [BOS, "<|im_start|>"]
    assert single_bos(tiny_tokenizer(), [1, 1, 1, 7, 1]) == [1, 7, 1]


def test_a_template_without_bos_is_followed_with_one_warning(caplog):
    tokenizer = tiny_tokenizer(add_bos=True)
    with caplog.at_level(logging.WARNING):
        first, second = render(tokenizer, CHAT), render(tokenizer, CHAT)
    assert first == second and words(tokenizer, first)[0] == "<|im_start|>"
    assert len(caplog.records) == 1 and "chat template does not" in caplog.text


def test_an_end_token_that_the_tokenizer_appends_is_taken_off():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = type(tiny_tokenizer(add_bos=True).backend_tokenizer.post_processor)(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    assert words(tokenizer, tokenizer("cat").input_ids) == ["cat", EOS]
    assert words(tokenizer, render(tokenizer, "cat")) == ["cat"]


def test_template_variables_are_passed():
    tokenizer = tiny_tokenizer(chat_template="{{ 'yes' if thinking else 'no' }}")
    assert words(tokenizer, render(tokenizer, CHAT, chat_template_kwargs={"thinking": True})) == ["yes"]
    assert words(tokenizer, render(tokenizer, CHAT)) == ["no"]


def test_refusals():
    with pytest.raises(InputError, match="has no chat template; use an instruction-tuned model"):
        render(tiny_tokenizer(chat_template=False), CHAT)
    with pytest.raises(InputError, match="refuses a chat with the roles user: only systems"):
        render(tiny_tokenizer(chat_template="{{ raise_exception('only systems') }}"), CHAT)
    with pytest.raises(InputError, match="has no tokens"):
        render(tiny_tokenizer(chat_template="{{ '' }}"), CHAT)


def test_with_system():
    system = {"role": "system", "content": "s"}
    assert with_system(CHAT, "s") == [system, *CHAT]
    assert with_system([system, *CHAT], "other") == [system, *CHAT]
    assert with_system("text", "s") == "s\n\ntext"
    assert with_system(CHAT, None) is CHAT


IDS = {"a": [1, 2, 3], "b": [1, 5, 6, 7, 8]}


def test_lengths_within_the_limit_pass():
    found = check_lengths(IDS, 5)
    assert (found.ids, found.longest, found.limit, found.dropped, found.truncated) == (IDS, 5, 5, (), ())
    assert check_lengths(IDS).limit is None
    assert check_lengths(IDS, 9, model_max=8, reserve=2).limit == 6


def test_drop_and_truncate():
    assert check_lengths(IDS, 3, "drop").ids == {"a": [1, 2, 3]}
    assert check_lengths(IDS, 3, "drop").dropped == ("b",)
    cut = check_lengths(IDS, 3, "truncate")
    assert cut.ids == {"a": [1, 2, 3], "b": [6, 7, 8]} and cut.truncated == ("b",) and cut.longest == 5
    assert check_lengths(IDS, 3, "truncate", bos_token_id=1).ids["b"] == [1, 7, 8]
    assert check_lengths(IDS, 1, "truncate", bos_token_id=1).ids["b"] == [8]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((4,), r"1 of 2 prompts are longer than 4 tokens \(the longest has 5, e.g. the prompt b\)"),
        ((2, "drop"), "all 2 prompts are longer than 2 tokens"),
        ((0,), "no room for a prompt: max_prompt_length 0"),
        ((2, "cut"), "one of error, drop, truncate, got 'cut'"),
    ],
)
def test_lengths_refused(args, message):
    with pytest.raises(InputError, match=message):
        check_lengths(IDS, *args)


def test_no_room_beside_the_completion():
    with pytest.raises(InputError, match="context 8 tokens, of which 8 for the completion"):
        check_lengths(IDS, model_max=8, reserve=8)
