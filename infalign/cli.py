"""The command line: parse, call one stage, say what was written.

A user's mistake ends with one clear line on standard error and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infalign import __version__
from infalign.runtime.distributed import PeerError, end_process, first_to_say, is_main
from infalign.types import InputError, Interrupted, RewardError, TrainingError

VERBS = {
    "run": "the whole experiment: calibrate, train, evaluate, report",
    "calibrate": "draw and score the base policy's reference samples",
    "train": "KL-regularised RL on the calibrated, transformed reward",
    "evaluate": "win rates of policy against base as decoded, KL, the exact limit; also of two files of samples",
    "compare": "win rates of one file of samples against another, whoever made them; loads no model",
    "report": "one HTML page and PNGs of what was measured",
    "generate": "decode prompts with the policy and its procedure, to JSONL",
    "serve": "an OpenAI-compatible endpoint of the policy and its procedure",
    "reward-model": "train a reward model on preference pairs, and measure it on held-out ones",
    "reward": "`reward check SPEC`: try a reward on a few samples; what it returns, speed, ties, determinism",
    "theory": "every transform against the optimum for a procedure; loads no model",
    "env": "versions and devices, for a bug report",
}

_USAGE = """\
usage: infalign VERB [--config RECIPE.yaml] [--KEY VALUE ...]

Make a language model better as it will be decoded.

verbs:
{verbs}

`infalign VERB --help` lists a verb's keys. Any key of a recipe can be given as a flag, which wins over the file.
`--debug` shows the traceback of an error.

