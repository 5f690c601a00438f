"""What TRL's own tests ask of `RLOOTrainer`, asked of both trainers: same calls, same results; refusals by name.

What `CTRLTrainer` refuses is in `REFUSED`, each with the words that help. Two of TRL's tests can't hold as they are
written, and are here by what they are after: they put a stand-in for `generate` (ours samples by itself) and for
`RLOOTrainer.training_step` (ours calls it).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import GRPOConfig, RLOOConfig, RLOOTrainer

from infalign import CTRLConfig, CTRLTrainer
from infalign.types import InputError
from tests.tiny import WORDS, tiny_causal, tiny_classifier, tiny_config, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on machines with fewer cores
BOTH = {
    "trl": (RLOOTrainer, RLOOConfig),
    "ours": (CTRLTrainer, CTRLConfig),
    "ours, their config": (CTRLTrainer, RLOOConfig),
}
SAID = ["the cat sat on", "a dog", "i like", "what is", "the sun", "why", "you want the", "red and blue", "it is not"]
TEXTS = Dataset.from_list([{"prompt": said} for said in SAID])
CHATS = Dataset.from_list([{"prompt": [{"role": "user", "content": said}]} for said in SAID])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a policy, of reward models of two families (one with another tokenizer) and of other policies."""
    folder = tmp_path_factory.mktemp("contract")
    tiny_causal(folder / "policy", "llama")
    tiny_classifier(folder / "reward", "llama", seed=1)
    words = ["cat", "dog", "the", "a", "sun", "what", "assistant", "user"]
    tiny_classifier(folder / "other-reward", "gpt2", seed=2, tokenizer=tiny_tokenizer(words))
    return folder


@pytest.fixture(params=["ours", pytest.param("trl", marks=pytest.mark.slow)])
def kind(request):
    """Ours; TRL's to see, among the slow tests, that the test asks what TRL holds."""
    return request.param


