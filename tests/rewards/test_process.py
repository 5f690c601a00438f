"""Process reward models: what they see, where steps end, how steps become a score, what is refused."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForTokenClassification

from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.loader import load_reward
from infalign.rewards.process import ProcessReward
from infalign.types import InputError, RewardError
from tests.tiny import CLOSE, tiny_classifier, tiny_tokenizer

PROMPT = "what is 2 + 2 ?"
CHAT = [{"role": "user", "content": "what ;  2 ?"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp("prm"), num_labels=2, of="token")


def made(path, **options):
    return ProcessReward(path, **{"device": "cpu", "label": 1, "separator": ";", **options})


def chances(path, ids):
    """(T, labels) probabilities after each token, by plain transformers."""
    model = AutoModelForTokenClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].softmax(-1).numpy()


def words(reward, ids):
    return " ".join(reward.tokenizer.convert_ids_to_tokens(ids))


def test_it_sees_what_process_supervision_trains_on(path):
    """The beginning token, the prompt, each step with a separator after it; scores are read at the separators."""
    reward = made(path)
    ids, places = reward.encode(PROMPT, " 2 + 2 ; = 4 . ; yes")
    assert words(reward, ids) == "<s> what is 2 + 2 ? 2 + 2 ; = 4 . ; yes ;"
    assert places == [10, 14, 16]
    np.testing.assert_allclose(
        reward.step_scores([PROMPT], [" 2 + 2 ; = 4 . ; yes"])[0], chances(path, ids)[places, 1], atol=CLOSE
    )


def test_steps_are_what_stands_between_separators(path):
    reward = made(path, separator="\n\n", marker=";")
    assert reward.steps(" a\n\n \n\nthe cat\nsat\n\n") == [" a", "the cat\nsat"]
    assert reward.steps("") == reward.steps("\n\n") == [""]
    assert reward.steps([{"role": "assistant", "content": "a\n\nb"}]) == ["a", "b"]


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("min", np.min), ("last", lambda s: s[-1]), ("mean", np.mean), ("prod", np.prod)]
)
def test_steps_become_a_score(aggregate, expected, path):
    reward = made(path, aggregate=aggregate)
    completions = [" yes ; no ; sad", " so", ""]
    steps = reward.step_scores([PROMPT] * 3, completions)
    assert [len(one) for one in steps] == [3, 1, 1]
    np.testing.assert_allclose(reward([PROMPT] * 3, completions), [expected(one) for one in steps], atol=1e-12)
    assert reward.counts == {"scored": 6, "masked": 0, "steps": 10}


def test_the_marker_stands_in_the_separators_place(path):
    reward = made(path, separator=" ; ", marker=" <|im_end|>")
    ids, places = reward.encode(PROMPT, "yes ; no")
    assert words(reward, ids).endswith("yes <|im_end|> no <|im_end|>") and places == [
        len(ids) - 3,
        len(ids) - 1,
    ]
    several = made(path, separator=" ; ", marker=" so so")
    ids, places = several.encode(PROMPT, "yes ; no")
    assert words(several, ids).endswith("? yes so so no so so") and places == [len(ids) - 4, len(ids) - 1]


def test_chats_go_through_the_template(path):
    """The answer's steps are found in it, whatever the prompt looks like."""
    reward = made(path)
    answer = [{"role": "assistant", "content": "yes ; no"}]
    ids, places = reward.encode(CHAT, answer)
    assert words(reward, ids) == "<|im_start|> user what ; 2 ? <|im_end|> <|im_start|> assistant yes ; no ; <|im_end|>"
    assert [words(reward, [ids[place]]) for place in places] == [";", ";"] and places == [10, 12]
    np.testing.assert_allclose(reward.step_scores([CHAT], [answer])[0], chances(path, ids)[places, 1], atol=CLOSE)
    assert reward.encode(CHAT, "yes ; no") == (ids, places)


def test_a_template_that_changes_the_answer_is_refused(path):
    trims = "{% for message in messages %}{{ message['content'].strip() }}{% endfor %}"
    with pytest.raises(
        InputError,
        match=r"changes the answer \(the marker '; .+n' is after every step, also the last.*give a marker that",
    ):
        made(path, separator="\n", marker="; \n", chat_template=trims).encode(CHAT, "yes\nno")
    with pytest.raises(InputError, match="its tokenizer makes no token of the marker '\\\\n'"):
        made(path, separator="\n")
    bare = tiny_tokenizer(chat_template=False)
    with pytest.raises(InputError, match="has no chat template; give chat_template"):
        made(path, tokenizer=bare).encode(CHAT, "yes")


