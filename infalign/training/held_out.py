"""Win rate and KL on held-out prompts while training: fresh samples of the current policy against the calibration's.

Every rank makes equally many passes through the model, whatever its share of the prompts: with sharded weights each
pass is a collective. Rewards come after, agreed on by all ranks.
"""

# TRL and transformers type their attributes as unions of everything that they may ever hold.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trl.trainer.utils import use_adapter

from infalign.evaluation.winrate import win_rate
from infalign.runtime.distributed import even_share, gathered, together
from infalign.theory.procedures import BestOfN
from infalign.training.reward import PROMPT_IDS, data_columns
from infalign.training.rollouts import rollout_uniforms
from infalign.types import InputError

Rows = list[tuple[list[int], list[float]]]


def measure(trainer: Any, rows: Sequence[dict[str, Any]], count: int) -> dict[str, float]:
    """What `count` samples on each held-out prompt say.

    Args:
        trainer: a `CTRLTrainer`.
        rows: of the data set: `prompt`, the reference rewards, further columns.
        count: samples a prompt.

    Returns:
        `winrate` under the trainer's procedure, `winrate_1` (standard), `kl_seq` (nats).

    Raises:
        InputError: there are no rows, or they have no reference rewards.
    """
    if not rows:
        raise InputError("the eval_dataset is empty: give it prompts, or leave it out")
    trainer.ctrl_reward.require_references(rows[0], "the eval_dataset")
    drawn = []
    numbered = list(enumerate(rows))
    for one in even_share(numbered):  # a rank with a row less samples the first one again, and forgets it
        number, row = one or (0, None)
        prompt_ids, samples = _sample(trainer, rows[number], count, number)
        drawn.append((row, samples, _mean_kl(trainer, prompt_ids, samples)))
    scored: list[NDArray[np.float64]] = []
    with together():
        scored = [_rewards(trainer, row, samples) for row, samples, _ in drawn if row is not None]
    references = [np.asarray(row[trainer.ctrl_reward.column], dtype=float) for row, _, _ in drawn if row is not None]
    kls = [kl for row, _, kl in drawn if row is not None]
    # an average over prompts of all ranks, not of the ranks' averages: their shares may differ by one
    everything = [one for part in gathered(list(zip(scored, references, kls, strict=True))) for one in part]
    kept = [(ours, theirs) for ours, theirs, _ in everything if ours.size >= trainer.procedure.n]
    ours, theirs = [one for one, _ in kept], [one for _, one in kept]
    return {
        "winrate": win_rate(ours, theirs, trainer.procedure).mean,
        "winrate_1": win_rate(ours, theirs, BestOfN(1)).mean,
        "kl_seq": float(np.mean([kl for _, _, kl in everything])),
    }


def _sample(trainer: Any, row: dict[str, Any], count: int, number: int) -> tuple[list[int], Rows]:
    """The tokens of row `number`'s prompt, and `count` completions of it with their log-probabilities."""
    ids = row[PROMPT_IDS] if PROMPT_IDS in row else trainer._tokenize_prompts([row["prompt"]])[0][0]
    prompts = [list(ids)] * count
    length = trainer.max_completion_length
    # rows of equal prompts have streams of their own, by their place
    first = number * count
    uniforms_BT = rollout_uniforms(prompts, seed=trainer.args.seed, generation=-1, first_row=first, count=length)
    return prompts[0], trainer._decode(prompts, uniforms_BT)


def _rewards(trainer: Any, row: dict[str, Any], samples: Rows) -> NDArray[np.float64]:
    """The raw rewards of one prompt's completions, without those that have no score."""
    reward, count = trainer.ctrl_reward, len(samples)
    texts = trainer.processing_class.batch_decode([ids for ids, _ in samples], skip_special_tokens=True)
    chat = isinstance(row["prompt"], list)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    given = {name: [value] * count for name, value in row.items() if name not in ("prompt", reward.column)}
    rewards = reward.raw(
        prompts=[row["prompt"]] * count,
        completions=completions,
        completion_ids=[ids for ids, _ in samples],
        **data_columns(given),
    )
    return rewards[~np.isnan(rewards)]


def _mean_kl(trainer: Any, prompt: list[int], samples: Rows) -> float:
    """The mean log-ratio of policy to reference over one prompt's completions, nats."""
    device = trainer.accelerator.device
    width = max(len(ids) for ids, _ in samples)
    ids = torch.tensor([prompt + ids + [0] * (width - len(ids)) for ids, _ in samples], device=device)
    real = [[1] * (len(prompt) + len(ids)) + [0] * (width - len(ids)) for ids, _ in samples]
    mask = torch.tensor(real, device=device)
    with torch.no_grad(), _reference(trainer) as reference:
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            reference, ids, mask, width, batch_size=trainer.args.per_device_eval_batch_size
        )
    # E[log pi] over the policy's own samples less E[log pi_ref] over the same: nats a sequence
    policy = np.array([sum(logps) for _, logps in samples])
    return float(policy.mean() - (logps * mask[:, -width:]).sum(1).double().mean().item())


@contextlib.contextmanager
def _reference(trainer: Any) -> Iterator[Any]:
    """The reference policy: TRL's second copy, or the policy with its adapter off."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
        yield trainer.model
