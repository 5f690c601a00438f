"""What is lost on held-out texts: against plain arithmetic, and the error against drawing other texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.evaluation.forgetting import text_fit
from infalign.generation.likelihood import completion_logps
from infalign.models.loading import load_policy
from infalign.stages.experiment import Experiment
from infalign.stages.forgetting import measure_texts
from infalign.stages.recipe import load_recipe
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import CLOSE, tiny_causal


def test_nats_a_token_weigh_texts_by_their_tokens():
    found = text_fit("x", np.array([-10.0, -1.0]), np.array([-13.0, -1.5]), np.array([9.0, 1.0]))
    assert (found.base, found.policy, found.lost) == pytest.approx((1.1, 1.45, 0.35))
    assert found.texts == 2 and found.tokens == 10
    assert math.isnan(text_fit("x", np.array([-1.0]), np.array([-2.0]), np.array([1.0])).error)


def test_the_error_is_that_of_other_texts():
    rng = np.random.default_rng(0)

    def draw():
        tokens = rng.integers(5, 40, 60).astype(float)
        lost = 0.2 * tokens + 0.3 * rng.normal(size=60) * np.sqrt(tokens)
        return text_fit("x", -3.0 * tokens, -3.0 * tokens - lost, tokens)

    found = [draw() for _ in range(2000)]
    spread = np.std([one.lost for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.1)  # 2000 draws: 1.6 % of each


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probabilities_are_those_of_a_plain_pass(tmp_path, family):
    path = tiny_causal(tmp_path, family, seed=1, initializer_range=0.2)
    prompts, completions = [[7, 8, 9], [7, 8, 9], [10]], [[11, 12], [13], [14, 15, 16, 17]]
    plain = AutoModelForCausalLM.from_pretrained(path).double().eval()
    wanted = []
    for prompt, ids in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logps = plain(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted.append(logps[range(len(ids)), ids].sum().item())
    model = load_policy(path, device=torch.device("cpu"))
    for budget in (4, 8192):
        found = completion_logps(model, prompts, completions, tokens_per_batch=budget)
        assert found.tolist() == pytest.approx(wanted, abs=CLOSE)


@pytest.fixture
def keys(tmp_path):
    policy = tiny_causal(tmp_path / "policy", "llama", seed=5)
    (tmp_path / "tales.jsonl").write_text('{"text": "the cat sat on a mat"}\n{"text": "the dog ran"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "the cat", "completion": " sat on a mat"}\n')
    texts = {"tales": str(tmp_path / "tales.jsonl"), "pairs": str(tmp_path / "pairs.jsonl")}
    return {**tiny_experiment(tmp_path), "policy_name_or_path": policy, "held_out_texts": texts}


def test_both_models_read_all_texts(keys, monkeypatch):
    tales, pairs = measure_texts(Experiment(load_recipe(keys)))
    assert (tales.name, tales.texts, tales.tokens) == ("tales", 2, 7)  # the first token of a text is given
    assert (pairs.name, pairs.texts, pairs.tokens) == ("pairs", 1, 4)
    experiment = Experiment(load_recipe(keys))
    for path, found in ((keys["model_name_or_path"], tales.base), (keys["policy_name_or_path"], tales.policy)):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        total = 0.0
        for text in ("the cat sat on a mat", "the dog ran"):
            ids = torch.tensor([experiment.tokenizer(text)["input_ids"]])
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        assert found == pytest.approx(total / 7, abs=CLOSE)
    monkeypatch.setattr(Experiment, "model", None)  # found again, nothing is loaded
    assert measure_texts(Experiment(load_recipe(keys))) == (tales, pairs)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"tales": "nowhere.jsonl"}, "held_out_texts, tales: there is no nowhere.jsonl: give a JSONL of texts"),
        ({"empty": "{folder}/empty.jsonl"}, "held_out_texts, empty: "),
    ],
)
def test_files_that_are_none_are_one_line(keys, tmp_path, texts, message):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    texts = {name: file.format(folder=tmp_path) for name, file in texts.items()}
    with pytest.raises(InputError, match=message):
        measure_texts(Experiment(load_recipe({**keys, "held_out_texts": texts})))
