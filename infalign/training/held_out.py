"""Win rate and KL on held-out prompts while training: fresh samples of the current policy against the calibration's.

Samples are drawn with the same random streams at every measurement, so that a curve shows the policy and not the draw;
several prompts share a pass, as in training. Every rank makes equally many passes through the model, whatever its share
of the prompts: with sharded weights each pass is a collective. Rewards come after, agreed on by all ranks.
"""

# TRL and transformers type their attributes as unions of everything that they may ever hold.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trl.trainer.utils import use_adapter

from infalign.calibration.quantile import calibrate
from infalign.evaluation.limits import attainment, limit_at
from infalign.evaluation.winrate import win_rate
from infalign.generation.likelihood import sequence_kl
from infalign.runtime.distributed import even_share, gathered, together
from infalign.theory.procedures import BestOfN
from infalign.training.reward import PROMPT_IDS, TERMS, data_columns
from infalign.training.rollouts import rollout_uniforms
from infalign.types import InputError

Array = NDArray[np.float64]
HELD_OUT = -1
"""In place of a generation's number: the random streams of these samples, the same at every measurement."""
Rows = list[tuple[list[int], list[float]]]
"""Token ids of completions, and the policy's log-probabilities of them."""


@dataclass(frozen=True)
class _OnAPrompt:
    """One prompt: scored rewards and reference rewards of each term, mean log-ratio (nats) and length (tokens)."""

    rewards_TM: list[Array]
    references_TK: list[Array]
    kl: float
    length: float


def measure(trainer: Any, rows: Sequence[dict[str, Any]], count: int) -> dict[str, float]:
    """What `count` samples on each held-out prompt say.

    Args:
        trainer: a `CTRLTrainer`.
        rows: of the data set: `prompt`, the reference rewards, further columns.
        count: samples a prompt.

    Returns:
        `winrate` under the trainer's procedure, `winrate_1` (standard), `kl_seq` (nats), `attainment` of the exact
        limit at this KL (left out where the KL is too small to tell), `completion_length` (tokens), and
        `quantile_distance`: how far the rewards' quantiles among the references are from uniform, which the base's are
        (the largest gap between the two distribution functions: 1/2 for a policy that is always above the base's
        median). Of several `CTRLReward`s this is the first one's, and all have `winrate/NAME` under their own
        procedures.

    Raises:
        InputError: there are no rows, or they have no reference rewards.
    """
    if not rows:
        raise InputError("the eval_dataset is empty: give it prompts, or leave it out")
    for one in trainer.ctrl_rewards:
        one.require_references(rows[0], "the eval_dataset")
    drawn = drawn_samples(trainer, rows, count)
    scored: list[list[Array]] = []
    with together():
        scored = [_rewards(trainer, rows[number], samples) for number, samples, _ in drawn]
    measured = [
        (number, _OnAPrompt(rewards_TM, _references(trainer, rows[number]), float(kl_M.mean()), _length(samples)))
        for rewards_TM, (number, samples, kl_M) in zip(scored, drawn, strict=True)
    ]
    # an average over prompts of all ranks, not of the ranks' averages: their shares may differ by one
    of_all_ranks = sorted((one for part in gathered(measured) for one in part), key=lambda one: one[0])
    everything = [one for _, one in of_all_ranks]
    found = _summary(everything, trainer.procedure)
    if len(trainer.ctrl_rewards) > 1:
        for term, one in enumerate(trainer.ctrl_rewards):
            if one.procedure is not None:
                found[f"winrate/{one.name}"] = win_rate(*_sides(everything, term, one.procedure), one.procedure).mean
    return found


