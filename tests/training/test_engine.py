"""Rollouts of an engine: seen to be the policy's, weighed by what they differ by, and stopped where they are not.

The engine here is a copy of the policy that samples with the package's own sampler; a real one is in `tests/engines`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.generation.hf import decode_rows
from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.engine import check_engine, engine_logps, importance_weights, token_kl
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError, SamplingSettings
from tests.tiny import tiny_causal
from tests.training.test_resume import rows
from tests.training.test_trainer import config, token_sum


def test_the_divergence_and_the_weights_by_enumeration():
    """Sums over all answers of two tables in place of samples: KL(mu || pi), and every expectation under pi."""
    rng = np.random.default_rng(0)
    log_mu, log_pi = (torch.tensor(rng.normal(size=50)).log_softmax(0) for _ in range(2))
    log_ratios, mu = log_pi - log_mu, log_mu.exp()
    exact = float((mu * -log_ratios).sum())
    found = sum(
        float(share) * token_kl(ratio.reshape(1, 1), torch.ones(1, 1))[1]
        for share, ratio in zip(mu, log_ratios, strict=True)
    )
    assert found == pytest.approx(exact, rel=1e-6)
    values = torch.tensor(rng.normal(size=50))
    weighed = float((mu * importance_weights(log_ratios, "sequence_truncate", None, None) * values).sum())
    assert weighed == pytest.approx(float((log_pi.exp() * values).sum()), abs=1e-12)
    cut = importance_weights(log_ratios, "sequence_truncate", 0.5, 2.0)
    left = importance_weights(log_ratios, "sequence_mask", 0.5, 2.0)
    assert float(cut.min()) == 0.5 and float(cut.max()) == 2.0
    assert torch.equal(left == 0, (cut == 0.5) | (cut == 2.0)) and 0 < int((left == 0).sum()) < 50


def test_log_probabilities_as_the_engine_gives_them():
    found = engine_logps([[[-1.0], [-2.0]], [[-0.5]], [-3.0, None]], 3, torch.device("cpu"))
    assert found[:2].tolist() == [[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]]
    assert found[2, 0] == -3.0 and torch.isnan(found[2, 1])


def test_what_is_tolerated():
    check_engine(1e-4, 0.04, 1e-3, 0)
    check_engine(5e-3, 0.04, 1e-3, 0)  # 8 tokens: under the slack of a completion
    check_engine(9e-4, 0.9, 1e-3, 7)  # a thousand tokens in half precision
    for kl_token, kl, step, why in (
        (0.02, 0.2, 0, "its model, temperature or precision is another"),
        (0.02, 0.2, 3, "the weights were not brought over"),
        (float("nan"), float("nan"), 0, "its model"),
    ):
        with pytest.raises(InputError, match=why):
            check_engine(kl_token, kl, 1e-3, step)


class Engine:
    """A copy of the policy beside it, with the face of TRL's `VLLMGeneration`."""

    broken = ""

    def __init__(self, model, processing_class, temperature=1.0, max_completion_length=5, **_):
        self.policy, self.model = model, AutoModelForCausalLM.from_pretrained(model.name_or_path)
        self.settings = SamplingSettings(max_tokens=max_completion_length, temperature=temperature)
        self.ends, self.logprobs, self.number = (processing_class.eos_token_id,), None, 0
        if self.broken == "other model":
            for parameter in self.model.parameters():
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3

    def sync_weights(self):
        if not self.broken:
            self.model.load_state_dict(self.policy.state_dict())

    def generate(self, prompts, images, num_generations, profiler):
        self.number += 1
        uniforms = np.random.default_rng(self.number).random((len(prompts), self.settings.max_tokens))
        self.model.eval()
        drawn = decode_rows(self.model, prompts, uniforms, self.settings, self.ends)
        logps = None if self.logprobs is None else [[[one] for one in row] for _, row in drawn]
        return prompts, [ids for ids, _ in drawn], logps, None


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains eight steps with the engine; returns the trainer."""
    monkeypatch.setattr("trl.trainer.rloo_trainer.VLLMGeneration", Engine)
    monkeypatch.setattr("infalign.training.trainer.missing_packages", lambda _: [])
    llama = tiny_causal(tmp_path / "llama", "llama")

    def train(broken="", **changes):
        monkeypatch.setattr(Engine, "broken", broken)
        settings = {"use_vllm": True, "max_steps": 8, "learning_rate": 3e-2, "max_grad_norm": 10.0, **changes}
        arguments = CTRLConfig(**config(tmp_path / "out", **settings))
        subject = CTRLTrainer(llama, CTRLReward(token_sum, identity), arguments, train_dataset=rows())
        subject.train()
        return subject

    return train


def logged(subject, name):
    return [row[name] for row in subject.state.log_history if name in row]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_synced_engine_is_the_policy(run, temperature):
    subject = run(temperature=temperature)
    assert len(logged(subject, "vllm/kl_token")) == 8 and max(logged(subject, "vllm/kl_token")) < 1e-8
    assert logged(subject, "vllm/weight") == pytest.approx([1.0] * 8, abs=1e-4)
    assert abs(logged(subject, "kl_seq")[0]) < 1e-5 and max(logged(subject, "kl_seq")) > 0.05


@pytest.mark.parametrize(
    ("broken", "why"), [("not synced", "at step [1-7] .*: the weights were not brought"), ("other model", "at step 0 ")]
)
def test_an_engine_with_other_weights_stops_the_run(run, broken, why):
    with pytest.raises(InputError, match=f"rollouts of vLLM are not the policy's: KL .*{why}"):
        run(broken)


def test_completions_are_weighed(run):
    """Without new weights, and tolerated, what the policy has left behind is weighed less; or not, where so asked."""
    subject = run("not synced", vllm_tolerance=100.0)
    assert max(logged(subject, "vllm/kl_seq")) > 0.05 and min(logged(subject, "vllm/weight")) < 0.999
    plain = run("not synced", vllm_tolerance=100.0, vllm_importance_sampling_correction=False)
    assert not logged(plain, "vllm/weight") and logged(plain, "vllm/kl_seq")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"vllm_importance_sampling_mode": "token_mask"}, "must be sequence_mask or sequence_truncate"),
        ({"vllm_tolerance": 0.0}, "vllm_tolerance must be above 0"),
        ({"vllm_importance_sampling_clip_max": 0.5}, "must have 1 between them, got None and 0.5"),
    ],
)
def test_mistakes(keys, told, tmp_path):
    with pytest.raises(InputError, match=told):
        CTRLConfig(**config(tmp_path, **keys))
