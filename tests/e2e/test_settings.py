"""Training settings that people have: LoRA, QLoRA, gradient checkpointing, bf16, trackers, the Hub."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import infalign
from infalign.runtime.config import read_flags
from infalign.stages.calibrate import calibrate, open_table
from infalign.stages.experiment import Experiment
from infalign.stages.policy_folder import save_policy
from infalign.stages.recipe import load_recipe
from infalign.stages.train import checkpoint_of, make_trainer, train, training_arguments
from infalign.stages.training_keys import adapter_of, split_training
from infalign.theory.tilted import tilt
from infalign.theory.transforms import identity
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj", "up_proj"], "learning_rate": 1e-2}


def trained(keys):
    """Calibrate and train a recipe; returns the experiment and the policy's folder."""
    recipe = load_recipe(keys)
    experiment = Experiment(recipe)
    calibrate(recipe, experiment)
    train(recipe, experiment)
    return experiment, experiment.policy_path


def logged(folder, name):
    return [row[name] for row in json.loads((folder / "training_log.json").read_text()) if name in row]


def logits(model):
    return model(torch.tensor([[7, 8, 9, 10]])).logits.detach()


def assert_is_base_and_adapter(policy, base_path):
    """Every weight of the merged policy is the base's plus the adapter's product, to a rounding of float32.

    Of the weights and not of logits: a logit adds up the roundings of all layers, in an order that depends on the
    processor's kernels; a weight of less than 4 is rounded by at most 2**-22 twice, as product and as sum.
    """
    merged, base = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (policy, base_path))
    config = json.loads((policy / "adapter" / "adapter_config.json").read_text())
    learnt = load_file(policy / "adapter" / "adapter_model.safetensors")
    changed = 0
    for name, weight in base.items():
        inside = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = (learnt.get(f"{inside}.lora_{side}.weight") for side in "AB")
        expected = weight.double()
        if down is not None and up is not None:
            expected = expected + config["lora_alpha"] / config["r"] * up.double() @ down.double()
            changed += 1
        assert weight.abs().max() < 4
        torch.testing.assert_close(merged[name].double(), expected, atol=2**-21, rtol=0)
    assert 2 * changed == len(learnt) > 0


class TestLora:
    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("lora")
        keys = {**tiny_experiment(folder), **LORA, "max_steps": 3}
        return keys, infalign.run(keys), folder / "out" / "policy"

    def test_the_policy_is_whole_and_equals_base_and_adapter(self, finished):
        keys, _, policy = finished
        merged = AutoModelForCausalLM.from_pretrained(policy)
        base = AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"])
        plain = logits(base)
        adapted = logits(PeftModel.from_pretrained(base, str(policy / "adapter")))
        # one float32 rounding of the weights, and the roundings of two layers, on logits of up to 20
        torch.testing.assert_close(logits(merged), adapted, atol=1e-3, rtol=0)
        assert_is_base_and_adapter(policy, keys["model_name_or_path"])
        assert (adapted - plain).abs().max() > 1e-3, "the adapter does nothing"

    def test_it_starts_at_kl_zero_and_moves(self, finished):
        _, result, policy = finished
        kl = logged(policy, "kl_seq")
        assert abs(kl[0]) < 1e-4 and max(map(abs, kl[1:])) > 1e-4
        assert result["evaluation"].kl.mean > 0

    def test_the_reference_is_the_base_with_the_adapter_off(self, finished):
        keys, _, _ = finished
        experiment = Experiment(load_recipe(keys))
        subject = make_trainer(experiment, open_table(experiment))
        assert subject.ref_model is None
        trainable = sum(p.numel() for p in subject.model.parameters() if p.requires_grad)
        assert 0 < trainable < 0.5 * sum(p.numel() for p in subject.model.parameters())

    def test_a_pickled_adapter_is_refused(self, finished, tmp_path):
        keys, _, policy = finished
        (tmp_path / "pickled").mkdir()
        shutil.copy(policy / "adapter" / "adapter_config.json", tmp_path / "pickled")
        (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"")
        experiment = Experiment(load_recipe({**keys, "initial_weights": str(tmp_path / "pickled")}))
        with pytest.raises(InputError, match=r"no adapter_model.safetensors"):
            make_trainer(experiment, open_table(experiment))

    def test_an_adapter_goes_on_from_its_weights(self, finished, tmp_path):
        keys, _, policy = finished
        new = {**keys, "output_dir": str(tmp_path / "new"), "initial_weights": str(policy / "adapter"), "max_steps": 1}
        experiment = Experiment(load_recipe(new))
        calibrate(experiment.recipe, experiment)
        subject = make_trainer(experiment, open_table(experiment))
        save_policy(subject, tmp_path / "saved", experiment)
        old, copied = (
            load_file(path / "adapter_model.safetensors")
            for path in (policy / "adapter", tmp_path / "saved" / "adapter")
        )
        assert old.keys() == copied.keys()
        assert all(torch.equal(old[name], copied[name]) for name in old)


