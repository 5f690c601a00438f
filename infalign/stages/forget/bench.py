"""What is measured of one model, written down once: `measured/MODEL.json`."""

from __future__ import annotations

import gc
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from infalign.data.examples import read_examples
from infalign.forgetting.hidden import answer_differences, last_states, probe, total_variance
from infalign.forgetting.scoring import answer_logps, encoded_answers, labels_of
from infalign.forgetting.tasks import Question, Task
from infalign.generation.hf import HFSampler
from infalign.generation.likelihood import completion_logps
from infalign.generation.plan import Request, plan_batches
from infalign.models.loading import choose_device, end_token_ids, load_policy, local_path
from infalign.runtime.artifacts import differences, fingerprint, read_json, write_json
from infalign.runtime.console import Progress
from infalign.runtime.distributed import is_main, together
from infalign.runtime.imports import file_digest
from infalign.runtime.seeds import stream
from infalign.stages.forget.models import Models
from infalign.stages.forget.recipe import BASE, FORGOTTEN, RELEARNED, TUNED, ForgetRecipe, Node
from infalign.types import InputError, SamplingSettings

Array = NDArray[np.float64]

TEXTS, TEXT_LENGTH = 200, 512
AT_A_TIME = 64
"""Questions between two steps of progress."""


class Bench:
    """Measures models, or finds them measured.

    Args:
        recipe: the verb's.
        tasks: by name.
        models: of the same recipe.
    """

    def __init__(self, recipe: ForgetRecipe, tasks: Mapping[str, Task], models: Models) -> None:
        self.recipe, self.tasks, self.models = recipe, tasks, models
        self.forget = recipe.forget or list(tasks)
        self.device = choose_device(recipe.use_cpu)
        self.quantizes = recipe.quantized and importlib.util.find_spec("bitsandbytes") is not None
        self.texts = self._text_files()

    def found(self, node: Node) -> dict[str, Any] | None:
        """What was measured of a model, if it was, and of this very model on these questions."""
        file = self._file(node)
        if not file.exists():
            return None
        held = read_json(file, "the measurement")
        changed = differences(held["parts"], self.models.parts(node))
        if changed and not self.recipe.overwrite:  # also where the weights are gone
            raise InputError(
                f"{file} was measured of a model of other settings ({'; '.join(changed)}): give another --output_dir, "
                "or --overwrite to make it anew"
            )
        return held if held.get("identity") == self._identity(node) else None

    def measure(self, node: Node, folder: str) -> dict[str, Any]:
        """Measure a model and write it down; rank 0 does it, the others wait."""
        with together(f"the measuring of {node.name}"):
            if is_main():
                model = self._load(folder)
                found = {"identity": self._identity(node), "parts": self.models.parts(node)}
                found |= self._measured(node, model)
                del model
                gc.collect()
                if node.role == FORGOTTEN and self.quantizes:
                    found["quantized"] = self._quantized(node, folder)
                write_json(self._file(node), found)
        return read_json(self._file(node), "the measurement")

    def _file(self, node: Node) -> Path:
        return self.recipe.output / "measured" / f"{node.name}.json"

    def _identity(self, node: Node) -> str:
        """Of everything that a measurement depends on."""
        own = self._own(node)
        return fingerprint(
            [
                self.models.parts(node),
                {name: [(q.context, q.answers, q.label) for q in self.tasks[name].test] for name in self._tested(node)},
                {name: [(q.context, q.answers, q.label) for q in self.tasks[name].train] for name in own},
                {name: file_digest(Path(file)) for name, file in self.texts.items()},
                {name: task.delimiter for name, task in self.tasks.items()},
                [self.recipe.probes, self.quantizes and node.role == FORGOTTEN, self.recipe.open_answers if own else 0],
            ]
        )

    def _tested(self, node: Node) -> list[str]:
        return [node.task] if node.role == RELEARNED else list(self.tasks)

    def _own(self, node: Node) -> list[str]:
        """The tasks that a model is looked at more closely for."""
        if node.role == FORGOTTEN:
            return [node.task]
        if node.role == TUNED:
            return [one for one in self.forget if node.task in ("", one)]
        return self.forget if node.role == BASE else []

    def _load(self, folder: str) -> Any:
        recipe = self.recipe
        return load_policy(
            folder,
            device=self.device,
            dtype=getattr(torch, recipe.dtype),
            revision=recipe.model_revision if folder == self.models.base_path else None,
            trust_remote_code=recipe.trust_remote_code,
            attn_implementation=recipe.attn_implementation,
        )

    def _measured(self, node: Node, model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"logps": self._logps(node, model)}
        if node.role == RELEARNED:
            return found
        found["texts"] = {name: self._nats(name, file, model) for name, file in self.texts.items()}
        own = self._own(node)
        if node.role == BASE:
            found["variance"] = {name: self._variance(model, task) for name, task in self.tasks.items()}
            if self.recipe.probes:
                control = self._untrained()
                found["control"] = {name: self._probed(control, self.tasks[name]) for name in own}
            return found
        if self.recipe.probes:
            found["probed"] = {name: self._probed(model, self.tasks[name]) for name in own}
        if self.recipe.open_answers:
            found["open"] = {name: self._open(model, self.tasks[name]) for name in own}
        return found

    def _logps(self, node: Node, model: Any) -> dict[str, list[list[float]]]:
        tested = {name: self.tasks[name] for name in self._tested(node)}
        found: dict[str, list[list[float]]] = {}
        with Progress(
            f"forget: {node.name}: score", sum(len(one.test) for one in tested.values()), "questions"
        ) as progress:
            for name, task in tested.items():
                rows = self._encoded(task, task.test)
                found[name] = []
                for start in range(0, len(rows), AT_A_TIME):
                    part = rows[start : start + AT_A_TIME]
                    found[name] += answer_logps(model, part, self.recipe.tokens_per_batch).tolist()
                    progress.advance(len(part))
        return found

    def _encoded(self, task: Task, questions: Any) -> Any:
        return encoded_answers(self.models.tokenizer, questions, task.delimiter, self.models.max_length)

    def _variance(self, model: Any, task: Task) -> float:
        contexts = [pair[0].context for pair in self._encoded(task, task.test)]
        return total_variance(last_states(model, contexts, self.recipe.tokens_per_batch))

    def _probed(self, model: Any, task: Task) -> list[float]:
        """1 or 0 a test question: whether a probe fitted on the training part's true labels finds the answer."""
        train, test = (
            answer_differences(model, self._encoded(task, part), self.recipe.tokens_per_batch)
            for part in (task.train, task.test)
        )
        return probe(train, labels_of(task.train), test, labels_of(task.test), self.recipe.seed).tolist()

    def _untrained(self) -> Any:
        """A model of the same config with random weights."""
        config = AutoConfig.from_pretrained(
            self.models.base_path, revision=self.recipe.model_revision, trust_remote_code=self.recipe.trust_remote_code
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=self.recipe.trust_remote_code)
        return model.to(self.device).eval()

    def _quantized(self, node: Node, folder: str) -> list[list[float]]:
        """(I, 2) log-probabilities of the task's answers by a copy in four bits (NF4)."""
        task = self.tasks[node.task]
        four_bits: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = load_policy(
            folder,
            device=self.device,
            dtype=getattr(torch, self.recipe.dtype),
            trust_remote_code=self.recipe.trust_remote_code,
            quantization=four_bits,
        )
        return answer_logps(model, self._encoded(task, task.test), self.recipe.tokens_per_batch).tolist()

    def _open(self, model: Any, task: Task) -> list[float]:
        """Of each test question how many of `open_answers` sampled answers begin with the right one."""
        tokenizer, count = self.models.tokenizer, self.recipe.open_answers
        rows = self._encoded(task, task.test)
        room = max(len(one.answer) for pair in rows for one in pair) + 1
        settings = SamplingSettings(max_tokens=room)
        sampler = HFSampler(model, tokenizer, settings, end_token_ids(model, tokenizer), self.recipe.seed)
        requests = [
            Request(f"{task.name}-{number}", index, pair[0].context)
            for number, pair in enumerate(rows)
            for index in range(count)
        ]
        right = np.zeros(len(rows))
        with Progress(f"forget: {task.name}: sample", len(requests), "answers") as progress:
            for batch in plan_batches(requests, room, self.recipe.tokens_per_batch):
                for sample in sampler.sample(batch):
                    number = int(sample.key.rpartition("-")[2])
                    right[number] += begins_with_the_answer(sample.text, task.test[number])
                progress.advance(len(batch))
        return right.tolist()

    def _text_files(self) -> dict[str, str]:
        found = {}
        for name, file in self.recipe.held_out_texts.items():
            path = local_path(str(file), self.recipe.base_dir)
            if path is None:
                raise InputError(f"held_out_texts, {name}: there is no {file}: give a JSONL of texts")
            found[str(name)] = str(path)
        return found

    def _nats(self, name: str, file: str, model: Any) -> float:
        """Cross-entropy on a file of texts, nats a token."""
        length = min(TEXT_LENGTH, self.models.max_length or TEXT_LENGTH)
        rng = stream(self.recipe.seed, "held-out texts", name)
        examples = read_examples(file, self.models.tokenizer, length, TEXTS, rng)
        logps = completion_logps(
            model,
            [one.ids[: one.start] for one in examples],
            [one.ids[one.start :] for one in examples],
            tokens_per_batch=self.recipe.tokens_per_batch,
        )
        return -float(logps.sum()) / sum(len(one.ids) - one.start for one in examples)


