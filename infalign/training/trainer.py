"""`CTRLTrainer`: TRL's `RLOOTrainer` with rollouts from infalign's sampler, each prompt computed once, and checks.

The algorithm stays TRL's: leave-one-out advantages of `Phi(C(x, y)) - beta * sum_t log(pi/pi_ref)`. Overridden:

- `_generate`: remembers how long completions are, for the KL where `mask_truncated_completions` takes them out.
- `_generate_single_turn`: the sampler that calibration used, one random stream per rollout; its log-probabilities are
  kept, so the exactly on-policy "old" pass costs nothing (in float32; under autocast it is recomputed).
- `_get_per_token_logps_and_entropies`: each distinct prompt once (`models/shared_prefix.py`), the head in pieces.
- `_prepare_inputs`: whole prompt groups stay together when a generation is cut into steps.
- `_generate_and_score_completions`: logs `kl_seq`, and at step 0 checks KL ~ 0 and mean calibrated reward ~ 1/2.
- `_calculate_rewards`: the rollouts' log-ratios, for pooled calibration.
- `training_step`, `_compute_loss`: a loss that is not finite is never propagated, on any rank.
- `_get_train_sampler`, `train`, `_save_checkpoint`: exact resume; checkpoints are whole or not there (`checkpoints`).
- `train`: a steered run ends where its KL is the target (`interpolation`).
- `save_model`: weights that are not finite are never saved.
- `evaluate`: held-out win rate under the procedure, and sequence KL.

With `solver: offline`, batches are base samples from the data set in place of rollouts, and the loss is a regression on
them (`offline`); all else is the same.

The sampler, the shared log-probabilities and whole groups are active for TRL versions in `TESTED_TRL`; for another
version TRL's own path runs there, with a warning.
"""

# TRL and transformers type their attributes as unions of everything that they may ever hold.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false, reportOperatorIssue=false

from __future__ import annotations

import inspect
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import is_peft_model
from packaging.version import Version
from torch import Tensor
from transformers.trainer_utils import rotate_checkpoints
from trl import RLOOConfig, RLOOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from infalign.generation.hf import decode_rows
from infalign.models.layout import columnwise
from infalign.models.loading import keep_four_bits_plain, no_functional_dropout, pad_within_the_vocabulary
from infalign.models.shared_prefix import keeps_no_cache, pass_cost, positions, why_plain, without_router_logits
from infalign.runtime.artifacts import disk_errors, write_whole
from infalign.runtime.console import notice, say
from infalign.runtime.distributed import any_rank, barrier, gathered, is_main, together, world_size
from infalign.runtime.launch import check_started
from infalign.training.baselines import Baseline
from infalign.training.callbacks import (
    ContinueLoss,
    KLBudget,
    NegativeKL,
    SaveOnSignal,
    SkipNotFinite,
    check_finite_weights,
)
from infalign.training.card import model_card
from infalign.training.checkpoints import (
    check_resumable,
    load_rollout_state,
    load_visits,
    newest_whole,
    run_identity,
    save_rollout_state,
    seal,
    visits_of,
)
from infalign.training.checks import check_batch, check_calibration_at_start, check_kl_at_start, check_rewards
from infalign.training.chunked_head import add_chunked_head
from infalign.training.config import CTRLConfig, as_ctrl_config, own_beta, resolve_beta
from infalign.training.data_sets import check_data_sets
from infalign.training.engine import check_engine, engine_logps, importance_weights, token_kl
from infalign.training.held_out import measure
from infalign.training.interpolation import Interpolated, interpolate
from infalign.training.kl_control import FARTHEST, FARTHEST_UNKNOWN, USUAL, KLControl, sensitivity
from infalign.training.offline import (
    OfflineSamples,
    check_offline,
    check_samples_at_start,
    importance_kl,
    offline_loss,
)
from infalign.training.packages import missing_packages
from infalign.training.reward import PROMPT_IDS, TERMS, CTRLReward
from infalign.training.rollouts import PromptOrder, rollout_uniforms, shuffled_groups
from infalign.training.shared_logps import shared_logps
from infalign.types import InputError, SamplingSettings

TESTED_TRL = ("1.16",)
ANNEAL = 0.6  # share of the steps over which beta comes down from beta_start

Render = Callable[[Any], list[int]]


