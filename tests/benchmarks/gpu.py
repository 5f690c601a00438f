"""infalign beside TRL and transformers on a GPU, in bfloat16: seconds of the clock, in turns in one process.

`python -m tests.benchmarks.gpu CASE ...` runs some of the cases; each asserts that both sides agree, then prints one
JSON line. The models are random Llamas of a published model's shape, so that nothing is downloaded. `--device cpu`
tries the cases with a small shape and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from trl import RLOOConfig, RLOOTrainer

from infalign import BestOfN, CTRLConfig, CTRLReward, CTRLTrainer, optimal_transform
from infalign.generation.hf import decode_rows
from infalign.models.loading import load_policy
from infalign.models.shared_prefix import why_plain
from infalign.rewards.loader import load_reward
from infalign.types import SamplingSettings
from tests.benchmarks.subjects import ready_for_steps, stepper
from tests.tiny import tiny_tokenizer

K = 8
SHAPES = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
}


class Bench:
    """The machine, and what is made on it."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = torch.device(device), folder
        self.shapes = ["tiny"] if device == "cpu" else ["SmolLM2-135M", "Llama-3.2-1B"]
        name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
        self.hardware = {"device": name} | {one: version(one) for one in ("infalign", "torch", "transformers", "trl")}

    def model(self, shape: str, classifier: bool = False) -> str:
        """The folder of a random Llama of this shape in bfloat16, with a tokenizer of one word a token."""
        path = self.folder / f"{shape}{'-classifier' if classifier else ''}"
        if path.exists():
            return str(path)
        vocabulary = SHAPES[shape]["vocab_size"]
        tokenizer = tiny_tokenizer([f"w{number}" for number in range(vocabulary - 6)])
        tokenizer.model_max_length = 4096
        config = AutoConfig.for_model(
            "llama",
            **SHAPES[shape],
            max_position_embeddings=4096,
            initializer_range=0.05,
            tie_word_embeddings=True,
            **({"num_labels": 1} if classifier else {}),
            **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")},
        )
        factory = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        with self.device:
            torch.manual_seed(int(classifier))
            model = factory.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    def prompts(self, shape: str, count: int, length: int) -> list[str]:
        """Distinct prompts of exactly `length` tokens."""
        words = SHAPES[shape]["vocab_size"] - 6
        return [" ".join(f"w{(31 * row + 7 * place) % words}" for place in range(length)) for row in range(count)]

    def seconds(self, subjects: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
        """The median seconds of each subject, in turns, after one that warms up."""
        found: dict[str, list[float]] = {name: [] for name in subjects}
        for repeat in range(repeats + 1):
            for name, subject in subjects.items():
                self.wait()
                start = time.perf_counter()
                subject()
                self.wait()
                if repeat:
                    found[name].append(time.perf_counter() - start)
        return {name: median(values) for name, values in found.items()}

    def peak_mib(self, subject: Callable[[], Any]) -> int:
        """GPU memory that the subject takes beyond what is held before it, in MiB."""
        if self.device.type == "cpu":
            return 0
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        subject()
        self.wait()
        return round((torch.cuda.max_memory_allocated() - held) / 2**20)

    def wait(self) -> None:
        """Until the GPU has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def say(self, case: str, seconds: dict[str, float], **sizes: Any) -> None:
        """One result; the first subject is the other side."""
        other, ours = seconds
        rounded = {name: round(value, 4) for name, value in seconds.items()}
        line = {"case": case, **sizes, "seconds": rounded, "ratio": round(seconds[other] / seconds[ours], 2)}
        print(json.dumps(line | self.hardware), flush=True)


def sampling(bench: Bench) -> None:
    """8 prompts x 8 completions of 64 tokens (32 x 16 for the second row) against `generate` on replicated prompts."""
    for shape in bench.shapes:
        model = load_policy(bench.model(shape), device=bench.device, dtype=torch.bfloat16)
        words = SHAPES[shape]["vocab_size"] - 6
        print(json.dumps({"case": "trust", "model": shape, "why_plain": why_plain(model)}), flush=True)
        for prompts, k, length, new in ((8, 8, 64, 64), (32, 16, 512, 64)):
            rows = [
                [6 + (31 * row + 7 * place) % words for place in range(length)]
                for row in range(prompts)
                for _ in range(k)
            ]
            ids = torch.tensor(rows, device=bench.device)
            mask = torch.ones_like(ids)
            config = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
            uniforms = np.random.default_rng(0).random((len(rows), new))

            def theirs(ids: Any = ids, mask: Any = mask, config: Any = config, model: Any = model) -> None:
                model.generate(ids, attention_mask=mask, generation_config=config)

            def ours(rows: Any = rows, uniforms: Any = uniforms, model: Any = model, new: int = new) -> None:
                with torch.no_grad():
                    decode_rows(model, rows, uniforms, SamplingSettings(new), [])

            seconds = bench.seconds({"generate": theirs, "infalign": ours})
            rate = {name: round(len(rows) * new / value) for name, value in seconds.items()}
            memory = {"generate": bench.peak_mib(theirs), "infalign": bench.peak_mib(ours)}
            bench.say(
                "sampling",
                seconds,
                model=shape,
                prompt=length,
                k=k,
                new_tokens=new,
                rows=len(rows),
                tokens_per_second=rate,
                MiB=memory,
            )


def scoring(bench: Bench) -> None:
    """A classifier on 8 prompts x 8 completions of 128 tokens on average, against one batch padded to the longest."""
    for shape in bench.shapes:
        path = bench.model(shape, classifier=True)
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16).to(bench.device).eval()
        reward = load_reward(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        words = SHAPES[shape]["vocab_size"] - 6
        rng = np.random.default_rng(0)
        for length in (64, 512):
            texts = [text for text in bench.prompts(shape, 8, length) for _ in range(K)]
            sizes = rng.geometric(1 / 128, len(texts)).clip(max=512)
            completions = [" " + " ".join(f"w{word}" for word in rng.integers(0, words, size)) for size in sizes]
            whole = [text + completion for text, completion in zip(texts, completions, strict=True)]

            def theirs(whole: Any = whole, model: Any = model, tokenizer: Any = tokenizer) -> torch.Tensor:
                inputs = tokenizer(
                    text=whole, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
                ).to(model.device)
                with torch.inference_mode():
                    return model(**inputs).logits[:, 0]

            def ours(texts: Any = texts, completions: Any = completions, reward: Any = reward) -> np.ndarray:
                return reward(prompts=texts, completions=completions)

            apart = float(np.abs(np.asarray(ours()) - theirs().float().cpu().numpy()).max())
            spread = float(theirs().float().std())
            seconds = bench.seconds({"trl": theirs, "infalign": ours})
            bench.say(
                "scoring",
                seconds,
                model=shape,
                prompt=length,
                rows=len(texts),
                tokens=int(sizes.sum()),
                apart=round(apart, 4),
                spread=round(spread, 4),
                MiB={"trl": bench.peak_mib(theirs), "infalign": bench.peak_mib(ours)},
            )


def step(bench: Bench) -> None:
    """A CTRL step against TRL's RLOO step: 8 prompts x 8 completions, the same classifier as reward, bf16 autocast."""
    for shape, length, new in [(shape, *sizes) for shape in bench.shapes for sizes in ((64, 64), (512, 128))]:
        theirs, ours = _trainers(bench, shape, length, new)
        seconds = bench.seconds({"trl": stepper(theirs), "infalign": stepper(ours)}, repeats=2)
        memory = {"trl": bench.peak_mib(stepper(theirs)), "infalign": bench.peak_mib(stepper(ours))}
        metrics = {name: round(float(np.mean(values)), 4) for name, values in ours._metrics["train"].items() if values}
        kept = {name: metrics[name] for name in ("kl_seq", "reward/calibrated") if name in metrics}
        bench.say("step", seconds, model=shape, prompt=length, k=K, new_tokens=new, rows=8 * K, MiB=memory, **kept)
        del theirs, ours


def _trainers(bench: Bench, shape: str, length: int, new: int) -> tuple[RLOOTrainer, CTRLTrainer]:
    texts = bench.prompts(shape, 64, length)
    references = np.random.default_rng(0).normal(0, 0.1, 32).tolist()
    data = Dataset.from_dict({"prompt": texts, "ref_rewards": [references] * len(texts)})
    cpu = bench.device.type == "cpu"
    settings = {
        "output_dir": str(bench.folder / "out"),
        "per_device_train_batch_size": 8 * K,
        "num_generations": K,
        "max_completion_length": new,
        "use_cpu": cpu,
        "bf16": not cpu,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1e-6,
        "beta": 0.1,
        "gradient_checkpointing": False,
        "disable_dropout": True,
    }
    path, judge = bench.model(shape), bench.model(bench.shapes[0], classifier=True)
    theirs = RLOOTrainer(
        path,
        AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1, dtype=torch.bfloat16),
        RLOOConfig(**settings),
        train_dataset=data.remove_columns("ref_rewards"),
        reward_processing_classes=AutoTokenizer.from_pretrained(judge),
    )
    reward = CTRLReward(load_reward(judge), optimal_transform(BestOfN(4), beta=0.1))
    ours = CTRLTrainer(path, reward, CTRLConfig(**settings), train_dataset=data)
    for trainer in (theirs, ours):
        ready_for_steps(trainer)
    return theirs, ours


