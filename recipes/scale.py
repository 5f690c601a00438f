"""What a training step costs on many GPUs, by formula and simulation: `python recipes/scale.py` (scale.md reads it).

A step of `infalign run` draws rollouts, scores them, passes them once through the reference and three times (forward,
and backward twice) through the policy, and moves weights between GPUs. Tokens, operations and bytes follow from the
recipe; how fast they go is measured for this package's engine (constants below, each with its source) and assumed for
what was never run here, which is said where it stands. Rollouts have random lengths, so the time they take is
simulated: every GPU decodes its share, and the step waits for the last of them.

`python recipes/scale.py --measure` fits the same formula to this machine with a small random Llama, predicts larger
ones, and prints what they really take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from infalign.report.table import Table, plain_text
from infalign.training.memory import GIB, PolicyShape, Setup, cache_bytes_per_token, training_bytes

Floats = NDArray[np.float64]

BF16 = 2
DRAW_SEED = 0


@dataclass(frozen=True)
class Machine:
    """What one GPU does in a second, and how it reaches the others.

    `flops` are those of dense bfloat16 products at their peak; `busy` is the share of it that training and scoring
    reach, `streamed` the share of `bandwidth` that decoding does. Links are bytes a second, one way, of one GPU.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    inside: float
    outside: float
    node: int = 8
    busy: float = 0.4
    streamed: float = 0.6


# Peaks are NVIDIA's data sheets (SXM, without sparsity); 400 Gbit/s of network for each GPU. `busy` and `streamed` are
# assumptions: usual reports of model FLOP utilisation lie between .3 and .5.
H100 = Machine("H100", 989e12, 3.35e12, 80e9, 450e9, 50e9)
H200 = replace(H100, name="H200", bandwidth=4.8e12, memory=141e9)


@dataclass(frozen=True)
class Engine:
    """How completions are drawn.

    A decoding step of n rows takes `layers * per_layer + n * per_row` seconds of starting and choosing, beside reading
    the weights and the rows' keys and values and multiplying. `refills` says that a row that has ended makes room for
    the next one at once; otherwise a batch ends with its longest row. `split` is over how many GPUs a copy of the
    weights is divided (tensor parallel), `per_exchange` the seconds of one of two exchanges a layer that this takes.
    """

    name: str
    per_layer: float
    per_row: float
    refills: bool = False
    split: int = 1
    per_exchange: float = 0.0


# An assumption (CUDA graphs, fused sampling): vLLM was never run here on a GPU. `fitted` is the package's engine.
VLLM = Engine("vLLM", per_layer=30e-6, per_row=5e-6, refills=True, per_exchange=15e-6)

SMALL = PolicyShape(135_000_000, layers=30, kv_heads=3, head_dim=64, vocabulary=49_152, embeddings=28_000_000)
ONE_B = PolicyShape(1_236_000_000, layers=16, kv_heads=8, head_dim=64, vocabulary=128_256, embeddings=263_000_000)
SEVEN_B = PolicyShape(7_600_000_000, layers=28, kv_heads=4, head_dim=128, vocabulary=152_064, embeddings=1_090_000_000)
SEVENTY_B = PolicyShape(70_600_000_000, 80, kv_heads=8, head_dim=128, vocabulary=128_256, embeddings=2_100_000_000)

NEW = 64
MEASURED = (
    (SMALL, 64, 64, 10_105.0),
    (SMALL, 512, 512, 40_643.0),
    (ONE_B, 64, 64, 11_409.0),
    (ONE_B, 512, 512, 33_553.0),
)
"""Shape, tokens of the prompt, rows, tokens a second on one H200: LOG.md, "first time on a GPU"."""


@dataclass(frozen=True)
class Job:
    """The rollouts of a step, and how many steps.

    Lengths are log-normal with this median and spread, and end at `longest`; `lengths(count)` draws them.
    """

    groups: int = 128
    group: int = 8
    prompt: int = 512
    median: int = 256
    spread: float = 0.7
    longest: int = 1024
    steps: int = 500

    def lengths(self, count: int, seed: int = DRAW_SEED) -> NDArray[np.int64]:
        """`count` lengths."""
        drawn = np.random.default_rng(seed).lognormal(np.log(self.median), self.spread, count)
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)


