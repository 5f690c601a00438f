"""Numbers that are not finite: the step is left out, too many stop the run, and no such model is ever saved."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from infalign.training.checkpoints import newest_whole
from infalign.types import TrainingError
from tests.faults import test_rewards
from tests.tiny import tiny_causal
from tests.training import test_offline
from tests.training.test_resume import assert_same, final


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module", params=["online", "offline"])
def make(request, llama):
    """Makes a trainer with a checkpoint after every step, `make(folder, **changes)`."""
    if request.param == "online":
        return functools.partial(test_rewards.make, llama)
    samples = test_offline.base_samples(llama)

    def offline(folder, **changes):
        settings = {"max_steps": test_rewards.STEPS, "save_strategy": "steps", "save_steps": 1, **changes}
        return test_offline.trainer(llama, folder, samples, **settings)

    return offline


class Watch(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())


def spoil_gradients(subject, value: float, steps: set[int]) -> Watch:
    """One entry of one parameter's gradient becomes `value` at the given steps."""
    parameter = list(subject.model.parameters())[3]

    def hook(gradient):
        if subject.state.global_step not in steps:
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[5] = value
        return spoiled

    parameter.register_hook(hook)
    watch = Watch()
    subject.add_callback(watch)
    return watch


def spoil_loss(subject, steps: set[int]) -> Watch:
    """The log-probabilities that the loss is made of become NaN at the given steps."""
    plain = subject._get_per_token_logps_and_entropies

    def spoiled(*args, **kwargs):
        logps, *rest = plain(*args, **kwargs)
        bad = torch.is_grad_enabled() and subject.state.global_step in steps
        return (logps * math.nan if bad else logps, *rest)

    subject._get_per_token_logps_and_entropies = spoiled
    watch = Watch()
    subject.add_callback(watch)
    return watch


def is_sound(checkpoint: Path) -> bool:
    """Weights and optimizer state of a checkpoint are finite."""
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = [value for one in optimizer.values() for value in one.values() if torch.is_tensor(value)]
    tensors = [*load_file(checkpoint / "model.safetensors").values(), *moments]
    return len(moments) > 0 and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_its_step(value, clip, make, tmp_path, capsys):
    subject = make(tmp_path, max_steps=4, max_grad_norm=clip, save_strategy="no")
    watch = spoil_gradients(subject, value, {2})
    subject.train()
    moved = [not torch.equal(one, other) for one, other in zip(watch.weights, watch.weights[1:], strict=False)]
    assert moved == [True, False, True], "the third step, and it alone, moves no weight"
    assert subject.not_finite.skipped == 1 and subject.state.global_step == 4
    assert bool(torch.isfinite(watch.weights[-1]).all())
    assert "warning: step 3 is skipped: its loss or gradients are not finite" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_skips_its_step(make, tmp_path, capsys):
    """One micro-step of two: the whole step goes, as its gradient would be half of one."""
    layout = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    subject = make(tmp_path, max_steps=3, **layout)
    watch = spoil_loss(subject, {1})
    subject.train()
    assert torch.equal(watch.weights[0], watch.weights[1]) and not torch.equal(watch.weights[1], watch.weights[2])
    assert subject.not_finite.skipped == 1
    assert "step 2 is skipped" in capsys.readouterr().err


def test_two_in_a_row_are_survived_and_a_good_step_starts_the_count_anew(make, tmp_path):
    subject = make(tmp_path, max_steps=6, save_strategy="no")
    spoil_gradients(subject, math.nan, {0, 1, 3, 4})
    subject.train()
    assert (subject.not_finite.skipped, subject.not_finite.in_a_row) == (4, 0)


@pytest.mark.parametrize("spoil", ["gradient", "loss"])
def test_three_in_a_row_stop_and_the_newest_checkpoint_goes_on(spoil, make, tmp_path):
    subject = make(tmp_path / "bad", max_steps=4, save_total_limit=1)
    steps = {1, 2, 3}
    watch = spoil_gradients(subject, math.inf, steps) if spoil == "gradient" else spoil_loss(subject, steps)
    with pytest.raises(TrainingError, match=r"^3 steps in a row had a loss or gradients .* \(the last: 4\): lower"):
        subject.train()
    assert len(watch.weights) == 3 and all(torch.equal(one, watch.weights[0]) for one in watch.weights)
    newest, skipped = newest_whole(tmp_path / "bad")
    assert newest == tmp_path / "bad" / "checkpoint-3" and not skipped and is_sound(newest)
    resumed = make(tmp_path / "bad", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert all(bool(torch.isfinite(value).all()) for value in final(resumed)[0].values())


def spoil_weights(subject, step: int) -> None:
    """A weight becomes infinite at the end of a step, before anything is saved."""

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                list(model.parameters())[1].data.view(-1)[0] = math.inf

    subject.callback_handler.callbacks.insert(0, Break())


def test_a_model_that_is_not_finite_is_never_saved(make, tmp_path):
    """Rotation keeps one checkpoint: the sound one, from which the run goes on as if nothing had been."""
    whole = make(tmp_path / "whole")
    whole.train()
    subject = make(tmp_path / "bad", save_total_limit=1)
    spoil_weights(subject, 2)
    with pytest.raises(
        TrainingError, match=r"weights are not finite \(model.layers.0.*\): it is not saved; go on from"
    ):
        subject.train()
    newest, _ = newest_whole(tmp_path / "bad")
    assert newest == tmp_path / "bad" / "checkpoint-1" and is_sound(newest)
    assert {path.parent for path in (tmp_path / "bad").rglob("*.safetensors")} == {newest}
    resumed = make(tmp_path / "bad")
    resumed.train(resume_from_checkpoint=True)
    assert_same(final(resumed), final(whole))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_save_model_refuses_and_leaves_no_file(value, make, tmp_path):
    subject = make(tmp_path / "out", save_strategy="no")
    with torch.no_grad():
        subject.model.lm_head.weight[3, 4] = value
    with pytest.raises(TrainingError, match=r"weights are not finite \(lm_head.weight\)"):
        subject.save_model(str(tmp_path / "policy"))
    assert not list(tmp_path.rglob("*.safetensors"))