def settings(folder, **changes):
    """TRL's own: a rate so high that every weight moves, groups of three."""
    keys = {
        "output_dir": str(folder),
        "learning_rate": 0.1,
        "per_device_train_batch_size": 3,
        "num_generations": 3,
        "max_completion_length": 8,
        "max_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return {**keys, **changes}


def subject(kind, made, folder, *, model="policy", rewards="reward", data=TEXTS, keys=None, **arguments):
    """A trainer of that kind. Names of models are looked up in the folder of `made`."""
    trainer, config = BOTH[kind]
    looked_up = [str(made / one) if isinstance(one, str) else one for one in _list(rewards)]
    return trainer(
        model=str(made / model) if isinstance(model, str) else model,
        reward_funcs=looked_up if isinstance(rewards, list) else looked_up[0],
        args=config(**settings(folder, **(keys or {}))),
        train_dataset=data,
        **arguments,
    )


def _list(one):
    return one if isinstance(one, list) else [one]


def trained(trainer) -> dict[str, bool]:
    """Whether each parameter moved."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    return {name: not torch.equal(weight, trainer.model.get_parameter(name)) for name, weight in before.items()}


# --- rewards ------------------------------------------------------------------------------------------------------


def long(completions, **_):
    return [float(len(_said(one))) for one in completions]


def varied(completions, **_):
    return [float(len(set(_said(one)))) for one in completions]


def constant(completions, **_):
    return [1 for _ in completions]


async def later(completions, **_):
    return [float(len(set(_said(one)))) for one in completions]


def silent(completions, **_):
    return [None] * len(completions)


def near_column(completions, some_values, **_):
    return [float(abs(len(_said(one)) - value)) for one, value in zip(completions, some_values, strict=True)]


def sees_the_state(completions, trainer_state, **_):
    return [float(len(set(_said(one))) + trainer_state.global_step) for one in completions]


def logs_columns(completions, log_extra, **_):
    log_extra("test_column", [_said(one)[:5] for one in completions])
    return long(completions)


def logs_a_number(completions, log_metric, **_):
    log_metric("custom_accuracy", 0.75)
    return long(completions)


def _said(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


@dataclass(frozen=True)
class Case:
    """A training that must move every weight, and what must be in its logs."""

    keys: dict[str, Any] = field(default_factory=dict)
    rewards: Any = "reward"
    data: Dataset = TEXTS
    logged: tuple[str, ...] = ()


TRAINS = {
    "texts": Case(),
    "chats": Case(data=CHATS),
    "a function": Case(rewards=long),
    "a function of chats": Case(rewards=long, data=CHATS),
    "two functions": Case(rewards=[long, varied], logged=("rewards/long/mean", "rewards/varied/std")),
    "functions, one of them async": Case(rewards=[long, constant, later], logged=("rewards/later/mean",)),
    "one that is silent": Case(rewards=[long, silent]),
    "a function and a model": Case(rewards=[long, "reward"]),
    "weights": Case({"reward_weights": [0.7, 0.3]}, [long, varied], logged=("rewards/long/mean", "rewards/long/std")),
    "a column of the data": Case(rewards=near_column, data=TEXTS.add_column("some_values", list(range(len(SAID))))),
    "the trainer's state": Case(rewards=sees_the_state),
    "columns of its own": Case({"log_completions": True}, logs_columns),
    "a number of its own": Case(rewards=logs_a_number, logged=("custom_accuracy",)),
    "two iterations": Case({"num_iterations": 2}),
    "checkpointing": Case({"gradient_checkpointing": True}),
    "padding to a multiple": Case({"pad_to_multiple_of": 8}),
    "groups larger than a batch": Case({"num_generations": 6, "gradient_accumulation_steps": 2}),
    "template arguments": Case({"chat_template_kwargs": {"enable_thinking": False}}, data=CHATS),
    "workers of the data loader": Case({"dataloader_num_workers": 2}),
    "neutral sampling": Case({"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}),
    "neutral arguments of generation": Case({"generation_kwargs": {"do_sample": True, "top_k": 0}}),
}


@pytest.mark.parametrize("name", list(TRAINS))
def test_trains(name, kind, made, tmp_path):
    case = TRAINS[name]
    trainer = subject(kind, made, tmp_path, rewards=case.rewards, data=case.data, keys=case.keys)
    moved = trained(trainer)
    assert all(moved.values()), [weight for weight, did in moved.items() if not did]
    # TRL's tests read the last entry: with TRL's `logging_steps` what was measured since the last log is in it
    assert set(case.logged) <= set(trainer.state.log_history[-1])
    if case.rewards is logs_columns:
        assert "test_column" in trainer._logs["extra"]


@pytest.mark.parametrize(
    "family",
    {
        "cohere2": {"head_dim": 16},
        "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "qwen2": {},
        "nemotron_h": {
            "layers": 3,
            "layers_block_type": ["mamba", "attention", "moe"],
            "head_dim": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
        "glm4_moe": {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    }.items(),
    ids=lambda pair: pair[0],
)
def test_other_architectures(family, kind, made, tmp_path):
    """Weights move where TRL's move (a router's only through its load-balancing loss, which is logged)."""
    name, fields = family
    policy = tiny_causal(tmp_path / "model", name, **fields)
    still = []
    for trainer_kind in ("trl", kind):
        # each family's own tokenizer class would read the words otherwise than they were written
        tokenizer = tiny_tokenizer()
        trainer = subject(trainer_kind, made, tmp_path / trainer_kind, model=policy, processing_class=tokenizer)
        still.append({weight for weight, moved in trained(trainer).items() if not moved})
        if trainer.aux_loss_enabled:
            assert trainer.state.log_history[-1]["aux_loss"] is not None
    assert still[0] == still[1]


def test_trls_config_is_taken_for_ours(made, tmp_path, capsys):
    trainer = subject("ours, their config", made, tmp_path)
    assert all(trained(trainer).values()) and trainer.args.logging_steps == RLOOConfig.logging_steps == 10
    assert "args is TRL's RLOOConfig: read as CTRLConfig, with beta 0.05 and without dropout" in capsys.readouterr().err


def test_models_and_data_alone_are_enough(kind, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "trl" and not torch.cuda.is_available():
        pytest.skip("TRL's defaults need an accelerator")
    trainer = BOTH[kind][0](model=str(made / "policy"), reward_funcs=str(made / "reward"), train_dataset=TEXTS)
    assert trainer.beta == RLOOConfig.beta and trainer.train_dataset is TEXTS


def test_the_logged_reward_is_weighted(kind, made, tmp_path):
    def one(completions, **_):
        return [1.0] * len(completions)

    def nothing(completions, **_):
        return [0.0] * len(completions)

    trainer = subject(kind, made, tmp_path, rewards=[one, nothing], keys={"reward_weights": [0.7, 0.3]})
    trainer.train()
    assert trainer.state.log_history[-1]["reward"] == pytest.approx(0.7, abs=1e-5)


def test_rewards_that_are_all_none_are_told(kind, made, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="trl.trainer.rloo_trainer"):
        subject(kind, made, tmp_path, rewards=silent).train()
    assert "All reward functions returned None for the following kwargs:" in caplog.text


def test_nothing_moves_where_every_completion_is_cut(kind, made, tmp_path):
    keys = {"mask_truncated_completions": True, "max_completion_length": 1}
    trainer = subject(kind, made, tmp_path, keys=keys, rewards=long)
    moved = trained(trainer)
    assert trainer.state.log_history[-1]["completions/clipped_ratio"] == 1.0  # one token of a hundred ends it
    assert not any(moved.values())


def test_whole_completions_are_learned_from_beside_cut_ones(kind, made, tmp_path):
    """TRL's test puts a stand-in for `generate`; here the end is likely enough by itself."""
    model = AutoModelForCausalLM.from_pretrained(made / "policy")
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] *= 3
    trainer = subject(
        kind, made, tmp_path, model=model, keys={"mask_truncated_completions": True, "logging_steps": 1}, rewards=long
    )
    assert all(trained(trainer).values())
    shares = [log["completions/clipped_ratio"] for log in trainer.state.log_history if "kl" in log]
    assert any(0 < share < 1 for share in shares), shares


