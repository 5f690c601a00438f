"""A merged model is looked at, and gets a card that names its parents, and the manifest that says it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from infalign import __version__
from infalign.merging.parents import check_finite, check_loadable
from infalign.merging.plan import MergePlan
from infalign.runtime.artifacts import write_manifest
from infalign.stages.merge.recipe import MergeRecipe

KIND = "merge"

_CARD = """\
---
library_name: transformers
base_model: {parents}
base_model_relation: merge
tags: [infalign, merge{tag}]
---

# {name}

Merged by **{method}** with infalign {version}.

| model | content |
|---|---|
{rows}

```yaml
{recipe}```

seed: {seed}
"""


def finish(folder: Path, recipe: MergeRecipe, plan: MergePlan, parts: dict[str, Any]) -> None:
    """Look at a merged model, and write its card and, last, its manifest."""
    check_finite(folder)
    check_loadable(folder, recipe.trust_remote_code)
    describe(folder, recipe, plan, parts)


def describe(folder: Path, recipe: MergeRecipe, plan: MergePlan, parts: dict[str, Any]) -> None:
    """The card, and, last, the manifest."""
    local = [name for name in parts["models"] if all((recipe.base_dir / one).exists() for one in name.split("+"))]
    shown = dict(zip(local, short_names(local), strict=True))  # a Hub id stays whole
    models = {shown.get(name, name): content for name, content in parts["models"].items()}
    rows = "\n".join(f"| {name} | {', '.join(content)} |" for name, content in models.items())
    card = _CARD.format(
        parents=list(models),
        tag=f", {plan.method}",
        name=recipe.output.name,
        method=plan.method,
        version=__version__,
        rows=rows,
        recipe=yaml.safe_dump(plan.yaml, sort_keys=False),
        seed=recipe.seed,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    settings = {name: value for name, value in asdict(recipe).items() if name != "base_dir"}
    write_manifest(folder, KIND, parts, recipe=settings)


def short_names(names: Sequence[str]) -> list[str]:
    """Models by as many of the last parts of their paths as tell them apart.

    >>> short_names(["outputs/helpful/policy", "outputs/harmless/policy"]), short_names(["/x/a", "b"])
    (['helpful/policy', 'harmless/policy'], ['a', 'b'])
    """
    parts = [Path(name).parts for name in names]
    for count in range(1, max(map(len, parts), default=0) + 1):
        short = ["/".join(one[-count:]) for one in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)
