"""`infalign serve`: the policy, decoded with its procedure, behind OpenAI's HTTP API (`infalign.serving`)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infalign.decoding.early_rejection import EarlyRejection
from infalign.decoding.strategy import Strategy
from infalign.generation.plan import Request
from infalign.models.loading import context_length
from infalign.rewards.scoring import score_samples
from infalign.runtime.artifacts import fingerprint
from infalign.runtime.config import check, field_hints
from infalign.runtime.console import say
from infalign.stages.experiment import Experiment
from infalign.stages.objective import load_procedure
from infalign.stages.recipe import Recipe
from infalign.stages.reference_sampler import REFERENCE, reference_sampler
from infalign.stages.servers import server_url
from infalign.stages.strategy import load_strategy
from infalign.types import InputError, Interrupted, Prompt, prompt_key

EXTRA = ("prometheus_client", "pydantic", "starlette", "uvicorn")


@dataclass(frozen=True)
class ServeOptions:
    """Flags of `infalign serve` beside the recipe's keys."""

    served: Literal["policy", "base"] = "policy"
    host: str = "127.0.0.1"
    port: int = 8000
    api_token_env: str | None = None
    max_queue: int = 64
    request_timeout: float = 300.0
    max_tokens_policy: Literal["cap", "refuse"] = "cap"


def serve(recipe: Recipe, **flags: Any) -> None:
    """Serve until a signal ends it: Ctrl-C returns, SIGTERM raises; requests under way finish before.

    Args:
        recipe: model, procedure, reward and sampling settings, as for `generate`.
        flags: fields of `ServeOptions`, also as text.

    Raises:
        InputError: flags that do not fit, a port that is taken, no policy, or a reward or backend that does not work.
        Interrupted: after SIGTERM.
    """
    options = _checked(flags)
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve needs {', '.join(missing)}: pip install 'infalign[serve]'")
    from infalign.serving.app import build_app  # noqa: PLC0415 - an extra
    from infalign.serving.listen import address, bind, is_loopback_host, listen  # noqa: PLC0415 - an extra

    token = None if options.api_token_env is None else _token(options.api_token_env)
    if token is None and not is_loopback_host(options.host):
        raise InputError(
            f"--host {options.host} is open to other machines: give --api_token_env NAME, the environment variable "
            "that holds the token to ask for, or stay on 127.0.0.1"
        )
    with bind(options.host, options.port) as bound:
        service = service_of(recipe, options, token)
        lines = _welcome(address(bound), service, options)
        ended = listen(build_app(service), bound, ready=lambda: say(lines))
    if ended == signal.SIGTERM:
        raise Interrupted("served until SIGTERM; what was under way is answered")


def _checked(flags: Mapping[str, Any]) -> ServeOptions:
    options = ServeOptions(**check({}, flags, field_hints(ServeOptions)))
    problems = []
    if options.max_queue < 1:
        problems.append(f"--max_queue must be at least 1, got {options.max_queue}")
    if not 0 < options.request_timeout < math.inf:
        problems.append(f"--request_timeout must be seconds above 0, got {options.request_timeout:g}")
    if problems:
        raise InputError("; ".join(problems))
    return options


