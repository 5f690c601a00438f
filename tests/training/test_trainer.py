"""`CTRLTrainer` computes what TRL's plain path computes, only cheaper; and it refuses what can't be right."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import AutoModelForCausalLM, TrainerState
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from infalign.evaluation.winrate import win_rate
from infalign.models.shared_prefix import positions
from infalign.theory.optimum import optimal_transform, win_rate_limit
from infalign.theory.procedures import BestOfN
from infalign.theory.transforms import identity
from infalign.training.callbacks import GRPOCheck, NegativeKL
from infalign.training.config import CTRLConfig
from infalign.training.held_out import measure
from infalign.training.reward import CTRLReward
from infalign.training.rollouts import rollout_uniforms
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError, RewardError
from tests.tiny import tiny_causal

PROMPTS = ["the cat sat", "a dog", "the", "the cat sat on the mat"]


def token_sum(completion_ids, **_):
    return [float(sum(ids)) for ids in completion_ids]


def references(count=20, value=None):
    rng = np.random.default_rng(0)
    rows = [rng.normal(60, 30, count).tolist() if value is None else [value] * count for _ in PROMPTS]
    return Dataset.from_dict({"prompt": PROMPTS, "ref_rewards": rows})


def config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 2,
        "beta": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
    }
    return {**settings, **changes}


def trainer(model, folder, reward=None, dataset=None, **changes):
    reward = reward or CTRLReward(token_sum, identity)
    return CTRLTrainer(model, reward, CTRLConfig(**config(folder, **changes)), train_dataset=dataset or references())


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2", "gemma"])
def model(request, tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


def batch_of(subject):
    """A padded batch with shared prompts, as TRL lays it out: prompts left, completions right."""
    prompts = [[5, 6, 7], [8], [9, 10], [5, 6, 7], [8]]
    completions = [[4, 5, 6], [7, 8], [5, 6], [9], [10, 11, 12]]
    pad = subject._tokenizer.pad_token_id
    ids = [[pad] * (3 - len(p)) + p + c + [pad] * (3 - len(c)) for p, c in zip(prompts, completions, strict=True)]
    mask = [
        [0] * (3 - len(p)) + [1] * len(p + c) + [0] * (3 - len(c)) for p, c in zip(prompts, completions, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def weighted(logps, real):
    """A loss with another weight for every token, so that no gradient can cancel by chance."""
    return (logps[real] * torch.linspace(-1, 1, int(real.sum()))).sum()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("chunk", [None, 2])
def test_logps_and_gradients_equal_forwards_of_single_rows(model, tmp_path, chunk):
    """Against rows run one by one without padding or cache (TRL's padded rows misplace GPT-2's absolute positions)."""
    subject = trainer(model, tmp_path)
    ids, mask = batch_of(subject)
    real = mask[:, -3:].bool()
    rows = []
    for row, keep in zip(ids, mask.bool(), strict=True):
        prompt, completion = row[:3][keep[:3]], row[3:][keep[3:]]
        logits = subject.model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, -1).gather(1, completion[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(logps, (0, 3 - len(logps))))
    expected = torch.stack(rows)
    weighted(expected, real).backward()
    expected_gradients = gradients(subject.model)
    subject.model.zero_grad()
    found, _, _ = subject._get_per_token_logps_and_entropies(subject.model, ids, mask, 3, batch_size=chunk)
    weighted(found, real).backward()
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(gradients(subject.model), expected_gradients, atol=5e-5, rtol=1e-4)


def test_mixed_precision_shares_too(llama, tmp_path):
    subject = trainer(llama, tmp_path, bf16=True, max_steps=1)
    subject.train()
    assert subject._shares and all(subject._shares.values())


def test_positions_with_checkpointing_are_those_of_the_tokens(tmp_path):
    """GPT-2's positions are learned: TRL's own passes, which checkpointing needs, count the padding on the left."""
    moved = []
    for checkpointing in (False, True):
        subject = trainer(
            tiny_causal(tmp_path / "model", "gpt2"),
            tmp_path / "out",
            gradient_checkpointing=checkpointing,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            seed=1,  # whose first two prompts are of unlike length
        )
        subject.train()
        moved.append(torch.cat([p.detach().flatten() for p in subject.model.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return tiny_causal(tmp_path_factory.mktemp("experts"), "qwen3_moe", output_router_logits=True, **sizes)


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_experts_train_as_on_the_plain_path(coefficient, experts, tmp_path, capsys):
    """TRL's load-balancing loss is kept: it takes whole rows, and a coefficient of 0 leaves it out."""
    moved = []
    for shared in (True, False):
        subject = trainer(
            experts,
            tmp_path,
            shared_prefix=shared,
            router_aux_loss_coef=coefficient,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
        )
        subject.train()
        moved.append(torch.cat([p.detach().flatten() for p in subject.model.parameters()]))
        log = subject.state.log_history[0]
        assert log["kl_seq"] == pytest.approx(0.0, abs=1e-4)
        assert ("aux_loss" in log) == bool(coefficient)
    torch.testing.assert_close(moved[0], moved[1], atol=1e-5, rtol=0)
    assert ("load-balancing loss (router_aux_loss_coef 0.01)" in capsys.readouterr().err) == bool(coefficient)