@pytest.mark.parametrize(
    ("given", "adapted"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ([r".*\.[qv]_proj"], {"q_proj", "v_proj"}),
    ],
)
def test_one_name_of_a_module(given, adapted, tmp_path):
    """TRL makes a pattern of it, which has to match a module's whole path."""
    keys = {**tiny_experiment(tmp_path), "use_peft": True}
    flags = read_flags(["--lora_target_modules", f"[{json.dumps(given[0])}]"])
    bare = read_flags(["--lora_target_modules", given[0]])
    as_text = {**keys, "lora_target_modules": given[0]}
    for recipe in (load_recipe(keys, flags), load_recipe(keys, bare), load_recipe(as_text)):
        config = adapter_of(split_training(recipe.training)[1])
        names = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), config).state_dict()
        assert {name.split(".")[-4] for name in names if "lora_A" in name} == adapted


@pytest.mark.parametrize("given", [True, "true"])
def test_going_on_as_a_recipe_of_trl_says_it(given, tmp_path):
    recipe = load_recipe({**tiny_experiment(tmp_path), "resume_from_checkpoint": given})
    assert checkpoint_of(recipe) is True
    named = load_recipe(tiny_experiment(tmp_path / "b"), read_flags(["--resume_from_checkpoint", "checkpoint-2"]))
    assert checkpoint_of(named) == "checkpoint-2"


@pytest.mark.parametrize("given", [{"target_kl": 0.5}, {"target_kl": None, "beta": 0.3}], ids=["a KL", "a beta"])
def test_calibrate_tells_what_few_samples_cost(given, tmp_path, capsys):
    calibrate(load_recipe({**tiny_experiment(tmp_path), "transform": "identity", **given}))
    kl = given["target_kl"] or tilt(identity, beta=0.3).kl
    assert f" win rate at KL {kl:.2f} nats\n" in capsys.readouterr().out.partition("expected cost of this K: ")[2]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "transform optimal, beta {0.beta:.4g} at first, steered to 0.5 nats"),
        ({"kl_control": False}, "transform optimal, beta {0.beta:.4g},"),
        ({"beta_start": 2.0}, "transform optimal, beta from 2 down to {0.beta:.4g}"),
        ({"objective": "direct"}, "direct objective, beta {0.beta:.4g} at first, steered to 0.5 nats"),
    ],
)
def test_the_dry_run_tells_the_beta_that_training_starts_from(changes, line, tmp_path, capsys):
    """It told the optimum's, which 12 samples a prompt do not start from; and a transform of the direct objective."""
    keys = {**tiny_experiment(tmp_path), **changes}
    infalign.run(keys, dry=True)
    experiment = Experiment(load_recipe(keys))
    arguments = training_arguments(experiment)
    assert line.format(arguments) in capsys.readouterr().out
    assert (arguments.beta < 0.95 * experiment.objective.beta) == (not changes)


def test_the_direct_objective_has_no_cost_of_few_samples(tmp_path, capsys):
    """The cost is that of a transform of quantiles, which it has none of."""
    calibrate(load_recipe({**tiny_experiment(tmp_path), "objective": "direct"}))
    told = capsys.readouterr().out
    assert "calibration: " in told and "expected cost" not in told


def test_one_module_is_trained(tmp_path):
    keys = {**tiny_experiment(tmp_path), **LORA, "lora_target_modules": ["q_proj"]}
    infalign.run(keys, dry=True)
    _, policy = trained(keys)
    assert {name.split(".")[-3] for name in load_file(policy / "adapter" / "adapter_model.safetensors")} == {"q_proj"}


