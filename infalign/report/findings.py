"""Everything that a run has left in its output folder, read once; what is not there is None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.judged import JudgedCurve
from infalign.calibration.judged_file import read_curve
from infalign.calibration.table import SampleTable
from infalign.evaluation.summary import Evaluation, evaluation_from_json
from infalign.runtime.artifacts import read_json, read_manifest
from infalign.theory.objective import differing

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Findings:
    """What was found.

    `references` are the calibration's rewards, one row a prompt, in the order they were drawn; `rewards` are those of
    "base" and "policy" from evaluation, one flat array each, without NaN. `judged` is what the reward's quantiles are
    worth under the gold reward, of `gold_optimal`.
    """

    recipe: Mapping[str, Any] | None
    calibration: Mapping[str, Any] | None
    policy: Mapping[str, Any] | None
    log: list[dict[str, Any]] | None
    evaluation: Evaluation | None
    references: list[Floats] | None
    rewards: Mapping[str, Floats] | None
    judged: JudgedCurve | None = None

    @property
    def is_empty(self) -> bool:
        """True when no stage has finished."""
        return all(part is None for part in (self.calibration, self.policy, self.log, self.evaluation))

    def missing(self) -> list[str]:
        """One sentence for each artifact that is not there, with the command that makes it."""
        parts = [
            (self.recipe, "recipe.json (any stage writes it)", "calibrate"),
            (self.calibration, "calibration/manifest.json: no finished calibration", "calibrate"),
            (self.policy, "policy/manifest.json: no finished policy", "train"),
            (self.log, "policy/training_log.json: no training curves", "train"),
            (self.evaluation, "evaluation.json: no win rates", "evaluate"),
        ]
        found = [f"{what}. Make it: infalign {verb} --config RECIPE.yaml" for part, what, verb in parts if part is None]
        if self.calibration is not None and not self.references:
            found.append("calibration/scores-*: reference rewards. Make them: infalign calibrate --config RECIPE.yaml")
        if self.evaluation is not None and not self.rewards:
            found.append("evaluation/: the rewards of the samples. Make them: infalign evaluate --config RECIPE.yaml")
        return found

    def contradictions(self) -> list[str]:
        """Where artifacts tell of different experiments: the reader must not take them for one."""
        trained = (self.policy or {}).get("parts", {})
        evaluated = {} if self.evaluation is None else self.evaluation.record()
        return [
            f"The policy was trained with {name} {trained[name]}, but evaluation.json says {evaluated[name]}: "
            "run infalign evaluate again (unless it judged another policy)."
            for name in differing(trained, evaluated)
        ]


def read_findings(folder: Path) -> Findings:
    """Read an output folder.

    Raises:
        InputError: a file is damaged, or was written by a newer infalign.
    """
    recipe = _json(folder / "recipe.json", "the recipe record")
    calibration = read_manifest(folder / "calibration", "calibration")
    written = _json(folder / "evaluation.json", "the evaluation")
    evaluation = None if written is None else evaluation_from_json(written)
    return Findings(
        recipe=None if recipe is None else recipe.get("recipe"),
        calibration=calibration,
        policy=read_manifest(folder / "policy", "policy"),
        log=_json(folder / "policy" / "training_log.json", "the training log"),
        evaluation=evaluation,
        references=None if calibration is None else _references(folder / "calibration", calibration),
        rewards=None if evaluation is None else _evaluation_rewards(folder / "evaluation", evaluation, calibration),
        judged=read_curve(folder / "calibration"),
    )


def _json(path: Path, what: str) -> Any:
    return read_json(path, what) if path.exists() else None


def _references(folder: Path, manifest: Mapping[str, Any]) -> list[Floats] | None:
    """The first K rewards of every prompt by the reward that the manifest names."""
    rewards = _rewards(folder, _fingerprint(manifest))
    return [row[: manifest["samples_per_prompt"]] for row in rewards.values()] or None


def _evaluation_rewards(
    folder: Path, evaluation: Evaluation, calibration: Mapping[str, Any] | None
) -> dict[str, Floats] | None:
    """Rewards of base and policy by the evaluation's reward; None when it cannot be told which scores are its."""
    both = _scored_by(folder / "base") & _scored_by(folder / "policy")
    known = calibration is not None and calibration["parts"]["reward"].rpartition(" ")[0] == evaluation.reward
    fingerprint = _fingerprint(calibration) if calibration is not None and known else next(iter(both), "")
    if fingerprint not in both or (len(both) > 1 and not known):
        return None
    rows = {side: _rewards(folder / side, fingerprint) for side in ("base", "policy")}
    flat = {side: _flat(found, evaluation.samples) for side, found in rows.items()}
    return flat if all(values.size for values in flat.values()) else None


def _scored_by(folder: Path) -> set[str]:
    """The fingerprints of the rewards that scored a table."""
    return {path.name.removeprefix("scores-") for path in folder.glob("scores-*")}


def _rewards(folder: Path, fingerprint: str) -> dict[str, Floats]:
    plan = _json(folder / "plan.json", "the sampling plan")
    return {} if plan is None else SampleTable.open(folder, plan["parts"]).rewards(fingerprint)


def _flat(rewards: Mapping[str, Floats], count: int) -> Floats:
    values = np.concatenate([row[:count] for row in rewards.values()]) if rewards else np.empty(0)
    return values[np.isfinite(values)]


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    return manifest["parts"]["reward"].rpartition(" ")[2]
