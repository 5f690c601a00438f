"""An experiment: what a recipe's names stand for, each loaded on first use and once.

Stages ask it for prompts, tokens, rewards, models and samplers; two stages that need the same thing share it.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from infalign.calibration.judged import JudgedCurve
from infalign.calibration.table import SampleTable
from infalign.data.columns import parse_columns
from infalign.data.mixture import load_mixture
from infalign.data.prompts import LoadedPrompts, load_prompts, numbered
from infalign.data.splits import Splits, split_prompts
from infalign.data.templates import check_lengths, render, with_system
from infalign.evaluation.summary import GOLD, PROXY
from infalign.generation.hf import HFSampler
from infalign.generation.openai import OpenAISampler
from infalign.generation.plan import Sampler
from infalign.generation.vllm_engine import Engine
from infalign.models.layout import lay_columnwise
from infalign.models.loading import (
    choose_device,
    context_length,
    end_token_ids,
    load_policy,
    load_tokenizer,
    local_path,
    model_fingerprint,
    resolve_model,
)
from infalign.rewards.calibrated_sum import bind_sums, sums_in
from infalign.rewards.loader import Reward, load_reward
from infalign.runtime.artifacts import (
    differences,
    fingerprint,
    read_json,
    sweep_temporaries,
    without_secrets,
    write_json,
)
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import barrier, is_main, together
from infalign.runtime.launch import join
from infalign.stages.engines import engine_sampler
from infalign.stages.imported import imported_digest, imported_sampler
from infalign.stages.judged import GOLD_OPTIMAL, judged_curve
from infalign.stages.objective import load_objective, load_procedure, load_procedures
from infalign.stages.recipe import Recipe, require
from infalign.stages.servers import served_end_ids, server_of, server_url, warn_of_exposed_key
from infalign.stages.terms import Term
from infalign.theory.objective import Objective
from infalign.theory.procedures import Procedure
from infalign.types import InputError, Prompt

CALIBRATION = "calibration"
QUANTISED = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
ENGINE = 2  # of the sampler: raise it when the same stream would give other samples
SERVED = {"generation": "openai", "engine": 1}  # likewise, of the server's client
IN_VLLM = {"generation": "vllm", "engine": 1}  # likewise, of vLLM's


class Experiment:
    """What a recipe stands for.

    Args:
        recipe: a checked recipe.

    Raises (from the attributes, on first use):
        InputError: whatever the recipe names is not there or does not fit.
    """

    def __init__(self, recipe: Recipe) -> None:
        join(recipe.use_cpu)
        if recipe.trust_remote_code:
            notice("trust_remote_code: true runs Python code that ships with a model: trust it, or leave it out")
        warn_of_exposed_key(recipe)
        self.recipe = recipe
        self._models: dict[tuple[str, bool], Any] = {}
        self._engines: dict[str, Engine] = {}
        self._policy_folder = "policy"
        self._judged: JudgedCurve | None = None

    def part(self, folder: str, **changes: Any) -> Experiment:
        """A part of this experiment's training: other keys of the recipe, and its policy in a folder of its own.

        It shares what is loaded already.

        Args:
            folder: below `output_dir`.
            changes: keys of the recipe that say how, and not on what, is trained.
        """
        part = copy.copy(self)
        part.recipe, part._policy_folder = dataclasses.replace(self.recipe, **changes), folder
        part.__dict__.pop("_objective", None)
        return part

    # --- models ---------------------------------------------------------------------------------------------------

    @cached_property
    def base_path(self) -> str:
        """Folder or Hub id of the base policy."""
        require(self.recipe, "model_name_or_path")
        return resolve_model(self.recipe.model_name_or_path, self.recipe.base_dir)

    @property
    def policy_path(self) -> Path:
        """Folder of the policy that `train` writes."""
        return self.recipe.output / self._policy_folder

    @property
    def judged_path(self) -> str:
        """Folder or Hub id of the policy that is evaluated or decoded with.

        Raises:
            InputError: `train` has not finished one.
        """
        if self.recipe.policy_name_or_path:
            return resolve_model(self.recipe.policy_name_or_path, self.recipe.base_dir)
        if not (self.policy_path / "manifest.json").exists():
            raise InputError(
                f"no finished policy in {self.policy_path}: run `infalign train` with this recipe, or give "
                "--policy_name_or_path"
            )
        return str(self.policy_path)

    @cached_property
    def tokenizer(self) -> Any:
        """The base policy's tokenizer."""
        return load_tokenizer(self.base_path, self.recipe.model_revision, self.recipe.trust_remote_code)

    @cached_property
    def quantization(self) -> Any | None:
        """How training quantises the base policy (QLoRA: `load_in_4bit`, `load_in_8bit`), or None."""
        if not any(self.recipe.training.get(name) for name in QUANTISED[:2]):
            return None
        from infalign.stages.training_keys import quantization_of  # noqa: PLC0415 - imports TRL, seconds

        return quantization_of(self.recipe.training)

    def model(self, path: str | Path, quantization: Any | None = None) -> Any:
        """A policy for inference, kept for the next stage."""
        name = str(path), quantization is not None
        if name not in self._models:
            self._models[name] = load_policy(
                str(path),
                device=choose_device(self.recipe.use_cpu),
                dtype=getattr(torch, self.recipe.dtype),
                revision=self._revision(path),
                trust_remote_code=self.recipe.trust_remote_code,
                attn_implementation=self.recipe.attn_implementation,
                quantization=quantization,
            )
            lay_columnwise(self._models[name])
        return self._models[name]

    def _revision(self, path: str | Path) -> str | None:
        return self.recipe.model_revision if str(path) == self.base_path else None

    def release_models(self) -> None:
        """Let go of loaded policies (before training needs the memory)."""
        self._models.clear()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def sampler(self, path: str | Path, purpose: str) -> Sampler:
        """A sampler of the model at `path`; `purpose` separates its random streams from other stages'.

        Calibration draws from what training starts from: with QLoRA the quantised base. What is measured is the base
        and the merged policy as they are deployed.

        Raises:
            InputError: the model can't be loaded, or the server's API key is not in the environment.
        """
        recipe, seed = self.recipe, f"{self.recipe.seed}/{purpose}"
        if recipe.calibration_samples and purpose == CALIBRATION:
            return imported_sampler(self)
        quantization = self.quantization if purpose == CALIBRATION else None
        server = server_of(recipe, policy=str(path) != self.base_path)
        if server is None and recipe.generation == "vllm":
            return engine_sampler(self, path, self._revision(path), self._engines, seed)
        if server is None:
            model = self.model(path, quantization)
            return HFSampler(model, self.tokenizer, recipe.sampling, end_token_ids(model, self.tokenizer), seed)
        return OpenAISampler(
            server,
            self.tokenizer,
            recipe.sampling,
            served_end_ids(str(path), self.tokenizer, self._revision(path), recipe.trust_remote_code),
            seed,
            local=None if recipe.server_tolerance is None else lambda: self.model(path, quantization),
            tolerance=recipe.server_tolerance or 0.0,
        )

    def sampling_parts(self, path: str | Path, purpose: str) -> dict[str, Any]:
        """Everything that shapes the samples of the model at `path`, for fingerprints."""
        imported = self.recipe.calibration_samples
        quantised = {name: self.recipe.training[name] for name in QUANTISED if self.recipe.training.get(name)}
        return {
            **(quantised if purpose == CALIBRATION and self.quantization is not None else {}),
            "model": model_fingerprint(str(path), self._revision(path)),
            **self.recipe.sampling.as_dict(),
            "dtype": self.recipe.dtype,
            "seed": self.recipe.seed,
            "purpose": purpose,
            "engine": ENGINE,
            **(SERVED if server_url(self.recipe, policy=str(path) != self.base_path) else {}),
            **(IN_VLLM if self.recipe.generation == "vllm" else {}),
            **({"samples": imported_digest(self.recipe)} if imported and purpose == CALIBRATION else {}),
        }

    # --- prompts --------------------------------------------------------------------------------------------------

    @cached_property
    def splits(self) -> Splits:
        """Disjoint train, validation and test prompts, with the system prompt in place."""
        recipe = self.recipe
        if not recipe.datasets:
            require(recipe, "dataset_name")
        train = self._load(recipe.dataset_train_split)
        test = self._load(recipe.dataset_test_split) if recipe.dataset_test_split else None
        for loaded in (train, test):
            if loaded is not None:
                tell_how_read(loaded)
        splits = split_prompts(
            self.with_system_prompt(train.prompts),
            None if test is None else self.with_system_prompt(test.prompts),
            num_train=recipe.num_train_prompts,
            num_validation=recipe.num_validation_prompts,
            num_test=recipe.num_test_prompts,
            seed=recipe.seed,
        )
        if splits.left_out:
            notice(f"{splits.left_out} prompts are in no split: near copies of prompts in a split that is full")
        splits = self._within_length(splits)
        self._check_groups(splits)
        return splits

    def in_group(self, prompt: Prompt, group: str) -> bool:
        """Whether a prompt is of a term's group; of the empty one all are."""
        return not group or str(prompt.columns.get(self.recipe.group_column, "")) == group

    def is_for(self, reward: Reward, prompt: Prompt) -> bool:
        """Whether a prompt is of the group of one of a reward's terms."""
        return any(self.in_group(prompt, term.group) for term in self.terms if term.reward is reward)

    def asks(self, reward: Reward, prompt: Prompt) -> bool:
        """Whether a reward scores answers to a prompt: where one of its terms is, and where it has what it reads."""
        others = reward not in self.rewards  # the gold one, and members of sums
        return others or self.is_for(reward, prompt) or reward.required_columns <= set(prompt.columns)

    def _check_groups(self, splits: Splits) -> None:
        """Every term has prompts.

        Raises:
            InputError: the data has no such column, or a split has no prompt of a group.
        """
        column = self.recipe.group_column
        groups = dict.fromkeys(one["group"] for one in self.recipe.objectives if one.get("group"))
        for name in ("train", "validation", "test"):
            prompts = getattr(splits, name)
            found = sorted({str(prompt.columns[column]) for prompt in prompts if column in prompt.columns})
            missing = [group for group in groups if group not in found]
            if prompts and missing:
                has = f"has {', '.join(found[:10])}{', ...' if len(found) > 10 else ''}" if found else "is not there"
                raise InputError(
                    f"group {missing[0]!r}: no {name} prompt has it in the column {column!r}, which {has}: set "
                    "group_column, or ask for more prompts"
                )

    def _load(self, split: str) -> LoadedPrompts:
        recipe = self.recipe
        if recipe.datasets:
            return load_mixture(
                recipe.datasets,
                prompt_column=recipe.prompt_column,
                data_format=recipe.data_format,
                columns=parse_columns(recipe.columns),
                base_dir=recipe.base_dir,
            )
        return load_prompts(
            str(recipe.dataset_name),
            config=recipe.dataset_config,
            split=split,
            prompt_column=recipe.prompt_column,
            data_format=recipe.data_format,
            columns=parse_columns(recipe.columns),
            base_dir=recipe.base_dir,
            data_dir=recipe.dataset_data_dir,
        )

    def with_system_prompt(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts with the recipe's system prompt in front, and their keys accordingly."""
        if not self.recipe.system_prompt:
            return list(prompts)
        return list(numbered((with_system(one.content, self.recipe.system_prompt), one.columns) for one in prompts))

    def _within_length(self, splits: Splits) -> Splits:
        """The splits without dropped prompts; fills `prompt_ids`."""
        everything = [*splits.train, *splits.validation, *splits.test]
        rendered = {prompt.key: self.render(prompt) for prompt in everything}
        checked = check_lengths(
            rendered,
            self.recipe.max_prompt_length,
            self.recipe.prompt_length_policy,
            context_length(self.base_path, self.recipe.model_revision, self.recipe.trust_remote_code),
            reserve=self.recipe.max_completion_length,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        for what, keys in (("dropped", checked.dropped), ("truncated", checked.truncated)):
            if keys:
                notice(f"{len(keys)} of {len(rendered)} prompts {what}: longer than {checked.limit} tokens")
        self.prompt_ids = {key: tuple(ids) for key, ids in checked.ids.items()}
        kept = {
            name: tuple(prompt for prompt in getattr(splits, name) if prompt.key in checked.ids)
            for name in ("train", "validation", "test")
        }
        return dataclasses.replace(splits, **kept)

    def render(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as the model sees it; the row's own template variables win over the recipe's."""
        variables = {**self.recipe.chat_template_kwargs, **prompt.template}
        return render(self.tokenizer, prompt.content, chat_template_kwargs=variables)

    # --- what is optimised ----------------------------------------------------------------------------------------

    @cached_property
    def reward(self) -> Reward:
        """The reward that is calibrated, trained on and decoded with."""
        require(self.recipe, "reward")
        return self._reward(str(self.recipe.reward), self.recipe.reward_kwargs)

    @cached_property
    def terms(self) -> list[Term]:
        """What is trained for: the recipe's `objectives`, or its procedure and reward alone; the first one decodes.

        Terms with the same reward share it, and two rewards of one name are told apart.
        """
        met = {repr((self.recipe.reward, self.recipe.reward_kwargs)): self.reward}
        terms: list[Term] = []
        for keys, procedure in zip(self.recipe.objectives, load_procedures(self.recipe), strict=False):
            spec = repr((keys["reward"], keys["reward_kwargs"]))
            if spec not in met:
                reward = self._reward(keys["reward"], keys["reward_kwargs"])
                taken = [PROXY, GOLD, *(one.name.partition(" (")[0] for one in met.values())]
                if alike := taken.count(reward.name):
                    reward.name = reward.__name__ = f"{reward.name} ({alike + 1})"
                met[spec] = reward
            terms.append(Term(procedure, met[spec], keys["weight"], keys.get("group", "")))
        return terms or [Term(self.procedure, self.reward)]

    @property
    def trained_terms(self) -> list[Term]:
        """The terms that have a weight."""
        return [term for term in self.terms if term.weight > 0]

    @property
    def trained_rewards(self) -> list[Reward]:
        """Theirs, each once."""
        return list({id(term.reward): term.reward for term in self.trained_terms}.values())

    @property
    def rewards(self) -> list[Reward]:
        """The terms' rewards, each once."""
        return list({id(term.reward): term.reward for term in self.terms}.values())

    @cached_property
    def gold(self) -> Reward | None:
        """The reward that judges beside it, or None."""
        if not self.recipe.gold_reward:
            return None
        gold = self._reward(self.recipe.gold_reward, self.recipe.gold_reward_kwargs)
        if sums_in(gold):
            raise InputError(
                "gold_reward: a weighted sum of calibrated rewards needs base samples scored by its members, which "
                "`calibrate` makes for `reward` alone: give another gold_reward"
            )
        return gold

    def _reward(self, spec: str, kwargs: dict[str, Any]) -> Reward:
        reward = load_reward(
            spec,
            kwargs,
            base_dir=self.recipe.base_dir,
            on_error=self.recipe.reward_on_error,
            retries=self.recipe.reward_retries,
            timeout=self.recipe.reward_timeout,
            strip_reasoning=("<think>", "</think>") if self.recipe.strip_reasoning else None,
        )
        if not sums_in(reward):
            return reward
        folder, parts = self.recipe.output / "calibration", self.sampling_parts(self.base_path, CALIBRATION)
        return bind_sums(
            reward,
            lambda: SampleTable.open(folder, parts),
            lambda: [*self.splits.train, *self.splits.validation, *self.splits.test],
            parts,
            self.recipe.num_calibration_samples,
        )

    @cached_property
    def procedure(self) -> Procedure:
        """The inference procedure."""
        return load_procedure(self.recipe)

    @property
    def objective(self) -> Objective:
        """What is trained for: the procedure, the transform of the calibrated reward, the KL coefficient.

        Of `gold_optimal` it is known when calibration has scored its samples with both rewards.
        """
        if self.recipe.transform == GOLD_OPTIMAL and self._judged is None:
            self._judged = judged_curve(self)
        if "_objective" not in self.__dict__ or self._objective[0] is not self._judged:
            self._objective = self._judged, load_objective(self.recipe, self.procedure, self._judged)
        return self._objective[1]

    def renew_objective(self) -> None:
        """Samples or scores have changed: what the objective took from them is found anew."""
        self._judged = None

    @property
    def judged(self) -> JudgedCurve | None:
        """What the proxy's quantiles are worth under the gold reward, where the objective needs it and it is known."""
        _ = self.objective
        return self._judged

    @property
    def calibrated_rewards(self) -> list[Reward]:
        """What calibration scores its samples with: the terms' rewards, and gold where the objective needs it."""
        needed = [self.gold] if self.recipe.transform == GOLD_OPTIMAL and self.gold is not None else []
        return [*self.rewards, *needed]

    # --- the output folder ----------------------------------------------------------------------------------------

    def claim_output(self) -> None:
        """Make `output_dir` this experiment's own, or see that it is.

        Raises:
            InputError: it belongs to another recipe (what differs is named), or holds something else.
        """
        with together("the claim of output_dir"):  # every rank looks, and one of them speaks
            held = self._held_record()
        barrier()  # every rank has looked before rank 0 writes
        if is_main():
            sweep_temporaries(self.recipe.output)
            if held is None or self.recipe.overwrite:
                self.record()
        barrier()

    def _held_record(self) -> dict[str, Any] | None:
        """The record of the recipe whose folder `output_dir` is, None when it is nobody's yet."""
        require(self.recipe, "output_dir")
        folder, path = self.recipe.output, self.recipe.output / "recipe.json"
        identity = self._identity()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output_dir {folder} is a file: give a folder")
        held = read_json(path, "the recipe record") if path.exists() else None
        if held is not None:
            if "identity" not in held:
                raise InputError(f"the recipe record {path} is damaged: delete it and run again")
            found = differences(self._held_identity(held), identity)
            if found and not self.recipe.overwrite:
                raise InputError(
                    f"output_dir {folder} belongs to another recipe ({'; '.join(found)}): give another --output_dir, "
                    "or --overwrite to replace what it holds"
                )
        elif folder.exists() and any(not path.match(".*.tmp") for path in folder.iterdir()):  # a killed run leaves one
            raise InputError(f"output_dir {folder} is not empty and is not infalign's: give another --output_dir")
        return held

    def record(self) -> None:
        """Write down the recipe that the folder's artifacts were made with, without secrets.

        Rank 0 of a stage that succeeds does it.
        """
        identity = self._identity()
        names = [one.name for one in dataclasses.fields(self.recipe) if one.name != "overwrite"]
        values = {name: getattr(self.recipe, name) for name in names}
        content = {"identity": identity, "fingerprint": fingerprint(identity), "recipe": without_secrets(values)}
        write_json(self.recipe.output / "recipe.json", content)

    def _identity(self) -> dict[str, Any]:
        names = ("model_name_or_path", "model_revision", "dataset_name", "dataset_config", "dataset_data_dir")
        return self._placed({name: getattr(self.recipe, name) for name in (*names, "datasets", "seed")})

    def _placed(self, identity: dict[str, Any]) -> dict[str, Any]:
        """An identity in which local paths are whole: however they are spelt, the same files are the same recipe."""

        def place(name: Any) -> Any:
            path = local_path(name, self.recipe.base_dir) if isinstance(name, str) else None
            return name if path is None else str(path)

        paths = {name: place(identity.get(name)) for name in ("model_name_or_path", "dataset_name")}
        entries = [{**entry, "path": place(entry.get("path"))} for entry in identity.get("datasets") or []]
        folder = identity.get("dataset_data_dir")
        paths["dataset_data_dir"] = os.path.normpath(folder) if folder else folder
        return without_secrets({**identity, **paths, "datasets": entries})

    def _held_identity(self, held: dict[str, Any]) -> dict[str, Any]:
        """The identity that the folder's record holds; of a path that is gone what the recipe said (all has moved)."""
        spelt = held.get("recipe") or {}
        gone = {
            name: spelt[name]
            for name, value in held["identity"].items()
            if isinstance(value, str) and os.path.isabs(value) and not os.path.exists(value) and spelt.get(name)
        }
        return self._placed({**held["identity"], **gone})


def tell_how_read(loaded: LoadedPrompts) -> None:
    """Say how rows were read, and that rows of equal content are not merged."""
    for note in loaded.notes:
        say(f"{loaded.source}: {note}")
    if loaded.repeated:
        say(loaded.summary())