def _token(variable: str) -> str:
    """The token in an environment variable; no message shows what may be the token itself."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise InputError(
            "--api_token_env must be the NAME of an environment variable in capitals, e.g. INFALIGN_TOKEN; what is "
            "given is none, and not shown in case it is the token itself: put the token into that variable"
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        raise InputError(f"--api_token_env: the environment variable {variable} is not set: export it, or leave it out")
    if not (token.isascii() and token.isprintable()):
        raise InputError(f"--api_token_env: what {variable} holds has characters that no header takes")
    return token


def service_of(recipe: Recipe, options: ServeOptions, token: str | None = None) -> Any:
    """The `infalign.serving.completions.Service` of a recipe: everything is loaded, and the model has drawn once.

    Raises:
        InputError: whatever the recipe names is not there or does not work.
    """
    from infalign.serving.completions import Service  # noqa: PLC0415
    from infalign.serving.engine import Engine  # noqa: PLC0415
    from infalign.serving.metrics import Metrics  # noqa: PLC0415
    from infalign.serving.worker import Worker  # noqa: PLC0415

    experiment = Experiment(recipe)
    path = experiment.base_path if options.served == "base" else experiment.judged_path
    strategy, reward = strategies(recipe), experiment.reward
    drawn: Any = experiment.sampler(path, "generate")
    # The tokenizer that reads prompts works in another thread than the one that decodes: each needs its own.
    sampler = dataclasses.replace(drawn, tokenizer=copy.deepcopy(drawn.tokenizer))
    engine = Engine(
        sampler=sampler,
        score=lambda prompts, samples: score_samples(reward, prompts, samples),
        procedure=strategy,
        seed=recipe.seed,
        tokens_per_batch=recipe.tokens_per_batch,
        reference=reference_sampler(experiment),
        remote=server_url(recipe, policy=path != experiment.base_path) is not None,
    )
    if isinstance(strategy(None), EarlyRejection) and not hasattr(sampler, "begin"):
        raise InputError(
            "strategy early_rejection stops completions half-way, which generation: openai can't: leave one out"
        )
    render = renderer(experiment)
    _warm_up(sampler, render)
    metrics = Metrics()
    identity = {
        "policy": experiment.sampling_parts(path, "generate"),
        "base": experiment.sampling_parts(experiment.base_path, REFERENCE),
        "procedure": repr(strategy(None)),
        "reward": reward.fingerprint,
    }
    return Service(
        model=_name(recipe, options.served),
        procedure=repr(strategy(None)),
        fingerprint=f"infalign-{fingerprint(identity)}",
        sampling=recipe.sampling,
        seed=recipe.seed,
        most_tokens=context_length(experiment.base_path, recipe.model_revision, recipe.trust_remote_code),
        most_prompt=recipe.max_prompt_length,
        render=render,
        token_text=functools.partial(experiment.tokenizer.decode, skip_special_tokens=False),
        worker=Worker(engine, max_queue=options.max_queue, metrics=metrics),
        metrics=metrics,
        timeout=options.request_timeout,
        token=token,
        cap=options.max_tokens_policy == "cap",
    )


def strategies(recipe: Recipe) -> Callable[[int | None], Strategy]:
    """The recipe's strategy (by default its procedure) with another number of candidates, or (None) with its own.

    Raises (when called):
        InputError: it does not take it.
    """

    @functools.lru_cache(maxsize=64)
    def strategy(n: int | None) -> Strategy:
        if n is None:
            return load_strategy(recipe, load_procedure(recipe))
        changed = dataclasses.replace(recipe, n=n)
        built = load_strategy(changed, load_procedure(changed))
        if built.n != n:
            raise InputError(f"{built!r} draws {built.n} candidates, whatever is asked for: leave n (best_of) out")
        return built

    strategy(None)
    return strategy


def renderer(experiment: Experiment) -> Callable[[Any, Mapping[str, Any]], tuple[Prompt, tuple[int, ...]]]:
    """A prompt, with the recipe's system prompt, and its tokens as in training; a chat's own template variables win."""

    # what transformers takes by itself, another template among it
    arguments = set(inspect.signature(experiment.tokenizer.apply_chat_template).parameters)

    def render(content: Any, variables: Mapping[str, Any]) -> tuple[Prompt, tuple[int, ...]]:
        taken = sorted(arguments & set(variables))
        if taken:
            raise InputError(f"chat_template_kwargs: {taken[0]} is none of a template's variables")
        columns = {"chat_template_kwargs": dict(variables)} if variables else {}
        plain = Prompt(content, prompt_key(content, variables), columns)
        prompt = experiment.with_system_prompt([plain])[0]
        return prompt, tuple(experiment.render(prompt))

    return render


def _warm_up(sampler: Any, render: Callable[[Any, Mapping[str, Any]], tuple[Prompt, tuple[int, ...]]]) -> None:
    """One sample, so that a model or a server that does not work is told before anybody asks.

    Raises:
        InputError: it does not work.
    """
    _, ids = render("Hello", {})
    own = sampler.settings
    sampler.settings = dataclasses.replace(own, max_tokens=min(own.max_tokens, 32))
    sampler.sample([Request("warm-up", 0, ids)])
    sampler.settings = own


def _name(recipe: Recipe, served: str) -> str:
    """What the model is called: the last part of what it was named in the recipe."""
    if served == "base":
        return Path(recipe.model_name_or_path).name
    return Path(recipe.policy_name_or_path).name if recipe.policy_name_or_path else recipe.output.resolve().name


def _welcome(url: str, service: Any, options: ServeOptions) -> str:
    body = json.dumps({"model": service.model, "messages": [{"role": "user", "content": "Hello"}]}).replace(
        "'", "'\\''"
    )
    header = f' -H "Authorization: Bearer ${options.api_token_env}"' if options.api_token_env else ""
    return (
        f"serving {service.model} by {service.procedure} at {url}/v1 (Ctrl-C ends it)\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'"
    )
