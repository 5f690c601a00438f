"""`CTRLTrainer`: TRL's `RLOOTrainer` with rollouts from infalign's sampler, each prompt computed once, and checks.

The algorithm stays TRL's: leave-one-out advantages of `Phi(C(x, y)) - beta * sum_t log(pi/pi_ref)`. Overridden:

- `_generate_single_turn`: the sampler that calibration used, one random stream per rollout; its log-probabilities are
  kept, so the exactly on-policy "old" pass costs nothing (in float32; under autocast it is recomputed).
- `_get_per_token_logps_and_entropies`: each distinct prompt once (`generation/shared_prefix.py`).
- `_prepare_inputs`: whole prompt groups stay together when a generation is cut into steps.
- `_generate_and_score_completions`: logs `kl_seq`, and at step 0 checks KL ~ 0 and mean calibrated reward ~ 1/2.
- `evaluate`: held-out win rate under the procedure, and sequence KL.

The first four are active for TRL versions in `TESTED_TRL`; for another version TRL's own path runs, with a warning.
"""

# TRL and transformers type their attributes as unions of everything that they may ever hold.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false, reportOperatorIssue=false

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import gather_object, is_peft_model
from packaging.version import Version
from torch import Tensor
from trl import RLOOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from infalign.evaluation.winrate import win_rate
from infalign.generation.hf import decode_rows
from infalign.generation.shared_prefix import continuation, encode_prefixes, is_shareable, unique_rows
from infalign.runtime.console import notice
from infalign.runtime.distributed import my_share
from infalign.theory.procedures import BestOfN
from infalign.training.callbacks import KLBudget
from infalign.training.checks import check_calibration_at_start, check_kl_at_start
from infalign.training.config import CTRLConfig
from infalign.training.reward import CTRLReward
from infalign.training.rollouts import rollout_uniforms, shuffled_groups
from infalign.types import InputError, SamplingSettings

TESTED_TRL = ("1.16",)
ANNEAL = 0.6  # share of the steps over which beta comes down from beta_start

Render = Callable[[Any], list[int]]


