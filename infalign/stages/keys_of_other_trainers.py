"""Keys of other recipes (TRL's GRPO, older versions, open-r1) that infalign lacks: what they are here, or why not.

A near name is worse than none: `scale_rewards` is not a `gold_reward` spelt wrongly.
"""

from __future__ import annotations

_ONE_LOSS = (
    "the loss is RLOO's, with the sequence KL in the reward, which the transform's optimum rests on: leave it out"
)
_ONE_REWARD = (
    "rewards are combined before they are calibrated (reward: reward_models/calibrated_sum.py:build is a weighted sum "
    "to copy), or their win rates are (objectives: [{reward: file.py:name, weight: 1.0}, ...])"
)
_RATIOS = "RLOO has no such correction: log-probabilities are always the trainer's own: leave it out"
_ENTROPY = "an entropy bonus would move the optimum; the KL penalty keeps the policy near the base: set target_kl"
_DIVERGENCE = "the divergence is the sequence KL: set target_kl or beta"
_DPO = "it belongs to preference losses; infalign trains on rewards: leave it out"
_CODE = "it belongs to open-r1's code rewards: pass it to your reward in reward_kwargs"
_SHAPED = "it belongs to open-r1's length rewards: write it into your reward, or pass it in reward_kwargs"
_TRACKING = "give run_name and project, or the tracker's own environment variables"

_SWEEP = "this is a sweep: infalign sweep --config FILE"