class CTRLTrainer(RLOOTrainer):
    """Train a policy for the decoder it will be deployed with.

    Arguments, their order and defaults are `RLOOTrainer`'s; ours come after them and are keyword-only.

    Args:
        model: a name or folder (TRL re-loads the reference from it), or a model that came from one.
        reward_funcs: a `CTRLReward` (or anything TRL takes, which then is plain RLOO). Or several with `Direct` in
            place of a transform, each with a `name` and with the `column` of its reward: their weighted sum
            (`CTRLConfig(reward_weights=...)`) is trained for, and each is measured. The first is the main one.
        args: a `CTRLConfig`; `beta=None` takes the transform's own beta. None: its defaults, and the output folder
            `MODEL-CTRL`. An `RLOOConfig` is read as `as_ctrl_config` says.
        train_dataset: its rows hold `prompt`, the reference rewards, and whatever the reward reads.
        eval_dataset: likewise; a dictionary of data sets is measured one by one, as `eval_<name>_...`.
        procedure: judged by `evaluate`; by default the reward's.
        render: prompt content -> token ids; by default TRL's own rendering.
        identity: what else a run must share with a checkpoint to resume from it, by name.

    Raises:
        InputError: no beta anywhere, a data set without reference rewards or with too few prompts, an adapter of
            virtual tokens, fewer processes than were asked for, or a package that is not installed.
    """

    _tag_names = ("trl", "rloo", "infalign", "ctrl")
    _name = "CTRL"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: RLOOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        procedure: Any = None,
        render: Render | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        check_started()
        functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.ctrl_rewards = [one for one in functions if isinstance(one, CTRLReward)]
        self.ctrl_reward = self.ctrl_rewards[0] if self.ctrl_rewards else None
        self.procedure = procedure or getattr(self.ctrl_reward, "procedure", None)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = CTRLConfig(f"{name.rstrip('/').rpartition('/')[2]}-CTRL")
        weights = getattr(args, "reward_weights", None) or []
        weights = weights if len(weights) == len(functions) else [1.0] * len(functions)
        weighted = [(one, weight) for one, weight in zip(functions, weights, strict=True) if one in self.ctrl_rewards]
        args = as_ctrl_config(args, knows_beta=own_beta(weighted) is not None)
        if missing := missing_packages(vars(args)):
            raise InputError("; ".join(missing))
        if isinstance(train_dataset, dict):
            names = ", ".join(map(repr, train_dataset))
            raise InputError(f"train_dataset is a dictionary of data sets ({names}): give one, e.g. dataset['train']")
        check_rewards(functions, self.ctrl_rewards, args.reward_weights)
        args.beta = resolve_beta(args, own_beta(weighted), plain=not self.ctrl_rewards)
        if self.ctrl_rewards:
            check_data_sets(self.ctrl_rewards, train_dataset, eval_dataset)
            for one in self.ctrl_rewards:
                one.join(args.num_generations, self.ctrl_rewards)
        if hasattr(train_dataset, "__len__"):
            check_batch(args, len(train_dataset))
        given = run_identity(functions, self.ctrl_rewards, args.reward_weights, train_dataset, args.beta)
        self.offline: OfflineSamples | None = None
        if args.solver == "offline":
            loss = offline_loss(args.loss, args.loss_kwargs, args.target_kl)
            reward = check_offline(loss, self.ctrl_rewards, args)
            self.offline = OfflineSamples(loss, reward, int(args.num_generations or 1), args.seed)
            self.offline.check_rows(train_dataset)
            given["loss"] = loss.label
        self._render = render
        self._fast = _trl_is_tested()
        self._shared = self._fast and args.shared_prefix
        self._lengths: list[int] = []
        self._sampled_logps: Tensor | None = None
        self._row_ids: list[list[int]] = []
        self._scored_logps: list[Tensor] | None = None
        self._engine_logps: list[Any] | None = None
        self.kl_control: KLControl | None = None
        self.interpolated: Interpolated | None = None
        super().__init__(
            model,
            functions,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
        )
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            kind = self.model.active_peft_config.peft_type.value
            raise InputError(f"peft_type {kind}: rollouts would be drawn without its virtual tokens; use LoRA")
        if self.use_vllm and self._fast:
            self.vllm_generation.logprobs = 0  # that of the drawn token, which TRL's RLOO does not ask for
        pad_within_the_vocabulary(self.model, self._tokenizer)
        keep_four_bits_plain(self.model)
        no_functional_dropout(self.model)
        self._add_chunked_heads()
        self.identity = {**given, **(identity or {}), "processes": world_size(), "sharding": self._sharding()}
        self.not_finite = SkipNotFinite(args.max_skipped_steps)
        self.on_signal = SaveOnSignal()
        for callback in (self.not_finite, self.on_signal, NegativeKL()):
            self.add_callback(callback)
        if args.kl_budget is not None:
            self.add_callback(KLBudget(args.kl_budget))
        self._warned: set[str] = set()
        self._shares: dict[int, bool] = {}
        self._offline_kl: list[float] = []

    # --- rollouts -------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if len(self._row_ids) == len(prompts):
            return self._row_ids, None, {}
        if self._render is None:
            return super()._tokenize_prompts(prompts)
        return [self._render(prompt) for prompt in prompts], None, {}

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        self._lengths = [len(ids) for ids in found[1]]
        return found

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any) -> Any:
        if self.use_vllm and self._fast and not (images or multimodal_fields):
            return self._from_vllm(prompt_ids)
        if not self._fast or images or multimodal_fields or self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        uniforms_BT = rollout_uniforms(
            prompt_ids,
            seed=self.args.seed,
            generation=self._generation_number(),
            first_row=self.accelerator.process_index * len(prompt_ids),
            count=self.max_completion_length,
        )
        with together():
            rows = self._decode(prompt_ids, uniforms_BT)
        if self._shared and not (self.args.bf16 or self.args.fp16):
            width = max(len(ids) for ids, _ in rows)
            # In float32 the sampler's log-probabilities are those of a forward pass up to rounding. Under autocast
            # they are not near enough: the first ratio of an on-policy step would not be 1.
            padded = [logps + [0.0] * (width - len(logps)) for _, logps in rows]
            self._sampled_logps = torch.tensor(padded, device=self.accelerator.device)
        return [ids for ids, _ in rows]

    def _from_vllm(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """TRL's way, and the engine's log-probabilities with it."""
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        count = self.num_generations if self.model.training else self.num_generations_eval
        _, ids, logps, _ = self.vllm_generation.generate(
            prompts=prompt_ids, images=None, num_generations=count, profiler=profiling_context(self, "vLLM.generate")
        )
        self._engine_logps = logps
        return ids

    def _weigh_engine(self, batch: dict[str, Any]) -> None:
        """See that the engine draws from the policy, and weigh its completions by policy over engine."""
        drawn, self._engine_logps = self._engine_logps, None
        if drawn is None or not self._scored_logps:
            return
        policy_BT = self._scored_logps[0]
        drawn_BT = self._drawn(batch["completion_mask"])
        log_ratios_BT = (policy_BT - engine_logps(drawn, policy_BT.shape[1], policy_BT.device)) * drawn_BT
        everybodys_BT, everywhere_BT = (
            self.accelerator.gather(self.accelerator.pad_across_processes(one, dim=1))
            for one in (log_ratios_BT, drawn_BT)
        )
        kl_token, kl = token_kl(everybodys_BT, everywhere_BT)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["vllm/kl_seq"].append(kl)
        metrics["vllm/kl_token"].append(kl_token)
        check_engine(kl_token, kl, self.args.vllm_tolerance, self.state.global_step)
        if not (self.args.vllm_importance_sampling_correction and self.model.training):
            return
        bounds = self.args.vllm_importance_sampling_clip_min, self.args.vllm_importance_sampling_clip_max
        weights_B = importance_weights(log_ratios_BT.sum(1), self.args.vllm_importance_sampling_mode, *bounds)
        batch["advantages"] = batch["advantages"] * weights_B.to(batch["advantages"].dtype)
        everybodys_B = self.accelerator.gather(weights_B)
        metrics["vllm/weight"].append(float(everybodys_B.mean()))
        metrics["vllm/left_out"].append(float((everybodys_B == 0).double().mean()))

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
            inner = _causal_model(model)
            layout = nullcontext() if self._sharding() in ("zero3", "fsdp") else columnwise(inner)
            # a forward pass is a collective under FSDP, and under ZeRO-3 unless it gathers the weights for rollouts
            in_step = self.is_fsdp_enabled or (self._sharding() == "zero3" and not self.args.ds3_gather_for_generation)
            try:
                with layout, self.accelerator.autocast():
                    return decode_rows(
                        inner,
                        prompt_ids,
                        uniforms_BT,
                        settings,
                        self.eos_token_ids,
                        in_step=in_step,
                        share=self._shared,
                    )
            finally:
                model.train(training)

    def _generation_number(self) -> int:
        # `_step` counts micro-steps, and a generation serves this many of them
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.beta = self._beta_now()
        self._row_ids = [list(row[PROMPT_IDS]) for row in inputs if PROMPT_IDS in row]
        if self.offline is not None and self.model.training:
            return self._base_samples(self.offline, inputs)
        self._scored_logps = []
        try:
            batch = super()._generate_and_score_completions(inputs)
            self._weigh_engine(batch)
            self._log_rollouts(batch, inputs)
        finally:
            self._scored_logps = self._sampled_logps = None
            self._row_ids = []
        return batch

    def _base_samples(self, offline: OfflineSamples, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of base samples of these rows' prompts, in place of rollouts."""
        prompt_ids = self._tokenize_prompts([row["prompt"] for row in inputs])[0]
        self._row_ids = []
        pad_id, device = self._tokenizer.pad_token_id, self.accelerator.device
        batch = offline.batch(inputs, prompt_ids, self._visit(), self.beta, pad_id, device)
        tokens = batch["prompt_mask"].sum() + batch["completion_mask"].sum()
        self._total_train_tokens += int(self.accelerator.gather(tokens).sum())
        metrics = self._metrics["train"]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["beta"].append(self.beta)
        return batch

    def _visit(self) -> int:
        """How often the offline solver has seen the prompts of this generation before."""
        prompts_at_once = self.args.generation_batch_size // self.num_generations
        return self._generation_number() // max(1, len(self.train_dataset) // prompts_at_once)

    def _beta_now(self) -> float:
        """The KL coefficient of this step: steered, or geometric from `beta_start` to `beta` over 60 % of the steps."""
        if self.args.target_kl is not None and self.state.max_steps:
            if self.kl_control is None:
                micro_steps = self.state.max_steps * self.args.gradient_accumulation_steps
                generations = -(-micro_steps // (self.args.steps_per_generation * self.num_iterations))
                start = math.log(self.args.beta)
                unknown = any(isinstance(one.transform, Baseline) for one in self.ctrl_rewards)
                bound = FARTHEST_UNKNOWN if unknown else FARTHEST
                aim = self.args.target_kl
                # of several objectives, the one that reacts most
                steepest = max((sensitivity(one.transform, aim) for one in self.ctrl_rewards), default=USUAL)
                self.kl_control = KLControl(
                    aim, start, max(1, generations), start, farthest=bound, sensitivity=steepest
                )
            return self.kl_control.beta
        start, end = self.args.beta_start, self.args.beta
        if start is None or not self.state.max_steps:
            return end
        progress = min(1.0, self.state.global_step / (ANNEAL * self.state.max_steps))
        return float(start * (end / start) ** progress)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        if self._scored_logps is not None and len(self._scored_logps) == 2:
            policy_BT, reference_BT = self._scored_logps
            drawn_BT = self._drawn(torch.zeros_like(policy_BT))
            log_ratios_B = ((policy_BT - reference_BT) * drawn_BT).sum(1).double().cpu().numpy()
            for one in self.ctrl_rewards:
                one.log_ratios_B = log_ratios_B
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _log_rollouts(self, batch: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """Log the sequence KL (k1, nats) with its standard error; at step 0, check it and the calibration."""
        if self._scored_logps is None or len(self._scored_logps) != 2:
            return
        policy_BT, reference_BT = self._scored_logps
        # k1, the mean log-ratio: unbiased, but single rows and even the mean of a batch may be negative
        kl_B = ((policy_BT - reference_BT) * self._drawn(batch["completion_mask"])).sum(1).double()
        kl = self.accelerator.gather(kl_B).cpu().numpy()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["kl_seq"].append(float(kl.mean()))
        if self.kl_control is not None and self.model.training:
            self.kl_control.update(float(kl.mean()))
        metrics["beta"].append(self.beta)
        metrics["kl_seq_error"].append(float(kl.std(ddof=1) / np.sqrt(kl.size)) if kl.size > 1 else 0.0)
        if self._step == 0 and self.ctrl_rewards and self.args.initial_weights is None:
            name = getattr(self.model.config, "_name_or_path", "the model")
            check_kl_at_start(kl, policy=name, reference=name)
            for one in self.ctrl_rewards:
                mine = [len(row[one.column]) for row in inputs if one.is_for(row.get(TERMS, ()))]
                counts = [count for part in gathered(mine) for count in part]
                if counts and (means := metrics.get(one.metric("reward/calibrated"))):
                    prompts = max(1, len(counts) // self.num_generations)
                    check_calibration_at_start(means[-1], len(counts), prompts, min(counts))

    def _drawn(self, mask_BT: Tensor) -> Tensor:
        """`mask_BT` with every token that was drawn: `mask_truncated_completions` takes whole rows out of TRL's.

        They stay out of the loss, but the KL is the policy's on all of its completions.
        """
        lengths = torch.tensor(self._lengths, device=mask_BT.device)
        return (torch.arange(mask_BT.shape[1], device=mask_BT.device) < lengths[:, None]).to(mask_BT.dtype)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        steps = self.args.steps_per_generation
        if not self.model.training or not self._fast or any("image" in key for key in generation_batch[0]):
            return super()._prepare_inputs(generation_batch)
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            number = self._generation_number()
            batch = self._generate_and_score_completions(generation_batch)
            # from seed and number alone: every rank shuffles alike, and a resumed run as the first one did
            generator = torch.Generator().manual_seed(hash((self.args.seed, number)) % 2**63)
            rows = len(batch["completion_ids"])
            order = shuffled_groups(rows, self.num_generations, generator) if steps > 1 else torch.arange(rows)
            parts = order.to(batch["completion_ids"].device).chunk(steps)
            # whole groups in each part, because the advantages of a group belong together
            self._buffered_inputs = [{name: value[part] for name, value in batch.items()} for part in parts]
        return self._buffered_inputs[self._step % steps]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's order within an epoch; each epoch's shuffle follows from the seed and its number alone."""
        planned = super()._get_train_sampler(dataset)
        return PromptOrder(planned, self.args.seed, lambda: int(self.state.epoch or 0)) if planned.shuffle else planned

    # --- faults ---------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except _NotFinite:
            # what TRL does after a micro-step; the exception has skipped it
            self._step += 1
            self.not_finite.poisoned = True
            return torch.zeros((), device=self.accelerator.device)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if self.offline is not None and "targets" in inputs:
            loss = self._offline_loss(self.offline, model, inputs)
        else:
            loss = super()._compute_loss(model, inputs)
        # all ranks or none: the backward pass is a collective, and one rank that leaves it out would stop the others
        if any_rank(not bool(torch.isfinite(loss.detach()))):
            raise _NotFinite
        return loss

    def _offline_loss(self, offline: OfflineSamples, model: Any, inputs: Any) -> Tensor:
        """The loss of whole groups of base samples; logs the KL that their importance weights say."""
        ids, mask = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
        )
        kept = inputs["completion_ids"].shape[1]
        logps_BT, _, aux_loss = self._get_per_token_logps_and_entropies(
            model, ids, mask, kept, compute_aux_loss=self.aux_loss_enabled
        )
        logps_B = (logps_BT * inputs["completion_mask"]).sum(1).float()
        log_ratios_B = logps_B - inputs["ref_logps"]
        log_ratios_PG, logps_PG, targets_PG = (
            one.view(-1, offline.group) for one in (log_ratios_B, logps_B, inputs["targets"])
        )
        loss = offline.loss(log_ratios_PG, logps_PG, targets_PG, self.beta)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._metrics["train"]["aux_loss"].append(float(self.accelerator.gather(aux_loss.detach()).mean()))
        everybodys = self.accelerator.gather(log_ratios_B.detach())
        if self._step == 0 and self.args.initial_weights is None:
            name = getattr(self.model.config, "_name_or_path", "the model")
            weights = next(self.model.parameters()).dtype
            rough = self.args.bf16 or self.args.fp16 or weights in (torch.bfloat16, torch.float16)
            tokens = float(inputs["completion_mask"].sum(1).float().mean()) if rough else None
            check_samples_at_start(everybodys.cpu().numpy(), name, tokens)
        steps = self.args.steps_per_generation
        first_iteration = self._step % (steps * self.num_iterations) < steps
        if self._visit() < offline.fresh_visits and first_iteration:
            of_samples = {
                "reward/raw": inputs["raw"],
                "reward/calibrated": inputs["quantiles"],
                "completions/mean_length": inputs["completion_mask"].sum(1).float(),
            }
            gathered_B = {name: self.accelerator.gather(values) for name, values in of_samples.items()}
            self._log_base_samples(everybodys, gathered_B)
        return loss

    def _log_base_samples(self, log_ratios_B: Tensor, values_B: dict[str, Tensor]) -> None:
        """What the importance weights of samples that were not trained on yet say of the policy: KL, mean `values_B`.

        Of samples that it has been trained on they say nothing: a network of some size knows them again (the KL of a
        language model of minutes, .5 nats, would be 4; recipes/LOG.md).
        """
        kl_B, weights_B = importance_kl(log_ratios_B), log_ratios_B.softmax(0)
        for name, value_B in values_B.items():
            self._metrics["train"][name].append(float((weights_B * value_B).sum()))
        self._metrics["train"]["kl_seq"].append(float(kl_B.mean()))
        self._metrics["train"]["kl_seq_error"].append(float(kl_B.std() / math.sqrt(len(kl_B))))
        self._offline_kl.append(float(kl_B.mean()))
        if len(self._offline_kl) == self.args.steps_per_generation:  # a generation's, as for rollouts
            if self.kl_control is not None:
                self.kl_control.update(float(np.mean(self._offline_kl)))
            self._offline_kl = []

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As TRL's, without `training_args.bin` (a pickle, which may hold a token of the Hub)."""
        check_finite_weights(self.model)
        folder = Path(output_dir or self.args.output_dir)
        with disk_errors(folder):
            super().save_model(output_dir, _internal_call)
        if is_main():
            (folder / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, model_name: str | None = None, dataset_name: Any = None, tags: Any = None) -> None:
        """Write the card (`card`) to `output_dir/README.md`, as TRL does when it saves or pushes."""
        if is_main():
            folder = Path(self.args.output_dir)
            write_whole(folder / "README.md", lambda path: path.write_text(model_card(self, model_name or folder.name)))

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As TRL's; a resumed run ends with the weights of one that was never interrupted.

        Args:
            resume_from_checkpoint: a folder, or True for the newest whole checkpoint of `output_dir`, if there is one.

        Raises:
            InputError: the checkpoint is not whole, or another run's.
            TrainingError: gradients or weights stay non-finite.
        """
        found: Any = resume_from_checkpoint
        if found is True:
            found, skipped = newest_whole(Path(self.args.output_dir))
            for folder, why in skipped:
                notice(f"{folder.name} is skipped: {why}")
        if found:
            check_resumable(Path(found), self.identity)
            self._buffered_inputs, counters, arrays = load_rollout_state(Path(found), self.accelerator.device)
            self._step, self._total_train_tokens = counters["step"], counters["tokens"]
            self._metrics["train"] = defaultdict(list, counters["metrics"])
            self._offline_kl = list(counters.get("offline_kl", []))
            if counters.get("kl_control"):
                self.kl_control = KLControl(**counters["kl_control"])
            load_visits(self.ctrl_rewards, counters["visits"], arrays)
            say(f"continuing from {Path(found).name}")
            self.model.train()  # what is logged before the first step belongs to training
            self.add_callback(ContinueLoss(self, counters["loss"], counters["logged_at"]))
        ended = super().train(resume_from_checkpoint=str(found) if found else None, **kwargs)
        if self.kl_control is not None and not self.on_signal.stopped:
            self._keep_the_kl(self.kl_control)
        return ended

    def _keep_the_kl(self, control: KLControl) -> None:
        """Move the trained weights to where the KL is the target, and say what is then missing."""
        if self.args.kl_interpolation and not self.args.load_best_model_at_end:
            self.interpolated = interpolate(self, control.target)
        moved = self.interpolated
        if moved is not None:
            self.state.log_history.append({"step": self.state.global_step, **asdict(moved)})
            if moved.weight != 1.0:
                say(
                    f"  weights at {moved.weight:.2f} of the way from the base: KL {moved.kl:.2f} nats "
                    f"({moved.trained_kl:.2f} before)"
                )
        if verdict := control.verdict(None if moved is None else moved.kl):
            notice(verdict)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """No step more when the checkpoint resumed from is that of the last one (transformers would make one)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if is_main() and folder.exists():  # half of one, from a run that was killed
            shutil.rmtree(folder)
        barrier()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when this one is whole
        try:
            with together(), disk_errors(folder):
                super()._save_checkpoint(model, trial)
                # between two generations no rollouts are in use: the next step draws afresh, resumed or not
                in_use = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
                counters = {
                    "step": self._step,
                    "tokens": self._total_train_tokens,
                    "metrics": dict(self._metrics["train"]),
                    "loss": float(self._tr_loss),
                    "logged_at": self._globalstep_last_logged,
                    "offline_kl": self._offline_kl,
                    "kl_control": asdict(self.kl_control) if self.kl_control else None,
                }
                counters["visits"], arrays = visits_of(self.ctrl_rewards)
                save_rollout_state(folder, self._buffered_inputs if in_use else None, counters, arrays)
        finally:
            self.args.save_total_limit = limit
        if is_main():
            seal(folder, self.identity, weights_only=self.args.save_only_model)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
        barrier()

    def _sharding(self) -> str:
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            return f"zero{int(plugin.zero_stage) if plugin is not None else 0}"
        return "fsdp" if self.is_fsdp_enabled else "none"

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
        if self._scored_logps is not None and self.mask_truncated_completions:  # while rollouts are scored
            drawn = self._drawn(attention_mask[:, -logits_to_keep:])
            attention_mask = torch.cat([attention_mask[:, :-logits_to_keep], drawn], dim=1)
        # the first pass without gradients after sampling is of the very policy that sampled: nothing to compute
        kept = self._sampled_logps if model is self.model and not torch.is_grad_enabled() else None
        if kept is not None and not compute_entropy and len(kept) == len(input_ids):
            self._sampled_logps = None
            kept = torch.nn.functional.pad(kept, (0, logits_to_keep - kept.shape[1]))  # pad_to_multiple_of
            self._keep_scored(kept)
            return kept, None, None
        text_only = all(value is None for value in multimodal.values())
        if compute_aux_loss:
            self._warn_of_plain_passes(
                f"the experts' load-balancing loss (router_aux_loss_coef {self.router_aux_loss_coef:g}) counts whole "
                "rows; router_aux_loss_coef: 0 leaves it out"
            )
        prompt = input_ids.shape[1] - logits_to_keep
        if compute_aux_loss or not text_only or not (self._can_share(model) and self._sharing_pays(model, prompt)):
            found = super()._get_per_token_logps_and_entropies(
                self._called_plainly(model) if self._fast and text_only else model,
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
        inner = _causal_model(self.accelerator.unwrap_model(model))
        with self.accelerator.autocast():
            logps, entropies = shared_logps(model, inner, input_ids, attention_mask, logits_to_keep, batch_size)
        self._keep_scored(logps)
        return logps, entropies if compute_entropy else None, None

    def _called_plainly(self, model: Any) -> Any:
        """`model`, called by TRL with the positions of real tokens, and without router logits unless TRL asks for them.

        TRL counts the padding on the left, too. Rotary positions are relative, so that only learned ones (GPT-2's) show
        it.
        """
        inner = _causal_model(self.accelerator.unwrap_model(model))
        placed = "position_ids" in inspect.signature(inner.forward).parameters
        routing = without_router_logits(inner)

        def call(**inputs: Any) -> Any:
            place = {"position_ids": positions(inputs["attention_mask"])} if placed else {}
            return model(**{**routing, **place, **inputs})

        return call

    def _keep_scored(self, logps: Tensor) -> None:
        if self._scored_logps is not None:
            self._scored_logps.append(logps.detach())

    def _add_chunked_heads(self) -> None:
        """Log-probabilities without (B, T, V) logits, also where TRL has no kernel for them."""
        if not self._shared or self._sharding() in ("zero3", "fsdp"):
            return
        add_chunked_head(_causal_model(self.model), self.temperature, entropy=True)
        if self.ref_model is not None:
            add_chunked_head(self.accelerator.unwrap_model(self.ref_model), self.temperature, entropy=False)

    def _can_share(self, model: Any) -> bool:
        """Whether shared prefixes can be used for `model` in this pass; every rank finds the same.

        Gradient checkpointing is asked about at every call: it is on where there are gradients and off elsewhere. In
        float32 the passes without gradients share all the same. In mixed precision they don't: two paths are a rounding
        apart (0.04 nats a sequence of 64 tokens), and the ratio of an on-policy step must be 1.
        """
        if not self._shared:
            return False
        inner = _causal_model(self.accelerator.unwrap_model(model))
        mixed = self.args.bf16 or self.args.fp16
        if mixed and self.aux_loss_enabled:
            return False
        if keeps_no_cache(inner) or (mixed and self.args.gradient_checkpointing):
            self._warn_of_plain_passes("gradient checkpointing keeps no cache")
            return False
        if id(inner) not in self._shares:
            sharded = self._sharding() in ("zero3", "fsdp")
            with self.accelerator.autocast():
                why = "parameters are sharded" if sharded else why_plain(inner)
            self._shares[id(inner)] = not any_rank(why is not None)
            if not self._shares[id(inner)]:
                self._warn_of_plain_passes(why or "another rank can't share them")
        return self._shares[id(inner)]

    def _sharing_pays(self, model: Any, prompt: int) -> bool:
        """Whether the tokens saved on prompts of `prompt` tokens are worth a second pass; every rank finds the same.

        On a GPU a small model computes a short prompt for all its rollouts sooner than another pass is launched. What
        decides is a step's batch, not this pass's: the old log-probabilities must take the path of the gradients.
        """
        inner = _causal_model(self.accelerator.unwrap_model(model))
        if inner.device.type != "cuda":
            return True
        # of each group of G rows only one has its prompt computed: (G - 1)/G of the rows save theirs
        saved = self.args.per_device_train_batch_size * (1 - 1 / self.num_generations) * prompt
        return any_rank(saved > pass_cost(inner))

    def _warn_of_plain_passes(self, why: str) -> None:
        if "prefix" not in self._warned:
            self._warned.add("prefix")
            notice(f"log-probabilities compute each prompt once per rollout, not once per group: {why}")

    # --- held-out measurement -------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Win rate under the procedure and sequence KL on held-out prompts, with the current policy.

        Logged as `eval_winrate` (the procedure's), `eval_winrate_1` (standard), `eval_kl_seq` and what else
        `held_out.measure` gives; use `metric_for_best_model: winrate` with `load_best_model_at_end: true` to keep the
        best checkpoint.

        Args:
            eval_dataset: a data set, the name of one of several, or a dictionary of them, each logged as
                `eval_<name>_...`; by default the trainer's own.
            ignore_keys, metric_key_prefix: as TRL's.

        Raises:
            InputError: an unknown name, or a data set without reference rewards.
        """
        dataset = self._held_out(eval_dataset)
        if self.ctrl_reward is None or self.procedure is None or dataset is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, one in dataset.items():
                metrics |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        values = measure(self, list(dataset), max(self.num_generations_eval, self.procedure.n))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out(self, given: Any) -> Any:
        """The data set, or the dictionary of them, that `evaluate` was asked for."""
        if given is None:
            return self.eval_dataset
        if not isinstance(given, str):
            return given
        if not isinstance(self.eval_dataset, dict) or given not in self.eval_dataset:
            names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else "no names: it is one data set"
            raise InputError(f"evaluate({given!r}): the trainer's eval_dataset has {names}")
        return self.eval_dataset[given]


class _NotFinite(Exception):
    """The loss is not finite on some rank: no rank propagates its own."""


def _trl_is_tested() -> bool:
    version = Version(trl.__version__)
    tested = f"{version.major}.{version.minor}" in TESTED_TRL
    if not tested:
        notice(f"TRL {trl.__version__} is not among the tested versions {TESTED_TRL}: TRL's own (slower) path is used")
    return tested


def _causal_model(model: Any) -> Any:
    """The causal language model inside an adapter wrapper (its layers are adapted in place)."""
    return model.get_base_model() if is_peft_model(model) else model
