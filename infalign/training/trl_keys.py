"""Every key of TRL's `RLOOConfig`, sorted: kept as it is, refused unless neutral, or made up for.

The method fixes what several keys would change: the reward is a transform on [0, 1] whose beta and KL belong together,
rollouts follow the policy's own distribution, and the KL is measured against the base model. A key that a new version
of TRL adds is in none of the three, and a test says so: sort it before that version is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# The model and how it is run; rollouts; the objective; the optimizer; the data; logs, evaluation, checkpoints.
_KEPT = """
    model_init_kwargs trust_remote_code router_aux_loss_coef ds3_gather_for_generation bf16 fp16 tf32
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config torch_empty_cache_steps
    use_cpu full_determinism fsdp fsdp_config deepspeed parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank debug skip_memory_metrics

    num_generations num_generations_eval max_completion_length generation_batch_size steps_per_generation
    temperature chat_template_kwargs pad_to_multiple_of use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size use_transformers_continuous_batching
    transformers_continuous_batching_config use_transformers_paged

    beta num_iterations

    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1
    adam_beta2 adam_epsilon max_grad_norm

    shuffle_dataset seed dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context

    output_dir log_completions log_multimodal num_completions_to_print log_unique_prompts logging_strategy
    logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id do_train do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start
    per_device_eval_batch_size save_strategy save_steps save_on_each_node save_total_limit load_best_model_at_end
    metric_for_best_model greater_is_better resume_from_checkpoint restore_callback_states_from_checkpoint push_to_hub
    hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
"""
KEPT = frozenset(_KEPT.split())
"""Change nothing that the method rests on."""


@dataclass(frozen=True)
class Refusal:
    """`neutral` says which values change nothing; `why` is what another one would do, and what to do instead."""

    neutral: Callable[[Any], bool]
    why: str


def _only(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _above_zero(value: Any) -> bool:
    return value is None or value > 0


def _every_rank_reads(value: Any) -> bool:
    """Of `accelerator_config`: a mapping or accelerate's own object; a path is read by transformers later."""
    read = value.get if isinstance(value, Mapping) else lambda name: getattr(value, name, None)
    return not read("split_batches") and not read("dispatch_batches")


_OTHER_DISTRIBUTION = "log-probabilities and KL would be those of another distribution"
_MOVING = (
    "the KL would be measured against a reference that moves, and kl_seq, kl_budget and target_kl are about the base "
    "model: leave it out; beta_start is a KL coefficient that comes down"
)
WEIGHT = (
    "the weight would multiply the transform, whose beta and KL belong together: leave it out, and set target_kl or "
    "beta; several rewards are combined before calibration (reward_models/calibrated_sum.py)"
)

REFUSED: dict[str, Refusal] = {
    "normalize_advantages": Refusal(_only(False), "rescales the transform away: leave it false"),
    # several weights are the trainer's to judge: it knows which of the rewards is ours
    "reward_weights": Refusal(lambda value: value is None or len(value) != 1 or value[0] == 1.0, WEIGHT),
    "reward_clip_range": Refusal(
        _only(None),
        "clips the transform, whose range is its own: leave it out; calibration tames outliers of a reward already",
    ),
    "epsilon": Refusal(_above_zero, "must be above 0: at 0 a ratio of 1 has no clear gradient; TRL's is 0.2"),
    "epsilon_high": Refusal(_above_zero, "must be above 0, or unset for the same as epsilon"),
    "sync_ref_model": Refusal(_only(False), _MOVING),
    "ref_model_mixup_alpha": Refusal(_only(0.6), _MOVING),
    "ref_model_sync_steps": Refusal(_only(512), _MOVING),
    "disable_dropout": Refusal(
        _only(True), "rollouts are drawn without dropout, and the loss would be another policy's: leave it true"
    ),
    "neftune_noise_alpha": Refusal(
        _only(None, 0), "noise in the embeddings would make log-probabilities another policy's: leave it out"
    ),
    "label_smoothing_factor": Refusal(_only(0), "there are no labels to smooth: leave it out, or raise target_kl"),
    "top_p": Refusal(_only(1.0), f"{_OTHER_DISTRIBUTION}: leave it 1.0"),
    "top_k": Refusal(_only(0, None), f"{_OTHER_DISTRIBUTION}: leave it 0"),
    "min_p": Refusal(_only(None, 0), f"{_OTHER_DISTRIBUTION}: leave it out"),
    "repetition_penalty": Refusal(_only(1.0), f"{_OTHER_DISTRIBUTION}: leave it 1.0"),
    "generation_kwargs": Refusal(lambda _: True, "see checks.check_rollout_settings"),
    "vllm_structured_outputs_regex": Refusal(
        _only(None), "constrains rollouts, and calibration samples are free: leave it out"
    ),
    "remove_unused_columns": Refusal(
        _only(False), "would take the reference rewards, and what the reward reads, out of the data: leave it false"
    ),
    "train_sampling_strategy": Refusal(
        _only("random"), "the order of prompts follows from the seed: leave it out; shuffle_dataset: false keeps theirs"
    ),
    "dataloader_in_order": Refusal(
        _only(True), "batches out of order would repeat prompts and skip others: leave it true"
    ),
    "accelerator_config": Refusal(
        _every_rank_reads,
        "split_batches and dispatch_batches would cut prompt groups apart: leave them out; every process reads its own "
        "share",
    ),
    "auto_find_batch_size": Refusal(
        _only(False), "a smaller batch would cut prompt groups apart: lower per_device_train_batch_size instead"
    ),
    "ignore_data_skip": Refusal(
        _only(False), "a run that resumes would begin with the first prompts again: leave it false"
    ),
    "enable_jit_checkpoint": Refusal(
        _only(False), "infalign answers SIGTERM with a checkpoint itself, and two handlers exclude each other"
    ),
}
"""Would change the method behind its back; `why` completes "KEY=VALUE: ..."."""

_SAMPLER = "rollouts come from infalign's own sampler"
_MEASURED = "`evaluate` measures fresh samples of held-out prompts"
COMPENSATED: dict[str, str] = {
    "mask_truncated_completions": "",  # kl_seq counts them all the same (`CTRLTrainer`)
    "save_only_model": "",  # such a checkpoint is not resumed from (`checkpoints`)
    "cache_implementation": _SAMPLER,
    "use_cache": _SAMPLER,
    "data_seed": "the order of prompts follows from seed",
    "average_tokens_across_devices": "the loss is a mean over completions",
    "dataloader_drop_last": "batches are whole prompt groups",
    "length_column_name": "batches are whole prompt groups",
    "label_names": "there are no labels",
    "prediction_loss_only": _MEASURED,
    "include_for_metrics": _MEASURED,
    "batch_eval_metrics": _MEASURED,
    "eval_do_concat_batches": _MEASURED,
    "eval_use_gather_object": _MEASURED,
    "eval_accumulation_steps": _MEASURED,
    "bf16_full_eval": _MEASURED,
    "fp16_full_eval": _MEASURED,
}
"""Taken over by infalign; where it has no effect, the reason."""


def refusals(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with these keys, each as one sentence with its reason and the way out."""
    return [
        f"{name}={values[name]!r}: {refusal.why}"
        for name, refusal in REFUSED.items()
        if name in values and not refusal.neutral(values[name])
    ]


def without_effect(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The keys that were set and change nothing, each with the reason."""
    return [
        f"{name}={values[name]!r} has no effect: {why}"
        for name, why in COMPENSATED.items()
        if why and name in values and values[name] != defaults[name]
    ]
