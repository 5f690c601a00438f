"""The last step of a steered run: along the line from the base to the policy, to where the KL is the target."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from infalign import BestOfN
from infalign.evaluation.limits import Estimate
from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.interpolation import MEASUREMENTS, NEAR, Interpolated, interpolate, search
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from tests.tiny import tiny_causal
from tests.training.test_trainer import config, references, token_sum


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


def trained(model, folder, peft_config=None, **changes):
    settings = {"max_steps": 6, "learning_rate": 0.006, "target_kl": 0.5, "beta": 0.01, **changes}
    subject = CTRLTrainer(
        model,
        CTRLReward(token_sum, identity),
        CTRLConfig(**config(folder / "out", **settings)),
        train_dataset=references(),
        peft_config=peft_config,
        procedure=BestOfN(1),
    )
    subject.train()
    return subject


@pytest.mark.parametrize("power", [1.2, 2.0, 2.7])
@pytest.mark.parametrize("trained_kl", [0.5, 0.97, 1.4, 3.0])
def test_the_weight_is_that_of_the_target(power, trained_kl):
    asked = []

    def kl_at(weight):
        asked.append(weight)
        return Estimate(trained_kl * weight**power, 0.01)

    found = search(kl_at, 1.0)
    wanted = trained_kl ** (-1 / power)
    if not 0.1 <= trained_kl**-0.5 <= 1.5:  # the first guess is out of reach
        assert found == Interpolated(1.0, trained_kl, trained_kl)
    elif 0.1 <= wanted <= 1.5:
        assert abs(found.kl - 1.0) <= NEAR and len(asked) <= MEASUREMENTS
    assert asked[0] == 1.0 and (len(asked) == 1) == (abs(trained_kl - 1) <= NEAR or found.weight == 1.0)


@pytest.mark.parametrize("kl", [0.0, -0.02, 0.2, 400.0])
def test_what_is_out_of_reach_stays(kl):
    """A policy that hardly moved, and one that ran away."""
    assert search(lambda weight: Estimate(kl * weight**2, 0.001), 1.0) == Interpolated(1.0, kl, kl)


def test_a_noisy_measurement_ends_at_the_nearest():
    noise = iter([0.0, 0.3, -0.3, 0.2])
    assert abs(search(lambda weight: Estimate(2.0 * weight**2 + next(noise), 0.1), 1.0).kl - 1.0) <= 0.3


@pytest.mark.parametrize(("kl", "error", "moves"), [(1.12, 0.15, False), (1.12, 0.1, True), (0.8, 0.25, False)])
def test_a_difference_that_may_be_chance_moves_nothing(kl, error, moves):
    asked = []

    def kl_at(weight):
        asked.append(weight)
        return Estimate(kl * weight**2, error)

    found = search(kl_at, 1.0)
    assert (found.weight != 1.0) == moves and (len(asked) > 1) == moves


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_trained_policy_lies_on_the_line_at_the_target(llama, tmp_path):
    """The KL from the sampler's and the reference's own log-probabilities, on samples of other seeds."""
    plain = trained(llama, tmp_path / "plain", kl_interpolation=False)
    moved = trained(llama, tmp_path / "moved")
    found = moved.interpolated
    assert plain.interpolated is None and found is not None and found.weight != 1.0
    base, end = weights_of(plain.ref_model), weights_of(plain.model)
    for name, parameter in moved.model.named_parameters():
        wanted = base[name] + found.weight * (end[name] - base[name])
        torch.testing.assert_close(parameter.detach(), wanted, atol=1e-6, rtol=1e-5)
    logged = [row for row in moved.state.log_history if "weight" in row]
    assert logged == [{"step": 6, "weight": found.weight, "kl": found.kl, "trained_kl": found.trained_kl}]
    moved.args.seed, plain.args.seed = 7, 7
    rows = list(references())
    kls = {}
    for name, subject in (("plain", plain), ("moved", moved)):
        subject.num_generations_eval = 400
        kls[name] = subject.evaluate(rows)["eval_kl_seq"]
    assert abs(kls["moved"] - 0.5) < 0.25  # .02 to .07 over five seeds
    assert abs(kls["plain"] - 0.5) > abs(kls["moved"] - 0.5)


def test_an_adapter_is_moved_as_its_merged_weights_are(llama, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    plain = trained(llama, tmp_path / "plain", lora, kl_interpolation=False, learning_rate=0.03)
    moved = trained(llama, tmp_path / "moved", lora, learning_rate=0.03)
    found = moved.interpolated
    assert found is not None and found.weight != 1.0
    merged = {name: weights_of(copy.deepcopy(one.model).merge_and_unload()) for name, one in
              (("plain", plain), ("moved", moved))}  # fmt: skip
    base = weights_of(copy.deepcopy(plain.model).unload())
    differing = 0
    for name, start in base.items():
        wanted = start + found.weight * (merged["plain"][name] - start)
        torch.testing.assert_close(merged["moved"][name], wanted, atol=1e-5, rtol=1e-4)
        differing += bool((merged["plain"][name] - start).abs().max() > 1e-4)
    assert differing > 0


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}],
    ids=["dora", "modules_to_save"],
)
def test_adapters_without_such_a_line_stay(lora, llama, tmp_path):
    settings = LoraConfig(r=2, target_modules=["q_proj"], **lora)
    assert trained(llama, tmp_path, settings, max_steps=1).interpolated is None


def test_no_line_for_streams_sharded_weights_and_chosen_checkpoints(llama, tmp_path, monkeypatch):
    subject = trained(llama, tmp_path / "one", max_steps=1, kl_interpolation=False)
    monkeypatch.setattr(subject, "_sharding", lambda: "zero3")
    assert interpolate(subject, 0.5) is None
    monkeypatch.undo()
    subject.train_dataset = subject.train_dataset.to_iterable_dataset()
    assert interpolate(subject, 0.5) is None
    constant = trained(llama, tmp_path / "two", max_steps=1, target_kl=None)
    assert constant.interpolated is None and constant.kl_control is None
