"""A cell of `headline.yaml`: one objective, trained and measured on the table of `ctrl_one_page.py`, exactly as well.

The table stands in for a language model: 32 prompts, answers of two tokens out of 24, rewards that are numbers drawn
once. What is trained is its logits, by the package's own rewards (`CTRLReward`, `Direct`, `Baseline`) and its control
of the KL; what a policy is worth is known without sampling. So where objectives differ here, it is the objectives.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import ctrl_one_page as page
from few_samples import exact, train, train_offline

from infalign import CellSamples, CTRLReward
from infalign.calibration.few_samples import beta_for_kl
from infalign.evaluation.summary import decoders
from infalign.stages.objective import load_objective, load_procedure
from infalign.stages.recipe import load_recipe
from infalign.training.baselines import BASELINES, Baseline, base_spread
from infalign.training.direct import Direct
from infalign.training.offline import offline_loss


def cell(
    target_kl: float,
    seed: int,
    num_calibration_samples: int,
    num_generations: int,
    max_steps: int,
    learning_rate: float,
    eval_samples: int,
    eval_n: list[int],
    **objective: Any,
) -> CellSamples:
    """Train one objective, steered to `target_kl` nats, and draw `eval_samples` answers of it and of the base.

    Args:
        target_kl, seed, num_calibration_samples, num_generations, max_steps, learning_rate, eval_samples, eval_n: as in
            a recipe.
        objective: `procedure`, `n`, `transform`, `transform_kwargs`, `objective`, `solver`, `loss`, as in a recipe.
    """
    keys = {"target_kl": target_kl, "num_calibration_samples": num_calibration_samples}
    recipe = load_recipe({**keys, "num_generations": num_generations, **objective})
    procedure = load_procedure(recipe)
    aim = load_objective(recipe, procedure)
    value: Any = aim.transform
    beta = aim.beta
    if recipe.objective == "direct":
        value = Direct(procedure)
    elif recipe.objective in BASELINES:
        _, reward_PJ = page.make_problem(seed)
        value = Baseline(recipe.objective, procedure, scale=base_spread(list(reward_PJ.numpy())))
    else:
        beta = beta_for_kl(value, num_calibration_samples, target_kl)
    reward = CTRLReward(lambda completions, **_: completions, value, num_generations=num_generations)
    shape = num_calibration_samples, num_generations
    start = None
    if recipe.solver != "online":
        loss = offline_loss(recipe.loss, recipe.loss_kwargs, target_kl)
        steps = max_steps if recipe.solver == "offline" else max_steps // 2
        offline = train_offline(loss, reward, aim.beta, target_kl, *shape, steps, learning_rate, seed)
        start = offline[0]
    if recipe.solver == "offline":
        policy, base, reward_PJ = offline
    else:
        steps = max_steps if recipe.solver == "online" else max_steps // 2
        policy, base, reward_PJ = train(reward, beta, target_kl, *shape, steps, learning_rate, seed, start)
    log_pi, log_base = page.log_probs(policy), page.log_probs(base)
    kl_P = (log_pi.exp() * (log_pi - log_base)).sum(1)
    # the base's samples are the same for every cell of a seed
    rewards = [
        reward_PJ.gather(1, page.sample(side, eval_samples, torch.Generator().manual_seed(1000 + seed + place))).numpy()
        for place, side in enumerate((policy, base))
    ]
    known = {repr(one): exact(policy, base, reward_PJ, one)[1] for one in decoders(procedure, eval_n)}
    return CellSamples(
        keys=[f"prompt {number}" for number in range(page.P)],
        kl_P=kl_P.numpy(),
        policy_PM=rewards[0],
        base_PM=rewards[1],
        exact={**known, "kl": float(np.mean(kl_P.numpy()))},
    )