def decoding_step(shape: PolicyShape, machine: Machine, engine: Engine, rows: float, cached: float) -> float:
    """Seconds of one token for `rows` rows that hold `cached` tokens of keys and values together, in bfloat16.

    >>> slow = Engine("none", per_layer=0.0, per_row=0.0)
    >>> bytes_read = 2 * SEVEN_B.parameters
    >>> step = decoding_step(SEVEN_B, H100, slow, rows=1, cached=0)
    >>> bool(np.isclose(step, bytes_read / (H100.bandwidth * H100.streamed)))
    True
    """
    read = BF16 * shape.parameters + cached * cache_bytes_per_token(shape, BF16)
    work = 2.0 * shape.parameters * rows
    moved = max(read / (machine.bandwidth * machine.streamed), work / (machine.flops * machine.busy)) / engine.split
    exchanges = 2 * shape.layers * engine.per_exchange if engine.split > 1 else 0.0
    return shape.layers * engine.per_layer + rows * engine.per_row + moved + exchanges


def decoding(
    shape: PolicyShape, machine: Machine, engine: Engine, lengths: NDArray[np.int64], prompt: float, slots: int
) -> float:
    """Seconds in which one copy of the weights draws completions of these lengths, `slots` rows at a time.

    `prompt` is how many of a prompt's tokens a row reads: a group's rows share theirs.
    """
    waiting, seconds = list(lengths[::-1]), 0.0
    left: Floats = np.zeros(0)
    done: Floats = np.zeros(0)
    while waiting or left.size:
        if waiting and (engine.refills or not left.size):
            room = slots - left.size
            fresh = [float(waiting.pop()) for _ in range(min(room, len(waiting)))]
            left, done = np.append(left, fresh), np.append(done, np.zeros(len(fresh)))
        # nothing starts or ends within these tokens: one step's time for all of them, at their mean cache
        tokens = left.min()
        cached = done.sum() + left.size * (tokens / 2 + prompt)
        seconds += tokens * decoding_step(shape, machine, engine, left.size, cached)
        left, done = left - tokens, done + tokens
        left, done = left[left > 0], done[left > 0]
    return seconds


