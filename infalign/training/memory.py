"""Bytes that a training run holds on each process, by formula; `python -m infalign.training.memory` prints a table.

T trained numbers (the policy's P, or an adapter's), F frozen ones (0, or P), N processes, t and w bytes of a trained
and of a frozen number (4 float32, 2 bfloat16; under bf16 mixed precision DeepSpeed stores all in 2):

| bytes on each process | ddp | zero1 | zero2 | zero3 | fsdp2 |
|---|---|---|---|---|---|
| weights | T t + F w | T t + F w | T t + F w | (T t + F w) / N | (T t + F w) / N |
| gradients | T t | T t | T t / N | T t / N | T t / N |
| DDP's buckets, N > 1 | T t | | | | |
| float32 copy of the weights | | 4 T / N | 4 T / N | 4 T / N | |
| Adam's two moments | 2 T t | 8 T / N | 8 T / N | 8 T / N | 2 T t / N |
| float32 gradients of a step, none if t = 4 | | 4 T / N | 4 T / N | 4 min(T / N, 1e9) | |
| reference policy, none with adapters | P w | P w | P w | P w / N | P w / N |
| weights gathered for rollouts, N > 1 | | | | T t + F w | |

Their sum is an upper bound: gathered weights and the gradients of a step are not there at the same time.

Sources: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3.1 and figure 1 (2 + 2 + K bytes, K = 12); Hu et al.
2021, LoRA, arXiv:2106.09685; Dettmers et al. 2023, QLoRA, arXiv:2305.14314 (blocks of 64). What the libraries do was
read in deepspeed 0.19 and accelerate 1.15; `tests/training/test_memory.py` compares with tensors of real runs.

Not counted: activations, a gathered layer, the communication buffers of DeepSpeed (2 GiB or so) and the allocator's
waste. Leave a fifth of the device free. DDP and FSDP leave the weights as they were loaded: with `dtype: bfloat16` DDP
keeps Adam's moments in bfloat16 too, which is small and imprecise; DeepSpeed and FSDP2 (under bf16) keep float32 ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from infalign.types import InputError

Sharding = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
Method = Literal["full", "lora", "qlora"]

GIB = 2**30
FLOAT32 = 4
DRAW = 8  # bytes a candidate token: float32 logits, and once more in whole blocks
NF4 = 0.5 + 4 / 64  # bytes a number of a bitsandbytes 4-bit weight: 4 bits and a float32 scale for every 64
SUB_GROUP = 10**9  # numbers that ZeRO-3 updates at a time (DeepSpeed's sub_group_size)


@dataclass(frozen=True)
class PolicyShape:
    """What the memory of a causal language model follows from.

    `parameters` counts all numbers, `embeddings` those of input embeddings and output head (never quantised);
    `kv_heads` x `head_dim` is the width of a layer's keys, and of its values.
    """

    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    embeddings: int = 0


@dataclass(frozen=True)
class Setup:
    """How it is trained.

    Args:
        sharding: what is split over the processes.
        processes: N, on all machines together.
        width: bytes of a weight as loaded (the recipe's `dtype`): 4 or 2.
        mixed: bf16 mixed precision, the default on an accelerator.
        method: every weight, or an adapter on a plain or a 4-bit base.
        adapter: numbers of the adapter (T), for lora and qlora.
        gather: ZeRO-3 gathers the weights on every process for rollouts (TRL's `ds3_gather_for_generation`).

    Raises:
        InputError: an unknown sharding or method, or numbers that can't be.
    """

    sharding: Sharding = "ddp"
    processes: int = 1
    width: int = 2
    mixed: bool = True
    method: Method = "full"
    adapter: int = 0
    gather: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("sharding", get_args(Sharding)), ("method", get_args(Method))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.processes < 1:
            raise InputError(f"processes must be at least 1, got {self.processes}")
        if self.width not in (2, 4):
            raise InputError(f"width must be 2 (bfloat16) or 4 (float32) bytes, got {self.width}")
        if (self.method == "full") == bool(self.adapter):
            raise InputError(f"adapter must be above 0 with lora and qlora and 0 with full, got {self.adapter}")

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed holds the weights."""
        return self.sharding.startswith("zero")

    @property
    def stored(self) -> int:
        """w, bytes of a frozen or a DeepSpeed weight: DeepSpeed casts everything to bfloat16 under bf16."""
        return 2 if self.deepspeed and self.mixed else self.width

    @property
    def trained(self) -> int:
        """t, bytes of a trained number: adapters on a bfloat16 base are float32 (PEFT), TRL makes QLoRA's bfloat16."""
        if self.deepspeed:
            return self.stored
        if self.sharding == "fsdp2" and self.mixed and self.method != "qlora":
            return FLOAT32
        return {"full": self.width, "lora": FLOAT32, "qlora": 2}[self.method]

    def share(self, size: float, *shardings: Sharding) -> float:
        """`size` over the processes under one of `shardings`, whole under the others."""
        return size / self.processes if self.sharding in shardings else size


def training_bytes(policy: PolicyShape, setup: Setup) -> dict[str, int]:
    """Bytes on each process of everything that lasts or peaks in a training step, by what holds them.

    Full training of 10 numbers on two ZeRO-2 processes under bf16: 20 of weights and 20 of the reference whole; half of
    2 x 10 gradients, of a 4 x 10 copy, of 8 x 10 moments, of 4 x 10 gradients in the step.

    >>> tiny = PolicyShape(10, layers=1, kv_heads=1, head_dim=2, vocabulary=3)
    >>> [size for size in training_bytes(tiny, Setup("zero2", processes=2)).values() if size]
    [20, 10, 20, 40, 20, 20]
    """
    trained = setup.adapter or policy.parameters
    found = {
        "weights": weight_bytes(policy, setup),
        "gradients": setup.share(trained * setup.trained, "zero2", "zero3", "fsdp2"),
        "DDP buckets": trained * setup.trained if setup.sharding == "ddp" and setup.processes > 1 else 0,
        "float32 copy": copy_bytes(trained, setup),
        "Adam moments": moment_bytes(trained, setup),
        "float32 gradients": step_bytes(trained, setup),
        "reference": reference_bytes(policy, setup),
        "gathered weights": gathered_bytes(policy, setup),
    }
    return {name: round(size) for name, size in found.items()}


def weight_bytes(policy: PolicyShape, setup: Setup) -> float:
    """The policy with its adapter: (frozen w + T t), over N under zero3 and fsdp2.

    Full: P t. LoRA: P w + T t. QLoRA: (P - E) x 0.5625 + E w + T t with E embeddings; its packed weights stay whole on
    every process (bitsandbytes packs into bytes, which neither DeepSpeed nor FSDP splits).
    """
    if setup.method == "full":
        return setup.share(policy.parameters * setup.trained, "zero3", "fsdp2")
    adapter = setup.share(setup.adapter * setup.trained, "zero3", "fsdp2")
    if setup.method == "lora":
        return setup.share(policy.parameters * setup.stored, "zero3", "fsdp2") + adapter
    packed = (policy.parameters - policy.embeddings) * NF4
    return packed + setup.share(policy.embeddings * setup.stored, "zero3", "fsdp2") + adapter


def copy_bytes(trained: int, setup: Setup) -> float:
    """DeepSpeed's float32 copy of this process' part: 4 T / N, also where the weights are float32 already."""
    return FLOAT32 * trained / setup.processes if setup.deepspeed else 0


def moment_bytes(trained: int, setup: Setup) -> float:
    """Adam's two moments: 8 T / N float32 under DeepSpeed, else two numbers as the trained ones (ddp whole)."""
    if setup.deepspeed:
        return 2 * FLOAT32 * trained / setup.processes
    return setup.share(2 * setup.trained * trained, "fsdp2")


def step_bytes(trained: int, setup: Setup) -> float:
    """The float32 gradients that DeepSpeed makes for a step: 4 T / N; under ZeRO-3 1e9 numbers at a time.

    None where gradients are float32 anyway.
    """
    if not setup.deepspeed or setup.stored == FLOAT32:
        return 0
    # ZeRO-3 updates its part in sub-groups, so that only one of them has float32 gradients at a time
    mine = trained / setup.processes
    return FLOAT32 * (min(mine, SUB_GROUP) if setup.sharding == "zero3" else mine)


def reference_bytes(policy: PolicyShape, setup: Setup) -> float:
    """The frozen second copy of the policy, P w; with an adapter the policy without it is the reference."""
    if setup.method != "full":
        return 0
    return setup.share(policy.parameters * setup.stored, "zero3", "fsdp2")


def gathered_bytes(policy: PolicyShape, setup: Setup) -> float:
    """All weights at once on every process, as ZeRO-3 gathers them for rollouts: P w, and nothing saved by N."""
    if setup.sharding != "zero3" or not setup.gather or setup.processes == 1:
        return 0
    # packed 4-bit weights are whole on every process already
    base = 0 if setup.method == "qlora" else policy.parameters * setup.stored
    return base + (0 if setup.method == "full" else setup.adapter * setup.trained)


def rollout_bytes(policy: PolicyShape, rows: int, tokens: int, width: int) -> dict[str, int]:
    """What sampling holds for `rows` completions of `tokens` tokens each, prompt included.

    KV cache: 2 x layers x kv_heads x head_dim x tokens x width, for every row; an upper bound, for a prompt's part is
    kept once for all of its completions. Logits: 8 bytes a row and candidate token; training takes fewer, it goes over
    some tokens at a time.

    >>> rollout_bytes(PolicyShape(10, layers=2, kv_heads=3, head_dim=4, vocabulary=5), rows=6, tokens=7, width=2)
    {'KV cache': 4032, 'logits': 240}
    """
    cache = cache_bytes_per_token(policy, width) * rows * tokens
    return {"KV cache": cache, "logits": DRAW * rows * policy.vocabulary}


def cache_bytes_per_token(policy: PolicyShape, width: int) -> int:
    """Keys and values of one token: 2 x layers x kv_heads x head_dim x width bytes."""
    return 2 * policy.layers * policy.kv_heads * policy.head_dim * width


def fitting_batch(policy: PolicyShape, memory: float, row_tokens: int, width: int) -> int:
    """The largest `tokens_per_batch` that is a power of two and whose batch takes at most `memory` bytes; 0 if none.

    A row of `row_tokens` (its prompt and the length limit) takes its cache and its logits.

    >>> fitting_batch(PolicyShape(10, layers=2, kv_heads=3, head_dim=4, vocabulary=5), 10_000, row_tokens=7, width=2)
    64
    """
    row = sum(rollout_bytes(policy, 1, row_tokens, width).values())
    # whole rows that fit, as the tokens that a recipe counts in
    tokens = int(memory / row) * row_tokens
    return 1 << (tokens.bit_length() - 1) if tokens else 0  # the power of two at or below


# --- the sizing table -------------------------------------------------------------------------------------------------

POLICIES = {  # the shapes of Qwen2.5-0.5B, Qwen2.5-7B and Llama-3.1-70B, each with LoRA of rank 16 on all linear layers
    "0.5B": (PolicyShape(494_032_768, 24, 2, 64, 151_936, 136_134_656), 8_798_208),
    "7B": (PolicyShape(7_615_616_512, 28, 4, 128, 152_064, 1_089_994_752), 40_370_176),
    "70B": (PolicyShape(70_553_706_496, 80, 8, 128, 128_256, 2_101_346_304), 207_093_760),
}
DEVICES = (1, 8, 64)
ROWS, TOKENS, REWARD_NUMBERS = 16, 1024, 494_032_768
DEVICE_GIB = 80e9 / GIB
FITS_GIB = 0.8 * DEVICE_GIB


def table() -> str:
    """Gibibytes on each of 1, 8 or 64 devices of 80 GB, as Markdown; "no" where more than four fifths are taken."""
    head = ["policy", "trained", "GPUs", "ddp", "zero1", "zero2", "zero3", "zero3, not gathered", "fsdp2"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, (policy, adapter) in POLICIES.items():
        for method in get_args(Method):
            for devices in DEVICES:
                setup = Setup(method=method, processes=devices, adapter=0 if method == "full" else adapter)
                cells = [_cell(policy, one) for one in _shardings(setup)]
                lines.append("| " + " | ".join([name, method, str(devices), *cells]) + " |")
    return "\n".join(lines)


def _shardings(setup: Setup) -> Iterator[Setup]:
    for sharding in get_args(Sharding):
        yield replace(setup, sharding=sharding)
        if sharding == "zero3":
            yield replace(setup, sharding=sharding, gather=False)


def _cell(policy: PolicyShape, setup: Setup) -> str:
    """Gibibytes of training, a batch of rollouts and a replicated bfloat16 reward model."""
    held = training_bytes(policy, setup) | rollout_bytes(policy, ROWS, TOKENS, width=2)
    gib = (sum(held.values()) + 2 * REWARD_NUMBERS) / GIB
    shown = f"{gib:.1f}" if gib < 9.95 else f"{gib:.0f}"  # from 9.95 on, one decimal would show as 10.0
    return shown if gib <= FITS_GIB else f"{shown} no"


if __name__ == "__main__":
    print(table())
