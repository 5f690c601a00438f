"""`with_references`: a TRL script becomes one of infalign's with three lines; what was drawn is found again."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

import infalign
from infalign.generation.hf import HFSampler
from infalign.types import InputError
from tests.tiny import tiny_causal

SAID = ["the cat", "a dog sat", "why", "the sun is", "i like the"]


def longer(completions, **_):
    return [float(len(one if isinstance(one, str) else one[0]["content"])) for one in completions]


def near(completions, target, **_):
    return [-abs(len(one) - wanted) for one, wanted in zip(completions, target, strict=True)]


@pytest.fixture
def script(tmp_path):
    """What a TRL script has before it makes its trainer."""
    model = tiny_causal(tmp_path / "model", "llama")
    keys = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2,
        "max_completion_length": 5, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return model, Dataset.from_list([{"prompt": said, "target": len(said)} for said in SAID]), keys


@pytest.fixture
def drawn(monkeypatch):
    """How many samples each batch had."""
    counts: list[int] = []
    sample = HFSampler.sample
    monkeypatch.setattr(
        HFSampler, "sample", lambda self, requests: counts.append(len(requests)) or sample(self, requests)
    )
    return counts


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("config", [RLOOConfig, infalign.CTRLConfig])
def test_a_trl_script_after_three_lines(script, config, chats, capsys):
    model, prompts, keys = script
    if chats:
        prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": said}]} for said in SAID])
    args = config(**keys)
    prompts = infalign.with_references(prompts, model, longer, args)
    reward = infalign.CTRLReward(longer, infalign.optimal_transform(infalign.BestOfN(4), kl=1.0))
    trainer = infalign.CTRLTrainer(model=model, reward_funcs=reward, args=args, train_dataset=prompts)
    trainer.train()  # the first step checks that the mean calibrated reward is 1/2 and the KL 0
    assert trainer.state.global_step == 2
    assert all(len(row) == 64 for row in prompts["ref_rewards"])


def test_references_are_rewards_of_the_base_policys_samples(script):
    """Against TRL's own rollouts of the untrained policy: the same mean reward, up to the error of both."""
    model, prompts, keys = script
    ours = infalign.with_references(prompts, model, longer, RLOOConfig(**keys), count=400)
    seen: list[float] = []

    def looks(completions, **_):
        seen.extend(longer(completions))
        return [0.0] * len(completions)

    many = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 1000, "num_generations": 200}
    RLOOTrainer(model=model, reward_funcs=looks, args=RLOOConfig(**{**keys, **many}), train_dataset=prompts).train()
    found = np.concatenate([np.array(row) for row in ours["ref_rewards"]])
    error = np.hypot(found.std() / len(found) ** 0.5, np.std(seen) / len(seen) ** 0.5)
    assert len(seen) == 1000 and abs(found.mean() - np.mean(seen)) < 4 * error


def test_what_is_there_is_found(script, drawn):
    model, prompts, keys = script
    args = RLOOConfig(**keys)
    first = infalign.with_references(prompts, model, longer, args, count=4)
    assert sum(drawn) == 4 * len(SAID)
    assert infalign.with_references(prompts, model, longer, args, count=4)["ref_rewards"] == first["ref_rewards"]
    other = infalign.with_references(prompts, model, near, args, count=4, column="near")
    assert sum(drawn) == 4 * len(SAID) and other["near"] != first["ref_rewards"]
    lengths = [
        [-abs(length - target) for length in row]
        for row, target in zip(first["ref_rewards"], prompts["target"], strict=True)
    ]
    assert other["near"] == lengths
    more = infalign.with_references(prompts, model, longer, args, count=6)["ref_rewards"]
    assert sum(drawn) == 6 * len(SAID) and [row[:4] for row in more] == list(first["ref_rewards"])


def test_mistakes(script, tmp_path):
    model, prompts, keys = script
    args = RLOOConfig(**keys)
    with pytest.raises(InputError, match="model must be the folder or Hub id that the trainer is given, got a object"):
        infalign.with_references(prompts, object(), longer, args)
    with pytest.raises(InputError, match=r"top_p=0.9: .*1.0"):
        infalign.with_references(prompts, model, longer, RLOOConfig(**keys, top_p=0.9))
    with pytest.raises(InputError, match="dtype 'half_' in model_init_kwargs is none of torch's"):
        infalign.with_references(prompts, model, longer, RLOOConfig(**keys, model_init_kwargs={"dtype": "half_"}))
    with pytest.raises(InputError, match="no column 'prompt'"):
        infalign.with_references(prompts.rename_column("prompt", "said"), model, longer, args)
    infalign.with_references(prompts, model, longer, args, count=2)
    with pytest.raises(InputError, match=r"holds samples drawn with other settings \(temperature"):
        infalign.with_references(prompts, model, longer, RLOOConfig(**keys, temperature=0.5), count=2)
    infalign.with_references(
        prompts, model, longer, RLOOConfig(**keys, temperature=0.5), count=2, folder=tmp_path / "t"
    )
