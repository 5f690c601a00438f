"""A reward model (a sequence or token classifier) with its tokenizer, loaded and checked; nothing is scored here."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
)

from infalign.rewards.adapters import adapter_config, base_of, load_merged, unwrapped
from infalign.runtime.console import notice
from infalign.runtime.plugins import one_line
from infalign.types import InputError

Scored = Literal["sequence", "token"]
"""What has a score of its own."""
PROCESS = ("ForTokenClassification", "ForProcessRewardModel")
"""How the classes of models that score tokens are called (the second: Qwen's, whose code comes with the weights)."""
_PROBE = ("Yes.", "The answer to this is a little longer than that, and it ends here.", "No, I do not think so.")
_WATCHED = 3  # tokens
_SAMPLED = 64
"""Entries of every weight that go into the fingerprint."""


@dataclass(frozen=True)
class LoadedClassifier:
    """A model in evaluation mode, its tokenizer, and where it came from."""

    model: Any
    tokenizer: Any
    name: str


def load_classifier(
    model_or_path: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    of: Scored = "sequence",
) -> LoadedClassifier:
    """The model (from a path, a Hub id, or given) on its device, and its own tokenizer.

    An adapter is merged into the base model that it names; a given `PeftModel` is scored as it is.

    Weights are read from safetensors only. `device=None` is this process's GPU, or the CPU; a given model stays where
    it is. `dtype` is of the backbone ("auto": as stored). `of`: what the head scores.

    Raises:
        InputError: the model or tokenizer cannot be loaded, or weights (e.g. the head) are missing from the files.
    """
    if of == "sequence" and scored_by(model_or_path) == "token":
        raise _classifies_tokens(str(model_or_path)[:60])
    if isinstance(model_or_path, nn.Module):
        model = unwrapped(model_or_path)
        config = getattr(model_or_path, "config", None)
        source = name = getattr(config, "_name_or_path", "") or type(model_or_path).__name__
    else:
        name = str(model_or_path)
        if trust_remote_code:
            notice(f"reward model {name!r}: trust_remote_code runs Python code that ships with it")
        adapter = adapter_config(name)
        if adapter is None:
            model, source = _from_files(name, dtype, trust_remote_code, of), name
        else:
            factory = _factory(name, of)
            model = load_merged(name, adapter, dtype, trust_remote_code, factory)
            source = _with_tokenizer(name, adapter)
        model = model.to(device or default_device())
    if of == "sequence" and any(one.endswith(PROCESS) for one in getattr(model.config, "architectures", None) or ()):
        raise _classifies_tokens(name)  # its config could not be had before, on the Hub
    model.requires_grad_(False).eval()
    source = source if tokenizer is None else tokenizer
    if isinstance(source, (str, Path)):
        source = _tokenizer(str(source), trust_remote_code)
    return LoadedClassifier(model, source, name)


def _classifies_tokens(name: str) -> InputError:
    return InputError(
        f"reward model {name!r} classifies tokens: it is a process reward model; load it with ProcessReward, or by its "
        "name as a recipe's reward"
    )


def default_device() -> torch.device:
    """This process's current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def choose_label(config: Any, label: int | str | None, name: str) -> int:
    """The column of the logits that is the reward.

    Args:
        config: the model's, with `num_labels` and `id2label`.
        label: index or name; may be left out for a model with one label.
        name: the model's, for messages.

    Raises:
        InputError: several labels and none chosen, or no such label.
    """
    count = config.num_labels
    names = {int(index): str(text) for index, text in config.id2label.items()}
    listing = ", ".join(f"{index}: {names.get(index, '?')}" for index in range(count))
    if label is None:
        if count == 1:
            return 0
        raise InputError(
            f"reward model {name!r} has {count} labels ({listing}); set label to the one that is the reward"
        )
    by_name = {text: index for index, text in names.items()}
    index = by_name.get(label, -1) if isinstance(label, str) else label
    if isinstance(label, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise InputError(f"reward model {name!r} has no label {label!r}; its labels are {listing}")
    return index


def keep_head_in_float32(model: nn.Module) -> nn.Module:
    """The backbone of `model`, after turning everything above it to float32 (also its inputs).

    In bf16 a head rounds scores to 3 digits, and distinct completions tie.
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(backbone, nn.Module):
        return model
    for child in model.children():
        if child is not backbone:
            child.float()
            child.register_forward_pre_hook(_to_float32)
    return backbone


def positions_of(model: nn.Module, paddings: Set[int] = frozenset()) -> int | None:
    """How many tokens the model's table of positions has room for; None when it has no such table.

    It is watched on a few tokens, all the same: the embedding that is asked for consecutive rows is the positions', and
    the first row says where they start: at padding_idx + 1 in RoBERTa and its kin, at 0 in most others.

    Args:
        model: a classifier.
        paddings: token ids that mean padding, beside what the embeddings say.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    avoided = {table.padding_idx for table in tables} | paddings
    token = next(token for token in range(len(avoided) + 1) if token not in avoided)
    found: list[int] = []

    def watch(table: Any, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].flatten()[:_WATCHED].tolist() if inputs and isinstance(inputs[0], torch.Tensor) else []
        if len(rows) == _WATCHED and all(row == rows[0] + place for place, row in enumerate(rows)):
            found.append(table.num_embeddings - int(rows[0]))

    hooks = [table.register_forward_pre_hook(watch) for table in tables]
    ids = torch.full((1, _WATCHED), token, device=next(model.parameters()).device)
    try:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (RuntimeError, IndexError, ValueError):  # e.g. BART, which wants an end token; its tables were asked before
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return min(found, default=None)


def takes_types(model: nn.Module) -> bool:
    """Whether a model tells the two texts of a pair apart by token types."""
    count = getattr(getattr(model, "config", None), "type_vocab_size", None)
    return "token_type_ids" in inspect.signature(model.forward).parameters and (count is None or count > 1)


def model_fingerprint(model: nn.Module, tokenizer: Any) -> str:
    """16 hex digits over the class, the shapes and 64 evenly spread entries of every weight, and the tokenizer.

    The same for a path, a copy of it, and the model in memory, on any device.
    """
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=8)
    for key, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        digest.update(f"{key}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(flat[::step][:_SAMPLED].cpu().double().numpy().tobytes())
    parts = [tokenizer.get_vocab(), str(getattr(tokenizer, "chat_template", None)), list(tokenizer("a b")["input_ids"])]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def scored_by(model_or_path: Any) -> Scored:
    """What a reward model scores, by the class that its config (or the model itself) names."""
    if isinstance(model_or_path, nn.Module):
        return "token" if type(unwrapped(model_or_path)).__name__.endswith(PROCESS) else "sequence"
    name = str(model_or_path)
    if (adapter := adapter_config(name)) is not None:
        if adapter.get("task_type") in ("TOKEN_CLS", "SEQ_CLS"):
            return "token" if adapter["task_type"] == "TOKEN_CLS" else "sequence"
        name = base_of(name, adapter)
    return "token" if any(one.endswith(PROCESS) for one in _architectures(name)) else "sequence"


def _architectures(name: str) -> tuple[str, ...]:
    return _named_by_config(name) if Path(name).is_dir() else _named_on_the_hub(name)


def _named_by_config(name: str) -> tuple[str, ...]:
    try:
        return tuple(PretrainedConfig.get_config_dict(name)[0].get("architectures") or ())
    except Exception:  # no config, no network: loading the model says so
        return ()


_named_on_the_hub = functools.cache(_named_by_config)  # as `adapters` does: without a network a question takes long


def text_config(model: Any) -> Any:
    """The config of a model's text part, which is mostly the model's own."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def padding_of(model: Any, tokenizer: Any) -> int:
    """A token id to pad with: any will do where the mask is obeyed."""
    ids = (tokenizer.pad_token_id, getattr(text_config(model), "pad_token_id", None), tokenizer.eos_token_id, 0)
    return next(token_id for token_id in ids if token_id is not None)


def longest(model: Any, tokenizer: Any, name: str, max_length: int | None, pad_id: int) -> int | None:
    """The most tokens of a sequence: `max_length`, else what model and tokenizer say; None when nothing does.

    Raises:
        InputError: more than the model has positions for.
    """
    positions = positions_of(model, {pad_id})
    if max_length is not None and positions is not None and max_length > positions:
        raise InputError(
            f"reward model {name!r}: max_length is {max_length}, and the model has positions for {positions} tokens"
        )
    declared = (
        getattr(model.config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),  # 10**30 where a tokenizer knows no limit
    )
    limits = [positions, *(one for one in declared if one is not None and 0 < one < 10**9)]
    return max_length or min((one for one in limits if one), default=None)


def check_batching(
    name: str,
    tokenizer: Any,
    backbone: nn.Module,
    forward: Callable[[Sequence[list[int]]], NDArray[np.float64]],
    max_length: int | None,
    pad_id: int,
) -> None:
    """Scores one by one must be the scores of a padded batch; says both when they are not.

    Args:
        name: the reward model's.
        tokenizer: its own.
        backbone: whose precision says how near they must be.
        forward: token ids of sequences -> a logit (B,) of each, in one padded pass.
        max_length: tokens of a sequence.
        pad_id: what a sequence without tokens becomes.

    Raises:
        InputError: they are not, or the model can't score at all.
    """
    sequences = [list(tokenizer(text)["input_ids"])[:max_length] or [pad_id] for text in _PROBE]
    try:
        alone = np.concatenate([forward([ids]) for ids in sequences])
        together = forward(sequences)
    except Exception as error:  # the model's own code, e.g. BART's, which wants an end token in every sequence
        raise InputError(
            f"reward model {name!r}: scoring three short texts failed ({one_line(error)}); see that model and "
            "tokenizer belong together"
        ) from error
    exact = next(backbone.parameters()).dtype == torch.float32
    tolerance = (1e-3 if exact else 5e-2) * max(1.0, float(np.abs(alone).max()))
    if not np.abs(alone - together).max() <= tolerance:
        raise InputError(
            f"reward model {name!r}: the score depends on the batch ({alone.round(4).tolist()} one by one, "
            f"{together.round(4).tolist()} together); its code ignores the padding, or its weights are not finite"
        )


def _factory(name: str, of: Scored) -> Any:
    """The transformers class that loads it."""
    if of == "sequence":
        return AutoModelForSequenceClassification
    own = any(one.endswith(PROCESS[1]) for one in _architectures(name))
    return AutoModel if own else AutoModelForTokenClassification


def _from_files(name: str, dtype: Any, trust_remote_code: bool, of: Scored) -> Any:
    try:
        model, info = _factory(name, of).from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # OS, network, configuration and shape errors; all are for the recipe to fix
        raise InputError(
            f"reward model {name!r} cannot be loaded as a {of} classifier ({one_line(error)}); give a folder or "
            f"Hub id with safetensors weights"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        unused = sorted(info["unexpected_keys"])[:3]
        other = f"; the files have {', '.join(unused)} instead" if unused else ""
        raise InputError(
            f"reward model {name!r} has no trained {', '.join(missing[:3])}: it would be freshly initialised and score "
            f"at random{other}; give a trained reward model"
        )
    _check_unused(model, name, info["unexpected_keys"])
    return model


_HARMLESS = re.compile(r"(.*\.)?(position_ids|inv_freq|masked_bias|attn\.bias)")  # constants that old files hold
_OTHER_TASKS = re.compile(
    r"(lm_head|cls|lm_predictions|mask_predictions|generator_predictions|embed_out|qa_outputs)\..*"
)


def _check_unused(model: Any, name: str, unexpected: Iterable[str]) -> None:
    """Tell of weights in the files that the model's class has no place for: it does not score as it was trained.

    A bias of the head is the same for every completion, so that no order and no quantile depends on it.

    Raises:
        InputError: other weights of a head.
    """
    unused = sorted(key for key in unexpected if not _HARMLESS.fullmatch(key) and not _OTHER_TASKS.fullmatch(key))
    inside = [key for key in unused if key.startswith(f"{model.base_model_prefix}.")]
    linear = {f"{path}.bias" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    biases = [key for key in unused if key not in inside and key in linear]
    others = [key for key in unused if key not in inside and key not in biases]
    kind = type(model).__name__
    if others:
        raise InputError(
            f"reward model {name!r}: its files hold weights of another head, {', '.join(others[:3])}, for which {kind} "
            "has no place: its scores would not be those that it was trained for; load it with the class that it was "
            "trained with (trust_remote_code: true where that comes along), or take these weights out of the files"
        )
    for keys, effect in (
        (biases, "every score is off by the same constant, which changes no order and no quantile"),
        (inside, "scores differ from those that it was trained for"),
    ):
        if keys:
            notice(
                f"reward model {name!r}: {', '.join(keys[:3])}{' and more' if len(keys) > 3 else ''} in its files "
                f"left out, because {kind} has no place for it: {effect}"
            )


def _with_tokenizer(name: str, adapter: dict[str, Any]) -> str:
    """Where the tokenizer of an adapter lies: mostly beside it, else with its base."""
    beside = not Path(name).is_dir() or (Path(name) / "tokenizer_config.json").is_file()
    return name if beside else base_of(name, adapter)


def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise InputError(
            f"no tokenizer for the reward model at {name!r} ({one_line(error)}); save it next to the model or pass one"
        ) from error


def _to_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
