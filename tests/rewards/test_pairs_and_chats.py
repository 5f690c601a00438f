"""Reward models as they were trained: on pairs of texts, on chats; with as many tokens as they have positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification

from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.loader import load_reward
from infalign.types import InputError, RewardError
from tests.tiny import BOS, CLOSE, EOS, tiny_classifier, tiny_tokenizer

PROMPTS = ["why is the sun red ?", "the cat", "hello"]
COMPLETIONS = ["it is big .", "sat on the mat .", "bye bye ."]
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]
ENCODERS = ("bert", "deberta-v2", "roberta", "distilbert")


def pair_tokenizer(**options):
    """As BERT's: `<s> a </s> b </s>`, the second text with type 1."""
    tokenizer = tiny_tokenizer(**options)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # saved too
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} $B:1 {EOS}:1",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in (BOS, EOS)],
    )
    return tokenizer


def classifier(folder, family, **options):
    extra = {"type_vocab_size": 2} if family in ("bert", "deberta-v2", "roberta") else {}
    return tiny_classifier(folder, family, tokenizer=pair_tokenizer(**options), **extra)


def warnings_in(text):
    """What infalign said, without the libraries' progress."""
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def by_transformers(path, firsts, seconds=None):
    """Each row alone, as transformers' own pipeline would call tokenizer and model."""
    tokenizer = load_reward(path, {"pair": True}).function.tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    scores = []
    for row, first in enumerate(firsts):
        inputs = tokenizer(first, None if seconds is None else seconds[row], return_tensors="pt")
        if "distilbert" in type(model).__name__.lower():
            inputs.pop("token_type_ids")
        with torch.no_grad():
            scores.append(model(**inputs).logits[0, 0].item())
    return scores


@pytest.mark.parametrize("family", ENCODERS)
def test_pairs_are_scored_as_transformers_scores_them(family, tmp_path):
    path = classifier(tmp_path / "rm", family)
    reward = load_reward(path, {"pair": True, "batch_tokens": 64})
    found = reward(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(found, by_transformers(path, PROMPTS, COMPLETIONS), atol=CLOSE)
    joined = load_reward(path, {"pair": False})
    whole = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(joined(PROMPTS, COMPLETIONS), by_transformers(path, whole), atol=CLOSE)
    assert np.abs(found - joined(PROMPTS, COMPLETIONS)).max() > 1e-2, "else this shows nothing"
    assert reward.fingerprint != joined.fingerprint == load_reward(path).fingerprint


def test_token_types_count(tmp_path):
    """BERT tells the texts apart by them: without, the score is another."""
    path = classifier(tmp_path / "rm", "bert")
    reward = ClassifierReward(path, pair=True)
    ids, types = zip(*(reward._encoded(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)), strict=True)
    assert np.abs(reward.score(list(ids), None, list(types)) - reward.score(list(ids))).max() > 1e-3


def test_a_decoder_may_be_trained_on_pairs_too(tmp_path):
    path = classifier(tmp_path / "rm", "llama")
    reward = ClassifierReward(path, pair=True)
    expected = [f"{BOS} {p} {EOS} {c} {EOS}" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert [reward.render(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)] == expected
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([reward.tokenizer(p, c).input_ids])).logits[0, 0].item()
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), alone, atol=CLOSE)


def test_a_long_pair_loses_tokens_of_its_prompt(tmp_path):
    """And the types go with them."""
    path = classifier(tmp_path / "rm", "bert")
    reward = ClassifierReward(path, pair=True, max_length=9, too_long="truncate")
    short = ClassifierReward(path, pair=True)
    assert len(short.encode(PROMPTS[0], COMPLETIONS[0])) == 13  # <s> 6 </s> 4 </s>
    np.testing.assert_allclose(reward(PROMPTS[:1], COMPLETIONS[:1]), short(["red ?"], COMPLETIONS[:1]), atol=CLOSE)
    assert reward.counts["truncated"] == 1


