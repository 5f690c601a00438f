"""`infalign merge`: check, merge, look at the result, and only then put it in its place."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from infalign import __version__
from infalign.merging.kit import run_mergekit
from infalign.merging.parents import check_alike, check_finite, check_loadable, resolve_parent, shapes_of, weight_files
from infalign.merging.plan import DAM, MergePlan
from infalign.models.loading import model_fingerprint, replicated
from infalign.runtime.artifacts import sweep_temporaries, whole_folder, write_manifest
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import is_main, together
from infalign.runtime.launch import join
from infalign.stages.merge.recipe import MergeRecipe
from infalign.stages.output import reusable
from infalign.types import InputError

KIND = "merge"

_CARD = """\
---
library_name: transformers
base_model: {parents}
base_model_relation: merge
tags: [infalign, merge{tag}]
---

# {name}

{count} models merged by **{method}** with infalign {version}.

| model | content |
|---|---|
{rows}

```yaml
{recipe}```

seed: {seed}
"""


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
    else:
        with together("a merge"):
            if is_main():
                _merge_by_mergekit(recipe, plan, names, parts)
    return {"folder": str(folder), "made": True}


def tell(result: dict[str, Any]) -> None:
    """Print where the merged model is."""
    if result["made"]:
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
    say(f"merging {len(plan.parents)} models by {plan.method}")
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


def finish(folder: Path, recipe: MergeRecipe, plan: MergePlan, parts: dict[str, Any]) -> None:
    """Look at a merged model, and write its card and, last, its manifest."""
    check_finite(folder)
    check_loadable(folder, recipe.trust_remote_code)
    models = parts["models"]
    rows = "\n".join(f"| {_short(name)} | {', '.join(content)} |" for name, content in models.items())
    card = _CARD.format(
        parents=[_short(name) for name in models],
        tag=f", {plan.method}",
        name=recipe.output.name,
        count=len(plan.parents),
        method=plan.method,
        version=__version__,
        rows=rows,
        recipe=yaml.safe_dump(plan.yaml, sort_keys=False),
        seed=recipe.seed,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_manifest(folder, KIND, parts, recipe=_settings(recipe))


def _settings(recipe: MergeRecipe) -> dict[str, Any]:
    return {name: value for name, value in asdict(recipe).items() if name not in ("base_dir",)}


def _short(name: str) -> str:
    """A Hub id as it is, a local path without its folders."""
    return "+".join(Path(part).name if Path(part).is_absolute() else part for part in name.split("+"))


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
