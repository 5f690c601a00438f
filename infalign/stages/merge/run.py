"""`infalign merge`: check, merge, look at the result, and only then put it in its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from infalign.merging.kit import run_mergekit
from infalign.merging.parents import check_alike, resolve_parent, shapes_of, weight_files
from infalign.merging.plan import DAM, MIXTURE, MergePlan
from infalign.models.loading import load_tokenizer, model_fingerprint, replicated
from infalign.models.mixture import read_mixture, write_mixture
from infalign.runtime.artifacts import sweep_temporaries, whole_folder
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import is_main, together
from infalign.runtime.launch import join
from infalign.stages.merge.recipe import MergeRecipe
from infalign.stages.merge.result import KIND, describe, finish
from infalign.stages.output import reusable
from infalign.types import InputError


def merge(recipe: MergeRecipe) -> dict[str, Any]:
    """Merge, or find it merged.

    Returns:
        `folder`, where the model is, and `made`, whether it was made now.

    Raises:
        InputError: the plan names what is not there or does not fit, or the folder holds something else.
        TrainingError: the merge failed, or its result is not finite.
    """
    join(recipe.use_cpu)
    plan = recipe.plan
    folder = recipe.output
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
        raise InputError(f"output_dir {folder} is not empty and no merge of infalign's: give another --output_dir")
    names, parts = resolved_parts(recipe, plan)
    if reusable(folder, KIND, parts, recipe.overwrite):
        say(f"merge: {folder} is merged already")
        return {"folder": str(folder), "made": False}
    if is_main():
        sweep_temporaries(folder.parent)
        for line in plan.notes:
            notice(line)
    _check_shapes(plan, names)
    if plan.method == DAM:
        from infalign.stages.merge.dam import merge_by_dam  # noqa: PLC0415 - loads models

        with replicated():
            merge_by_dam(recipe, plan, names, parts)
        return {"folder": str(folder), "made": True}
    with together("a merge"):
        if is_main():
            make = _mix if plan.method == MIXTURE else _merge_by_mergekit
            make(recipe, plan, names, parts)
    return {"folder": str(folder), "made": True}


def tell(result: dict[str, Any]) -> None:
    """Print where the merged model is."""
    if result["made"] and read_mixture(result["folder"]):
        say(f"mixture of logits: {result['folder']} (policy_name_or_path for evaluate and generate)")
    elif result["made"]:
        size = sum(path.stat().st_size for path in weight_files(Path(result["folder"])))
        say(f"merged model: {result['folder']} ({size / 1e9:.2f} GB)")


def resolved_parts(recipe: MergeRecipe, plan: MergePlan) -> tuple[dict[str, str], dict[str, Any]]:
    """The models by their names in the YAML, as mergekit takes them; and everything that the merge depends on."""
    with together("the checks before a merge"):
        base = resolve_parent(plan.base, None, recipe.base_dir) if plan.base else None
        wanted = {*([plan.base] if plan.base else []), *(parent.model for parent in plan.parents)}
        names = {name: resolve_parent(name, base, recipe.base_dir) for name in sorted(wanted)}
    contents = {name: [model_fingerprint(one) for one in path.split("+")] for name, path in names.items()}
    return names, {"merge": plan.yaml, "models": contents, "seed": recipe.seed}


def _check_shapes(plan: MergePlan, names: dict[str, str]) -> None:
    """Parents of another shape are refused before anything is read; those on the Hub are left to mergekit."""
    if "models" not in plan.yaml:
        return
    folders = {name: Path(path.split("+")[0]) for name, path in names.items()}
    shapes = {name: shapes_of(folder) for name, folder in folders.items() if folder.is_dir()}
    if len(shapes) > 1:
        check_alike(shapes, bool(plan.yaml.get("tokenizer") or plan.yaml.get("tokenizer_source")))


def _merge_by_mergekit(recipe: MergeRecipe, plan: MergePlan, names: dict[str, str], parts: dict[str, Any]) -> None:
    count = len(plan.parents)
    say(f"merging {count} model{'s' if count > 1 else ''} by {plan.method}")
    with whole_folder(recipe.output) as temporary:
        run_mergekit(
            with_paths(plan.yaml, names),
            temporary,
            seed=recipe.seed,
            shard_bytes=int(recipe.shard_gb * 1e9),
            trust_remote_code=recipe.trust_remote_code,
        )
        shutil.rmtree(temporary / ".adapters", ignore_errors=True)
        finish(temporary, recipe, plan, parts)


def _mix(recipe: MergeRecipe, plan: MergePlan, names: dict[str, str], parts: dict[str, Any]) -> None:
    """Nothing is computed: the parents stay as they are, and are decoded together."""
    adapters = [name for name, path in names.items() if "+" in path]
    if adapters:
        raise InputError(
            f"{plan.method} takes whole models, and {adapters[0]} is an adapter: merge it into its model first "
            "(merge_method: linear with it alone)"
        )
    models = [names[parent.model] for parent in plan.parents]
    with whole_folder(recipe.output) as temporary:
        load_tokenizer(models[0], trust_remote_code=recipe.trust_remote_code).save_pretrained(temporary)
        write_mixture(temporary, models, [float(one.parameters["weight"]) for one in plan.parents], recipe.output)
        describe(temporary, recipe, plan, parts)


def with_paths(value: Any, names: dict[str, str]) -> Any:
    """A merge's YAML with resolved models in place of their names."""
    if isinstance(value, dict):
        return {
            key: names.get(one, one) if key in ("model", "base_model", "tokenizer_source") and isinstance(one, str)
            else with_paths(one, names)
            for key, one in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [with_paths(one, names) for one in value]
    return value
