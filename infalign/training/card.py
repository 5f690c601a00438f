"""The model card that a saved policy carries: what it was trained for, from what, and how to decode it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infalign import __version__
from infalign.theory.objective import objective
from infalign.theory.procedures import BUILT_IN, BestOfN
from infalign.training.baselines import Baseline
from infalign.training.direct import Direct

_CARD = """\
---
library_name: transformers
base_model: {base}
pipeline_tag: text-generation
tags: [infalign, ctrl, trl, rloo{tag}]
---

# {name}

`{base}`, trained with [InfAlign-CTRL](https://arxiv.org/abs/2412.19792) for decoding with **{procedure}**: a reward is
calibrated against samples of the base policy, transformed for the procedure, and maximised under a KL penalty.

| | |
|---|---|
| procedure | {procedure} |
| reward | {reward} |
| transform | {transform} |
| KL coefficient | {beta:.6g} ({aim}) |
| rollouts | {rollouts} a prompt, temperature {temperature:g}, at most {tokens} tokens |
| steps | {steps} |
| made with | infalign {version} |

Deploy it with the procedure it was trained for: draw {n} candidates at temperature {temperature:g}, score them with
the reward, and return the one that {procedure} picks (`infalign generate` does it). With another decoder it may be
worse than a policy that was trained for that one.

```bibtex
@inproceedings{{balashankar2025infalign,
  title     = {{InfAlign: Inference-aware language model alignment}},
  author    = {{Balashankar, Ananth and others}},
  booktitle = {{ICML}},
  year      = {{2025}},
  note      = {{arXiv:2412.19792}},
}}
```
"""


_DIRECT = "none: the win rate itself (direct objective)"


def _objectives(trainer: Any) -> str:
    """The terms of several objectives with their weights."""
    weights = trainer.args.reward_weights or [1.0] * len(trainer.reward_funcs)
    terms = [
        f"{weight:g} \N{MULTIPLICATION SIGN} {name}"
        for weight, name in zip(weights, trainer.reward_func_names, strict=True)
    ]
    return f"none: win rates themselves (direct objective), {' + '.join(terms)}"


def _named(transform: Any) -> str:
    """What is maximised in place of a transform, or the transform."""
    if isinstance(transform, Direct):
        return _DIRECT
    if isinstance(transform, Baseline):
        return f"none: the baseline {transform.label}, on the raw reward"
    return str(transform or "none")


def model_card(trainer: Any, name: str) -> str:
    """The card of a `CTRLTrainer`'s policy; a local base model is named without its folder."""
    procedure = getattr(trainer.procedure, "name", "")
    transform = getattr(trainer.ctrl_reward, "transform", None)
    direct, baseline = isinstance(transform, Direct), isinstance(transform, Baseline)
    several, kl = len(trainer.ctrl_rewards) > 1, None
    if transform is not None and not several and not baseline:
        kl = objective(trainer.procedure or BestOfN(1), None if direct else transform, beta=trainer.args.beta).kl
    aim = "target KL not known" if kl is None else f"target KL {kl:.4g} nats"
    if trainer.kl_control is not None:
        aim = f"at the end; it was steered: target KL {trainer.args.target_kl:.4g} nats"
    if trainer.interpolated is not None and trainer.interpolated.weight != 1.0:
        aim += f"; the weights lie at {trainer.interpolated.weight:.3g} of the way from the base to the trained ones"
    base = str(getattr(trainer.model.config, "_name_or_path", "") or "unknown")
    return _CARD.format(
        name=name,
        tag=f", {procedure.replace('_', '-')}" if procedure in BUILT_IN else "",
        base=Path(base).name if Path(base).is_absolute() else base,
        procedure=trainer.procedure or "plain sampling",
        n=getattr(trainer.procedure, "n", 1),
        reward=", ".join(dict.fromkeys(one.raw.name for one in trainer.ctrl_rewards) or trainer.reward_func_names),
        transform=_objectives(trainer) if several else _named(transform),
        beta=trainer.args.beta if trainer.kl_control is None else trainer.kl_control.beta,
        aim=aim,
        rollouts=trainer.num_generations,
        temperature=trainer.temperature,
        tokens=trainer.max_completion_length,
        steps=trainer.state.global_step,
        version=__version__,
    )
