"""`infalign train`: KL-regularised RL on the calibrated, transformed reward, or a regression on the base samples.

`solver: offline+online` trains twice: offline into `output_dir/offline`, then online from there. The reference stays
the base, so that KL and rewards of the second part are what they are in a run that starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from numpy.typing import NDArray
from trl import ModelConfig, get_quantization_config

from infalign.calibration.few_samples import beta_for_kl
from infalign.calibration.table import REFERENCES, SampleTable
from infalign.runtime.artifacts import MANIFEST, sweep_temporaries, without_secrets, write_json, write_manifest
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import barrier, is_main, together
from infalign.stages.calibrate import calibration_parts, open_table, reference_rewards
from infalign.stages.experiment import Experiment
from infalign.stages.judged import GOLD_OPTIMAL
from infalign.stages.objective import trained_procedures
from infalign.stages.output import STARTED, leaves_nothing, refuse_stale_start, reusable
from infalign.stages.policy_folder import initial_model, load_initial_adapter, save_policy
from infalign.stages.recipe import REPORTING, Recipe, require_plain
from infalign.stages.sampling import table_rewards
from infalign.stages.term_prompts import assigned
from infalign.stages.training_keys import adapter_of, split_training
from infalign.theory.procedures import Procedure
from infalign.training.baselines import BASELINES, Baseline, base_spread
from infalign.training.checks import best_model_settings, check_loop
from infalign.training.config import CTRLConfig
from infalign.training.direct import Direct, check_group
from infalign.training.offline import OfflineLoss, offline_loss
from infalign.training.packages import missing_packages
from infalign.training.progress import TrainingProgress, quiet
from infalign.training.reward import DATA_COLUMNS, PROMPT_IDS, TERMS, CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError, Interrupted, Prompt, Sample

_OF_THE_RECIPE = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "model_revision",
    "attn_implementation": "attn_implementation",
    "trust_remote_code": "trust_remote_code",
}


OFFLINE = "offline"
"""The folder of the first part of `offline+online`, below `output_dir`."""


@leaves_nothing("checkpoint-*", "policy")
def train(recipe: Recipe, experiment: Experiment | None = None) -> dict[str, Any]:
    """Train the policy, or find it trained.

    Returns:
        `folder` of the policy, `trained` (False when it was reused) and, when it was trained now, `steps`.

    Raises:
        InputError: the recipe does not fit itself, the calibration is missing or another one, or a check at step 0.
        Interrupted: a SIGTERM was answered with a checkpoint.
        TrainingError: losses, gradients or weights are not finite.
    """
    require_plain(recipe)
    experiment = whole = experiment or Experiment(recipe)
    with together():  # before the calibration is read
        check_ready(experiment)
    experiment.claim_output()
    folder = experiment.policy_path
    parts = training_parts(experiment)
    if reusable(folder, "policy", parts, recipe.overwrite):
        say(f"policy: {folder} is trained already")
        if isinstance(checkpoint_of(recipe), str):
            notice("resume_from_checkpoint is ignored: the policy is finished (--overwrite with other settings)")
        return {"folder": folder, "trained": False}
    with together():  # every rank looks, and one of them speaks
        table = open_table(experiment)
        for reward in experiment.rewards:
            reference_rewards(experiment, table, reward)
        if recipe.transform == GOLD_OPTIMAL and experiment.judged is None:
            raise InputError(
                f"transform: gold_optimal needs calibration samples that the gold reward has scored, too, and "
                f"{table.folder} has none: run `infalign calibrate` with this recipe"
            )
    experiment.release_models()
    if recipe.solver == "offline+online":
        refuse_stale_start(folder, parts, recipe.overwrite)
        first = offline_part(whole)
        _train_offline(first, table)
        experiment = online_part(whole, first)
    steps = _train_into(folder, experiment, table, parts)
    if is_main():
        whole.record()
    barrier()
    return {"folder": folder, "trained": True, "steps": steps}


def offline_part(experiment: Experiment) -> Experiment:
    """The first part of `offline+online`: the recipe's keys, `offline_training`'s over them."""
    recipe = experiment.recipe
    objective = "transform" if recipe.objective == "direct" else recipe.objective
    training = {**recipe.training, **recipe.offline_training, "push_to_hub": False}
    return experiment.part(OFFLINE, solver="offline", objective=objective, training=training, offline_training={})


def online_part(experiment: Experiment, first: Experiment) -> Experiment:
    """The second: rollouts, from the policy that the first has made."""
    adapter = first.policy_path / "adapter"
    start = adapter if adapter.is_dir() else first.policy_path
    training = {**experiment.recipe.training, "initial_weights": str(start)}
    changes = {"loss": None, "loss_kwargs": {}, "offline_training": {}}
    return experiment.part("policy", solver="online", training=training, **changes)


def _train_offline(experiment: Experiment, table: SampleTable) -> None:
    """Train the first part, or find it trained."""
    folder, parts = experiment.policy_path, training_parts(experiment)
    if reusable(folder, "policy", parts, experiment.recipe.overwrite):
        say(f"offline part: {folder} is trained already")
        return
    steps = _train_into(folder, experiment, table, parts)
    say(f"offline part: {folder} ({steps} steps)")


def _train_into(folder: Path, experiment: Experiment, table: SampleTable, parts: Mapping[str, Any]) -> int:
    """Train a policy and write it into a folder; returns how many steps were made.

    Raises:
        InputError, Interrupted, TrainingError: as `train`.
    """
    recipe = experiment.recipe
    refuse_stale_start(folder, parts, recipe.overwrite)
    try:
        trainer = make_trainer(experiment, table, parts)
    except InputError:
        raise
    except (ValueError, ImportError) as error:  # TRL's and transformers' own refusals of a combination of settings
        raise InputError(f"the training keys do not fit: {' '.join(str(error).split())}") from error
    if is_main():
        sweep_temporaries(folder)
        write_json(folder / STARTED, {"parts": parts})
    trainer.train(resume_from_checkpoint=checkpoint_of(recipe))
    if trainer.on_signal.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped by SIGTERM at step {trainer.state.global_step} of {trainer.state.max_steps}, a checkpoint is "
            "saved: run the same command again to continue"
        )
    if trainer.state.global_step == 0:
        raise InputError("training made 0 steps: max_steps or num_train_epochs is 0, or there is too little data")
    save_policy(trainer, folder, experiment)
    if is_main():
        write_json(folder / "training_log.json", trainer.state.log_history)
        write_manifest(folder, "policy", parts, steps=trainer.state.global_step)
    barrier()
    return trainer.state.global_step


def check_ready(experiment: Experiment) -> None:
    """Training can start: its keys fit, their packages are installed, and the Hub is there if it is pushed to.

    Raises:
        InputError: one of these is not so.
    """
    if experiment.recipe.solver == "offline+online":
        check_ready(offline_part(experiment))
    arguments = training_arguments(experiment)
    for procedure in trained_procedures(experiment.recipe):
        if (of_groups := _of_groups(experiment.recipe, procedure)) is not None:
            check_group(of_groups, int(arguments.num_generations or 1))
    finished = (experiment.policy_path / MANIFEST).exists()
    if arguments.push_to_hub and is_main() and not finished:
        try:
            HfApi().whoami(token=arguments.hub_token)
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise InputError(
                f"push_to_hub: the Hub does not know you ({' '.join(str(error).split())[:200]}): check the connection, "
                "log in with `hf auth login`, or leave push_to_hub out and upload the policy later"
            ) from error


def training_parts(experiment: Experiment) -> dict[str, Any]:
    """What the policy depends on, by name; secrets (`hub_token`) are blotted out."""
    recipe = experiment.recipe
    training = without_secrets({name: value for name, value in recipe.training.items() if name not in REPORTING})
    return {
        **{f"calibration {name}": value for name, value in calibration_parts(experiment).items()},
        **experiment.objective.record(),
        "calibration_method": recipe.calibration_method,
        "kl_control": recipe.kl_control,
        **({} if recipe.solver == "online" else {"solver": recipe.solver, "loss": offline_loss_of(recipe).label}),
        **({"offline_training": recipe.offline_training} if recipe.offline_training else {}),
        **training,
    }


def make_trainer(experiment: Experiment, table: SampleTable, identity: Mapping[str, Any] | None = None) -> CTRLTrainer:
    """The trainer of an experiment, with its calibrated data sets; `identity` is recorded in its checkpoints."""
    recipe = experiment.recipe
    arguments = training_arguments(experiment)
    _, adapter = split_training(recipe.training)
    model = ModelConfig(model_name_or_path=experiment.base_path, **adapter)
    splits = experiment.splits
    trainer = CTRLTrainer(
        initial_model(arguments, experiment.base_path) or experiment.base_path,
        rewards_of(experiment, table),
        arguments,
        procedure=experiment.trained_terms[0].procedure,
        identity=identity,
        train_dataset=_dataset(experiment, table, splits.train, samples=recipe.solver == "offline"),
        eval_dataset=_dataset(experiment, table, splits.validation) if splits.validation else None,
        processing_class=experiment.tokenizer,
        peft_config=adapter_of(adapter),
        quantization_config=get_quantization_config(model),
    )
    load_initial_adapter(trainer)
    trainer.add_callback(TrainingProgress())
    quiet(trainer)
    return trainer


def rewards_of(experiment: Experiment, table: SampleTable) -> list[CTRLReward]:
    """The reward functions of a run: one for each term; `table` is the calibration's."""
    recipe, aim = experiment.recipe, experiment.objective
    spread = 1.0
    if recipe.objective in BASELINES:
        spread = base_spread(list(reference_rewards(experiment, table, experiment.reward).values()))
    places = {
        id(reward): column for reward, column in zip(experiment.trained_rewards, _columns(experiment), strict=True)
    }
    terms = experiment.trained_terms
    several = len(terms) > 1
    apart = several and (bool(recipe.objective_mix) or any(term.group for term in terms))
    return [
        CTRLReward(
            term.reward,
            _of_groups(recipe, term.procedure, aim.beta, spread) or aim.transform,
            method=recipe.calibration_method,
            column=places[id(term.reward)],
            name=term.name if several else "ctrl",
            only=number if apart else None,
        )
        for number, term in enumerate(terms)
    ]