class CTRLTrainer(RLOOTrainer):
    """Train a policy for the decoder it will be deployed with.

    Args:
        model: a name or folder (TRL re-loads the reference from it), or a model that came from one.
        reward_funcs: a `CTRLReward` (or anything TRL takes, which then is plain RLOO).
        args: a `CTRLConfig`; `beta=None` takes the transform's own beta.
        procedure: judged by `evaluate`; by default the reward's.
        render: prompt content -> token ids; by default TRL's own rendering.
        kwargs: everything else of `RLOOTrainer`.

    Raises:
        InputError: no beta anywhere.
    """

    _tag_names = ("trl", "rloo", "infalign", "ctrl")
    _name = "CTRL"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: CTRLConfig,
        *,
        procedure: Any = None,
        render: Render | None = None,
        **kwargs: Any,
    ) -> None:
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self.ctrl_reward = next((one for one in functions if isinstance(one, CTRLReward)), None)
        self.procedure = procedure or getattr(self.ctrl_reward, "procedure", None)
        args.beta = _resolve_beta(args, self.ctrl_reward)
        self._render = render
        self._fast = _trl_is_tested() and args.shared_prefix
        self._sampled_logps: Tensor | None = None
        self._scored_logps: list[Tensor] | None = None
        super().__init__(model, functions, args, **kwargs)
        if args.kl_budget is not None:
            self.add_callback(KLBudget(args.kl_budget))
        self._warned: set[str] = set()

    # --- rollouts -------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if self._render is None:
            return super()._tokenize_prompts(prompts)
        return [self._render(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any) -> Any:
        if not self._fast or images or multimodal_fields or self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        uniforms_BT = rollout_uniforms(
            prompt_ids,
            seed=self.args.seed,
            generation=self._generation_number(),
            first_row=self.accelerator.process_index * len(prompt_ids),
            count=self.max_completion_length,
        )
        rows = self._decode(prompt_ids, uniforms_BT)
        if not (self.args.bf16 or self.args.fp16):
            width = max(len(ids) for ids, _ in rows)
            padded = [logps + [0.0] * (width - len(logps)) for _, logps in rows]
            self._sampled_logps = torch.tensor(padded, device=self.accelerator.device)
        return [ids for ids, _ in rows]

    def _decode(
        self, prompt_ids: Sequence[Sequence[int]], uniforms_BT: np.ndarray
    ) -> list[tuple[list[int], list[float]]]:
        """Decode with the current policy (gathered where it is sharded), in eval mode."""
        settings = SamplingSettings(max_tokens=uniforms_BT.shape[1], temperature=self.temperature)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
        ):
            training = model.training
            model.eval()
            try:
                return decode_rows(_causal_model(model), prompt_ids, uniforms_BT, settings, self.eos_token_ids)
            finally:
                model.train(training)

    def _generation_number(self) -> int:
        accumulation = self.args.gradient_accumulation_steps
        micro = self.state.global_step * accumulation + self._step % accumulation
        return micro // (self.args.steps_per_generation * self.num_iterations)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._scored_logps = []
        self.beta = self._beta_now()
        try:
            batch = super()._generate_and_score_completions(inputs)
            self._log_rollouts(batch, inputs)
        finally:
            self._scored_logps = self._sampled_logps = None
        return batch

    def _beta_now(self) -> float:
        """The KL coefficient of this step: geometric from `beta_start` to `beta` over the first 60 % of the steps."""
        start, end = self.args.beta_start, self.args.beta
        if start is None or not self.state.max_steps:
            return end
        progress = min(1.0, self.state.global_step / (ANNEAL * self.state.max_steps))
        return float(start * (end / start) ** progress)

    def _log_rollouts(self, batch: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """Log the sequence KL (k1, nats) with its standard error; at step 0, check it and the calibration."""
        if self._scored_logps is None or len(self._scored_logps) != 2:
            return
        policy_BT, reference_BT = self._scored_logps
        kl_B = ((policy_BT - reference_BT) * batch["completion_mask"]).sum(1).double()
        kl = self.accelerator.gather(kl_B).cpu().numpy()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["kl_seq"].append(float(kl.mean()))
        metrics["beta"].append(self.beta)
        metrics["kl_seq_error"].append(float(kl.std(ddof=1) / np.sqrt(kl.size)) if kl.size > 1 else 0.0)
        if self.state.global_step == 0 and self.ctrl_reward is not None and self._step == 0:
            name = getattr(self.model.config, "_name_or_path", "the model")
            check_kl_at_start(kl, policy=name, reference=name)
            prompts = max(1, kl.size // self.num_generations)
            references = min(len(row[self.ctrl_reward.column]) for row in inputs)
            if metrics.get("reward/calibrated"):
                check_calibration_at_start(metrics["reward/calibrated"][-1], kl.size, prompts, references)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        steps = self.args.steps_per_generation
        if not self.model.training or not self._fast or any("image" in key for key in generation_batch[0]):
            return super()._prepare_inputs(generation_batch)
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            number = self._generation_number()
            batch = self._generate_and_score_completions(generation_batch)
            generator = torch.Generator().manual_seed(hash((self.args.seed, number)) % 2**63)
            rows = len(batch["advantages"])
            order = shuffled_groups(rows, self.num_generations, generator) if steps > 1 else torch.arange(rows)
            parts = order.to(batch["advantages"].device).chunk(steps)
            self._buffered_inputs = [{name: value[part] for name, value in batch.items()} for part in parts]
        return self._buffered_inputs[self._step % steps]

    # --- log-probabilities ----------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities (B, T) and entropies of the completion tokens; prompts that rows share are run once."""
        kept = self._sampled_logps if model is self.model and not torch.is_grad_enabled() else None
        if kept is not None and not compute_entropy and kept.shape == (len(input_ids), logits_to_keep):
            self._sampled_logps = None
            self._keep_scored(kept)
            return kept, None, None
        plain = compute_aux_loss or any(value is not None for value in multimodal.values())
        if plain or not self._can_share(model):
            found = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
            self._keep_scored(found[0])
            return found
        logps, entropies = self._shared_logps(model, input_ids, attention_mask, logits_to_keep, batch_size)
        self._keep_scored(logps)
        return logps, entropies if compute_entropy else None, None

    def _keep_scored(self, logps: Tensor) -> None:
        if self._scored_logps is not None:
            self._scored_logps.append(logps.detach())

    def _shared_logps(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, kept: int, batch_size: int | None
    ) -> tuple[Tensor, Tensor | None]:
        _, of_row = unique_rows(input_ids[:, :-kept], attention_mask[:, :-kept])
        order = of_row.argsort(stable=True)
        logps, entropies = [], []
        for rows in order.split(batch_size or len(order)):
            outputs = self._forward_shared(model, input_ids[rows], attention_mask[rows], kept)
            logps.append(outputs.log_probs)
            entropies.append(outputs.entropy)
        back = order.argsort()
        entropy = None if entropies[0] is None else torch.cat(entropies)[back]
        return torch.cat(logps)[back], entropy

    def _forward_shared(self, model: Any, input_ids: Tensor, attention_mask: Tensor, kept: int) -> Any:
        """One forward: the distinct prompts once, then all completions on their repeated caches, TRL's fused head."""
        ids_BP, mask_BP = input_ids[:, :-kept], attention_mask[:, :-kept]
        first, of_row = unique_rows(ids_BP, mask_BP)
        with self.accelerator.autocast():
            inner = _causal_model(self.accelerator.unwrap_model(model))
            prefix = encode_prefixes(inner, ids_BP[first], mask_BP[first])
            ids = torch.cat([ids_BP[:, -1:], input_ids[:, -kept:]], dim=1)
            mask = torch.cat([mask_BP[:, -1:], attention_mask[:, -kept:]], dim=1)
            labels = ids.masked_fill(mask == 0, -100)
            return model(**continuation(prefix, of_row, ids, mask), labels=labels, fused_lm_head=True)

    def _can_share(self, model: Any) -> bool:
        if not self._fast:
            return False
        sharded = self.is_fsdp_enabled or (self.is_deepspeed_enabled and _zero_stage(self.accelerator) == 3)
        shareable = not sharded and is_shareable(_causal_model(self.accelerator.unwrap_model(model)))
        if not shareable and "prefix" not in self._warned:
            self._warned.add("prefix")
            why = (
                "parameters are sharded"
                if sharded
                else "gradient checkpointing, or a cache with sliding windows or states"
            )
            notice(f"prompts are computed once per rollout, not once per group: {why}")
        return shareable

    # --- held-out measurement -------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Win rate under the procedure and sequence KL on held-out prompts, with the current policy.

        Logged as `eval_winrate` (the procedure's), `eval_winrate_1` (standard) and `eval_kl_seq`; use
        `metric_for_best_model: winrate` with `load_best_model_at_end: true` to keep the best checkpoint.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if self.ctrl_reward is None or self.procedure is None or dataset is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        count = max(self.num_generations_eval, self.procedure.n)
        measured = [self._measure_prompt(row, count) for row in my_share(list(dataset))]
        measured = [one for one in gather_object(measured) if one["rewards"].size >= self.procedure.n]
        ours, theirs = [one["rewards"] for one in measured], [one["references"] for one in measured]
        found = {
            "winrate": win_rate(ours, theirs, self.procedure).mean,
            "winrate_1": win_rate(ours, theirs, BestOfN(1)).mean,
            "kl_seq": float(np.mean([one["kl"] for one in measured])),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure_prompt(self, row: dict[str, Any], count: int) -> dict[str, Any]:
        """Rewards and mean sequence KL of `count` fresh samples on one held-out prompt."""
        prompt_ids, _, _ = self._tokenize_prompts([row["prompt"]])
        uniforms_BT = rollout_uniforms(
            list(prompt_ids) * count, seed=self.args.seed, generation=-1, first_row=0, count=self.max_completion_length
        )
        rows = self._decode(list(prompt_ids) * count, uniforms_BT)
        texts = self.processing_class.batch_decode([ids for ids, _ in rows], skip_special_tokens=True)
        chat = isinstance(row["prompt"], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        columns = {
            name: [value] * count for name, value in row.items() if name not in ("prompt", self.ctrl_reward.column)
        }
        rewards = self.ctrl_reward.raw(
            prompts=[row["prompt"]] * count,
            completions=completions,
            completion_ids=[ids for ids, _ in rows],
            **columns,
        )
        return {
            "rewards": rewards[~np.isnan(rewards)],
            "references": np.asarray(row[self.ctrl_reward.column], dtype=float),
            "kl": self._mean_kl(prompt_ids[0], rows),
        }

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[Any]:
        """The reference policy: TRL's second copy, or the policy with its adapter off."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        adapted = self.accelerator.unwrap_model(self.model)
        with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
            yield self.model

    def _mean_kl(self, prompt: Sequence[int], rows: list[tuple[list[int], list[float]]]) -> float:
        device = self.accelerator.device
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([list(prompt) + ids + [0] * (width - len(ids)) for ids, _ in rows], device=device)
        mask = torch.tensor(
            [[1] * (len(prompt) + len(ids)) + [0] * (width - len(ids)) for ids, _ in rows], device=device
        )
        with torch.no_grad(), self._reference_model() as reference:
            logps, _, _ = self._get_per_token_logps_and_entropies(
                reference, ids, mask, width, batch_size=self.args.per_device_eval_batch_size
            )
        policy = np.array([sum(logps) for _, logps in rows])
        return float(policy.mean() - (logps * mask[:, -width:]).sum(1).double().mean().item())


def _resolve_beta(args: CTRLConfig, reward: CTRLReward | None) -> float:
    beta = args.beta if args.beta is not None else getattr(getattr(reward, "transform", None), "beta", None)
    if beta is None:
        raise InputError(
            "beta is not set and the transform has none of its own: give CTRLConfig(beta=...), or use "
            "optimal_transform(procedure, kl=...), or tilt(transform, kl=...).beta"
        )
    return float(beta)


def _trl_is_tested() -> bool:
    version = Version(trl.__version__)
    tested = f"{version.major}.{version.minor}" in TESTED_TRL
    if not tested:
        notice(f"TRL {trl.__version__} is not among the tested versions {TESTED_TRL}: TRL's own (slower) path is used")
    return tested


def _causal_model(model: Any) -> Any:
    """The causal language model inside an adapter wrapper (its layers are adapted in place)."""
    return model.get_base_model() if is_peft_model(model) else model


def _zero_stage(accelerator: Any) -> int:
    plugin = accelerator.state.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0