def fitted() -> Engine:
    """The package's engine on a GPU: the two constants of it that come nearest to `MEASURED`, by least squares."""
    rows, wanted = [], []
    for shape, prompt, count, rate in MEASURED:
        known = decoding_step(shape, H200, Engine("", 0.0, 0.0), count, count * (prompt / 8 + NEW / 2))
        seconds = count / rate
        rows.append(np.array([shape.layers, count]) / seconds)
        wanted.append((seconds - known) / seconds)
    per_layer, per_row = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    return Engine("infalign", float(per_layer), float(per_row))


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a step, and bytes a GPU holds."""

    rollouts: float
    scoring: float
    reference: float
    policy: float
    exchange: float
    copying: float
    held: float
    fits: bool

    @property
    def seconds(self) -> float:
        """The whole step: parts follow each other."""
        return self.rollouts + self.scoring + self.reference + max(self.policy, self.exchange) + self.copying


def step(shape: PolicyShape, gpus: int, engine: Engine, job: Job, machine: Machine = H100, reward: float = 8e9) -> Step:
    """A step on `gpus` GPUs under ZeRO-3, whose weights are gathered for rollouts (or copied to the engine's).

    Args:
        shape: the policy.
        gpus: how many, in nodes of `machine.node`.
        engine: draws the rollouts.
        job: what is drawn.
        machine: one GPU.
        reward: parameters of the reward model, spread over the GPUs like the policy.
    """
    copies = gpus // engine.split
    lengths = job.lengths(job.groups * job.group)
    shares = np.array_split(lengths, copies) if copies else []
    held = float(sum(training_bytes(shape, Setup("zero3", processes=gpus, gather=False)).values()))
    weights = BF16 * shape.parameters / engine.split
    room = machine.memory * 0.9 - held - weights - BF16 * reward / gpus
    row = cache_bytes_per_token(shape, BF16) * (job.longest + job.prompt / job.group) / engine.split
    slots = int(room // row)
    fits = slots >= 1 and copies >= 1
    drawn = (
        max(decoding(shape, machine, engine, one, job.prompt / job.group, slots) for one in shares if one.size)
        if fits
        else np.inf
    )
    prefill = 2 * shape.parameters * job.groups * job.prompt / (machine.flops * machine.busy * gpus)
    tokens = job.groups * job.prompt + float(lengths.sum())
    a_pass = 2 * shape.parameters * tokens / (machine.flops * machine.busy * gpus)
    link = machine.inside if gpus <= machine.node else machine.outside
    passes = max(1, int(np.ceil(lengths.size / gpus / 4)))  # four rows a pass; each gathers the weights twice
    # gathered for the forward and the backward pass of every micro-batch and of the reference, gradients scattered
    exchanged = BF16 * shape.parameters * (gpus - 1) / gpus * (3 * passes + 1) / link
    copying = BF16 * shape.parameters / engine.split * (gpus - 1) / gpus / link
    return Step(
        rollouts=drawn + prefill,
        scoring=2 * reward * tokens / (machine.flops * machine.busy * gpus),
        reference=a_pass,
        policy=4 * a_pass,  # forward, once more forward under checkpointing, and backward, which is two
        exchange=exchanged,
        copying=copying,
        held=held + weights,
        fits=fits,
    )


def checked() -> Table:
    """What the fitted formula says of the GPU's measurements."""
    engine, rows = fitted(), []
    for shape, prompt, count, rate in MEASURED:
        lengths = np.full(count, NEW)
        said = count * NEW / decoding(shape, H200, engine, lengths, prompt / 8, count)
        name = f"{shape.parameters / 1e6:,.0f} M"
        rows.append((name, str(prompt), str(count), f"{rate:,.0f}", f"{said:,.0f}", f"{said / rate:.2f}"))
    return Table(("model", "prompt", "rows", "measured, tokens/s", "formula", "ratio"), tuple(rows))


def table(job: Job, cells: int) -> Table:
    """Both sizes, both engines, 8 to 512 GPUs."""
    rows = []
    ours = fitted()
    for name, shape in (("7B", SEVEN_B), ("70B", SEVENTY_B)):
        for gpus in (8, 64, 512):
            for engine in (ours, replace(VLLM, split=1 if shape is SEVEN_B else 4)):
                found = step(shape, gpus, engine, job)
                label = engine.name if engine.split == 1 else f"{engine.name}, split over {engine.split}"
                memory = f"{found.held / GIB:.0f}"
                if not found.fits:
                    rows.append((name, str(gpus), label, memory, "does not fit", *[""] * 8))
                    continue
                hours = found.seconds * job.steps / 3600
                parts = (found.rollouts, found.scoring, found.reference, found.policy, found.exchange, found.copying)
                rows.append(
                    (
                        name, str(gpus), label, memory, *(f"{part:.1f}" for part in parts), f"{found.seconds:.0f}",
                        f"{hours:,.1f} / {hours * gpus:,.0f}", f"{cells * hours * gpus:,.0f}",
                    )
                )  # fmt: skip
    heads = ("policy", "GPUs", "rollouts by", "GiB", "rollouts", "scoring", "reference", "policy", "exchange")
    return Table((*heads, "copying", "step, s", "run: hours / GPU hours", "sweep, GPU hours"), tuple(rows))


Point = tuple[int, int, int]
"""Layers, rows, and parameters of a model that decodes them."""


def extrapolated(points: Sequence[Point], seconds: Sequence[float], wanted: Sequence[Point]) -> list[float]:
    """What `wanted` take on the machine where `points` took `seconds`.

    A token costs `layers a + rows b + rows parameters c`; the constants are those whose relative errors have the least
    squares.
    """
    terms = [np.array([[layers, rows, rows * size] for layers, rows, size in some], float) for some in (points, wanted)]
    constants = np.linalg.lstsq(terms[0] / np.array(seconds)[:, None], np.ones(len(points)), rcond=None)[0]
    return [float(found) for found in terms[1] @ constants]


def scaled_pass(seconds: float, size: int, wanted: int) -> tuple[float, float]:
    """A reference pass and a policy's (forward, backward) of `wanted` parameters, where one of `size` took that."""
    found = seconds / size * wanted
    return found, 3.0 * found


def measure(repeats: int = 3) -> Table:
    """This machine: constants fitted on smaller Llamas, parts of a step of a deeper one predicted and measured."""
    import torch  # noqa: PLC0415 - seconds, and only here
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from infalign.generation.hf import decode_rows  # noqa: PLC0415
    from infalign.types import SamplingSettings  # noqa: PLC0415

    def llama(layers: int, width: int) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2000, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
                num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
            )
        ).eval()  # fmt: skip

    def seconds(works: Sequence[Callable[[], object]]) -> list[float]:
        """The least CPU seconds of each, all of them in turns: what else the machine does is beside all alike."""
        taken: list[list[float]] = [[] for _ in works]
        for turn in range(repeats + 1):
            for found, work in zip(taken, works, strict=True):
                start = time.process_time()
                work()
                if turn:  # the first is a warm-up
                    found.append(time.process_time() - start)
        return [min(found) for found in taken]

    def draw(model: LlamaForCausalLM, rows: int) -> Callable[[], object]:
        prompts = [[(7 * place + row // 8) % 1999 for place in range(64)] for row in range(rows)]
        uniforms = np.random.default_rng(0).random((rows, NEW))
        return lambda: decode_rows(model, prompts, uniforms, SamplingSettings(max_tokens=NEW), [])

    def forward(model: LlamaForCausalLM, rows: int) -> Callable[[], object]:
        ids = torch.arange(rows * 128).reshape(rows, 128) % 1999

        def run() -> None:
            with torch.no_grad():
                model(ids)

        return run

    def both(model: LlamaForCausalLM, rows: int) -> Callable[[], object]:
        ids = torch.arange(rows * 128).reshape(rows, 128) % 1999

        def run() -> None:
            model(ids).logits.logsumexp(-1).mean().backward()
            model.zero_grad()

        return run

    def size(model: LlamaForCausalLM) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    shapes = ((2, 256, 8), (2, 512, 32), (4, 256, 16), (4, 512, 64))
    models = {(layers, width): llama(layers, width) for layers, width, _ in shapes}
    nearest, large, counts = models[4, 512], llama(6, 512), (16, 64)
    *of_points, of_pass, few, many, reference, policy = seconds(
        [
            *(draw(models[layers, width], rows) for layers, width, rows in shapes), forward(nearest, 16),
            *(draw(large, count) for count in counts), forward(large, 16), both(large, 16),
        ]
    )  # fmt: skip
    points = [(layers, rows, size(models[layers, width])) for layers, width, rows in shapes]
    decoded = extrapolated(points, of_points, [(6, count, size(large)) for count in counts])
    a_pass, both_ways = scaled_pass(of_pass, size(nearest), size(large))
    compared = [
        (f"decoding {counts[0]} rows of {NEW} tokens", decoded[0], few),
        (f"decoding {counts[1]} rows of {NEW} tokens", decoded[1], many),
        ("reference pass over 16 x 128 tokens", a_pass, reference),
        ("policy, forward and backward", both_ways, policy),
    ]
    rows = [(what, f"{said:.2f}", f"{found:.2f}", f"{said / found:.2f}") for what, said, found in compared]
    return Table((f"{size(large) / 1e6:.0f} M parameters", "predicted, CPU s", "measured", "ratio"), tuple(rows))


def main() -> None:
    """Print the check and the table, or this machine's measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="fit and check the formula on this machine")
    parser.add_argument("--cells", type=int, default=36, help="runs of a sweep")
    for field, value in vars(Job()).items():
        parser.add_argument(f"--{field}", type=type(value), default=value)
    given = vars(parser.parse_args())
    if given.pop("measure"):
        print("\n".join(plain_text(measure())))
        return
    cells = given.pop("cells")
    engine = fitted()
    print(
        f"infalign's engine: {engine.per_layer * 1e3:.3f} ms a layer and {engine.per_row * 1e6:.1f} us a row of a step"
    )
    print("\n".join(plain_text(checked())))
    print("\n".join(plain_text(table(Job(**given), cells))))


if __name__ == "__main__":
    main()