@pytest.mark.parametrize("hidden", [128, 32])
def test_qlora(hidden, tmp_path):
    """A quantised base is what rollouts come from: calibration draws from it, and step 0 finds KL 0 and mean 1/2."""
    changes = {**LORA, "load_in_4bit": True, "max_steps": 2, "bf16": False}
    keys = tiny_experiment(tmp_path)
    tiny_causal(tmp_path / "model", "llama", hidden=hidden)  # four-bit blocks hold 64 numbers
    experiment, policy = trained({**keys, **changes})
    quantised = experiment.model(experiment.base_path, experiment.quantization)
    assert any(parameter.dtype == torch.uint8 for parameter in quantised.parameters())
    assert "load_in_4bit" in experiment.sampling_parts(experiment.base_path, "calibration")
    assert abs(logged(policy, "kl_seq")[0]) < 0.05
    learnt = load_file(policy / "adapter" / "adapter_model.safetensors")
    assert all(bool(value.any()) for name, value in learnt.items() if "lora_B" in name), "no gradient arrives"
    merged = AutoModelForCausalLM.from_pretrained(policy)
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())
    assert_is_base_and_adapter(policy, experiment.base_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"dtype": "bfloat16", "bf16": True},
        {**LORA, "bf16": True},
        {**LORA, "gradient_checkpointing": True},
        {"bf16": True, "gradient_checkpointing": True},
    ],
    ids=["checkpointing", "bf16", "bfloat16 weights", "lora in bf16", "lora, checkpointing", "bf16, checkpointing"],
)
def test_memory_savers_train(changes, tmp_path):
    _, policy = trained({**tiny_experiment(tmp_path), **changes})
    kl = logged(policy, "kl_seq")
    assert len(kl) == 2 and abs(kl[0]) < 0.05
    assert all(bool(torch.isfinite(p).all()) for p in AutoModelForCausalLM.from_pretrained(policy).parameters())


def test_gradient_checkpointing_trains_like_the_plain_path(tmp_path):
    weights = []
    for name in (False, True):
        keys = {**tiny_experiment(tmp_path / str(name)), "gradient_checkpointing": name, "optim": "sgd"}
        weights.append(load_file(trained(keys)[1] / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-6, rtol=0)


def test_experts_whose_config_asks_for_router_logits(tmp_path):
    """Every stage: samples, log-probabilities and KL leave the load-balancing loss out; the saved config asks again."""
    keys = tiny_experiment(tmp_path)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    tiny_causal(tmp_path / "model", "qwen3_moe", output_router_logits=True, **sizes)
    result = infalign.run(keys)
    policy = tmp_path / "out" / "policy"
    assert abs(logged(policy, "kl_seq")[0]) < 1e-4 and logged(policy, "aux_loss")
    assert result["evaluation"].kl.mean > 0
    assert json.loads((policy / "config.json").read_text())["output_router_logits"] is True


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trained({**tiny_experiment(tmp_path), "report_to": "tensorboard"})
    events = EventAccumulator(str(next((tmp_path / "runs").rglob("events.out.*")).parent)).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/kl_seq", "train/reward/calibrated", "train/reward/raw"} <= set(tags)
    assert [event.step for event in events.Scalars("train/kl_seq")] == [1, 2]


def test_the_model_card_says_what_was_done(tmp_path):
    _, policy = trained(tiny_experiment(tmp_path))
    card = (policy / "README.md").read_text()
    assert "2412.19792" in card and "BestOfN(2)" in card and "infalign" in card
    assert "| reward | score |" in card and "target KL 0.5" in card and "`model`" in card
    assert str(tmp_path) not in card, "a path of this machine"


def test_the_hub_keys_pass_through(tmp_path):
    keys = {**tiny_experiment(tmp_path), "push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True}
    from infalign.stages.train import training_arguments  # noqa: PLC0415

    arguments = training_arguments(Experiment(load_recipe(keys)))
    assert (arguments.push_to_hub, arguments.hub_model_id, arguments.hub_private_repo) == (True, "me/mine", True)


def test_what_is_pushed_is_the_merged_policy(tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr("infalign.stages.policy_folder.upload_folder", lambda **words: pushed.update(words))
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self, token=None: {"name": "me"})
    monkeypatch.setattr(CTRLTrainer, "init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/mine"))
    keys = {**tiny_experiment(tmp_path), **LORA, "push_to_hub": True, "hub_model_id": "me/mine"}
    _, policy = trained(keys)
    assert pushed["repo_id"] == "me/mine" and pushed["folder_path"] == policy
    assert (policy / "model.safetensors").is_file() and "checkpoint-*" in pushed["ignore_patterns"]