def test_on_policy_ratios_are_one_in_mixed_precision_with_checkpointing(llama, tmp_path):
    """The passes with and without gradients take one path: two are a rounding of bf16 apart."""
    subject = trainer(llama, tmp_path, bf16=True, gradient_checkpointing=True, max_steps=1)
    seen = {}
    scored = subject._get_per_token_logps_and_entropies

    def spy(model, ids, mask, kept, *args, **kwargs):
        found = scored(model, ids, mask, kept, *args, **kwargs)
        if model is not subject.ref_model:
            seen[torch.is_grad_enabled()] = (found[0].detach() * mask[:, -kept:]).sum(1)
        return found

    subject._get_per_token_logps_and_entropies = spy
    subject.train()
    assert torch.equal(seen[True], seen[False])


def test_the_plain_path_draws_the_same_rollouts(llama, tmp_path):
    found = []
    for shared in (True, False):
        drawn = []

        def spy(completion_ids, **_):
            drawn.append(sorted(map(tuple, completion_ids)))  # noqa: B023
            return [float(sum(ids)) for ids in completion_ids]

        subject = trainer(llama, tmp_path, CTRLReward(spy, identity), shared_prefix=shared, learning_rate=0.0)
        subject.train()
        found.append(drawn)
    assert len(found[0]) == 2 and found[0] == found[1]