LINES = "{% for m in messages %}<|im_start|> {{ m['role'] }} ; {{ m['content'] }} <|im_end|> ; {% endfor %}"
TRIMS = LINES.replace("m['content']", "m['content'] | trim")


@pytest.mark.parametrize("template", [LINES, TRIMS])
@pytest.mark.parametrize("said", ["", " ", "yes ; no", " yes ; no"])
def test_steps_are_found_inside_the_answers_turn(template, said, path):
    """Also where it is empty and the template itself writes the marker, or takes white space off its beginning."""
    reward = made(path, chat_template=template)
    ids, places = reward.encode(CHAT, said)
    seen = words(reward, ids).split()
    ends = ["<|im_start|>", "user", ";", "what", ";", "2", "?", "<|im_end|>", ";", "<|im_start|>", "assistant", ";"]
    assert seen[: len(ends)] == ends
    answer = {"yes ; no": [1, 3], "": [0]}[said.strip()]
    assert places == [len(ends) + place for place in answer] and {seen[place] for place in places} == {";"}


def test_an_answer_that_the_prompt_holds_too(path):
    trims = LINES.replace("m['content']", "m['content'].rstrip('; ')")
    with pytest.raises(InputError, match="changes the answer"):
        made(path, chat_template=trims).encode([{"role": "user", "content": "say yes ; no ; now"}], "yes ; no")


def test_a_tokenizer_that_tells_no_places(path):
    reward = made(path)
    reward.tokenizer = SimpleNamespace(is_fast=False)
    with pytest.raises(InputError, match="its tokenizer tells no places of tokens: use text prompts"):
        reward.encode(CHAT, "yes")


def test_one_label_counts_by_its_sigmoid(tmp_path):
    path = tiny_classifier(tmp_path / "prm", num_labels=1, of="token")
    reward = ProcessReward(path, device="cpu", separator=";")
    ids, places = reward.encode(PROMPT, " yes ; no")
    model = AutoModelForTokenClassification.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, places, 0]
    np.testing.assert_allclose(reward.step_scores([PROMPT], [" yes ; no"])[0], logits.sigmoid().numpy(), atol=CLOSE)


def test_batches_do_not_matter(path):
    completions = [" yes ; no ; sad", " so", "", " the cat sat on the mat ; on the tree"]
    whole, pieces = (made(path, batch_tokens=count).step_scores([PROMPT] * 4, completions) for count in (10**6, 1))
    np.testing.assert_allclose(np.concatenate(whole), np.concatenate(pieces), atol=CLOSE)


def test_long_completions(path):
    completions = [" yes ; no", " so"]
    with pytest.raises(RewardError, match=r"completion 0 has 11 tokens with its prompt and markers, .* takes 10"):
        made(path, max_length=10)([PROMPT] * 2, completions)
    masked = made(path, max_length=10, too_long="mask")
    scores = masked([PROMPT] * 2, completions)
    assert np.isnan(scores[0]) and np.isfinite(scores[1]) and masked.counts == {"scored": 1, "masked": 1, "steps": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": None}, r"has 2 labels \(0: LABEL_0, 1: LABEL_1\); set label"),
        ({"aggregate": "max"}, "aggregate is one of min, last, mean, prod, got 'max'"),
        ({"too_long": "truncate"}, "too_long is error or mask for a process reward model, got 'truncate'"),
        ({"separator": ""}, "separator is a text of at least one character, got ''"),
        ({"marker": ""}, "marker is a text of at least one character"),
        ({"aggregate": ["min"]}, r"aggregate is one of .*, got \['min'\]"),
        ({"batch_tokens": 0}, "batch_tokens is a whole number of tokens, at least 1, got 0"),
        ({"max_length": "10"}, "max_length is a whole number of tokens, at least 1, got '10'"),
    ],
)
def test_options(options, words, path):
    with pytest.raises(InputError, match=words):
        made(path, **options)


def test_what_shapes_scores_shapes_the_fingerprint(path):
    prints = {made(path, **options).fingerprint for options in (
        {}, {"aggregate": "mean"}, {"separator": "."}, {"marker": "."}, {"label": 0}, {"max_length": 50}
    )}  # fmt: skip
    assert len(prints) == 6 and made(path).fingerprint == made(path, batch_tokens=7).fingerprint


