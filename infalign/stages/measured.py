"""What an evaluation has drawn and scored, and what the samples look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.diagnostics import duplicate_rate
from infalign.evaluation.length import Side
from infalign.stages.compute import compute_facts
from infalign.stages.experiment import Experiment
from infalign.types import Prompt, Sample

EXAMPLES = 8


@dataclass(frozen=True)
class Measured:
    """Everything that was sampled and scored, by prompt key; (M,) arrays in sample order, NaN for no score."""

    keys: tuple[str, ...]
    base: Mapping[str, NDArray[np.float64]]
    policy: Mapping[str, NDArray[np.float64]]
    base_gold: Mapping[str, NDArray[np.float64]] | None
    policy_gold: Mapping[str, NDArray[np.float64]] | None
    base_samples: Mapping[str, list[Sample]]
    policy_samples: Mapping[str, list[Sample]]

    def side(self, name: str, judge: str) -> Side:
        """One model's rewards that decode, those that judge, and its lengths in tokens."""
        proxy: Mapping[str, NDArray[np.float64]] = getattr(self, name)
        judged: Mapping[str, NDArray[np.float64]] = proxy if judge == "reward" else getattr(self, f"{name}_gold")
        samples: Mapping[str, list[Sample]] = getattr(self, f"{name}_samples")
        lengths = [np.array([len(one.token_ids) for one in samples[key]], dtype=np.float64) for key in self.keys]
        return Side([proxy[key] for key in self.keys], [judged[key] for key in self.keys], lengths)


def sample_facts(experiment: Experiment, prompts: list[Prompt], measured: Measured) -> dict[str, Any]:
    """What the samples look like: mean reward, length, cut and duplicate shares, and a few side by side."""
    drawn = {"base": measured.base_samples, "policy": measured.policy_samples}
    rewards = {"base": measured.base, "policy": measured.policy}
    facts: dict[str, Any] = {}
    for side, samples in drawn.items():
        rows = [samples[key] for key in measured.keys]
        flat = [sample for row in rows for sample in row]
        facts[side] = {
            "reward": float(np.nanmean(np.concatenate([rewards[side][key] for key in measured.keys]))),
            "tokens": float(np.mean([len(sample.token_ids) for sample in flat])),
            "clipped": float(np.mean([not sample.finished for sample in flat])),
            "duplicates": duplicate_rate([[sample.text for sample in row] for row in rows]),
        }
    shown = [prompt for prompt in prompts if prompt.key in set(measured.keys)][:EXAMPLES]
    facts["examples"] = [_example(experiment, prompt, drawn, rewards) for prompt in shown]
    facts["compute"] = compute_facts(experiment, [p for p in prompts if p.key in set(measured.keys)], drawn, rewards)
    return facts


def _example(
    experiment: Experiment, prompt: Prompt, drawn: Mapping[str, Mapping[str, list[Sample]]], rewards: dict[str, Any]
) -> dict[str, Any]:
    """One prompt with what the decoder picks from the first n samples of either side."""
    found: dict[str, Any] = {"prompt": prompt.content}
    for side, samples in drawn.items():
        scores = rewards[side][prompt.key]
        scored = np.flatnonzero(np.isfinite(scores))[: experiment.procedure.n]
        chosen = scored[int(experiment.procedure.select(scores[scored][None], np.random.default_rng(0))[0])]
        found[side] = {
            "decoded": {"text": samples[prompt.key][chosen].text, "reward": float(scores[chosen])},
            "samples": [
                {"text": samples[prompt.key][row].text, "reward": float(scores[row])} for row in scored.tolist()
            ],
        }
    return found