def test_steps_see_the_prompts_that_trl_plans(kind, made, tmp_path):
    """Generations of 24 serve four steps, twice; nine prompts are cut to the six that fill one."""
    keys = {
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 4,
        "num_generations": 4,
        "per_device_train_batch_size": 6,
        "num_iterations": 2,
        "shuffle_dataset": False,
        "max_steps": -1,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
    }
    trainer = subject(kind, made, tmp_path, keys=keys)
    seen: list[Any] = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, items=None: seen.append(inputs) or step(model, inputs, items)
    trainer.train()
    planned = [{"prompt": said} for said in SAID[:6] for _ in range(4)]
    assert len(seen) == 3 * 2 * 4 and all(inputs == planned for inputs in seen)


def test_a_grpo_users_arguments(made, tmp_path):
    args = GRPOConfig(**settings(tmp_path, beta=0.1), loss_type="grpo", scale_rewards="none")
    words = "got a GRPOConfig: its keys are here under the same names, but for scale_rewards, loss_type$"
    with pytest.raises(InputError, match=words):
        CTRLTrainer(str(made / "policy"), long, args, TEXTS)
    with pytest.raises(InputError, match=r"got dict$"):
        CTRLTrainer(str(made / "policy"), long, settings(tmp_path), TEXTS)


# --- data ---------------------------------------------------------------------------------------------------------

EVAL_SETS = ["dataset", "iterable_dataset", "dataset_dict", "iterable_dataset_dict", "dict", "dict of iterables"]


