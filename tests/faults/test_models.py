"""Models that ship traps: generation configs, heads, padding and end tokens, dropout; rows 1, 8-15 and 21."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForSequenceClassification
from trl import RLOOTrainer

from infalign.cli import main
from infalign.models.loading import end_token_ids, load_policy, load_tokenizer
from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.loader import load_reward
from infalign.theory.transforms import identity
from infalign.training.checks import check_kl_at_start
from infalign.training.config import CTRLConfig
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import EOS, tiny_causal, tiny_classifier, tiny_config, tiny_tokenizer
from tests.training.test_resume import rows
from tests.training.test_trainer import config, token_sum

GREEDY = {"do_sample": False, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "max_new_tokens": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


def changed(llama: str, folder: Path, file: str, **fields) -> str:
    """A copy of the model with other fields in one of its JSON files."""
    shutil.copytree(llama, folder)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, **fields}))
    return str(folder)


def train(model, folder, tokenizer=None, **changes):
    """One step; returns the trainer, and the prompts and completions that the reward saw."""
    seen = []

    def reward(prompts, completion_ids, **_):
        seen.extend(zip(prompts, map(tuple, completion_ids), strict=True))
        return token_sum(completion_ids)

    arguments = CTRLConfig(**config(folder, **{"max_steps": 1, **changes}))
    given = CTRLReward(load_reward(reward, retries=0), identity)
    subject = CTRLTrainer(model, given, arguments, train_dataset=rows(), processing_class=tokenizer)
    subject.train()
    return subject, seen


def weights(subject) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in subject.model.parameters()])


# -- row 1: the model's own generation_config


def test_a_generation_config_does_not_leak_into_rollouts(llama, tmp_path):
    _, plain = train(llama, tmp_path / "plain")
    _, trapped = train(changed(llama, tmp_path / "greedy", "generation_config.json", **GREEDY), tmp_path / "trapped")
    assert trapped == plain and len(set(plain)) == len(plain)


def test_nor_into_trls_own_path(llama, tmp_path, monkeypatch):
    """Which a version of TRL that is not tested takes."""
    monkeypatch.setattr("infalign.training.trainer.TESTED_TRL", ())
    model = changed(llama, tmp_path / "greedy", "generation_config.json", **GREEDY)
    _, seen = train(model, tmp_path / "out")
    assert len(set(seen)) == len(seen), "greedy rollouts repeat each other"
    assert max(len(ids) for _, ids in seen) == 5


# -- row 8: heads


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_an_encoder_without_a_trained_head_is_refused(family, tmp_path):
    tokenizer = tiny_tokenizer()
    AutoModel.from_config(tiny_config(family, tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no trained .*classifier.*: it would be freshly initialised"):
        ClassifierReward(str(tmp_path), device="cpu")


# -- row 9: the reward model's own tokenizer and template


def test_a_reward_model_with_another_vocabulary_reads_text_and_not_our_tokens(tmp_path, capsys):
    """Its ids for the same words are others; the policy's ids, handed to every reward, are not looked at."""
    words = ["why", "so", "the", "cat", "sat", "on", "a", "mat"]
    path = tiny_classifier(tmp_path / "rm", tokenizer=tiny_tokenizer(words[::-1]))
    reward = load_reward(path, {"device": "cpu"})
    found = reward(["the cat", "why"], ["sat on a mat", "so"], [[1, 2, 3, 4], [5]])
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for prompt, completion, score in (("the cat", "sat on a mat", found[0]), ("why", "so", found[1])):
        ids = tiny_tokenizer(words[::-1]).convert_tokens_to_ids(f"{prompt}{completion}".split())
        with torch.no_grad():
            assert model(torch.tensor([ids])).logits.item() == pytest.approx(score, abs=1e-5)
    assert tiny_tokenizer(words).convert_tokens_to_ids("the") != tiny_tokenizer(words[::-1]).convert_tokens_to_ids(
        "the"
    )
    reward(["why"], ["so"])
    shown = capsys.readouterr().out
    assert shown.count("what the reward model rm sees, for example: 'the <unk> on a mat'") == 1


# -- row 10: padding tokens


@pytest.mark.parametrize("pad", [EOS, None])
def test_training_does_not_depend_on_the_padding_token(pad, llama, tmp_path):
    ends = []
    for name, kind in (("own", "<pad>"), ("other", pad)):
        shutil.copytree(llama, tmp_path / name)
        for file in (tmp_path / name).glob("*token*"):
            file.unlink()
        tiny_tokenizer(pad=kind).save_pretrained(tmp_path / name)
        subject, seen = train(str(tmp_path / name), tmp_path / f"out-{name}", load_tokenizer(str(tmp_path / name)))
        ends.append((weights(subject), seen))
    assert ends[0][1] == ends[1][1]
    torch.testing.assert_close(ends[1][0], ends[0][0], atol=1e-6, rtol=0)