example: infalign run --config quickstart --output_dir outputs/quickstart
         infalign train --config RECIPE.yaml --accelerate_config zero3 --num_processes 8
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a mistake of the user's, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words, debug)
    except (InputError, RewardError) as error:
        return _told(error, 2, debug)
    except TrainingError as error:
        return _told(error, 1, debug)
    except Interrupted as error:
        from infalign.runtime.console import say  # noqa: PLC0415 - keeps --help fast

        say(f"infalign: {error}")
        return 143
    except PeerError:
        return 1
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if debug or not error.filename:
            raise
        return _told(f"{error.filename}: {error.strerror}: give another path", 2, debug)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if debug or error.errno not in _NO_ROOM:
            raise
        return _told(f"{error.strerror}: make room and run the same command again; what was finished is kept", 1, debug)
    except KeyboardInterrupt:
        if first_to_say("interrupted"):
            print("infalign: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _told(error: Exception | str, code: int, debug: bool) -> int:
    """One line a launch, or with --debug the traceback of the error being handled; returns the exit code."""
    if debug:
        raise
    if first_to_say(str(error)):
        print(f"infalign: error: {error}", file=sys.stderr)
    return code


def _dispatch(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(_USAGE.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"infalign {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        from infalign.runtime.config import nearest  # noqa: PLC0415 - keeps --help fast

        raise InputError(f"unknown verb {verb!r}{nearest(verb, VERBS)} (one of {', '.join(VERBS)})")
    if verb == "theory":
        return _theory(rest)
    _quiet_libraries()
    if verb == "env":
        if rest and not {"-h", "--help"}.isdisjoint(rest):
            print(f"usage: infalign env\n\n{VERBS['env']}")
            return 0
        if rest:
            raise InputError(f"env takes no arguments, got {' '.join(rest)}")
        _stage("env", "env")()
        return 0
    if verb == "reward":
        return _reward(rest)
    if any(word in ("-h", "--help") for word in rest):
        files = any(word.partition("=")[0] in ("--base", "--policy") for word in rest)
        print(_compare_help(verb) if files or verb == "compare" else _verb_help(verb))
        return 0
    if verb == "compare":
        from infalign.runtime.config import read_flags  # noqa: PLC0415 - keeps --help fast

        return _compare(read_flags(rest))
    return _recipe_verb(verb, rest, debug)


def _compare(flags: dict[str, Any]) -> int:
    """Two files of samples: `infalign compare`, or `evaluate` with --base and --policy."""
    asked = _stage("compare", "load_comparison")(flags)
    _stage("compare", "tell")(asked, _stage("compare", "compare")(asked))
    return 0


def _recipe_verb(verb: str, words: list[str], debug: bool) -> int:
    """Every verb that reads a recipe: here, or (`--accelerate_config`) on several processes once the recipe is read."""
    from infalign.runtime import launch  # noqa: PLC0415 - keeps --help fast
    from infalign.runtime.config import read_flags  # noqa: PLC0415
    from infalign.stages.recipe import find_recipe  # noqa: PLC0415

    asked, words = launch.take_flags(words)
    if asked and verb not in launch.VERBS:
        raise InputError(f"{verb} runs in one process: leave --{next(iter(asked))} out")
    flags = read_flags(words)
    if verb == "evaluate" and not {"base", "policy"}.isdisjoint(flags):
        return _compare(flags)
    config = flags.pop("config", None)
    if config is not None and not isinstance(config, str):
        raise InputError("--config takes one path, e.g. --config recipe.yaml")
    if config is not None and verb in launch.VERBS:
        asked = launch.keys_of(find_recipe(config)) | asked
    planned = launch.plan(asked)
    if planned is None:
        launch.check_started()
    if config is None and verb not in ("report", "reward-model"):
        raise InputError(f"give a recipe: infalign {verb} --config RECIPE.yaml (or --config quickstart)")
    options = {name: flags.pop(name) for name in _OPTIONS.get(verb, {}) if name in flags}
    recipe = _reader(verb)(config, flags)
    if planned is not None:
        planned.start(verb, [*words, *(["--debug"] if debug else [])])
    with _alone(verb, recipe, options):
        _call(verb, recipe, options)
    return 0


def _alone(verb: str, recipe: Any, options: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Two commands never write to one `output_dir`; rank 0 holds it for all processes of a launch."""
    from infalign.runtime.artifacts import at_work  # noqa: PLC0415 - keeps --help fast

    dry = _as_bool("dry_run", options.get("dry_run", False))
    writes = verb in ("run", "calibrate", "train", "evaluate", "reward-model") and not dry and recipe.output_dir
    return at_work(recipe.output) if writes and is_main() else contextlib.nullcontext()


def _call(verb: str, recipe: Any, options: dict[str, Any]) -> None:
    """One stage, and the line that says what it made."""
    from infalign.runtime.console import say  # noqa: PLC0415 - keeps --help fast

    name = verb.replace("-", "_")
    stage = _stage("reward_model.train" if name == "reward_model" else name, name)
    if verb == "run":
        stage(recipe, dry=_as_bool("dry_run", options.get("dry_run", False)))
    elif verb == "generate":
        for name, value in options.items():
            if not isinstance(value, str):
                raise InputError(f"--{name} takes one {'name' if name == 'split' else 'path'}, got {value!r}")
        stage(recipe, **options)
    elif verb == "serve":
        stage(recipe, **options)
    elif verb == "reward-model":
        result = stage(recipe)
        if is_main():
            _stage("reward_model.quality", "tell")(result)
    elif verb == "report":
        say(f"report: {stage(recipe)}")
    else:
        result = stage(recipe)
        if verb == "evaluate":
            _stage("evaluate", "tell")(result)
        if verb == "train" and result["trained"]:
            say(f"policy: {result['folder']} ({result['steps']} steps)")


_OPTIONS: dict[str, dict[str, str]] = {
    "run": {"dry_run": "check everything, estimate tokens, memory and time; write nothing"},
    "generate": {
        "prompts": "file of prompts, or - for standard input (JSONL or lines of text); unset: the test prompts",
        "output": "JSONL to write, or - for standard output, batch by batch",
        "split": "split of a folder of prompts that has several",
    },
    "serve": {
        "served": "policy, or base to serve that [policy]",
        "host": "address to listen on; other than loopback only with a token [127.0.0.1]",
        "port": "0 for any free one [8000]",
        "api_token_env": "NAME of the environment variable that holds the token to ask for",
        "max_queue": "requests that may wait; more get 429 [64]",
        "request_timeout": "seconds for a request; then 504 [300]",
    },
}


def _stage(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"infalign.stages.{module}"), name)


def _reader(verb: str) -> Callable[..., Any]:
    """What reads the verb's recipe."""
    if verb == "reward-model":
        return _stage("reward_model.recipe", "load_reward_model_recipe")
    return _stage("recipe", "load_recipe")


def _as_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool) or str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise InputError(f"--{name}: expected true or false, got {value!r}")


def _verb_help(verb: str) -> str:
    """The keys that a recipe may set, by heading, with their defaults."""
    from infalign.runtime import launch  # noqa: PLC0415 - keeps --help fast
    from infalign.stages.recipe import Recipe, own_keys  # noqa: PLC0415
    from infalign.stages.reward_model.recipe import RewardModelRecipe  # noqa: PLC0415

    defaults, config = (RewardModelRecipe(), "RewardConfig") if verb == "reward-model" else (Recipe(), "RLOOConfig")
    lines = [f"usage: infalign {verb} --config RECIPE.yaml [--KEY VALUE ...]", "", VERBS[verb], ""]
    for option, text in _OPTIONS.get(verb, {}).items():
        lines.append(f"  --{option:<25} {text}")
    if verb in launch.VERBS:
        lines += [""] if _OPTIONS.get(verb) else []
        lines.append(f"several processes (launch/README.md; names: {', '.join(launch.names())}):")
        lines += [f"  --{flag:<25} {text}" for flag, text in launch.FLAGS.items()]
    lines += _key_lines(defaults, own_keys(type(defaults)))
    if verb == "evaluate":
        lines += ["", "two files of samples instead of a recipe (`infalign compare --help` lists the keys):"]
        lines += ["  --base FILE --policy FILE"]
    lines += ["", f"training: every field of TRL's {config} and ModelConfig (learning_rate, max_steps, use_peft, ...)"]
    return "\n".join(lines)


def _compare_help(verb: str) -> str:
    """The keys of a comparison of two files, by heading, with their defaults."""
    from infalign.stages.compare import Comparison  # noqa: PLC0415 - keeps --help fast

    lines = [f"usage: infalign {verb} --base FILE --policy FILE [--KEY VALUE ...]", "", VERBS["compare"]]
    return "\n".join(lines + _key_lines(Comparison(), dataclasses.fields(Comparison)))


def _key_lines(defaults: Any, keys: Sequence[dataclasses.Field]) -> list[str]:
    """A line for each key, by heading."""
    lines: list[str] = []
    kind = ""
    for one in keys:
        if one.metadata["kind"] != kind:
            kind = one.metadata["kind"]
            lines += ["", f"{kind}:"]
        value = getattr(defaults, one.name)
        shown = "" if value in (None, "", [], {}) else f" [{value}]"
        lines.append(f"  --{one.name:<25} {one.metadata['help']}{shown}")
    return lines


def _theory(words: list[str]) -> int:
    parser = _Parser(prog="infalign theory", description=VERBS["theory"], allow_abbrev=False)
    parser.add_argument(
        "--procedure", default="best_of_n", help="best_of_n, worst_of_n, kth_of_n, random_n, soft_best_of_n"
    )
    parser.add_argument("--n", type=int, default=4, help="candidates drawn")
    parser.add_argument("--k", type=int, help="for kth_of_n: the k-th best")
    parser.add_argument("--tilt", type=float, help="for soft_best_of_n")
    parser.add_argument("--pmf", type=float, nargs="+", help="for random_n: P(N=1) P(N=2) ...")
    parser.add_argument("--kl", type=float, help="nats; give exactly one of --kl and --beta")
    parser.add_argument("--beta", type=float)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--plot", metavar="FILE.png", help="draw transforms, densities and win rates")
    given = parser.parse_args(words)
    from infalign.stages.theory import theory  # noqa: PLC0415 - keeps --help fast
    from infalign.theory.procedures import BUILT_IN  # noqa: PLC0415

    if given.procedure not in BUILT_IN:
        from infalign.runtime.config import nearest  # noqa: PLC0415

        raise InputError(
            f"procedure {given.procedure!r} is unknown{nearest(given.procedure, BUILT_IN)} "
            f"(one of {', '.join(BUILT_IN)})"
        )
    arguments = {name: getattr(given, name) for name in ("k", "tilt", "pmf") if getattr(given, name) is not None}
    if given.procedure != "random_n":
        arguments["n"] = given.n
    try:
        procedure = BUILT_IN[given.procedure](**arguments)
    except TypeError as error:
        raise InputError(f"procedure {given.procedure}: {error}: give --k, --tilt or --pmf") from error
    if given.plot and Path(given.plot).suffix.lower() != ".png":
        raise InputError(f"--plot writes a PNG, got {given.plot!r}: name it FILE.png")
    theory(procedure, kl=given.kl, beta=given.beta, as_json=given.json, plot=given.plot)
    return 0


def _reward(words: list[str]) -> int:
    parser = _Parser(prog="infalign reward check", description=VERBS["reward"], allow_abbrev=False)
    parser.add_argument("spec", metavar="SPEC", help="as a recipe's reward: file.py:name, module:name, model, URL")
    parser.add_argument("--reward_kwargs", default="{}", help="keyword arguments, e.g. '{target: 20}'")
    parser.add_argument("--prompts", help="file of prompts with their columns, in place of the built-in ones")
    parser.add_argument("--samples", help="file of rows of prompt and completions, in place of the built-in ones")
    parser.add_argument("--columns", help="other names of the file's columns, e.g. prompt=question,completions=answers")
    if not words or not {"-h", "--help"}.isdisjoint(words):
        parser.print_help()
        return 0
    if words[0] != "check":
        raise InputError(f"infalign reward {words[0]}: the only sub-verb is check: infalign reward check SPEC")
    parser.add_argument("--split", help="split of a folder that has several")
    given = parser.parse_args(words[1:])
    from infalign.runtime.config import check  # noqa: PLC0415 - keeps --help fast

    kwargs = check({}, {"reward_kwargs": given.reward_kwargs}, {"reward_kwargs": dict[str, Any]})["reward_kwargs"]
    from infalign.data.columns import parse_columns  # noqa: PLC0415

    files = {name: getattr(given, name) for name in ("prompts", "samples", "split")}
    files["columns"] = parse_columns(given.columns)
    found = _stage("reward_check", "reward_check")(given.spec, kwargs, **files)
    _stage("reward_check", "tell")(given.spec, found)
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse that raises its one line instead of printing the usage before it."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message} (see {self.prog} --help)")


def _quiet_libraries() -> None:
    """Telemetry off, and none of the libraries' start-up chatter; a user's own settings win."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRACKIO_TELEMETRY": "0",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says on every CPU which kernel it lacks
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch)\..*")


if __name__ == "__main__":  # as `python -m infalign`
    end_process(main())