def test_padding_to_a_multiple(llama, tmp_path):
    """The sampler's log-probabilities are as wide as the longest completion, TRL's batch is wider."""
    losses = []
    for multiple in (None, 8):
        subject = trainer(llama, tmp_path / str(multiple), pad_to_multiple_of=multiple, max_steps=2)
        subject.train()
        losses.append([row["loss"] for row in subject.state.log_history if "loss" in row])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_generate_is_left_alone(tmp_path):
    """`generate` reads the signature of `forward`: positions of left-padded prompts depend on it."""
    path = tiny_causal(tmp_path / "model", "gpt2")
    ids, mask = torch.tensor([[0, 0, 5], [6, 7, 8]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    plain = AutoModelForCausalLM.from_pretrained(path)
    subject = trainer(path, tmp_path / "out")
    found, expected = (
        model.eval().generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (subject.model, plain)
    )
    assert torch.equal(found, expected)
    assert subject.model._supports_logits_to_keep()


def test_a_copy_of_the_model_is_its_own(llama, tmp_path):
    """The head's path is bound to the model that is called, not to the one it was made for."""
    subject = trainer(llama, tmp_path)
    twin = copy.deepcopy(subject.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    ids = torch.tensor([[5, 6, 7]])
    found = twin.forward.__func__(twin, input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, torch.full((1, 2), -np.log(twin.config.vocab_size), dtype=torch.float32))


def test_virtual_tokens_are_refused(llama, tmp_path):
    with pytest.raises(InputError, match="PROMPT_TUNING: rollouts would be drawn without"):
        peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        CTRLTrainer(
            llama,
            CTRLReward(token_sum, identity),
            CTRLConfig(**config(tmp_path)),
            train_dataset=references(),
            peft_config=peft,
        )


def test_entropies_are_those_of_whole_logits(llama, tmp_path):
    subject = trainer(llama, tmp_path)
    ids, mask = batch_of(subject)
    real = mask[:, -3:].bool()
    _, found, _ = subject._get_per_token_logps_and_entropies(subject.model, ids, mask, 3, compute_entropy=True)
    expected = []
    for row, keep in zip(ids, mask.bool(), strict=True):
        logits = subject.model(row[keep][None]).logits[0, int(keep[:3].sum()) - 1 : -1]
        expected.append(torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(found[real], torch.cat(expected), atol=2e-5, rtol=1e-4)


def test_log_probabilities_equal_trls_own_head(llama, tmp_path):
    """A plain RLOOTrainer's fused head, on its own model, against infalign's."""
    subject = trainer(llama, tmp_path)
    ids, mask = batch_of(subject)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    add_fused_lm_head(plain, temperature=subject.temperature)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    theirs = plain(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), labels=labels, fused_lm_head=True
    ).log_probs[:, -3:]
    ours, _, _ = subject._get_per_token_logps_and_entropies(subject.model, ids, mask, 3)
    real = mask[:, -3:].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-5, rtol=1e-4)


def test_the_samplers_logps_are_the_policys(llama, tmp_path):
    """The "old" pass is skipped: what is used in its place equals a fresh forward."""
    subject = trainer(llama, tmp_path)
    seen = []
    plain = subject._get_per_token_logps_and_entropies

    def spy(model, ids, mask, kept, *args, **kwargs):
        taken = subject._sampled_logps is not None and model is subject.model
        found = plain(model, ids, mask, kept, *args, **kwargs)
        if taken:
            fresh, _, _ = RLOOTrainer._get_per_token_logps_and_entropies(subject, model, ids, mask, kept)
            seen.append(((found[0] - fresh) * mask[:, -kept:]).abs().max().item())
        return found

    subject._get_per_token_logps_and_entropies = spy
    subject.train()
    assert len(seen) == 2 and max(seen) < 2e-5


def test_the_loss_of_a_step_equals_trls(llama, tmp_path):
    """One step from the same rollouts moves the weights as TRL's own forward passes do."""
    weights = []
    for shared in (True, False):
        subject = trainer(llama, tmp_path, max_steps=1, optim="sgd", learning_rate=1.0)
        if not shared:
            subject._can_share = lambda model: False
        subject.train()
        weights.append(torch.cat([p.detach().flatten() for p in subject.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)


def test_accumulation_draws_the_same_rollouts(llama, tmp_path):
    """8x1 and 2x4 accumulated: the same completions for the same prompts."""
    found = []
    for size, steps in ((8, 1), (2, 4)):
        seen = []

        def spy(prompts, completion_ids, **_):
            seen.append(sorted(zip(map(str, prompts), map(tuple, completion_ids), strict=True)))  # noqa: B023
            return [float(sum(ids)) for ids in completion_ids]

        subject = trainer(
            llama,
            tmp_path,
            CTRLReward(spy, identity),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
        )
        subject.train()
        found.append(seen[0])
    assert found[0] == found[1]


def test_metrics_are_logged(llama, tmp_path):
    subject = trainer(llama, tmp_path)
    subject.train()
    logs = subject.state.log_history[0]
    assert logs["kl_seq"] == pytest.approx(0.0, abs=1e-4)
    for name in ("reward/raw", "reward/calibrated", "reward/transformed", "reward/unscored", "kl_seq_error"):
        assert np.isfinite(logs[name]), name
    # the identity of quantiles that are clipped by at most 1 / (2 (K + 1)), K = 20
    assert logs["reward/transformed"] == pytest.approx(logs["reward/calibrated"], abs=1 / 42 + 1e-6)


def test_ctrl_reward_trains_in_an_unmodified_rloo_trainer(llama, tmp_path):
    subject = RLOOTrainer(
        llama,
        CTRLReward(token_sum, identity),
        RLOOConfig(**config(tmp_path, bf16=False, gradient_checkpointing=False, disable_dropout=True)),
        train_dataset=references(),
    )
    subject.train()
    logged = [row for row in subject.state.log_history if "rewards/ctrl/mean" in row]
    assert logged and all(0 <= row["rewards/ctrl/mean"] <= 1 for row in logged)


def grpo(model, folder, **changes):
    keys = config(folder, bf16=False, gradient_checkpointing=False, **changes)
    return GRPOTrainer(
        model,
        CTRLReward(token_sum, identity),
        GRPOConfig(**keys),
        train_dataset=references(),
        callbacks=[GRPOCheck()],
    )


def test_ctrl_reward_trains_in_grpo_without_scaling(llama, tmp_path):
    subject = grpo(llama, tmp_path, scale_rewards="none")
    subject.train()
    assert subject.state.global_step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, 'divides the transform away: use scale_rewards="none"'),
        ({"scale_rewards": "none", "beta": 0.0}, "beta is 0"),
    ],
)
def test_grpo_set_ups_that_erase_the_method(change, message, llama, tmp_path):
    with pytest.raises(InputError, match=message):
        grpo(llama, tmp_path, **change).train()


def test_held_out_evaluation(llama, tmp_path):
    subject = CTRLTrainer(
        llama,
        CTRLReward(token_sum, identity),
        CTRLConfig(**config(tmp_path, eval_strategy="steps", eval_steps=1)),
        procedure=BestOfN(2),
        train_dataset=references(),
        eval_dataset=references(),
    )
    metrics = subject.evaluate()
    names = ("winrate", "winrate_1", "kl_seq", "completion_length", "quantile_distance")
    assert set(metrics) == {f"eval_{name}" for name in names}  # the KL of a policy that has not moved has no limit
    assert metrics["eval_kl_seq"] == pytest.approx(0.0, abs=1e-4)
    assert 0 < metrics["eval_winrate"] < 1
    assert metrics == pytest.approx(subject.evaluate())  # the same random streams
    subject.train()
    assert sum("eval_winrate" in row for row in subject.state.log_history) >= 2


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_held_out_prompts_that_share_a_pass_are_measured_alike(rows, llama, tmp_path):
    """One prompt a pass, two, all of them: prompts of unequal lengths, samples that end early."""
    subject = CTRLTrainer(
        llama,
        CTRLReward(token_sum, identity),
        CTRLConfig(**config(tmp_path, per_device_train_batch_size=rows, learning_rate=1e-2, max_steps=6)),
        procedure=BestOfN(2),
        train_dataset=references(),
        eval_dataset=references(),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in subject.model.parameters():  # another policy than the reference, the same one in every case
            weight.add_(0.05 * torch.randn_like(weight))
    found = measure(subject, list(references()), 4)
    assert found["kl_seq"] > 0.05
    assert 0 < found["quantile_distance"] <= 1 and 1 <= found["completion_length"] <= 5
    assert found["attainment"] == pytest.approx(
        (found["winrate"] - 0.5) / (win_rate_limit(BestOfN(2), found["kl_seq"]) - 0.5)
    )
    by_hand, kls = [], []
    for number, row in enumerate(references()):
        prompt = subject._tokenize_prompts([row["prompt"]])[0][0]
        uniforms = rollout_uniforms([prompt] * 4, seed=42, generation=-1, first_row=4 * number, count=5)
        samples = subject._decode([prompt] * 4, uniforms)
        rewards = token_sum([ids for ids, _ in samples])
        by_hand.append(win_rate([rewards], [row["ref_rewards"]], BestOfN(2)).mean)
        ids = [torch.tensor([prompt + ids]) for ids, _ in samples]
        with torch.no_grad():
            theirs = [
                sum(
                    subject.ref_model(one)
                    .logits[0, :-1]
                    .log_softmax(-1)
                    .gather(1, one[0, 1:, None])[len(prompt) - 1 :, 0]
                )
                for one in ids
            ]
        kls.append(np.mean([sum(logps) - float(other) for (_, logps), other in zip(samples, theirs, strict=True)]))
    assert found["winrate"] == pytest.approx(np.mean(by_hand))
    assert found["kl_seq"] == pytest.approx(np.mean(kls), abs=1e-4)


def test_the_win_rate_on_train_prompts_is_logged(llama, tmp_path):
    subject, rolled = trainer(llama, tmp_path, CTRLReward(token_sum, optimal_transform(BestOfN(2), kl=1.0))), []
    score = subject.ctrl_reward._everybodys

    def seen(raw_B, rows_B, keys, ours_B):
        rolled.append((raw_B.reshape(-1, 4), rows_B[::4]))  # groups of four, one after the other
        return score(raw_B, rows_B, keys, ours_B)

    subject.ctrl_reward._everybodys = seen
    subject.train()
    logged = [row["winrate"] for row in subject.state.log_history if "winrate" in row]
    expected = [win_rate(rewards_PG, rows_PK, BestOfN(2)).mean for rewards_PG, rows_PK in rolled]
    assert logged == pytest.approx(expected) and len(logged) == 2


@pytest.mark.parametrize(("kl", "warned"), [(-0.05, True), (-0.01, False), (0.05, False)])
def test_a_kl_that_stays_negative_is_told_once(kl, warned, capsys):
    """Ten logs with a standard error of 0.02 each: the mean's is 0.006."""
    callback = NegativeKL()
    state = TrainerState(log_history=[{"kl_seq": kl, "kl_seq_error": 0.02} for _ in range(10)])
    for _ in range(3):
        callback.on_log(None, state, None, logs={"kl_seq": kl})
    assert capsys.readouterr().err.count("stays negative") == warned


def test_kl_budget_stops(llama, tmp_path):
    subject = trainer(llama, tmp_path, kl_budget=1e-9, max_steps=50, learning_rate=1e-2)
    subject.train()
    assert subject.state.global_step < 12


def test_step_zero_refuses_a_calibration_that_does_not_fit(llama, tmp_path):
    with pytest.raises(InputError, match=r"mean calibrated reward is 1.000 and must be 0.5"):
        trainer(
            llama, tmp_path, dataset=references(200, value=-5.0), per_device_train_batch_size=32, num_generations=16
        ).train()


def test_step_zero_refuses_another_reference(llama, tmp_path):
    subject = trainer(llama, tmp_path)
    with torch.no_grad():
        for parameter in subject.ref_model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(InputError, match=r"sequence KL is .* must be 0: the policy"):
        subject.train()


def test_bad_settings(llama, tmp_path):
    with pytest.raises(InputError, match="beta is not set and the transform has none"):
        trainer(llama, tmp_path, beta=None)
    with pytest.raises(InputError, match="beta must be above 0"):
        CTRLConfig(**config(tmp_path, beta=0.0))
    with pytest.raises(InputError, match="normalize_advantages=True: rescales"):
        CTRLConfig(**config(tmp_path, normalize_advantages=True))
    with pytest.raises(InputError, match=r"top_p=0.9: log-probabilities and KL would be those of another distribution"):
        CTRLConfig(**config(tmp_path, top_p=0.9))


def test_ctrl_reward_values():
    reward = CTRLReward(lambda completions, **_: [float(c) for c in completions], lambda u: u**2)
    found = reward(prompts=["p"] * 3, completions=["0", "2.5", "9"], ref_rewards=[[1.0, 2.0, 3.0, 4.0]] * 3)
    assert found == pytest.approx([0.1**2, 0.5**2, 0.9**2])  # 0 and 1 are clipped to 1/(2(K+1)) and its mirror


def test_ctrl_reward_without_scores_and_without_references():
    logged = {}
    reward = CTRLReward(lambda completions, **_: [None, 1.0], identity)
    found = reward(
        prompts=["p", "p"], completions=["a", "b"], ref_rewards=[[0.0, 2.0]] * 2, log_metric=logged.__setitem__
    )
    assert found == [None, 0.5]
    assert logged == {"reward/raw": 1.0, "reward/calibrated": 0.5, "reward/transformed": 0.5, "reward/unscored": 0.5}
    with pytest.raises(InputError, match="no column 'ref_rewards'"):
        reward(prompts=["p"], completions=["a"])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (math.log, "fails on an array of 9 quantiles: TypeError"),
        (lambda u: 1.0, "finite values of the same shape"),
        (lambda u: u / 0.0, "finite values of the same shape|fails on an array"),
        (lambda u: np.ones_like(u), "is constant"),
    ],
)
def test_a_function_that_is_no_transform_is_refused_before_training(transform, message):
    with pytest.raises(InputError, match=message), np.errstate(all="ignore"):
        CTRLReward(lambda completions, **_: [1.0] * len(completions), transform)


def test_a_transform_that_turns_out_not_to_be_finite_is_refused():
    def bounded(u):
        return np.where(u > 0.995, np.inf, u)

    reward = CTRLReward(lambda completions, **_: [1.0] * len(completions), bounded)
    with pytest.raises(RewardError, match="not finite"):
        reward(prompts=["p"], completions=["a"], ref_rewards=[[0.0] * 300])
