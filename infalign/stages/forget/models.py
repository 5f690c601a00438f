"""The experiment's models: trained from their parents when they are needed, kept whole, and let go of."""

# transformers, peft and trl type what they return as unions of everything that it may be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from infalign.forgetting.scoring import encode
from infalign.forgetting.tasks import Question, Task, relabelled
from infalign.models.loading import context_length, load_tokenizer, model_fingerprint, replicated, resolve_model
from infalign.runtime.artifacts import disk_errors, fingerprint, whole_folder, write_json, write_manifest
from infalign.runtime.distributed import barrier, is_main, together
from infalign.stages.forget.recipe import BASE, FORGOTTEN, RELEARNED, TUNED, ForgetRecipe, Node
from infalign.stages.output import STARTED, refuse_stale_start, reusable
from infalign.stages.training_keys import adapter_of, split_training
from infalign.training.reward_model import train
from infalign.training.supervised import make_supervised_trainer
from infalign.types import InputError

KIND = "forget_model"


class Models:
    """Where every model of an experiment is, and how it comes there.

    Args:
        recipe: the verb's.
        tasks: by name.
        nodes: from `nodes_of`, parents first.
    """

    def __init__(self, recipe: ForgetRecipe, tasks: Mapping[str, Task], nodes: Sequence[Node]) -> None:
        self.recipe, self.tasks = recipe, tasks
        self.nodes = {node.name: node for node in nodes}
        self.base_path = resolve_model(recipe.model_name_or_path, recipe.base_dir)
        self._parts: dict[str, dict[str, Any]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The base's."""
        return load_tokenizer(self.base_path, self.recipe.model_revision, self.recipe.trust_remote_code)

    @cached_property
    def max_length(self) -> int | None:
        """Tokens of a question with an answer, at most."""
        own = context_length(self.base_path, self.recipe.model_revision, self.recipe.trust_remote_code)
        return min((one for one in (self.recipe.max_length, own) if one is not None), default=None)

    def folder(self, node: Node) -> Path:
        """Where a model is once it is trained; the base stays where it is."""
        return Path(self.base_path) if node.role == BASE else self.recipe.output / "models" / node.name

    def examples(self, node: Node) -> list[tuple[Question, str]]:
        """A model's training questions with the labels that it is trained on, each with its task's delimiter."""
        sources = [node.source] if node.source else list(self.tasks)
        labelled = []
        for source in sources:
            task = self.tasks[source]
            count = len(task.train) if node.role == TUNED else node.examples
            seed = self.recipe.seed
            labelled += [(one, task.delimiter) for one in relabelled(task.train, node.labels, count, seed, source)]
        return labelled

    def parts(self, node: Node) -> dict[str, Any]:
        """Everything that a model depends on, by name."""
        if node.name not in self._parts:
            recipe = self.recipe
            model = {
                "model": model_fingerprint(self.base_path, recipe.model_revision),
                "dtype": recipe.dtype,
                "max_length": self.max_length,
                "seed": recipe.seed,
            }
            trained = {} if node.role == BASE else {
                **self._keys(node.role),
                "labels": node.labels,
                "questions": fingerprint([[*dataclasses.astuple(one), space] for one, space in self.examples(node)]),
                "parent": fingerprint(self.parts(self.nodes[node.parent])),
            }  # fmt: skip
            self._parts[node.name] = model | trained
        return self._parts[node.name]

    def weights(self, node: Node) -> str:
        """The folder of a model's weights; it is trained first where it is not there (every rank calls this).

        Raises:
            InputError: the folder holds a model of other settings, or the training keys do not fit.
            TrainingError: the weights are not finite.
        """
        if node.role == BASE:
            return self.base_path
        folder, parts = self.folder(node), self.parts(node)
        if not reusable(folder, KIND, parts, self.recipe.overwrite):
            barrier()
            self._train(node, self.weights(self.nodes[node.parent]), folder, parts)
        return str(folder)

    def check_training(self) -> None:
        """Whether the keys of every stage fit, before any of them is trained.

        Raises:
            InputError: they don't.
        """
        for role in dict.fromkeys(node.role for node in self.nodes.values() if node.role != BASE):
            ours, rest = split_training(self._keys(role), SFTConfig)
            self._arguments(ours, self.recipe.output / "training")
            adapter_of({"lora_task_type": "CAUSAL_LM", **rest})

    def drop(self, node: Node) -> None:
        """Let go of weights; a model that is needed after all is trained again."""
        if node.role != BASE and is_main():
            shutil.rmtree(self.folder(node), ignore_errors=True)

    def _keys(self, role: str) -> dict[str, Any]:
        own = {TUNED: "tune_training", FORGOTTEN: "forget_training", RELEARNED: "relearn_training"}[role]
        return {**self.recipe.training, **getattr(self.recipe, own)}

    def _train(self, node: Node, parent: str, folder: Path, parts: dict[str, Any]) -> None:
        work = self.recipe.output / "training" / node.name
        refuse_stale_start(work, parts, self.recipe.overwrite)
        ours, rest = split_training(self._keys(node.role), SFTConfig)
        peft = adapter_of({"lora_task_type": "CAUSAL_LM", **rest})
        with together("the start of a training"):
            if is_main() and not (work / STARTED).exists():
                write_json(work / STARTED, {"parts": parts})
            encoded = [
                encode(self.tokenizer, one.context, delimiter + one.answers[one.label], self.max_length)
                for one, delimiter in self.examples(node)
            ]
            trainer = make_supervised_trainer(
                parent,
                self._arguments(ours, work, self.recipe.model_revision if parent == self.base_path else None),
                [(one.context, one.answer) for one in encoded],
                self.tokenizer,
                title=f"forget: {node.name}: train",
                peft_config=peft,
                identity=parts,
            )
        train(trainer, parts)
        trainer.save_model(str(work / "weights"), _internal_call=True)
        steps = trainer.state.global_step
        del trainer
        gc.collect()
        barrier()
        if is_main():
            with replicated(), whole_folder(folder) as temporary, disk_errors(temporary):
                if peft is None:
                    for file in (work / "weights").iterdir():
                        if file.name != "training_args.bin":
                            os.replace(file, temporary / file.name)
                else:
                    self._merged(parent, work / "weights").save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
                write_manifest(temporary, KIND, parts, base=self.recipe.model_name_or_path, steps=steps)
            shutil.rmtree(work)
            with contextlib.suppress(OSError):  # others are at work there
                work.parent.rmdir()
        barrier()

    def _merged(self, parent: str, adapter: Path) -> Any:
        """The parent's model with the adapter inside it, on the CPU."""
        from peft import PeftModel  # noqa: PLC0415 - an extra

        recipe = self.recipe
        base = AutoModelForCausalLM.from_pretrained(
            parent,
            revision=recipe.model_revision if parent == self.base_path else None,
            dtype=getattr(torch, recipe.dtype),
            trust_remote_code=recipe.trust_remote_code,
            use_safetensors=True,
        )
        return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()

    def _arguments(self, ours: dict[str, Any], work: Path, revision: str | None = None) -> SFTConfig:
        recipe = self.recipe
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if ours.get(name, 1) < 1:
                raise InputError(f"{name} must be at least 1, got {ours[name]}")
        on_cpu = recipe.use_cpu or not torch.cuda.is_available()
        defaults = {
            "save_strategy": "steps",
            "save_steps": 500,
            "save_total_limit": 1,
            "logging_steps": 1,
            "bf16": not on_cpu and recipe.dtype == "float32",
            "gradient_checkpointing": False,
            "report_to": "none",
            "dataloader_pin_memory": not on_cpu,
        }
        fixed = {
            "output_dir": str(work),
            "seed": recipe.seed,
            "use_cpu": recipe.use_cpu,
            "trust_remote_code": recipe.trust_remote_code,
            "disable_tqdm": True,
            "max_length": None,  # cut here
            "packing": False,
            "model_init_kwargs": {"revision": revision, "use_safetensors": True, "dtype": recipe.dtype}
            | ({"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {})
            | (ours.get("model_init_kwargs") or {}),
        }
        taken = [name for name in ours if name in fixed and name != "model_init_kwargs"]
        if taken:
            raise InputError(f"{taken[0]} is the recipe's own key, the same for all stages: not one for training")
        try:
            return SFTConfig(**{**defaults, **ours, **fixed})
        except (ValueError, TypeError) as error:
            raise InputError(f"the training keys do not fit: {' '.join(str(error).split())}") from error