FOREIGN: dict[str, str] = {
    "arms": _SWEEP,
    "grid": _SWEEP,
    "compare_at": _SWEEP,
    "keep_policies": _SWEEP,
    # GRPO
    "scale_rewards": "rewards are never divided by their spread, which would divide the transform away: leave it out",
    "loss_type": _ONE_LOSS,
    "delta": _ONE_LOSS,
    "importance_sampling_level": "ratios are of whole sequences, as for `sequence`: leave it out",
    "multi_objective_aggregation": _ONE_REWARD,
    "top_entropy_quantile": _ONE_LOSS,
    "off_policy_mask_threshold": _RATIOS,
    "use_bias_correction_kl": _RATIOS,
    "entropy_coef": _ENTROPY,
    "use_adaptive_entropy": _ENTROPY,
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
    "cast_lm_head_to_fp32": "log-probabilities are summed in float32 already: leave it out, or set dtype: float32",
    "max_tool_calling_iterations": "tools are not called in rollouts: leave it out",
    "log_completions_hub_repo": "completions are logged to the tracker (log_completions: true): leave it out",
    "use_liger_loss": "the head is computed in pieces already: leave it out",
    "vllm_guided_decoding_regex": "it constrains rollouts, and calibration samples are free: leave it out",
    "vllm_device": "TRL has taken it out: set vllm_mode: server or colocate",
    "vllm_importance_sampling_cap": "it is vllm_importance_sampling_clip_max",
    "vllm_dtype": "TRL has taken it out: rollouts use the policy's dtype",
    "vllm_max_model_len": "it is vllm_max_model_length",
    "ref_model_name": "the reference is model_name_or_path itself, which the KL is measured against: leave it out",
    # older RLOO and PPO
    "rloo_k": "it is num_generations",
    "kl_coef": "it is beta, or give target_kl in nats and beta follows",
    "init_kl_coef": "it is beta_start, with beta or target_kl as the end",
    "cliprange": "it is epsilon",
    "num_ppo_epochs": "it is num_iterations",
    "num_mini_batches": "it follows from steps_per_generation and gradient_accumulation_steps",
    "total_episodes": "give max_steps or num_train_epochs",
    "response_length": "it is max_completion_length",
    "local_rollout_forward_batch_size": "set tokens_per_batch for sampling; rollouts are one batch",
    "token_level_kl": "the KL is of sequences, in the reward: leave it out",
    "whiten_rewards": "whitening would divide the transform away: leave it out",
    "missing_eos_penalty": "write it into your reward, so that base samples are scored alike",
    "non_eos_penalty": "write it into your reward, so that base samples are scored alike",
    "stop_token": "completions end with the model's own end tokens: leave it out",
    "sft_model_path": "it is model_name_or_path: the base policy and the reference",
    "reward_model_path": "it is reward",
    "reward_model": "it is reward",
    # the model
    "torch_dtype": "it is dtype",
    "model_id": "it is model_name_or_path",
    "model_name": "it is model_name_or_path",
    "tokenizer_name_or_path": "the tokenizer is the model's own: save another one next to the weights",
    "use_flash_attention_2": "it is attn_implementation: flash_attention_2",
    "chat_template": "the chat template is the tokenizer's: write it into its chat_template.jinja",
    "chat_template_path": "the chat template is the tokenizer's: write it into its chat_template.jinja",
    "eos_token": "completions end with the model's own end tokens: set them in its generation_config.json",
    "pad_token": "padding is masked, whatever the token: leave it out",
    # the data
    "dataset_prompt_column": "it is prompt_column",
    "dataset_text_field": "it is prompt_column",
    "dataset_mixture": "it is datasets, a list of TRL's entries (path, split, fraction, ...)",
    "dataset_mixer": "it is datasets, a list of TRL's entries (path, split, fraction, ...)",
    "dataset_splits": "they are dataset_train_split and dataset_test_split",
    "dataset_split": "it is dataset_train_split",
    "dataset_configs": "it is dataset_config, or `name` in an entry of datasets",
    "dataset_streaming": "every prompt is calibrated, so that the data are read whole: set num_train_prompts for fewer",
    "dataset_num_proc": "reading prompts is not what takes time: leave it out",
    "dataset_kwargs": "give dataset_config, dataset_data_dir and the splits by name",
    "max_train_samples": "it is num_train_prompts",
    "max_eval_samples": "it is num_test_prompts",
    "max_length": "it is max_prompt_length for prompts and max_completion_length for completions",
    "max_seq_length": "it is max_prompt_length for prompts and max_completion_length for completions",
    "truncation_mode": "it is prompt_length_policy (error, drop, truncate) with max_prompt_length",
    "ignore_bias_buffers": "buffers are not synchronised here: leave it out",
    "group_by_length": "completions of like length are scored together already: leave it out",
    # training arguments that transformers has renamed or taken out
    "overwrite_output_dir": "it is overwrite: true (stale stages are made anew)",
    "evaluation_strategy": "it is eval_strategy",
    "no_cuda": "it is use_cpu: true",
    "warmup_ratio": "it is warmup_steps: a number below 1 is a share of all steps",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "include_inputs_for_metrics": "`evaluate` measures win rates itself: leave it out",
    "save_safetensors": "weights are always safetensors: leave it out",
    "half_precision_backend": "leave it out: bf16: true is torch's own",
    "fp16_backend": "leave it out: bf16: true is torch's own",
    "fp16_opt_level": "leave it out: bf16: true is torch's own",
    "push_to_hub_model_id": "it is hub_model_id",
    "push_to_hub_token": "it is hub_token",
    "split_batches": "every process reads its own share of a batch: leave it out",
    "dispatch_batches": "every process reads its own share of a batch: leave it out",
    "tokenizer": "the tokenizer is the model's own: leave it out",
    "activation_offloading": "set gradient_checkpointing: true, or launch with --accelerate_config zero3_offload",
    "lr": "it is learning_rate",
    "epochs": "it is num_train_epochs",
    "batch_size": "it is per_device_train_batch_size",
    # open-r1
    "benchmarks": "`infalign evaluate` measures win rates: leave it out",
    "callbacks": "pass callbacks to CTRLTrainer from Python: leave it out of a recipe",
    "hub_model_revision": "it is hub_revision",
    "overwrite_hub_revision": "set hub_always_push: true",
    "push_to_hub_revision": "it is push_to_hub: true with hub_revision",
    "remote_gen_model_url": "it is vllm_server_base_url, with use_vllm: true and vllm_mode: server",
    "remote_gen_model_port": "it is vllm_server_base_url, with use_vllm: true and vllm_mode: server",
    "wandb_entity": "set WANDB_ENTITY in the environment",
    "wandb_project": "it is project",
    "wandb_run_group": "set WANDB_RUN_GROUP in the environment",
    "wandb_log_unique_prompts": "it is log_unique_prompts",
    "cosine_min_value_wrong": _SHAPED,
    "cosine_max_value_wrong": _SHAPED,
    "cosine_min_value_correct": _SHAPED,
    "cosine_max_value_correct": _SHAPED,
    "cosine_max_len": _SHAPED,
    "repetition_n_grams": _SHAPED,
    "repetition_max_penalty": _SHAPED,
    "max_completion_len": _SHAPED,
    "soft_punish_cache": _SHAPED,
    "code_language": _CODE,
    "code_eval_test_batch_size": _CODE,
    "code_eval_scoring_mode": _CODE,
    "code_provider": _CODE,
    "ioi_provider": _CODE,
    "parallel_code_exec_per_proc": _CODE,
    "e2b_router_url": _CODE,
    "morph_router_url": _CODE,
    # supervised and preference training
    "packing": "prompts are not packed: leave it out",
    "padding_free": "prompts that rollouts share are computed once instead: leave it out",
    "completion_only_loss": "the loss is on completions alone: leave it out",
    "assistant_only_loss": "the loss is on completions alone: leave it out",
    "precompute_ref_log_probs": "the reference scores fresh rollouts: leave it out",
    "precompute_ref_batch_size": "the reference scores fresh rollouts: leave it out",
    "f_divergence_type": _DIVERGENCE,
    "f_alpha_divergence_coef": _DIVERGENCE,
    "label_smoothing": _DPO,
    "loss_weights": _DPO,
    "ld_alpha": _DPO,
    "use_weighting": _DPO,
    "discopop_tau": _DPO,
}
OPEN_R1_REWARDS: dict[str, str] = {
    "accuracy": "it is accuracy_reward, TRL's",
    "format": "it is think_format_reward, TRL's",
    "soft_overlong_punishment": "it is trl.rewards.get_soft_overlong_punishment, with its lengths in reward_kwargs",
    **dict.fromkeys(
        (
            "reasoning_steps", "cosine", "repetition_penalty", "length", "code", "binary_code", "ioi_code", "cf_code",
            "code_format", "tag_count",
        ),
        "it is a function of open-r1's: copy it into a file, reward: FILE.py:NAME",
    ),
}  # fmt: skip
"""Names in open-r1's `reward_funcs`, which are no models of the Hub."""
FAMILIES = {
    "sapo_": _ONE_LOSS,
    "vespo_": _ONE_LOSS,
    "wandb_": _TRACKING,
}
"""Likewise, for all keys that begin so."""


def explain(name: str) -> str | None:
    """What another tool's key is here, or why there is none; None when nothing is known of it.

    >>> explain("torch_dtype")
    'it is dtype'
    """
    family = next((line for start, line in FAMILIES.items() if name.startswith(start)), None)
    return FOREIGN.get(name, family)