class TestLoading:
    def test_a_folder_is_what_its_config_says(self, path, tmp_path):
        reward = load_reward(path, {"label": 1, "separator": ";", "aggregate": "mean"})
        assert isinstance(reward.function, ProcessReward)
        np.testing.assert_allclose(
            reward([PROMPT], [" yes ; no"]), made(path, aggregate="mean")([PROMPT], [" yes ; no"]), atol=CLOSE
        )
        assert isinstance(load_reward(tiny_classifier(tmp_path / "rm")).function, ClassifierReward)
        with pytest.raises(InputError, match="takes no argument 'pair'; one of tokenizer, label, aggregate"):
            load_reward(path, {"pair": True})

    def test_a_model_in_memory(self, path):
        model = AutoModelForTokenClassification.from_pretrained(path)
        reward = load_reward(model, {"label": 1, "separator": ";"})
        np.testing.assert_allclose(reward([PROMPT], [" yes ; no"]), made(path)([PROMPT], [" yes ; no"]), atol=CLOSE)

    def test_an_adapter(self, path, tmp_path):
        model = AutoModelForTokenClassification.from_pretrained(path)
        tuned = get_peft_model(model, LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, weight in tuned.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    weight.normal_(generator=torch.Generator().manual_seed(len(name)))
        tuned.save_pretrained(tmp_path / "adapter")
        tiny_tokenizer().save_pretrained(tmp_path / "adapter")
        reward = load_reward(str(tmp_path / "adapter"), {"label": 1, "separator": ";"})
        ids, places = reward.function.encode(PROMPT, " yes ; no")
        with torch.no_grad():
            expected = tuned.eval()(input_ids=torch.tensor([ids])).logits[0].softmax(-1)[places, 1].numpy()
        np.testing.assert_allclose(reward.function.step_scores([PROMPT], [" yes ; no"])[0], expected, atol=CLOSE)
        assert np.abs(expected - chances(path, ids)[places, 1]).max() > 1e-3

    def test_an_adapter_that_does_not_say_its_task(self, path, tmp_path):
        model = AutoModelForTokenClassification.from_pretrained(path)
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        tiny_tokenizer().save_pretrained(tmp_path / "adapter")
        reward = load_reward(str(tmp_path / "adapter"), {"label": 1, "separator": ";"})
        assert isinstance(reward.function, ProcessReward)

    def test_it_is_never_taken_for_a_sequence_classifier(self, path):
        for one in (path, AutoModelForTokenClassification.from_pretrained(path)):
            with pytest.raises(
                InputError, match="classifies tokens: it is a process reward model; load it with Process"
            ):
                ClassifierReward(one, label=1)

    def test_it_is_found_out_when_its_config_comes_late(self, path, monkeypatch):
        """The Hub did not answer when it was asked what the model is, and did when the model was loaded."""
        monkeypatch.setattr("infalign.rewards.classifier_loading.scored_by", lambda _: "sequence")
        with pytest.raises(InputError, match="classifies tokens: it is a process reward model"):
            ClassifierReward(path, label=1)

    def test_an_adapters_config_that_is_no_json(self, path, tmp_path):
        shutil.copytree(path, tmp_path / "broken")
        (tmp_path / "broken" / "adapter_config.json").write_text("{")
        with pytest.raises(InputError, match=r"adapter_config.json can't be read"):
            load_reward(str(tmp_path / "broken"))

    def test_a_class_of_its_own(self, path, tmp_path):
        """As Qwen's process reward models come: an `AutoModel` with its code beside it, a tuple of logits."""
        folder = tmp_path / "own"
        model = AutoModelForTokenClassification.from_pretrained(path)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "modeling_own.py").write_text(
            "from transformers import LlamaForTokenClassification\n"
            "class OwnForProcessRewardModel(LlamaForTokenClassification):\n"
            "    def forward(self, *args, **kwargs):\n"
            "        return (super().forward(*args, **kwargs).logits,)\n"
        )
        held = json.loads((folder / "config.json").read_text())
        held |= {
            "architectures": ["OwnForProcessRewardModel"],
            "auto_map": {"AutoModel": "modeling_own.OwnForProcessRewardModel"},
        }
        (folder / "config.json").write_text(json.dumps(held))
        reward = load_reward(str(folder), {"label": 1, "separator": ";", "trust_remote_code": True, "device": "cpu"})
        assert type(reward.function.model).__name__ == "OwnForProcessRewardModel"
        np.testing.assert_allclose(reward([PROMPT], [" yes ; no"]), made(path)([PROMPT], [" yes ; no"]), atol=CLOSE)

    def test_a_fresh_head_is_refused(self, path, tmp_path):
        backbone = AutoModelForTokenClassification.from_pretrained(path).model
        backbone.save_pretrained(tmp_path / "bare")
        tiny_tokenizer().save_pretrained(tmp_path / "bare")
        with pytest.raises(InputError, match=r"has no trained score\.bias, score\.weight"):
            ProcessReward(str(tmp_path / "bare"), label=1)