# -- row 11: ties


def test_ties_are_reported(tmp_path, capsys):
    keys = tiny_experiment(tmp_path) | {"reward": f"{tmp_path / 'coarse.py'}:coarse"}
    (tmp_path / "coarse.py").write_text(
        "def coarse(completion_ids, **_):\n    return [ids[0] % 2 for ids in completion_ids]\n"
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    assert main(["calibrate", "--config", str(tmp_path / "recipe.yaml")]) == 0
    told = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "calibration" / "manifest.json").read_text())["diagnostics"]
    assert found["ties"] > 0.45 and f"ties {found['ties']:.1%}" in told.out
    assert (
        found["duplicates"] < 0.5 and "duplicates " in told.out and f"length limit {found['clipped']:.1%}" in told.out
    )


# -- rows 12 and 13: several end tokens, truncated completions


def test_rollouts_and_base_samples_end_by_one_rule(llama, tmp_path):
    """The generation config's end tokens and the tokenizer's, in both; what is cut is counted as it is."""
    declared = [7, 9, 20, 21, 22, 30, 31, 40, 50, 60]
    model = changed(llama, tmp_path / "ends", "generation_config.json", eos_token_id=declared)
    subject, seen = train(model, tmp_path / "out", per_device_train_batch_size=32, num_generations=16)
    tokenizer = load_tokenizer(model)
    ends = end_token_ids(load_policy(model, device=torch.device("cpu")), tokenizer)
    assert set(ends) == {*declared, tokenizer.eos_token_id} == set(subject.eos_token_ids)
    finished = [ids[-1] in ends for _, ids in seen]
    assert all(not set(ids[:-1]) & set(ends) for _, ids in seen)
    assert all(done or len(ids) == 5 for done, (_, ids) in zip(finished, seen, strict=True))
    assert 0.1 < np.mean(finished) < 0.9
    log = subject.state.log_history[0]
    assert log["completions/clipped_ratio"] == pytest.approx(1 - np.mean(finished))


# -- rows 14 and 15: policy and reference at step 0


def test_a_kl_that_is_not_zero_at_step_0_names_both(tmp_path):
    with pytest.raises(InputError, match=r"KL is 0.3 ± .*must be 0: the policy \(a/b\) and the reference \(c/d\)"):
        check_kl_at_start(np.full(8, 0.3), policy="a/b", reference="c/d")
    for wrong in (np.array([math.nan, 0.0]), np.array([math.inf, 0.0]), np.full(8, -0.3)):
        with pytest.raises(InputError, match="must be 0"), np.errstate(invalid="ignore"):
            check_kl_at_start(wrong, policy="a", reference="b")
    check_kl_at_start(np.array([1e-4, -1e-4, 0.0]), policy="a", reference="b")


DROPOUT = {
    "gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),  # modules
    "llama": ("attention_dropout",),  # a number that the attention hands to its kernel while it trains
}


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_off(family, tmp_path):
    """A model with half of everything dropped trains as one without: sampling and training see one policy."""
    ends = []
    for share in (0.5, 0.0):
        model = tiny_causal(tmp_path / f"m{share}", family, **dict.fromkeys(DROPOUT[family], share))
        subject, _ = train(model, tmp_path / f"out{share}", num_iterations=2, max_steps=2)
        ends.append(weights(subject))
        assert abs(subject.state.log_history[0]["kl_seq"]) < 1e-4
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_the_temperature_is_that_of_sampling_everywhere(temperature, llama, tmp_path):
    """The sampler's log-probabilities are those of TRL's own forward at this temperature; KL is 0 at step 0."""
    arguments = CTRLConfig(**config(tmp_path, max_steps=1, temperature=temperature))
    subject = CTRLTrainer(llama, CTRLReward(token_sum, identity), arguments, train_dataset=rows())
    plain, worst = subject._get_per_token_logps_and_entropies, []

    def spy(model, ids, mask, kept, *args, **kwargs):
        taken = subject._sampled_logps is not None and model is subject.model
        found = plain(model, ids, mask, kept, *args, **kwargs)
        if taken:
            fresh, _, _ = RLOOTrainer._get_per_token_logps_and_entropies(subject, model, ids, mask, kept)
            worst.append(((found[0] - fresh) * mask[:, -kept:]).abs().max().item())
        return found

    subject._get_per_token_logps_and_entropies = spy
    subject.train()
    assert len(worst) == 1 and worst[0] < 2e-5
    assert abs(subject.state.log_history[0]["kl_seq"]) < 1e-4


# -- row 21: truncated sampling in training


@pytest.mark.parametrize("change", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_truncated_sampling_is_refused_in_training(change, tmp_path):
    name, value = next(iter(change.items()))
    with pytest.raises(InputError, match=rf"{name}={value}: .* KL would be those of another"):
        CTRLConfig(**config(tmp_path, **change))