def eval_set(name):
    one = TEXTS.select(range(3))
    one = one.to_iterable_dataset() if "iterable" in name else one
    if "dict" not in name:
        return one
    kinds = {"dataset_dict": DatasetDict, "iterable_dataset_dict": IterableDatasetDict}
    return kinds.get(name, dict)({"data1": one, "data2": one})


@pytest.mark.parametrize("name", EVAL_SETS)
def test_evaluation_sets(name, kind, made, tmp_path):
    """Given at the start and used while training, and given to `evaluate`."""
    keys = {"per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 1}
    trainer = subject(kind, made, tmp_path, data=TEXTS, keys=keys, eval_dataset=eval_set(name))
    if "dict" in name:
        assert set(trainer.eval_dataset) == {"data1", "data2"}
    trainer.train()
    losses = {"eval_data1_loss", "eval_data2_loss"} if "dict" in name else {"eval_loss"}
    logged = {key for log in trainer.state.log_history for key in log}
    assert losses <= logged and losses <= set(trainer.evaluate(eval_dataset=eval_set(name)))


def test_a_stream_trains(kind, made, tmp_path):
    trainer = subject(kind, made, tmp_path, data=TEXTS.to_iterable_dataset(), keys={"dataloader_num_workers": 4})
    assert trainer.args.accelerator_config.dispatch_batches is False and trainer.args.dataloader_num_workers == 0
    assert all(trained(trainer).values())


def test_workers_are_kept_beside_an_evaluation_stream(kind, made, tmp_path):
    stream = TEXTS.to_iterable_dataset()
    trainer = subject(kind, made, tmp_path, keys={"dataloader_num_workers": 2}, eval_dataset=stream)
    assert trainer.get_train_dataloader().num_workers == 2 and trainer.get_eval_dataloader().num_workers == 0
    assert trainer.args.dataloader_num_workers == 2


def test_training_sets_that_are_none(kind, made, tmp_path):
    with pytest.raises(ValueError, match="train_dataset"):
        subject(kind, made, tmp_path, data=None)
    with pytest.raises((TypeError, InputError), match="train_dataset"):
        subject(kind, made, tmp_path, data=DatasetDict({"train": TEXTS}))
    with pytest.raises(ValueError, match="dispatch_batches"):
        keys = {"accelerator_config": {"dispatch_batches": True}}
        subject(kind, made, tmp_path, data=TEXTS.to_iterable_dataset(), keys=keys)


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["config", "config, checkpointing", "model"])
def test_adapters(how, kind, made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made / "policy")
    base = {f"base_model.model.{name}" for name, _ in model.named_parameters()}
    arguments = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])}
    if how == "model":
        model, arguments = get_peft_model(model, arguments["peft_config"]), {}
    keys = {"gradient_checkpointing": "checkpointing" in how}
    for name, did in trained(subject(kind, made, tmp_path, model=model, keys=keys, **arguments)).items():
        # what is neither the base model's, nor wrapped by an adapter, nor the reference's adapter
        assert did == (name not in base and "base_layer" not in name and ".ref." not in name), name