def begins_with_the_answer(text: str, question: Question) -> bool:
    """Whether a sampled text begins with the right answer, and not with a longer wrong one that begins the same.

    >>> question = Question("2 + 2 =", ("four", "four hundred"), 0)
    >>> [begins_with_the_answer(one, question) for one in (" Four.", "four hundred", "fourteen")]
    [True, False, False]
    """

    def begins(answer: str) -> int:
        """How much of the text the answer is, if the text begins with it and it ends there: 3.7 does not say 3."""
        words = r"\s+".join(map(re.escape, answer.split()))
        return len(answer) if re.match(rf"\s*{words}(?!\w|[.,]\d)", text, re.IGNORECASE) else 0

    right, wrong = (question.answers[at] for at in (question.label, 1 - question.label))
    return begins(right) > begins(wrong)


def pass_shares(right_I: Array, count: int, sizes: list[int]) -> dict[str, float]:
    """pass@n by n, 1 - C(count - right, n) / C(count, n), from I questions with `count` samples each.

    >>> pass_shares(np.array([1.0, 0.0]), 2, [1, 2, 4])
    {'1': 0.25, '2': 0.5}
    """
    pick: Callable[[int, int], int] = math.comb
    return {
        str(n): float(np.mean([1.0 - pick(count - int(right), n) / pick(count, n) for right in right_I]))
        for n in sizes
        if n <= count
    }