def drawn_samples(
    trainer: Any, rows: Sequence[dict[str, Any]], count: int, generation: int = HELD_OUT, conditional: bool = False
) -> list[tuple[int, Rows, Array]]:
    """This rank's share of the rows, by number: completions of the current policy, and what each says of its KL, nats.

    Args:
        trainer: a `CTRLTrainer`.
        rows: of a data set.
        count: samples a prompt.
        generation: names their random streams.
        conditional: sum the KL of each next token in place of log-ratios (less variance, a pass more); of a policy that
            is an adapter it is log-ratios all the same.
    """
    kl_of = _conditional_kl if conditional and trainer.ref_model is not None else _log_ratios
    share = even_share(list(range(len(rows))))
    at_once = max(1, trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation // count)
    drawn: list[tuple[int, Rows, Array]] = []
    for start in range(0, len(share), at_once):
        part = share[start : start + at_once]
        # a rank with a row less samples the first one again, and leaves it out
        numbers = [0 if number is None else number for number in part]
        prompts = [_prompt_ids(trainer, rows[number]) for number in numbers]
        samples = _sample(trainer, prompts, numbers, count, generation)
        kl_B = kl_of(trainer, [ids for ids in prompts for _ in range(count)], samples)
        for place, number in enumerate(part):
            own = slice(place * count, (place + 1) * count)
            if number is not None:
                drawn.append((number, samples[own], kl_B[own]))
    return drawn


def _sides(measured: Sequence[_OnAPrompt], term: int, procedure: Any) -> tuple[list[Array], list[Array]]:
    """Rewards and reference rewards of the prompts that have enough of them."""
    kept = [one for one in measured if one.rewards_TM[term].size >= procedure.n]
    return [one.rewards_TM[term] for one in kept], [one.references_TK[term] for one in kept]


def _summary(measured: Sequence[_OnAPrompt], procedure: Any) -> dict[str, float]:
    ours, theirs = _sides(measured, 0, procedure)
    wins, kl = win_rate(ours, theirs, procedure).mean, float(np.mean([one.kl for one in measured]))
    quantiles = np.sort(np.concatenate(calibrate(ours, theirs)))
    uniform = (np.arange(quantiles.size) + 0.5) / quantiles.size
    found = {
        "winrate": wins,
        "winrate_1": win_rate(ours, theirs, BestOfN(1)).mean,
        "kl_seq": kl,
        "completion_length": float(np.mean([one.length for one in measured])),
        "quantile_distance": float(np.abs(quantiles - uniform).max()),
    }
    share = attainment(wins, limit_at(procedure, kl), kl)
    return found if np.isnan(share) else found | {"attainment": share}


def _prompt_ids(trainer: Any, row: dict[str, Any]) -> list[int]:
    return list(row[PROMPT_IDS] if PROMPT_IDS in row else trainer._tokenize_prompts([row["prompt"]])[0][0])


def _sample(trainer: Any, prompts: Sequence[list[int]], numbers: Sequence[int], count: int, generation: int) -> Rows:
    """`count` completions of each prompt, one prompt's after the other's."""
    length = trainer.max_completion_length
    uniforms_BT = np.concatenate(
        [
            # rows of equal prompts have streams of their own, by their place
            rollout_uniforms(
                [ids] * count, seed=trainer.args.seed, generation=generation, first_row=number * count, count=length
            )
            for ids, number in zip(prompts, numbers, strict=True)
        ]
    )
    return trainer._decode([ids for ids in prompts for _ in range(count)], uniforms_BT)


def _references(trainer: Any, row: dict[str, Any]) -> list[Array]:
    return [np.asarray(row[one.column], dtype=float) for one in trainer.ctrl_rewards]


def _rewards(trainer: Any, row: dict[str, Any], samples: Rows) -> list[Array]:
    """The raw rewards of one prompt's completions by each term, without those that have no score.

    A term that the prompt is not for has none.
    """
    count, hidden = len(samples), {"prompt", *(one.column for one in trainer.ctrl_rewards)}
    texts = trainer.processing_class.batch_decode([ids for ids, _ in samples], skip_special_tokens=True)
    chat = isinstance(row["prompt"], list)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    columns = data_columns({name: [value] * count for name, value in row.items() if name not in hidden})
    prompts, token_ids = [row["prompt"]] * count, [ids for ids, _ in samples]
    scores_TM = [
        one.scores(prompts, completions, token_ids, columns, [one.is_for(row.get(TERMS, ()))] * count)
        for one in trainer.ctrl_rewards
    ]
    return [scores_M[~np.isnan(scores_M)] for scores_M in scores_TM]


def _length(samples: Rows) -> float:
    return float(np.mean([len(ids) for ids, _ in samples]))


def _log_ratios(trainer: Any, prompts: Sequence[list[int]], samples: Rows) -> Array:
    """(B,) log pi - log pi_ref of completions, nats: the mean over the policy's own is its KL."""
    device = trainer.accelerator.device
    before, after = max(map(len, prompts)), max(len(ids) for ids, _ in samples)
    rows = [
        ([0] * (before - len(prompt)) + prompt, ids + [0] * (after - len(ids)), len(prompt), len(ids))
        for prompt, (ids, _) in zip(prompts, samples, strict=True)
    ]
    ids_BT = torch.tensor([prompt + ids for prompt, ids, _, _ in rows], device=device)
    place_T = torch.arange(before + after, device=device) - before  # 0 is the first completion token
    prompt_B, length_B = (torch.tensor([row[column] for row in rows], device=device)[:, None] for column in (2, 3))
    mask_BT = ((place_T >= -prompt_B) & (place_T < length_B)).long()
    with torch.no_grad(), _reference(trainer) as reference:
        logps_BT, _, _ = trainer._get_per_token_logps_and_entropies(
            reference, ids_BT, mask_BT, after, batch_size=trainer.args.per_device_eval_batch_size
        )
    theirs = (logps_BT * mask_BT[:, before:]).sum(1).double().cpu().numpy()
    return np.array([sum(logps) for _, logps in samples]) - theirs


def _conditional_kl(trainer: Any, prompts: Sequence[list[int]], samples: Rows) -> Array:
    """(B,) KL of each next token, summed along completions, nats: it has the mean of log-ratios."""
    policy, reference = (trainer.accelerator.unwrap_model(one) for one in (trainer.model, trainer.ref_model))
    with trainer.accelerator.autocast():
        _, kl_B = sequence_kl(policy, reference, prompts, [ids for ids, _ in samples], temperature=trainer.temperature)
    return kl_B.numpy()


@contextlib.contextmanager
def _reference(trainer: Any) -> Iterator[Any]:
    """The reference policy: TRL's second copy, or the policy with its adapter off."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
        yield trainer.model