def test_an_encoder_that_does_not_say_how_it_was_trained_is_told_of(tmp_path, capsys):
    path = classifier(tmp_path / "rm", "bert", chat_template=False)
    for pair in (True, False):
        ClassifierReward(path, pair=pair)(PROMPTS, COMPLETIONS)
    assert warnings_in(capsys.readouterr().err) == []
    ClassifierReward(path)(PROMPTS, COMPLETIONS)
    (told,) = warnings_in(capsys.readouterr().err)
    assert "is an encoder" in told and "{pair: true}" in told
    ClassifierReward(tiny_classifier(tmp_path / "decoder", tokenizer=tiny_tokenizer(chat_template=False)))
    assert warnings_in(capsys.readouterr().err) == []


def test_chats_as_pairs(tmp_path):
    """The prompt's side goes through the template, of the completion its text counts."""
    reward = ClassifierReward(classifier(tmp_path / "rm", "bert"), pair=True)
    seen = f"{BOS} <|im_start|> user hello <|im_end|> {EOS} bye bye . {EOS}"
    assert reward.render(CHATS[2], [{"role": "assistant", "content": COMPLETIONS[2]}]) == seen
    bare = classifier(tmp_path / "bare", "bert", chat_template=False)
    with pytest.raises(InputError, match=r"takes pairs of texts: give a chat_template that makes a text of a chat"):
        ClassifierReward(bare, pair=True)(CHATS, COMPLETIONS)
    last = ClassifierReward(bare, pair=True, chat_template="{{ messages[-1]['content'] }}")
    np.testing.assert_array_equal(last(CHATS, COMPLETIONS), ClassifierReward(bare, pair=True)(PROMPTS, COMPLETIONS))
    with pytest.raises(InputError, match="together have no tokens"):
        ClassifierReward(tiny_classifier(tmp_path / "no", "bert"), pair=True)([""], [""])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_texts_as_chats(family, tmp_path):
    path = classifier(tmp_path / "rm", family)
    reward = ClassifierReward(path, as_chat=True, pair=False)
    as_messages = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    plain = ClassifierReward(path, pair=False)
    np.testing.assert_array_equal(reward(PROMPTS, COMPLETIONS), plain(CHATS, as_messages))
    np.testing.assert_array_equal(reward(CHATS, as_messages), plain(CHATS, as_messages))
    assert np.abs(reward(PROMPTS, COMPLETIONS) - plain(PROMPTS, COMPLETIONS)).max() > 1e-2
    assert reward.fingerprint != plain.fingerprint == ClassifierReward(path, as_chat=False).fingerprint


def test_texts_for_a_model_with_a_chat_template_are_told_of_once(tmp_path, capsys):
    path = classifier(tmp_path / "rm", "llama")
    reward = ClassifierReward(path)
    reward(CHATS, COMPLETIONS)
    assert warnings_in(capsys.readouterr().err) == [], "chats go through it"
    for _ in range(2):
        reward(PROMPTS, COMPLETIONS)
    (told,) = warnings_in(capsys.readouterr().err)
    assert "scored without it" in told and "{as_chat: true}" in told
    for as_chat in (True, False):
        ClassifierReward(path, as_chat=as_chat)(PROMPTS, COMPLETIONS)
    ClassifierReward(tiny_classifier(tmp_path / "no", tokenizer=tiny_tokenizer(chat_template=False)))(["a"], ["b"])
    assert warnings_in(capsys.readouterr().err) == []
    with pytest.raises(InputError, match=r"as_chat: the tokenizer of the reward model .* has no chat template"):
        ClassifierReward(str(tmp_path / "no"), as_chat=True)


def test_switches_are_true_or_false():
    for name in ("pair", "as_chat"):
        with pytest.raises(InputError, match=f"{name} is true or false, got 'yes'"):
            ClassifierReward("unused", **{name: "yes"})


# --- positions ------------------------------------------------------------------------------------------------------

