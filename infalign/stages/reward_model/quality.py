"""What held-out pairs say of a trained reward model: measured, written, drawn and told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infalign.data.preferences import Preference
from infalign.evaluation.pairs import PairQuality, pair_quality
from infalign.report.reliability_plot import draw_reliability
from infalign.report.style import to_png
from infalign.rewards.classifier import ClassifierReward
from infalign.rewards.contract import completion_text
from infalign.runtime.artifacts import read_json, without_nan, write_json, write_whole
from infalign.runtime.console import say
from infalign.stages.reward_model.recipe import RewardModelRecipe

CHECKED = 16  # completions that are scored alone and together


def measure(
    recipe: RewardModelRecipe, train: Sequence[Preference], test: Sequence[Preference], folder: Path
) -> dict[str, Any]:
    """Score the held-out pairs with the saved model, as a recipe would, and write what they say.

    Args:
        recipe: the verb's.
        train: pairs that were trained on; they are only counted.
        test: pairs that were held out.
        folder: of the model.

    Returns:
        The content of `reward_model.json`.
    """
    reward = ClassifierReward(
        str(folder),
        batch_tokens=recipe.tokens_per_batch,
        max_length=recipe.max_length,
        too_long="truncate",
        chat_template_kwargs=recipe.chat_template_kwargs,
        pair=False,  # as the pairs were encoded in training
        as_chat=False,
    )
    chosen, rejected = ([getattr(pair, side) for pair in test] for side in ("chosen", "rejected"))
    prompts = [pair.prompt for pair in test]
    variables = [dict(pair.template) for pair in test]
    scores = reward([*prompts, *prompts], [*chosen, *rejected], chat_template_kwargs=[*variables, *variables])
    half = len(prompts)
    lengths = [len(reward.tokenizer(completion_text(one)).input_ids) for one in [*chosen, *rejected]]
    found = pair_quality(
        scores[:half],
        scores[half:],
        lengths[:half],
        lengths[half:],
        [pair.key for pair in test],
        confidence=recipe.confidence,
    )
    some = list(zip(prompts, chosen, variables, strict=True))[:CHECKED]
    alone = np.array([reward([p], [c], chat_template_kwargs=[v])[0] for p, c, v in some])
    content = _described(found) | {
        "batch_difference": float(np.abs(alone - scores[: len(alone)]).max()),
        "score_spread": float(scores.std()),
        "training_pairs": len(train),
        "training_prompts": len({pair.key for pair in train}),
        "confidence": recipe.confidence,
        "reward": str(folder),
        "manifest": read_json(folder / "manifest.json", "the manifest"),
    }
    write_json(recipe.output / "reward_model.json", without_nan(content))
    picture = to_png(draw_reliability(found.bins, found.pairs, found.ece))
    write_whole(recipe.output / "reliability.png", lambda temporary: temporary.write_bytes(picture))
    return content


def _described(found: PairQuality) -> dict[str, Any]:
    plain = dataclasses.asdict(found)
    plain["accuracy"] = {name: getattr(found.accuracy, name) for name in ("mean", "low", "high")}
    return plain


def tell(result: dict[str, Any]) -> None:
    """Print what was measured on held-out pairs."""
    accuracy = result["accuracy"]
    say()
    say(
        f"held out: {result['pairs']} pairs of {result['prompts']} prompts, none of which was trained on "
        f"({result['training_pairs']} pairs of {result['training_prompts']} prompts were)"
    )
    level = f"{100 * result['confidence']:g} %"
    apart = f"{result['batch_difference']:.1e} at most (scores spread {result['score_spread']:.2g})"
    lengths = (
        f"prefers the longer side in {_share(result['longer_preferred'])} of pairs (people: "
        f"{_share(result['longer_chosen'])}), Spearman {_number(result['length_correlation'])}; accuracy at like "
        f"length {_number(result['like_length_accuracy'])} ({result['like_length_pairs']} pairs)"
    )
    lines = {
        "accuracy": f"{accuracy['mean']:.3f}  {level} interval [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        + ("" if accuracy["low"] > 0.5 else "   NOT above chance: do not train a policy on it"),
        "loss": f"{result['log_loss']:.4f} nats (chance 0.6931)",
        "calibration error": f"{result['ece']:.3f} (reliability.png)",
        "ties": f"{result['tie_rate']:.1%} of pairs",
        "length": lengths,
        "batch 1 = batch n": f"apart by {apart}",
    }
    for name, text in lines.items():
        say(f"  {name:<18} {text}")
    say()
    say(f"use it: reward: {result['folder']}")


def _share(value: float) -> str:
    return "-" if value != value else f"{value:.0%}"


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"
