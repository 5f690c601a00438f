"""Which model a name means, and what tells two models apart."""

from __future__ import annotations

import shutil

import pytest
import torch

from infalign.models.loading import (
    context_length,
    end_token_ids,
    load_policy,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from infalign.types import InputError
from tests.tiny import tiny_causal, tiny_classifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("models") / "tiny", "llama")


def test_a_folder_is_found_beside_the_recipe(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    assert resolve_model("m", tmp_path) == str((tmp_path / "m").resolve())
    assert resolve_model("some/hub-id", tmp_path) == "some/hub-id"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("x.gguf", "no such file or folder"),
        ("package://nopackage/x.gguf", "'nopackage' is not installed: pip install nopackage"),
        ("package://infalign/nothing.gguf", "the package 'infalign' has no file 'nothing.gguf'"),
    ],
)
def test_what_is_not_there_is_named(name, message):
    with pytest.raises(InputError, match=message):
        resolve_model(name)


def test_what_is_no_language_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="can't load the model of model_name_or_path"):
        load_policy(str(tmp_path / "empty"), device=CPU)
    with pytest.raises(InputError, match="can't load the tokenizer of model_name_or_path"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="can't load the config of model_name_or_path"):
        context_length(str(tmp_path / "empty"))
    encoder = tiny_classifier(tmp_path / "bert", "distilbert")
    with pytest.raises(InputError, match="can't load the model of model_name_or_path"):
        load_policy(encoder, device=CPU)


def test_a_fingerprint_follows_the_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert model_fingerprint(folder) == model_fingerprint(str(tmp_path / "copy"))
    model = load_policy(folder, device=CPU)
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    model.save_pretrained(tmp_path / "copy")
    assert model_fingerprint(folder) != model_fingerprint(str(tmp_path / "copy"))


def test_end_tokens_are_the_union(folder):
    model, tokenizer = load_policy(folder, device=CPU), load_tokenizer(folder)
    model.generation_config.eos_token_id = [7, 9]
    assert end_token_ids(model, tokenizer) == tuple(sorted({7, 9, tokenizer.eos_token_id}))
    assert context_length(folder) == 512 and tokenizer.padding_side == "left"
