"""The recipe: every key that infalign itself reads, with TRL's names where TRL has the thing.

Everything else in a recipe belongs to `CTRLConfig` (TRL's `RLOOConfig`) or TRL's `ModelConfig`, is checked against
their types, and travels in `Recipe.training`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from infalign.decoding.strategies import STRATEGIES, TAKES_PROCEDURE
from infalign.runtime.address import address_problem
from infalign.runtime.config import check, field_hints, read_yaml
from infalign.runtime.launch import FLAGS as LAUNCH_FLAGS
from infalign.stages.keys_of_other_trainers import OPEN_R1_REWARDS, explain
from infalign.stages.terms import with_objectives
from infalign.theory.procedures import BUILT_IN, NEEDS, refuse_n
from infalign.theory.transforms import CATALOGUE
from infalign.types import InputError, SamplingSettings

REPORTING = {
    "report_to",
    "run_name",
    "project",
    "logging_steps",
    "logging_first_step",
    "log_completions",
    "log_level",
    "disable_tqdm",
    "save_steps",
    "save_total_limit",
    "save_strategy",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
}
"""Training keys that change what is written down, and not the policy."""
_TRL_REWARDS = {"accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment"}


def key(default: Any, text: str, kind: str) -> Any:
    """A recipe key with its help text; `kind` is the heading under which `--help` lists it."""
    metadata = {"help": text, "kind": kind}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def settle_paths(recipe: Any) -> None:
    """Note where a recipe's folders are as it is made: a plug-in may change the working directory later."""
    object.__setattr__(recipe, "_output", Path(recipe.output_dir).expanduser().absolute())
    object.__setattr__(recipe, "base_dir", Path(recipe.base_dir).absolute())


def settled_output(recipe: Any) -> Path:
    """A recipe's `output_dir` as a path, from where the working directory was when the recipe was made."""
    return vars(recipe)["_output"]


PROCEDURE_KWARGS = "; ".join(f"{name}: {example}" for name, (_, example) in NEEDS.items())
"""Help text: what the built-in procedures take beside n."""


def training_help(config: str) -> str:
    """The help text of a recipe's training keys, which belong to TRL's `config`."""
    return f"every field of TRL's {config} and ModelConfig (learning_rate, max_steps, use_peft, ...)"


