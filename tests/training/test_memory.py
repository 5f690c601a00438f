"""The memory formulas against the tensors of real runs, counted one by one.

Run as a module it is the worker of the launched tests: it trains two steps and writes what its process holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, TrainerCallback

import infalign
from infalign.runtime.distributed import end_process, rank
from infalign.stages import estimate
from infalign.training.memory import PolicyShape, Setup, cache_bytes_per_token, rollout_bytes, table, training_bytes
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal
from tests.training.test_trainer import trainer

ROOT = Path(__file__).parents[2]
SIZE = {"hidden": 64, "vocab_size": 500}


def held(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of tensors, each storage once."""
    storages = {one.untyped_storage().data_ptr(): one for one in tensors if one is not None and one.numel()}
    return sum(one.numel() * one.element_size() for one in storages.values())


def moments(optimizer: Any) -> int:
    """Bytes of Adam's moments (its step counter, 4 bytes a tensor, left out)."""
    states = optimizer.state.values()
    return held(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))


class Gradients(TrainerCallback):
    """Counts the gradients' bytes just before a step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.bytes = held(parameter.grad for parameter in model.parameters())


def shape_of(model: Any) -> PolicyShape:
    """The shape of a tiny llama."""
    config = model.config
    base = [parameter.numel() for name, parameter in model.named_parameters() if "lora" not in name]
    return PolicyShape(
        sum(base), config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.vocab_size
    )


@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize("adapted", [False, True])
def test_one_process_holds_what_the_formula_says(width, adapted, tmp_path):
    model = tiny_causal(tmp_path / "model", "llama", **SIZE)
    settings: dict[str, Any] = {"model_init_kwargs": {"dtype": {4: "float32", 2: "bfloat16"}[width]}}
    subject = run(model, tmp_path, adapted, **settings)
    counted = Gradients()
    subject.add_callback(counted)
    subject.train()
    adapter = sum(p.numel() for p in subject.model.parameters() if p.requires_grad) if adapted else 0
    method = "lora" if adapted else "full"
    setup = Setup(width=width, mixed=False, method=method, adapter=adapter)
    assert training_bytes(shape_of(subject.model), setup) == {
        "weights": held(subject.model.parameters()),
        "gradients": counted.bytes,
        "DDP buckets": 0,
        "float32 copy": 0,
        "Adam moments": moments(subject.optimizer.optimizer),
        "float32 gradients": 0,
        "reference": 0 if subject.ref_model is None else held(subject.ref_model.parameters()),
        "gathered weights": 0,
    }
    assert adapted == (subject.ref_model is None)


def run(model: str, folder: Path, adapted: bool, **settings: Any) -> Any:
    """A tiny trainer, with LoRA when `adapted`."""
    if not adapted:
        return trainer(model, folder, **settings)
    from peft import LoraConfig  # noqa: PLC0415 - seconds

    from infalign.theory.transforms import identity  # noqa: PLC0415
    from infalign.training.config import CTRLConfig  # noqa: PLC0415
    from infalign.training.reward import CTRLReward  # noqa: PLC0415
    from infalign.training.trainer import CTRLTrainer  # noqa: PLC0415
    from tests.training.test_trainer import config, references, token_sum  # noqa: PLC0415

    return CTRLTrainer(
        model,
        CTRLReward(token_sum, identity),
        CTRLConfig(**config(folder, **settings)),
        train_dataset=references(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


def test_the_cache_of_a_forward_pass(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama", **SIZE), dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    counted = held(part for layer in cache.layers for part in (layer.keys, layer.values))
    assert rollout_bytes(shape_of(model), rows=3, tokens=7, width=4)["KV cache"] == counted
    assert cache_bytes_per_token(shape_of(model), 4) * 21 == counted


@pytest.mark.parametrize("adapter", [{}, {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}])
def test_the_dry_run_counts_with_the_formulas(adapter, tmp_path, capsys):
    keys = tiny_experiment(tmp_path)
    found = infalign.run({**keys, **adapter}, dry=True)["bytes"]
    model = AutoModelForCausalLM.from_pretrained(str(keys["model_name_or_path"]), dtype=torch.float32)
    numbers = 2 * 4 * (32 + 32 + 32 + 16) if adapter else 0  # two layers, rank 4, from 32 to 32 and to 16
    setup = Setup(width=4, mixed=False, method="lora" if adapter else "full", adapter=numbers)
    expected = training_bytes(shape_of(model), setup)
    assert {name: found[name] for name in expected} == expected
    assert found["KV cache"] % cache_bytes_per_token(shape_of(model), 4) == 0 and found["reward model"] == 0
    out = capsys.readouterr().out
    assert f"memory of each of 1 process(es), ddp, {setup.method}" in out
    assert ("reference" in out) == (not adapter)


def test_the_dry_run_suggests_a_batch_that_fits(tmp_path, capsys, monkeypatch):
    """The largest power of two whose cache and logits take half of what the policy leaves free, counted by hand."""
    keys = tiny_experiment(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(str(keys["model_name_or_path"]), dtype=torch.float32)
    weights = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(estimate, "_free_bytes", lambda device: weights + 1_000_000)
    found = infalign.run(keys, dry=True)["tokens_per_batch"]
    longest = 5 + 5  # tokens of the longest prompt, and of a completion at most
    row = longest * 2 * 2 * 16 * 4 + 8 * model.config.vocab_size  # two layers, keys and values, one head of 16, float32
    rows = int(500_000 / row)
    assert found <= rows * longest < 2 * found
    assert f"half of that holds up to tokens_per_batch {found:,}\n" in capsys.readouterr().out
    monkeypatch.setattr(estimate, "_free_bytes", lambda device: weights + 10)
    assert infalign.run(keys, dry=True)["tokens_per_batch"] == 0
    assert "half of that holds not even one sample\n" in capsys.readouterr().out


def test_the_dry_run_refuses_an_adapter_that_does_not_fit(tmp_path):
    keys = {**tiny_experiment(tmp_path), "use_peft": True, "lora_target_modules": ["nope"]}
    with pytest.raises(InputError, match="the adapter's keys do not fit: Target modules"):
        infalign.run(keys, dry=True)


def test_the_limits():
    """Figure 1 of the ZeRO paper: 7.5e9 numbers on 64 processes, 2 + 2 + 12 bytes: 120, 31.4, 16.6 and 1.9 GB."""
    policy = PolicyShape(7_500_000_000, 1, 1, 1, 1)
    kept = ("weights", "gradients", "float32 copy", "Adam moments")
    for sharding, processes, gigabytes in (
        ("zero1", 1, 120.0), ("zero1", 64, 31.4), ("zero2", 64, 16.6), ("zero3", 64, 1.9),
    ):  # fmt: skip
        found = training_bytes(policy, Setup(sharding, processes=processes))
        assert sum(found[name] for name in kept) / 1e9 == pytest.approx(gigabytes, abs=0.06), sharding


def test_more_processes_never_need_more_and_adapters_less():
    policy, adapter = PolicyShape(7_000_000_000, 28, 4, 128, 150_000, 10**9), 40_000_000
    for sharding in ("zero1", "zero2", "zero3", "fsdp2"):
        totals = [sum(training_bytes(policy, Setup(sharding, processes=count)).values()) for count in (2, 8, 64)]
        assert totals == sorted(totals, reverse=True)
        full, lora, qlora = (
            sum(training_bytes(policy, Setup(sharding, processes=8, method=method, adapter=numbers)).values())
            for method, numbers in (("full", 0), ("lora", adapter), ("qlora", adapter))
        )
        assert lora < full and (qlora < lora or sharding in ("zero3", "fsdp2"))  # packed weights are not split


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sharding": "zero4"}, "sharding must be one of ddp, zero1, zero2, zero3, fsdp2, got 'zero4'"),
        ({"method": "dora"}, "method must be one of full, lora, qlora, got 'dora'"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"width": 8}, r"width must be 2 \(bfloat16\) or 4 \(float32\) bytes, got 8"),
        ({"method": "lora"}, "adapter must be above 0 with lora and qlora and 0 with full, got 0"),
        ({"adapter": 5}, "adapter must be above 0 with lora and qlora and 0 with full, got 5"),
    ],
)
def test_set_ups_that_can_not_be(keys, message):
    with pytest.raises(InputError, match=message):
        Setup(**keys)


def test_the_readme_shows_the_table():
    assert table() in (ROOT / "launch" / "README.md").read_text(encoding="utf-8")


# --- under DeepSpeed, on two processes --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "mixed"), [("zero1", True), ("zero2", False), ("zero2", True), ("zero3", False), ("zero3", True)]
)
def test_two_deepspeed_processes_hold_what_the_formula_says(sharding, mixed, tmp_path):
    """Within 2 %: partitions are padded to equal, aligned lengths."""
    import deepspeed  # noqa: F401, PLC0415 - a missing install fails, it does not skip

    stage = sharding[-1]
    file = ROOT / "launch" / f"cpu_zero{max(int(stage), 2)}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--zero_stage", stage]
    launch += ["--mixed_precision", "bf16" if mixed else "no"]
    model = tiny_causal(tmp_path / "model", "llama", **SIZE)
    worker = ["-m", "tests.training.test_memory", model, str(tmp_path), str(mixed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launch, *worker],
        capture_output=True, text=True, env=environment, timeout=400, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    policy = shape_of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    expected = training_bytes(policy, Setup(sharding, processes=2, width=4, mixed=mixed))
    for process in (0, 1):
        counted = json.loads((tmp_path / f"held-{process}.json").read_text())
        for name, size in counted.items():
            assert size == pytest.approx(expected[name], rel=0.02), f"{name} on process {process}"


def held_by_engine(subject: Any) -> dict[str, int]:
    """What a process of a DeepSpeed run holds between two steps."""
    optimizer = subject.model_wrapped.optimizer
    found = {"Adam moments": moments(optimizer.optimizer)}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        weights = [parameter.ds_tensor for parameter in subject.model.parameters()]
        whole = {one.untyped_storage().data_ptr() for one in weights}
        copies = [c for c in optimizer.fp32_partitioned_groups_flat if c.untyped_storage().data_ptr() not in whole]
        reference = [parameter.ds_tensor for parameter in subject.ref_model.parameters()]
        found["gradients"] = held([optimizer.grad_partitions_flat_buffer])
        return found | {"weights": views(weights), "float32 copy": held(copies), "reference": views(reference)}
    weights, reference = list(subject.model.parameters()), list(subject.ref_model.parameters())
    found["float32 copy"] = held(optimizer.single_partition_of_fp32_groups)
    return found | {"weights": views(weights), "reference": views(reference)}


def views(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors that are parts of one buffer."""
    return sum(one.numel() * one.element_size() for one in tensors)


def work(model: str, folder: Path, mixed: bool) -> None:
    """Train two steps; write what this process holds."""
    subject = trainer(model, folder / "out", per_device_train_batch_size=4, bf16=mixed)
    subject.train()
    (folder / f"held-{rank()}.json").write_text(json.dumps(held_by_engine(subject)))


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True")
    end_process(0)