ROOM = 20
STARTS = {"roberta": 1, "xlm-roberta": 1, "camembert": 1, "mpnet": 2, "longformer": 1, "xlm-roberta-xl": 1,
          "bert": 0, "distilbert": 0, "gpt2": 0, "electra": 0, "albert": 0}  # fmt: skip


def with_room(folder, family):
    """Room for 20 positions; padding is id 0, so RoBERTa's positions start at 1 (MPNet's always at 2)."""
    room = {"n_positions": ROOM} if family == "gpt2" else {"max_position_embeddings": ROOM}
    room |= {"attention_window": [4, 4]} if family == "longformer" else {}
    room |= {"embedding_size": 32} if family in ("electra", "albert") else {}
    tokenizer = (
        tiny_tokenizer(chat_template=False, pad="<s>") if family == "mpnet" else tiny_tokenizer(chat_template=False)
    )
    tokenizer.model_max_length = 10**9
    return tiny_classifier(folder, family, tokenizer=tokenizer, **room)


@pytest.mark.parametrize("family", STARTS)
def test_the_context_is_what_the_table_of_positions_has_room_for(family, tmp_path):
    path = with_room(tmp_path / "rm", family)
    limit = ROOM - STARTS[family]
    reward = ClassifierReward(path, pair=False)
    assert reward.max_length == limit
    words = "the cat sat on a mat . i like the moon and the sun so very much , thanks ! bye".split()  # noqa: SIM905
    assert len(words) > ROOM
    prompt, (fits, beyond) = " ".join(words[:5]), (" " + " ".join(words[5:end]) for end in (limit, limit + 1))
    tokens = reward.tokenizer.convert_tokens_to_ids(words)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([tokens[:limit]])).logits[0, 0].item()
        cut = model(input_ids=torch.tensor([tokens[1 : limit + 1]])).logits[0, 0].item()
    np.testing.assert_allclose(reward([prompt], [fits]), [alone], atol=CLOSE)
    with pytest.raises(RewardError, match=rf"has {limit + 1} tokens with its prompt, .* takes {limit}; shorten"):
        reward([prompt], [beyond])
    truncating = ClassifierReward(path, pair=False, too_long="truncate")
    np.testing.assert_allclose(truncating([prompt], [beyond]), [cut], atol=CLOSE)


def test_more_tokens_than_positions_can_not_be_asked_for(tmp_path):
    path = with_room(tmp_path / "rm", "roberta")
    assert ClassifierReward(path, pair=False, max_length=19).max_length == 19
    with pytest.raises(InputError, match="max_length is 20, and the model has positions for 19 tokens"):
        ClassifierReward(path, pair=False, max_length=20)


def test_without_a_table_of_positions_the_config_says(tmp_path):
    path = tiny_classifier(tmp_path / "rm", tokenizer=tiny_tokenizer(chat_template=False))
    assert ClassifierReward(path).max_length == 512
    assert ClassifierReward(path, max_length=600).max_length == 600, "rotary positions go on"


def test_tools_and_template_arguments_of_a_row_reach_the_template(tmp_path):
    """As in training a reward model: a row's score is that of a model whose template has these variables set."""
    template = (
        "{% if tools %}the cat {% endif %}{% if loud %}sat on {% endif %}"
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    path = tiny_classifier(tmp_path / "rm", tokenizer=tiny_tokenizer(chat_template=False))
    prompts = [[{"role": "user", "content": "a mat"}]] * 3
    answers = [[{"role": "assistant", "content": "ran"}]] * 3
    reward = ClassifierReward(path, chat_template=template)
    assert set(reward.reads_columns) == {"tools", "chat_template_kwargs"}
    columns = {"tools": [None, [{"type": "function"}], None], "chat_template_kwargs": [None, None, {"loud": True}]}
    found = reward(prompts, answers, **columns)
    texts = ["", "the cat ", "sat on "]
    fixed = [ClassifierReward(path, chat_template=f"{text}{template}")(prompts[:1], answers[:1])[0] for text in texts]
    np.testing.assert_allclose(found, fixed, atol=1e-6)
    assert len(set(np.round(found, 5))) == 3