@dataclass(frozen=True)
class Recipe:
    """One experiment. `base_dir` is the folder that relative paths start from (the YAML's)."""

    model_name_or_path: str = key("", "folder, .gguf file, package://PACKAGE/FILE, or Hub id", "model")
    model_revision: str | None = key(None, "revision on the Hub", "model")
    policy_name_or_path: str | None = key(None, "policy to evaluate or decode; unset: output_dir/policy", "model")
    dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "precision for sampling and scoring", "model")
    attn_implementation: str | None = key(None, "attention kernel, e.g. sdpa", "model")
    trust_remote_code: bool = key(False, "run code that ships with a model", "model")
    use_cpu: bool = key(False, "stay on the CPU even where there is a GPU", "model")

    dataset_name: str | None = key(None, "file (.jsonl .json .csv .parquet .txt, also .gz), folder, or Hub id", "data")
    dataset_config: str | None = key(None, "configuration name on the Hub", "data")
    dataset_data_dir: str | None = key(None, "folder inside the data set, e.g. harmless-base", "data")
    dataset_train_split: str = key("train", "split that training prompts come from", "data")
    dataset_test_split: str | None = key(None, "split of the test prompts; unset: held out of the train split", "data")
    datasets: list[dict] = key([], "TRL's mixture of data sets, in place of dataset_name", "data")
    prompt_column: str = key("prompt", "column with a text or a chat", "data")
    columns: dict | list[str] | str = key({}, "other names of columns, e.g. prompt=question,chosen=better", "data")
    data_format: Literal["auto", "chat", "prompt", "transcript"] = key(
        "auto", "chat: texts become the user's turn of a chat; transcript: hh-rlhf's chosen/rejected", "data"
    )
    num_train_prompts: int | None = key(None, "how many; unset: all that are left", "data")
    num_validation_prompts: int = key(0, "held out for `eval_steps` during training", "data")
    num_test_prompts: int = key(128, "held out for `evaluate`", "data")
    system_prompt: str | None = key(None, "put in front of every prompt that has none", "data")
    chat_template_kwargs: dict = key({}, "variables of the chat template, e.g. {enable_thinking: false}", "data")
    max_prompt_length: int | None = key(None, "tokens; unset: what the model's context leaves", "data")
    prompt_length_policy: Literal["error", "drop", "truncate"] = key("error", "for longer prompts", "data")

    reward: str | None = key(None, "file.py:name, module.name, or a classifier's folder or Hub id", "reward")
    reward_kwargs: dict = key({}, "keyword arguments of the reward", "reward")
    reward_funcs: list[str] = key([], "TRL's name for `reward` (one)", "reward")
    reward_model_name_or_path: str | None = key(None, "TRL's name for a classifier as `reward`", "reward")
    reward_on_error: Literal["error", "mask"] = key("error", "after all retries: stop, or leave samples out", "reward")
    reward_retries: int = key(2, "further attempts after an exception or a time-out", "reward")
    reward_timeout: float | None = key(None, "seconds for one call", "reward")
    strip_reasoning: bool = key(False, "take <think>...</think> out before scoring", "reward")
    gold_reward: str | None = key(None, "a second reward that judges in `evaluate`", "reward")
    gold_reward_kwargs: dict = key({}, "its keyword arguments", "reward")

    procedure: str = key("best_of_n", f"{', '.join(BUILT_IN)}, or path.py:name", "ctrl")
    n: int = key(4, "candidates that the procedure draws", "ctrl")
    procedure_kwargs: dict = key({}, PROCEDURE_KWARGS, "ctrl")
    objective: Literal["transform", "direct", "raw", "pkpo", "iama", "par", "grpo"] = key(
        "transform",
        "direct: the win rate's own unbiased gradient, no transform; raw, pkpo, iama, par, grpo: baselines",
        "ctrl",
    )
    objectives: list[dict] = key(
        [], "several: [{procedure: best_of_n, n: 4, reward: file.py:name, weight: 1.0}, ...]; the first decodes", "ctrl"
    )
    objective_weights: list[float] = key(
        [], "weights of objectives, in order, in place of theirs; 0: measured, and not trained for", "ctrl"
    )
    objective_mix: list[float] = key(
        [], "in place of weights: each training prompt is for one of objectives, drawn with these chances", "ctrl"
    )
    group_column: str = key("group", "the data's column that the groups of objectives are values of", "ctrl")
    transform: str = key("optimal", f"optimal, gold_optimal, {', '.join(CATALOGUE)}, or path.py:name", "ctrl")
    transform_kwargs: dict = key(
        {}, "{t: 10} for exponential, {shape: monotone} for gold_optimal; a builder's arguments", "ctrl"
    )
    beta: float | None = key(None, "KL coefficient; give exactly one of beta and target_kl", "ctrl")
    target_kl: float | None = key(None, "sequence KL in nats that training keeps; beta follows from it", "ctrl")
    kl_control: bool = key(True, "steer beta in training so that the measured KL comes to target_kl", "ctrl")
    num_calibration_samples: int = key(100, "K, base samples per prompt", "ctrl")
    solver: Literal["online", "offline", "offline+online"] = key(
        "online", "offline: trains on the calibration samples, without rollouts; offline+online: begins there", "ctrl"
    )
    loss: Literal["variance", "qrpo", "tup", "ipo", "bonbon"] | None = key(
        None, "of the offline solver; unset: variance, which needs no partition function", "ctrl"
    )
    loss_kwargs: dict = key({}, "{threshold: 0.6} of tup, {alpha: 0.005} of bonbon", "ctrl")
    offline_training: dict = key(
        {}, "training keys of the offline part of offline+online, e.g. {max_steps: 100, learning_rate: 1e-4}", "ctrl"
    )
    calibration_samples: str | None = key(
        None,
        "file of base samples that exist: prompts, completions; where known rewards and logps",
        "ctrl",
    )
    calibration_method: Literal["midrank", "interpolated", "pooled"] = key(
        "midrank", "interpolated: for K below about 32; pooled: rank among the prompt's rollouts, too", "ctrl"
    )

    strategy: str = key("procedure", f"{', '.join(STRATEGIES)}, or path.py:name", "decoding")
    strategy_kwargs: dict = key(
        {}, "{threshold: 0.9}, {answer: boxed}, {check_tokens: 16, keep: 0.5}, {cost: 0.1}", "decoding"
    )

    max_completion_length: int = key(256, "tokens, end token included", "sampling")
    temperature: float = key(1.0, "of base samples, rollouts and evaluation alike", "sampling")
    top_p: float = key(1.0, "only 1.0 outside `generate`", "sampling")
    top_k: int = key(0, "only 0 outside `generate`", "sampling")
    min_p: float | None = key(None, "only unset outside `generate`", "sampling")
    repetition_penalty: float = key(1.0, "only 1.0 outside `generate`", "sampling")
    tokens_per_batch: int = key(16384, "KV-cache tokens of a sampling batch", "sampling")

    generation: Literal["transformers", "openai", "vllm"] = key(
        "transformers",
        "what calibrate, evaluate and generate sample with; openai: a server; vllm: an engine in this process "
        "(rollouts: use_vllm)",
        "server",
    )
    base_url: str | None = key(None, "server of the base, e.g. http://127.0.0.1:8000/v1; unset: in process", "server")
    policy_base_url: str | None = key(None, "server of the policy (evaluate, generate); unset: in process", "server")
    served_model_name: str | None = key(None, "the base's name there; unset: the only model listed", "server")
    policy_served_model_name: str | None = key(None, "the policy's name there; unset: the only one listed", "server")
    server_concurrency: int = key(32, "requests under way at a time", "server")
    server_timeout: float = key(600.0, "seconds for one request", "server")
    server_retries: int = key(4, "further attempts after no connection, a time-out, 429 or 5xx", "server")
    server_tolerance: float | None = key(
        0.2, "nats between its log-probabilities and the local model's; unset: no check, no local model", "server"
    )
    api_key_env: str | None = key(None, "NAME of the environment variable that holds the API key", "server")

    eval_samples: int = key(64, "M, samples per test prompt and model", "evaluation")
    eval_n: list[int] = key([1, 2, 4, 8], "N of the Best-of-N and Worst-of-N win rates", "evaluation")
    judge: str | None = key(None, "pairwise judge of decoded answers, asked in both orders: file.py:name", "evaluation")
    judge_kwargs: dict = key({}, "its keyword arguments", "evaluation")
    judge_samples: int = key(4, "decoded pairs a test prompt that the judge sees", "evaluation")
    kl_samples: int = key(16, "policy samples per prompt that KL is measured on", "evaluation")
    held_out_texts: dict = key(
        {}, "{NAME: FILE} of texts, or prompts with completions: nats a token before and after", "evaluation"
    )
    confidence: float = key(0.95, "of the intervals", "evaluation")

    output_dir: str = key("", "where everything is written; a relative path starts at the working directory", "output")
    seed: int = key(42, "of every random stream", "output")
    overwrite: bool = key(False, "make stale stages anew instead of refusing, and score all samples anew", "output")

    training: dict = field(default_factory=dict, metadata={"kind": "training", "help": training_help("RLOOConfig")})
    base_dir: Path = field(default=Path(), metadata={"kind": "internal"})

    @property
    def sampling(self) -> SamplingSettings:
        """The sampling distribution of calibration, rollouts and evaluation."""
        return SamplingSettings(
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    __post_init__ = settle_paths
    output = property(settled_output)


def own_keys(declaration: type = Recipe) -> list[dataclasses.Field]:
    """The fields that a recipe may set, in order."""
    return [one for one in dataclasses.fields(declaration) if one.metadata["kind"] not in ("training", "internal")]


def load_recipe(config: str | Path | Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe from a YAML path or a mapping, with flags on top.

    Args:
        config: the path of a YAML file, the keys themselves (from a notebook), or None for flags only.
        flags: from `runtime.config.read_flags`.

    Raises:
        InputError: everything that is wrong with it, at once.
    """
    keys = read_keys(Recipe, config, flags, _training_hints, explain)
    recipe = with_objectives(_with_trl_names(Recipe(**keys)), keys)
    if "n" in keys and (recipe.strategy in TAKES_PROCEDURE or recipe.strategy not in STRATEGIES):
        refuse_n(recipe.procedure, recipe.n)  # the other strategies take their number of candidates from it
    if recipe.offline_training:
        try:
            hints = {name: hint for name, hint in _training_hints().items() if name not in field_hints(Recipe)}
            checked = check(recipe.offline_training, {}, hints, explain)
        except InputError as error:
            raise InputError(f"offline_training: {error}") from error
        recipe = dataclasses.replace(recipe, offline_training=checked)
    _check_together(recipe)
    return recipe


def read_keys(
    declaration: type,
    config: str | Path | Mapping[str, Any] | None,
    flags: Mapping[str, Any] | None,
    training_hints: Callable[[], dict[str, Any]],
    explain: Callable[[str], str | None] = lambda name: None,
) -> dict[str, Any]:
    """The checked fields of a recipe's dataclass: its own keys, `training` with TRL's, and `base_dir`.

    Args:
        declaration: a dataclass with the fields `training` and `base_dir`.
        config, flags: as for `load_recipe`.
        training_hints: TRL's keys with their types; asked only when a key is not the dataclass' own (TRL takes seconds
            to import).
        explain: what another tool's key is here, for the refusal.

    Raises:
        InputError: everything that is wrong with them, at once.
    """
    values, base_dir = dict(config) if isinstance(config, Mapping) else {}, Path()
    if config is not None and not isinstance(config, Mapping):
        path = find_recipe(str(config))
        if not path.is_file():
            raise InputError(f"no recipe at {path}: {_near_recipe(path) or 'give --config the path of a YAML file'}")
        values, base_dir = read_yaml(path), path.parent
    values = {name: value for name, value in values.items() if name not in LAUNCH_FLAGS}  # the command line's
    hints = {name: hint for name, hint in field_hints(declaration).items() if name not in ("training", "base_dir")}
    own = set(hints)
    if not own >= {*values, *(flags or {})}:
        hints = {**training_hints(), **hints}
    checked = check(values, flags or {}, hints, explain)
    training = {name: value for name, value in checked.items() if name not in own}
    return {name: value for name, value in checked.items() if name in own} | {
        "training": training,
        "base_dir": base_dir,
    }


def find_recipe(name: str) -> Path:
    """The path of a recipe: the file itself, or one that ships with infalign (`quickstart`)."""
    path = Path(name).expanduser()
    shipped = [folder / path.name for folder in recipe_folders()]
    if not path.suffix:
        shipped = [one.with_name(f"{one.name}.yaml") for one in shipped]
    return next((one for one in [path, *shipped] if one.is_file()), path)


def _near_recipe(path: Path) -> str:
    """The recipe of nearly that name, beside it or among the shipped ones, as a question; empty where there is none."""
    there = {file.stem: file for folder in (*recipe_folders(), path.parent) for file in sorted(folder.glob("*.y*ml"))}
    close = difflib.get_close_matches(path.stem, there, n=1)
    if not close:
        return ""
    file = there[close[0]]
    return f"did you mean {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}?"


def recipe_folders() -> list[Path]:
    """Where the shipped recipes lie: in the wheel, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [package / "share" / "recipes", package.parent / "recipes"]


def _training_hints() -> dict[str, Any]:
    from infalign.stages.training_keys import training_hints  # noqa: PLC0415 - imports TRL, seconds

    return training_hints()


def _with_trl_names(recipe: Recipe) -> Recipe:
    """TRL's `reward_funcs` and `reward_model_name_or_path` as `reward`."""
    if unknown := [name for name in recipe.reward_funcs if name in OPEN_R1_REWARDS]:
        told = "; ".join(f"{name}: {OPEN_R1_REWARDS[name]}" for name in unknown)
        raise InputError(f"reward_funcs names rewards of open-r1's own script: {told}")
    given = [recipe.reward, *recipe.reward_funcs, recipe.reward_model_name_or_path]
    given = [f"trl.rewards.{one}" if one in _TRL_REWARDS else one for one in given if one]
    if len(given) > 1:
        raise InputError(
            f"several rewards ({', '.join(map(str, given))}): give one; a weighted sum of several, each calibrated "
            "first so that scales do not matter, is reward: reward_models/calibrated_sum.py:build (a file to copy); "
            "the win rates of several, each with its own decoder, are objectives: [{reward: ..., weight: 1.0}, ...]"
        )
    return dataclasses.replace(recipe, reward=given[0] if given else None)


def _check_together(recipe: Recipe) -> None:
    """What no single key shows; all problems at once."""
    counts = ("n", "num_calibration_samples", "max_completion_length", "tokens_per_batch", "eval_samples", "kl_samples")
    problems = [f"{name} must be at least 1, got {value}" for name in counts if (value := getattr(recipe, name)) < 1]
    problems += [
        f"{name} must be at least 0, got {getattr(recipe, name)}"
        for name in ("num_validation_prompts",)
        if getattr(recipe, name) < 0
    ]
    if recipe.objective != "transform" and recipe.transform != "optimal":
        problems.append(
            f"objective: {recipe.objective} has no transform, got transform {recipe.transform}: leave one of them out"
        )
    if recipe.objective not in ("transform", "direct") and recipe.calibration_method != "midrank":
        problems.append(
            f"objective: {recipe.objective} is on the raw reward, got calibration_method {recipe.calibration_method}: "
            "leave one of them out"
        )
    problems += _solver_problems(recipe)
    if recipe.transform == "gold_optimal" and recipe.objectives:
        problems.append("transform: gold_optimal is for one reward and one judge of it: leave objectives out")
    if recipe.judge_samples < 1:
        problems.append(f"judge_samples must be at least 1, got {recipe.judge_samples}")
    if recipe.target_kl is not None and not recipe.target_kl > 0:
        problems.append(f"target_kl must be nats above 0, got {recipe.target_kl:g}: e.g. 1.0")
    if recipe.beta is not None and not recipe.beta > 0:
        problems.append(
            f"beta must be above 0, got {recipe.beta:g}: without a KL term there is no optimum for the decoder; give "
            "target_kl in nats, from which beta follows"
        )
    if not recipe.temperature > 0:
        problems.append(f"temperature must be above 0, got {recipe.temperature}: greedy decoding has no distribution")
    if not 0 < recipe.confidence < 1:
        problems.append(f"confidence must be between 0 and 1, got {recipe.confidence}")
    if not 0 <= recipe.seed < 2**32:
        problems.append(f"seed must be between 0 and 2**32 - 1, got {recipe.seed}")
    if recipe.top_k < 0 or not 0 < recipe.top_p <= 1 or not recipe.repetition_penalty > 0:
        problems.append(
            f"top_k must be at least 0, top_p in (0, 1], repetition_penalty above 0; got top_k={recipe.top_k}, "
            f"top_p={recipe.top_p}, repetition_penalty={recipe.repetition_penalty}"
        )
    if recipe.min_p is not None and not 0 <= recipe.min_p <= 1:
        problems.append(f"min_p must be between 0 and 1, got {recipe.min_p}")
    if recipe.dataset_name and recipe.datasets:
        problems.append("dataset_name and datasets are both given: keep one")
    if any(one < 1 for one in recipe.eval_n):
        problems.append(f"eval_n must be positive integers, got {recipe.eval_n}")
    problems += _server_problems(recipe)
    if problems:
        raise InputError("; ".join(problems))


def _solver_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the solver's keys."""
    problems = []
    if recipe.solver == "online" and (recipe.loss is not None or recipe.loss_kwargs):
        problems.append("loss and loss_kwargs are the offline solver's: set solver: offline, or leave them out")
    if recipe.solver != "offline+online" and recipe.offline_training:
        problems.append(
            f"offline_training is for solver: offline+online, got {recipe.solver}: give training keys directly, or "
            "leave it out"
        )
    if recipe.solver != "online" and recipe.objectives:
        problems.append(
            f"solver: {recipe.solver} trains for one reward, and objectives names {len(recipe.objectives)}: use "
            "solver: online, or a reward that sums them (reward_models/calibrated_sum.py)"
        )
    if recipe.solver == "offline+online" and recipe.training.get("initial_weights"):
        problems.append(
            "initial_weights: solver: offline+online starts from its own offline part: leave one of them out"
        )
    if recipe.solver == "offline" and recipe.objective not in ("transform", "raw", "par"):
        problems.append(
            f"solver: offline needs a value for each sample alone, and objective {recipe.objective} is about the "
            "policy's own samples: use objective: transform, raw or par, or solver: online"
        )
    if recipe.solver == "offline+online" and recipe.objective in ("pkpo", "iama", "grpo"):
        problems.append(
            f"solver: offline+online can't begin with objective {recipe.objective}, which is about the policy's own "
            "samples: use objective: transform, direct, raw or par, or solver: online"
        )
    aimed = recipe.transform != "optimal" or recipe.objective != "transform"
    if recipe.loss in ("tup", "ipo", "bonbon") and aimed and recipe.solver == "offline":
        problems.append(f"loss: {recipe.loss} has an aim of its own: leave transform and objective out")
    if recipe.loss in ("tup", "bonbon") and recipe.beta is not None:
        problems.append(f"loss: {recipe.loss} has no beta, got {recipe.beta:g}: give target_kl in nats")
    return problems


def _server_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the server's keys."""
    urls = {name: getattr(recipe, name) for name in ("base_url", "policy_base_url") if getattr(recipe, name)}
    problems = [f"{name} {problem}" for name, url in urls.items() if (problem := address_problem(url))]
    if recipe.generation == "openai" and not urls:
        problems.append("generation: openai needs base_url or policy_base_url, e.g. http://127.0.0.1:8000/v1")
    if recipe.generation != "openai" and urls:
        problems.append(f"{' and '.join(urls)} is set, but generation is {recipe.generation}: set generation: openai")
    if recipe.server_concurrency < 1:
        problems.append(f"server_concurrency must be at least 1, got {recipe.server_concurrency}")
    if not 0 < recipe.server_timeout < math.inf:
        problems.append(f"server_timeout must be seconds above 0, got {recipe.server_timeout}")
    if not 0 <= recipe.server_retries <= 20:
        problems.append(f"server_retries must be between 0 and 20, got {recipe.server_retries}")
    if recipe.server_tolerance is not None and not recipe.server_tolerance > 0:
        problems.append(f"server_tolerance must be nats above 0, or unset for no check, got {recipe.server_tolerance}")
    if recipe.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", recipe.api_key_env):
        problems.append(
            "api_key_env must be the NAME of an environment variable in capitals, e.g. INFALIGN_API_KEY; what is given "
            "is none, and not shown in case it is the key itself: put the key into that variable"
        )
    return problems


def require(recipe: Recipe, *names: str) -> None:
    """Raise unless every one of these keys is set; a stage calls it with the keys that it needs.

    Raises:
        InputError: naming all that are missing.
    """
    missing = [name for name in names if not getattr(recipe, name)]
    if missing:
        raise InputError(f"the recipe lacks {', '.join(missing)}: add to the YAML, or give as flags --NAME VALUE")


def require_plain(recipe: Recipe) -> None:
    """Calibration, training and evaluation need the model's own distribution.

    Raises:
        InputError: a truncating sampling field is set.
    """
    if not recipe.sampling.is_plain:
        raise InputError(
            f"top_p={recipe.top_p}, top_k={recipe.top_k}, min_p={recipe.min_p}, "
            f"repetition_penalty={recipe.repetition_penalty}: log-probabilities and KL would be those of another "
            "distribution; only `infalign generate` takes values other than 1.0, 0, unset, 1.0"
        )