def _of_groups(
    recipe: Recipe, procedure: Procedure, beta: float | None = None, spread: float = 1.0
) -> Direct | Baseline | None:
    """The recipe's objective where it is not a transform."""
    if recipe.objective == "transform":
        return None
    if recipe.objective == "direct":
        return Direct(procedure, beta)
    return Baseline(recipe.objective, procedure, spread, beta)


def _columns(experiment: Experiment) -> list[str]:
    """The columns of the data set that hold the reference rewards of each reward that is trained on."""
    return ["ref_rewards", *(f"ref_rewards_{number + 2}" for number in range(len(experiment.trained_rewards) - 1))]


def training_arguments(experiment: Experiment) -> CTRLConfig:
    """`CTRLConfig` from the recipe: its training keys, and what it shares with calibration.

    Raises:
        InputError: TRL or transformers refuse a combination (their words are passed on), or a package is missing.
    """
    recipe = experiment.recipe
    ours, _ = split_training(recipe.training)
    missing = missing_packages({**recipe.training, "attn_implementation": recipe.attn_implementation})
    if missing:
        raise InputError("; ".join(missing))
    if ours.get("max_steps") == 0:
        raise InputError("training made 0 steps: max_steps is 0; leave it out to train num_train_epochs")
    if recipe.dtype == "float16":
        raise InputError("dtype float16 can't be trained in: its range is too small; use bfloat16 or float32")
    model_init = ours.get("model_init_kwargs") or {}
    for name, own in _OF_THE_RECIPE.items():
        if isinstance(model_init, dict) and name in model_init:
            raise InputError(
                f"model_init_kwargs: {name} is the recipe's key {own}: set that, so that calibration, training and "
                "evaluation load the same model"
            )
    weights = [one["weight"] for one in recipe.objectives if one["weight"] > 0]
    shared = {
        "output_dir": str(experiment.policy_path),
        "seed": recipe.seed,
        **kl_settings(experiment, ours),
        **({"reward_weights": [1.0] * len(weights) if recipe.objective_mix else weights} if len(weights) > 1 else {}),
        "temperature": recipe.temperature,
        "max_completion_length": recipe.max_completion_length,
        "chat_template_kwargs": recipe.chat_template_kwargs,
        "use_cpu": recipe.use_cpu,
        "trust_remote_code": recipe.trust_remote_code,
        "disable_tqdm": True,
        "model_init_kwargs": {"revision": recipe.model_revision, "use_safetensors": True, "dtype": recipe.dtype}
        | ({"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {})
        | model_init,
    }
    if recipe.solver == "offline":
        shared |= {"solver": "offline", "loss": recipe.loss, "loss_kwargs": recipe.loss_kwargs}
    defaults: dict[str, Any] = {
        "save_total_limit": 1,
        "logging_steps": 1,
        "bf16": None,
        "dataloader_pin_memory": torch.cuda.is_available() and not recipe.use_cpu,
    }
    if ours.get("eval_strategy", "no") != "no" and not recipe.num_validation_prompts:
        raise InputError(
            f"eval_strategy {ours['eval_strategy']} needs prompts that are held out for it: set num_validation_prompts"
        )
    try:
        arguments = CTRLConfig(**{**defaults, **best_model_settings(ours), **ours, **shared})
        check_loop(arguments)
        return arguments
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"the training keys do not fit: {' '.join(str(error).split())}") from error


def kl_settings(experiment: Experiment, ours: Mapping[str, Any]) -> dict[str, float | None]:
    """`beta` and `target_kl` of the training arguments.

    With `target_kl` and `kl_control`, beta starts where K samples are expected to reach that KL, and is steered from
    there. A `beta_start` of the recipe comes down to the objective's own beta by itself.
    """
    recipe, aim = experiment.recipe, experiment.objective
    steered = recipe.kl_control and recipe.target_kl is not None and ours.get("beta_start") is None
    if not steered or recipe.target_kl is None:
        return {"beta": aim.beta, "target_kl": None}
    # the top of Phi is cut off by K for ranks alone; offline, the samples are ranked among themselves
    if recipe.solver == "offline" or recipe.objective != "transform" or recipe.calibration_method == "pooled":
        return {"beta": aim.beta, "target_kl": recipe.target_kl}
    beta = beta_for_kl(aim.transform, recipe.num_calibration_samples, recipe.target_kl)
    return {"beta": beta, "target_kl": recipe.target_kl}


def offline_loss_of(recipe: Recipe) -> OfflineLoss:
    """The loss of a recipe's offline solver."""
    return offline_loss(recipe.loss, recipe.loss_kwargs, recipe.target_kl)


def _dataset(experiment: Experiment, table: SampleTable, prompts: tuple[Prompt, ...], samples: bool = False) -> Dataset:
    """A TRL data set: each row's prompt, its tokens, the reference rewards, and the data's own columns.

    With `samples`, also the scored base samples and their log-probabilities.
    """
    count = experiment.recipe.num_calibration_samples
    terms = dict[str, tuple[int, ...]]()
    if (found := assigned(experiment, prompts)) is not None:
        prompts, terms = tuple(prompt for prompt, _ in found), {prompt.key: numbers for prompt, numbers in found}
    scored = [table_rewards(table, reward, prompts) for reward in experiment.trained_rewards]
    held = table.samples() if samples else {}
    nothing = np.empty(0)  # of a reward that is for other prompts
    rows = [
        {
            "prompt": prompt.content,
            PROMPT_IDS: list(experiment.prompt_ids[prompt.key]),
            **{
                column: (row := references.get(prompt.key, nothing)[:count])[~np.isnan(row)].tolist()
                for column, references in zip(_columns(experiment), scored, strict=True)
            },
            DATA_COLUMNS: dict(prompt.columns),
            **({TERMS: terms[prompt.key]} if terms else {}),
            **(_base_samples(held[prompt.key][:count], scored[0][prompt.key][:count]) if samples else {}),
        }
        for prompt in prompts
    ]
    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(_RowsByNumber(rows))


def _base_samples(samples: Sequence[Sample], rewards_K: NDArray[np.float64]) -> dict[str, Any]:
    """The columns of a prompt's scored base samples."""
    scored = [sample for sample, reward in zip(samples, rewards_K, strict=True) if not np.isnan(reward)]
    return {name: [of(sample) for sample in scored] for name, of in REFERENCES.items()}


class _RowsByNumber:
    """What a data set of row numbers shows: the rows as Python has them.

    Arrow, which a data set stores its values in, has one type a column: it would turn the answers 5 and 3.5 into 5.0
    and 3.5, give every dictionary the keys of all, and refuse integers beyond 64 bits.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        """A batch of row numbers as the batch of their rows."""
        return {name: [self.rows[number][name] for number in batch["row"]] for name in self.rows[0]}


def checkpoint_of(recipe: Recipe) -> str | bool:
    """The checkpoint that the recipe names, or True for the newest whole one of a run that was stopped."""
    named = recipe.training.get("resume_from_checkpoint")
    return named if isinstance(named, str) and named.lower() not in ("true", "false") else True