def test_an_adapter_of_experts(kind, made, tmp_path):
    fields = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path / "model", "gpt_oss", **fields))
    lora = LoraConfig(target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
    trainer = subject(
        kind, made, tmp_path, model=get_peft_model(model, lora), processing_class=tiny_tokenizer(), rewards=long
    )
    moved = trained(trainer)
    assert all(did == ("lora_" in name and ".ref." not in name) for name, did in moved.items()), moved


def test_code_of_a_model_is_trusted_when_told(kind, made, tmp_path):
    folder = tmp_path / "remote"
    tiny_causal(folder, "llama")
    (folder / "modeling_far.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class FarConfig(LlamaConfig):\n    model_type = 'far'\n"
        "class FarForCausalLM(LlamaForCausalLM):\n    config_class = FarConfig\n"
    )
    held = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_far.FarConfig", "AutoModelForCausalLM": "modeling_far.FarForCausalLM"}
    far = {**held, "model_type": "far", "architectures": ["FarForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(far))
    with pytest.raises(ValueError, match="custom code"):
        subject(kind, made, tmp_path, model=str(folder), rewards=long)
    trainer = subject(kind, made, tmp_path, model=str(folder), rewards=long, keys={"trust_remote_code": True})
    assert type(trainer.model).__name__ == "FarForCausalLM"


SEES = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ ' <image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """Folder of a tiny model of images and text with its processor, and chats with an image each."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = tiny_tokenizer([*WORDS, "<image>"], chat_template=SEES)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=tiny_config("llama", tokenizer),
        vision_config=CLIPVisionConfig(**shape, image_size=28, patch_size=14, projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=clip.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=SEES,
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (len(SAID), 28, 28, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in pixels]
    rows = [{**chat, "image": image} for chat, image in zip(CHATS, images, strict=True)]
    return folder, Dataset.from_list(rows)


@pytest.mark.parametrize("keys", [{}, {"pad_to_multiple_of": 7}, {"num_iterations": 2}], ids=str)
def test_models_that_see(keys, kind, seeing, made, tmp_path):
    """Weights move where TRL's move: all but a vision layer that no feature is taken from; a checkpoint goes on."""
    folder, data = seeing
    trainer = subject(kind, made, tmp_path, model=str(folder), rewards=long, data=data, keys=keys)
    moved = trained(trainer)
    again = subject(kind, made, tmp_path, model=str(folder), rewards=long, data=data, keys={**keys, "max_steps": 5})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert {name.rpartition(".")[0] for name, did in moved.items() if not did} == {"model.vision_tower.post_layernorm"}


class TestRewardModels:
    def test_another_family_with_its_tokenizer(self, kind, made, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(made / "other-reward")
        tokenizer = AutoTokenizer.from_pretrained(made / "other-reward")
        trainer = subject(kind, made, tmp_path, rewards=model, data=CHATS, reward_processing_classes=tokenizer)
        assert all(trained(trainer).values())

    def test_tokenizers_of_each(self, kind, made, tmp_path):
        first, second = (AutoTokenizer.from_pretrained(made / name) for name in ("reward", "other-reward"))
        pair = ["reward", "other-reward"]
        with pytest.raises(ValueError, match="must match"):
            subject(kind, made, tmp_path, rewards=pair, reward_processing_classes=first)
        trainer = subject(kind, made, tmp_path, rewards=pair, reward_processing_classes=[first, second])
        assert len(trainer.reward_processing_classes) == 2
        trainer = subject(kind, made, tmp_path, reward_processing_classes=first)
        assert trainer.reward_processing_classes == [first]


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "beta 0": ({"beta": 0.0}, "beta must be above 0 for KL-regularised training, got 0"),
    "a reference that moves": (
        {"sync_ref_model": True},
        "sync_ref_model=True: the KL would be measured against a reference that",
    ),
    "standardised advantages": (
        {"normalize_advantages": True},
        "normalize_advantages=True: rescales the transform away: leave it",
    ),
    "clipped rewards": ({"reward_clip_range": (-1, 1)}, "reward_clip_range=.*clip"),
    "truncated sampling": ({"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1}, "top_p=0.9: .*1.0"),
    "beams": ({"generation_kwargs": {"top_k": 50, "num_beams": 2}}, "generation_kwargs would draw rollouts otherwise"),
}


@pytest.mark.parametrize("name", list(REFUSED))
@pytest.mark.parametrize("config", ["ours", "ours, their config"])
def test_refused_in_one_line(name, config, made, tmp_path):
    keys, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as refused:
        subject(config, made, tmp_path, keys=keys)
    assert "\n" not in str(refused.value)