def passes(bench: Bench) -> None:
    """Log-probabilities with gradients of 64 completions: each prompt once, beside row by row, and which was chosen."""
    for shape, length, new in [(shape, *sizes) for shape in bench.shapes for sizes in ((64, 64), (512, 128))]:
        _, trainer = _trainers(bench, shape, length, new)
        words = SHAPES[shape]["vocab_size"] - 6
        prompts = torch.tensor(
            [[6 + (31 * row + 7 * place) % words for place in range(length)] for row in range(8) for _ in range(K)]
        )
        ids = torch.cat([prompts, torch.randint(6, words, (64, new))], dim=1).to(bench.device)
        mask = torch.ones_like(ids)
        trainer.model.to(bench.device).train()
        chosen = trainer._sharing_pays(trainer.model, length)
        found: dict[bool, torch.Tensor] = {}

        def run(
            pays: bool, trainer: Any = trainer, ids: Any = ids, mask: Any = mask, new: int = new, found: Any = found
        ) -> None:
            trainer._sharing_pays = lambda *_: pays
            trainer.model.zero_grad()
            with trainer.accelerator.autocast():
                logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, new)[0]
            logps.sum().backward()
            found[pays] = logps.detach().float()

        subjects = {"row by row": lambda run=run: run(False), "infalign": lambda run=run: run(True)}
        seconds = bench.seconds(subjects)
        memory = {name: bench.peak_mib(subject) for name, subject in subjects.items()}
        apart = float((found[True] - found[False]).sum(1).abs().max())
        trust = why_plain(trainer.model)
        bench.say(
            "passes",
            seconds,
            model=shape,
            prompt=length,
            k=K,
            new_tokens=new,
            rows=64,
            MiB=memory,
            apart=round(apart, 3),
            chosen="once" if chosen else "row by row",
            why_plain=trust,
        )
        del trainer


CASES = {"passes": passes, "sampling": sampling, "scoring": scoring, "step": step}


def main() -> None:
    """Run the cases that are named, all when there are none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.device, Path(folder))
        for name in given.cases or CASES:
            CASES[name](bench)


if __name__ == "__main__":
    main()
