"""The command line: parse, call one stage, say what was written. A new verb is a stage and a row in `VERBS`.

A user's mistake ends with one clear line on standard error and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from infalign import __version__
from infalign.runtime.distributed import PeerError, end_process, first_to_say, is_main
from infalign.types import InputError, Interrupted, RewardError, TrainingError


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb. Functions and classes are named `module:name` below `infalign.stages`, and imported when needed.

    Attributes:
        help: its line in `infalign --help`.
        run: the stage: a function of the recipe and the given `options`; of a verb without a recipe: of the parsed
            `arguments`, or of nothing.
        recipe: the dataclass that declares its keys, empty for a verb without a recipe.
        read: makes that dataclass of (path, flags), or of the flags alone where `config` is "none".
        config: whether `--config` must be given.
        options: flags beside the recipe's keys, with their help.
        tell: prints what `run` returned.
        launches: whether it can run on several processes.
        writes: whether it holds `output_dir` while it runs.
        arguments: adds the arguments of a verb without a recipe to its parser.
        sub_verb: the word that must follow the verb.
        usage, note: what stands after the verb in the first line of its help, and at the end.
    """

    help: str
    run: str
    recipe: str = "recipe:Recipe"
    read: str = "recipe:load_recipe"
    config: Literal["required", "optional", "none"] = "required"
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tell: str = ""
    launches: bool = False
    writes: bool = False
    arguments: str = ""
    sub_verb: str = ""
    usage: str = "--config RECIPE.yaml [--KEY VALUE ...]"
    note: str = ""


