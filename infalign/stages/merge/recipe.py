"""The keys of `infalign merge`: mergekit's, unchanged, and where the result goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from infalign.merging.plan import TOP, MergePlan, read_plan
from infalign.stages.recipe import key, read_keys, settle_paths, settled_output
from infalign.types import InputError


@dataclass(frozen=True)
class MergeRecipe:
    """One merge. `base_dir` is the folder that relative paths start from (the YAML's)."""

    merge_method: str = key("", "linear, slerp, nuslerp, ties, dare_ties, task_arithmetic, ... or dam", "mergekit")
    base_model: str | None = key(None, "the model that the others were trained from", "mergekit")
    models: list = key([], "[{model: FOLDER_OR_HUB_ID, parameters: {weight: 0.5}}, ...]; MODEL+ADAPTER", "mergekit")
    slices: list = key([], "layers of models, in place of models", "mergekit")
    modules: dict = key({}, "parts of models, in place of models", "mergekit")
    parameters: dict = key({}, "of the method; {weight: 0.5, density: 0.2, t: 0.3}; of dam: {steps: 200}", "mergekit")
    dtype: str | None = key(None, "precision of the merge: float32, bfloat16, float16", "mergekit")
    out_dtype: str | None = key(None, "precision of the result; unset: dtype", "mergekit")
    tokenizer_source: str | None = key(None, "base, union or a model", "mergekit")
    tokenizer: dict = key({}, "{source: base}, where vocabularies differ", "mergekit")
    chat_template: str | None = key(None, "auto, a name or a template", "mergekit")

    output_dir: str = key("", "the merged model's folder, relative to the working directory", "output")
    seed: int = key(42, "of DARE's masks and DAM's batches", "output")
    shard_gb: float = key(2.0, "GB of a file of weights, which bounds the memory", "output")
    trust_remote_code: bool = key(False, "run code that ships with a model", "output")
    use_cpu: bool = key(False, "stay on the CPU even where there is a GPU (dam)", "output")
    overwrite: bool = key(False, "merge anew instead of refusing", "output")

    base_dir: Path = field(default=Path(), metadata={"kind": "internal"})

    __post_init__ = settle_paths
    output = property(settled_output)

    @property
    def plan(self) -> MergePlan:
        """The checked merge.

        Raises:
            InputError: everything that is wrong with it.
        """
        given = {name: getattr(self, name) for name in TOP}
        return read_plan({name: value for name, value in given.items() if value not in (None, "", [], {})})


def load_merge_recipe(
    config: str | Path | Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None
) -> MergeRecipe:
    """A checked recipe from a YAML path or a mapping, with flags on top; see `recipe.load_recipe`.

    Raises:
        InputError: everything that is wrong with it, at once.
    """
    keys = read_keys(MergeRecipe, config, flags, dict)
    recipe = MergeRecipe(
        **{name: value for name, value in keys.items() if name in {one.name for one in fields(MergeRecipe)}}
    )
    problems = []
    if not recipe.output_dir:
        problems.append("output_dir must be given (--output_dir FOLDER)")
    if not 0 <= recipe.seed < 2**32:
        problems.append(f"seed must be between 0 and 2**32 - 1, got {recipe.seed}")
    if not recipe.shard_gb > 0:
        problems.append(f"shard_gb must be more than 0, got {recipe.shard_gb}")
    if problems:
        raise InputError("; ".join(problems))
    _ = recipe.plan
    return recipe
