"""Which server samples what: `generation: openai`, `base_url` for the base, `policy_base_url` for the policy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, GenerationConfig

from infalign.generation.server import Server
from infalign.models.loading import end_token_ids
from infalign.runtime.address import exposes_key, key_in_environment
from infalign.runtime.console import notice
from infalign.stages.recipe import Recipe


def server_url(recipe: Recipe, *, policy: bool) -> str | None:
    """Where the policy or the base is sampled from; None for this process."""
    url = recipe.policy_base_url if policy else recipe.base_url
    return url.rstrip("/") if url and recipe.generation == "openai" else None


def server_of(recipe: Recipe, *, policy: bool) -> Server | None:
    """The server that samples the policy or the base, None for this process.

    Raises:
        InputError: the API key is not in the environment.
    """
    url = server_url(recipe, policy=policy)
    if url is None:
        return None
    return Server(
        url=url,
        model=recipe.policy_served_model_name if policy else recipe.served_model_name,
        concurrency=recipe.server_concurrency,
        timeout=recipe.server_timeout,
        retries=recipe.server_retries,
        api_key=key_in_environment(recipe.api_key_env),
    )


def warn_of_exposed_key(recipe: Recipe) -> None:
    """One warning when the API key travels over plain http to another machine."""
    urls = [url for policy in (False, True) if (url := server_url(recipe, policy=policy)) and exposes_key(url)]
    if recipe.api_key_env and urls:
        shown = ", ".join(dict.fromkeys(urls))
        notice(f"the API key in {recipe.api_key_env} goes to {shown} over plain http: use https, or an SSH tunnel")


def served_end_ids(path: str, tokenizer: Any, revision: str | None, trust_remote_code: bool) -> tuple[int, ...]:
    """`end_token_ids` of a model that is not loaded."""
    at: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        declared = GenerationConfig.from_pretrained(path, **at)
    except OSError:  # the model comes without one
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **at)
        declared = GenerationConfig.from_model_config(config)
    model: Any = SimpleNamespace(generation_config=declared)
    return end_token_ids(model, tokenizer)