VERBS = {
    "run": Verb(
        "the whole experiment: calibrate, train, evaluate, report",
        "run:run_verb",
        options={"dry_run": "check everything, estimate tokens, memory and time; write nothing"},
        launches=True,
        writes=True,
    ),
    "calibrate": Verb(
        "draw and score the base policy's reference samples", "calibrate:calibrate", launches=True, writes=True
    ),
    "train": Verb(
        "KL-regularised RL on the calibrated, transformed reward",
        "train:train",
        tell="policy_folder:tell",
        launches=True,
        writes=True,
    ),
    "evaluate": Verb(
        "win rates of policy against base as decoded, KL, the exact limit; also of two files of samples",
        "evaluate:evaluate",
        tell="evaluate:tell",
        launches=True,
        writes=True,
        note="two files of samples instead of a recipe (`infalign compare --help` lists the keys):\n"
        "  --base FILE --policy FILE",
    ),
    "compare": Verb(
        "win rates of one file of samples against another, whoever made them; loads no model",
        "compare:compare_verb",
        recipe="compare:Comparison",
        read="compare:load_comparison",
        config="none",
        usage="--base FILE --policy FILE [--KEY VALUE ...]",
    ),
    "report": Verb(
        "one HTML page and PNGs of what was measured", "report:report", config="optional", tell="report:tell"
    ),
    "generate": Verb(
        "decode prompts with the policy and its procedure, to JSONL",
        "generate:generate",
        options={
            "prompts": "file of prompts, or - for standard input (JSONL or lines of text); unset: the test prompts",
            "output": "JSONL to write, or - for standard output, batch by batch",
            "split": "split of a folder of prompts that has several",
        },
        launches=True,
    ),
    "serve": Verb(
        "an OpenAI-compatible endpoint of the policy and its procedure",
        "serve:serve",
        options={
            "served": "policy, or base to serve that [policy]",
            "host": "address to listen on; other than loopback only with a token [127.0.0.1]",
            "port": "0 for any free one [8000]",
            "api_token_env": "NAME of the environment variable that holds the token to ask for",
            "max_queue": "requests that may wait; more get 429 [64]",
            "request_timeout": "seconds for a request; then 504 [300]",
            "max_tokens_policy": "for max_tokens above the recipe's: cap (said in a header), or refuse [cap]",
        },
    ),
    "reward-model": Verb(
        "train a reward model on preference pairs, and measure it on held-out ones",
        "reward_model.train:reward_model",
        recipe="reward_model.recipe:RewardModelRecipe",
        read="reward_model.recipe:load_reward_model_recipe",
        config="optional",
        tell="reward_model.quality:tell",
        launches=True,
        writes=True,
    ),
    "reward": Verb(
        "`reward check SPEC`: try a reward on a few samples; what it returns, speed, ties, determinism",
        "reward_check:reward_verb",
        recipe="",
        arguments="reward_check:add_arguments",
        sub_verb="check",
        usage="SPEC",
    ),
    "sweep": Verb(
        "many runs from one YAML, and their objectives compared at equal KL",
        "sweep.run:sweep_verb",
        recipe="sweep.recipe:Sweep",
        read="sweep.recipe:load_sweep",
        options={"dry_run": "check every cell, estimate tokens and time; write nothing"},
        launches=True,
        writes=True,
        usage="--config SWEEP.yaml [--KEY VALUE ...]",
        note="Any other key is a recipe's, for all cells (`infalign run --help` lists them).",
    ),
    "merge": Verb(
        "several models of one architecture become one: mergekit's methods and YAML, and dam",
        "merge.run:merge",
        recipe="merge.recipe:MergeRecipe",
        read="merge.recipe:load_merge_recipe",
        config="optional",
        tell="merge.run:tell",
        launches=True,
        writes=True,
        usage="--config MERGE.yaml --output_dir FOLDER [--KEY VALUE ...]",
    ),
    "forget": Verb(
        "unlearn tasks by randomised fine-tuning, and measure what really went",
        "forget.run:forget",
        recipe="forget.recipe:ForgetRecipe",
        read="forget.recipe:load_forget_recipe",
        options={"dry_run": "check everything, and list the models; write nothing"},
        tell="forget.run:tell",
        launches=True,
        writes=True,
        usage="--config FORGET.yaml [--KEY VALUE ...]",
    ),
    "theory": Verb(
        "every transform against the optimum for a procedure; loads no model",
        "theory:theory_verb",
        recipe="",
        arguments="theory:add_arguments",
    ),
    "env": Verb("versions and devices, for a bug report", "env:env", recipe=""),
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
        return _print_error(error, 2, debug)
    except TrainingError as error:
        return _print_error(error, 1, debug)
    except Interrupted as error:
        from infalign.runtime.console import say  # noqa: PLC0415 - keeps --help fast

        say(f"infalign: {error}")
        return 143
    except PeerError:
        return 1
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if debug or not error.filename:
            raise
        return _print_error(f"{error.filename}: {error.strerror}: give another path", 2, debug)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if debug or error.errno not in _NO_ROOM:
            raise
        return _print_error(
            f"{error.strerror}: make room and run the same command again; what was finished is kept", 1, debug
        )
    except KeyboardInterrupt:
        if first_to_say("interrupted"):
            print("infalign: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _print_error(error: Exception | str, code: int, debug: bool) -> int:
    """One line a launch, or with --debug the traceback of the error being handled; returns the exit code."""
    if debug:
        raise
    if first_to_say(str(error)):
        print(f"infalign: error: {error}", file=sys.stderr)
    return code


def _dispatch(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(_USAGE.format(verbs="\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"infalign {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in VERBS:
        from infalign.runtime.config import nearest  # noqa: PLC0415 - keeps --help fast

        raise InputError(f"unknown verb {name!r}{nearest(name, VERBS)} (one of {', '.join(VERBS)})")
    if name == "evaluate" and any(word.partition("=")[0] in ("--base", "--policy") for word in rest):
        name = "compare"
    if VERBS[name].recipe:
        _with_recipe(name, rest, debug)
    else:
        _with_arguments(name, rest)
    return 0


def _with_arguments(name: str, words: list[str]) -> None:
    """A verb that reads no recipe."""
    verb = VERBS[name]
    parser = _Parser(prog=f"infalign {name} {verb.sub_verb}".rstrip(), description=verb.help, allow_abbrev=False)
    if verb.arguments:
        _named(verb.arguments)(parser)
    if not {"-h", "--help"}.isdisjoint(words) or (verb.sub_verb and not words):
        parser.print_help()
    elif verb.sub_verb and words[0] != verb.sub_verb:
        raise InputError(
            f"infalign {name} {words[0]}: the only sub-verb is {verb.sub_verb}: {parser.prog} {verb.usage}"
        )
    elif verb.arguments:
        _named(verb.run)(parser.parse_args(words[1:] if verb.sub_verb else words))
    elif words:
        raise InputError(f"{name} takes no arguments, got {' '.join(words)}")
    else:
        _named(verb.run)()


def _with_recipe(name: str, words: list[str], debug: bool) -> None:
    """A verb that reads a recipe: here, or (`--accelerate_config`) on several processes once the recipe is read."""
    from infalign.runtime import launch  # noqa: PLC0415 - keeps --help fast
    from infalign.runtime.config import read_flags  # noqa: PLC0415
    from infalign.stages.recipe import find_recipe  # noqa: PLC0415

    verb = VERBS[name]
    if not {"-h", "--help"}.isdisjoint(words):
        print(_help(name))
        return
    launch_flags, words = launch.take_flags(words)
    if launch_flags and not verb.launches:
        raise InputError(f"{name} runs in one process: leave --{next(iter(launch_flags))} out")
    flags = read_flags(words)
    config = None if verb.config == "none" else flags.pop("config", None)
    if config is not None and not isinstance(config, str):
        raise InputError("--config takes one path, e.g. --config recipe.yaml")
    if config is not None and verb.launches:
        launch_flags = launch.keys_of(find_recipe(config)) | launch_flags
    planned = launch.plan(launch_flags)
    if planned is None:
        launch.check_started()
    if config is None and verb.config == "required":
        or_shipped = " (or --config quickstart)" if verb.recipe == "recipe:Recipe" else ""
        raise InputError(f"give a recipe: infalign {name} {verb.usage.partition(' [')[0]}{or_shipped}")
    options = {option: flags.pop(option) for option in verb.options if option in flags}
    for flag in flags:  # --dryrun: no recipe's key is so near
        close = difflib.get_close_matches(flag, verb.options, n=1, cutoff=0.9)
        if close:
            raise InputError(f"unknown flag --{flag}: did you mean --{close[0]}?")
    if "dry_run" in options:
        options["dry_run"] = _as_bool("dry_run", options["dry_run"])
    recipe = _named(verb.read)(flags) if verb.config == "none" else _named(verb.read)(config, flags)
    if planned is not None:
        planned.start(name, [*words, *(["--debug"] if debug else [])])
    with _alone(recipe, verb.writes and not options.get("dry_run")):
        result = _named(verb.run)(recipe, **options)
        if verb.tell and is_main():
            _named(verb.tell)(result)


def _alone(recipe: Any, writes: bool) -> contextlib.AbstractContextManager[None]:
    """Two commands never write to one `output_dir`; rank 0 holds it for all processes of a launch.

    But commands that make some cells of a sweep each share it: a cell has one of them.
    """
    from infalign.runtime.artifacts import at_work  # noqa: PLC0415 - keeps --help fast

    shared = bool(getattr(recipe, "only", None))
    return (
        at_work(recipe.output, shared=shared)
        if writes and recipe.output_dir and is_main()
        else contextlib.nullcontext()
    )


def _named(spec: str) -> Any:
    """The function or class `module:name` below `infalign.stages`."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(f"infalign.stages.{module}"), name)


def _as_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool) or str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise InputError(f"--{name}: expected true or false, got {value!r}")


def _help(name: str) -> str:
    """The keys that a recipe may set, by heading, with their defaults."""
    from infalign.runtime import launch  # noqa: PLC0415 - keeps --help fast
    from infalign.stages.recipe import own_keys  # noqa: PLC0415

    verb = VERBS[name]
    keys = _named(verb.recipe)
    lines = [f"usage: infalign {name} {verb.usage}", "", verb.help]
    if verb.options:
        lines += ["", *(f"  --{option:<25} {text}" for option, text in verb.options.items())]
    if verb.launches:
        lines += ["", f"several processes (launch/README.md; names: {', '.join(launch.names())}):"]
        lines += [f"  --{flag:<25} {text}" for flag, text in launch.FLAGS.items()]
    lines += _key_lines(keys(), own_keys(keys))
    if verb.note:
        lines += ["", verb.note]
    trained_by = keys.__dataclass_fields__.get("training")
    if trained_by is not None:
        lines += ["", f"training: {trained_by.metadata['help']}"]
    return "\n".join(lines)


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


class _Parser(argparse.ArgumentParser):
    """argparse that raises its one line instead of printing the usage before it."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message} (see {self.prog} --help)")


if __name__ == "__main__":  # as `python -m infalign`
    end_process(main())
