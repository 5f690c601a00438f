"""Log-likelihoods of answers against plain passes, and against lm-evaluation-harness on the same questions."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infalign.forgetting.scoring import answer_logps, correct, encode, encoded_answers, right_probability
from infalign.forgetting.tasks import Question
from infalign.types import InputError
from tests.tiny import CLOSE, tiny_causal, tiny_tokenizer

QUESTIONS = [
    Question("the cat sat on the", ("mat", "big blue moon"), 0),
    Question("is the dog happy ?", ("no", "yes"), 1),
    Question("the cat sat on the", ("tree", "sun"), 0),
    Question("what is 2 + 2 and 3 + 4 and 5 + 1 ? answer : ", ("4", "7 6"), 1),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tiny_causal(tmp_path_factory.mktemp("model"))
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def plainly(model, context, answer):
    """One sequence at a time, from the whole softmax."""
    with torch.no_grad():
        logp = model(torch.tensor([[*context, *answer]])).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(context) - 1 + at, token]) for at, token in enumerate(answer))


@pytest.mark.parametrize("tokens", [16, 8192])
def test_log_likelihoods_are_those_of_one_sequence_alone(tiny, tokens):
    _, model, tokenizer = tiny
    rows = encoded_answers(tokenizer, QUESTIONS, " ", None)
    found = answer_logps(model, rows, tokens)
    wanted = [[plainly(model, one.context, one.answer) for one in pair] for pair in rows]
    assert np.abs(found - np.array(wanted)).max() < CLOSE


def test_right_answers():
    logps = np.array([[-1.0, -2.0], [-3.0, -3.0], [-5.0, -1.0], [-2.0, -3.0]])
    assert correct(logps, QUESTIONS).tolist() == [1.0, 0.0, 0.0, 0.0]  # a tie goes to the first
    # by characters: -1/3, -2/13; -3/2, -3/3; -5/4, -1/3; -2, -3/3
    assert correct(logps, QUESTIONS, per_character=True).tolist() == [0.0, 1.0, 0.0, 1.0]
    assert right_probability(logps, QUESTIONS) == pytest.approx(
        [1 / (1 + np.exp(-1)), 0.5, 1 / (1 + np.exp(4)), 1 / (1 + np.exp(1))]
    )
    assert right_probability(np.array([[-1000.0, 0.0]]), QUESTIONS[:1])[0] < 1e-300


class Joining:
    """A tokenizer of characters that joins "ab" to one token over the border between context and answer."""

    bos_token, bos_token_id, eos_token_id = None, None, None

    def encode(self, text, add_special_tokens=True):
        return [ord(one) for one in text.replace("ab", "\u00e6")]


def test_context_and_answer_are_tokenized_together():
    # as the harness does: the context alone has three tokens, so the answer is what stands behind three tokens
    assert encode(Joining(), "xya", "b?c").answer == (ord("?"), ord("c"))
    assert encode(Joining(), "xy  ", "b") == encode(Joining(), "xy", "  b")  # white space goes to the answer
    with pytest.raises(InputError, match="the answer 'b' has no token of its own after 'xya'"):
        encode(Joining(), "xya", "b")
    with pytest.raises(InputError, match="has no token of its own"):
        encode(Joining(), "", "b")  # there is no first token


def test_an_empty_context_is_the_first_token(tiny):
    _, _, tokenizer = tiny
    found = encode(tokenizer, "", "the cat")
    assert found.context == (tokenizer.bos_token_id,) and len(found.answer) == 2


def test_special_tokens_of_the_tokenizer_stand_in_front_once():
    tokenizer = tiny_tokenizer(add_bos=True)
    plain, begun = encode(tokenizer, "the cat", " sat"), encode(tokenizer, "<s> the cat", " sat")
    assert plain.context[0] == tokenizer.bos_token_id and len(plain.context) == 3
    assert begun.context.count(tokenizer.bos_token_id) == 1


def test_long_questions_lose_their_left(tiny):
    _, _, tokenizer = tiny
    whole = encode(tokenizer, "the cat sat on the mat", " big blue moon")
    cut = encode(tokenizer, "the cat sat on the mat", " big blue moon", max_length=5)
    assert cut.answer == whole.answer and cut.context == whole.context[-2:]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")
def test_the_harness_says_the_same(tiny, tmp_path):
    """Its own log-likelihoods, accuracy and length-normalised accuracy on the same local task."""
    import lm_eval  # noqa: PLC0415 - an extra
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    folder, model, tokenizer = tiny
    rows = [{"q": one.context, "choices": list(one.answers), "label": one.label} for one in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "local_task.yaml").write_text(
        "task: local_task\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=folder, device="cpu", batch_size=2),
        tasks=["local_task"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    theirs = sorted(found["samples"]["local_task"], key=lambda sample: sample["doc_id"])
    ours = answer_logps(model, encoded_answers(tokenizer, QUESTIONS, " ", None), 8192)
    logps = np.array([[float(one[0]) for one in sample["filtered_resps"]] for sample in theirs])
    assert np.abs(ours - logps).max() < 1e-4
    scores = found["results"]["local_task"]
    assert correct(ours, QUESTIONS).mean() == scores["acc,none"]
    assert correct(ours, QUESTIONS, per_character=True).mean() == scores["acc_norm,none"]
