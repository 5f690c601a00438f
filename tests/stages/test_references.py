"""`with_references`: a TRL script becomes one of infalign's with three lines; what was drawn is found again."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from trl import GRPOConfig, RLOOConfig, RLOOTrainer

import infalign
from infalign.generation.hf import HFSampler
from infalign.rewards.scoring import ASKED_AGAIN
from infalign.types import InputError
from tests.tiny import tiny_causal

SAID = ["the cat", "a dog sat", "why", "the sun is", "i like the"]


def longer(completions, **_):
    return [float(len(one if isinstance(one, str) else one[0]["content"])) for one in completions]


def silent(completions, **_):
    return [None] * len(completions)


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


def test_samples_are_found_and_rewards_are_asked_anew(script, drawn):
    model, prompts, keys = script
    args = RLOOConfig(**keys)
    first = infalign.with_references(prompts, model, longer, args, count=4)
    assert sum(drawn) == 4 * len(SAID)
    assert infalign.with_references(first, model, longer, args, count=4)["ref_rewards"] == first["ref_rewards"]
    other = infalign.with_references(prompts.add_column("id", SAID), model, near, args, count=4, column="near")
    assert sum(drawn) == 4 * len(SAID)
    rows = zip(first["ref_rewards"], prompts["target"], strict=True)
    assert other["near"] == [[-abs(length - target) for length in row] for row, target in rows]
    more = infalign.with_references(prompts, model, longer, args, count=6)["ref_rewards"]
    assert sum(drawn) == 6 * len(SAID) and [row[:4] for row in more] == list(first["ref_rewards"])


FACTOR = 1.0


def scaled(completions, **_):
    return [FACTOR * length for length in longer(completions)]


def test_a_reward_that_has_changed_where_its_source_does_not_show_it(script, monkeypatch):
    model, prompts, keys = script
    args = RLOOConfig(**keys)
    before = infalign.with_references(prompts, model, scaled, args, count=3)["ref_rewards"]
    monkeypatch.setitem(globals(), "FACTOR", -1.0)
    after = infalign.with_references(prompts, model, scaled, args, count=3)["ref_rewards"]
    assert after == [[-length for length in row] for row in before]


def test_what_trl_withholds_is_withheld(script):
    model, prompts, keys = script

    def told(completions, completion=None, **_):
        return [float(completion is None)] * len(completions)

    rows = prompts.add_column("completion", SAID)
    found = infalign.with_references(rows, model, told, RLOOConfig(**keys), count=2)
    assert found["ref_rewards"] == [[1.0, 1.0]] * len(SAID) and found["completion"] == SAID


def test_one_prompt_is_enough(script, drawn):
    model, prompts, keys = script
    found = infalign.with_references(prompts.select([0]), model, longer, RLOOConfig(**keys), count=3)
    assert len(found) == 1 and len(found[0]["ref_rewards"]) == 3 and sum(drawn) == 3


def test_a_reward_is_asked_once_about_a_sample(script):
    """But for the few that it is asked about again."""
    model, prompts, keys = script
    asked: list[str] = []

    def counts(completions, **_):
        asked.extend(completions)
        return longer(completions)

    infalign.with_references(prompts, model, counts, RLOOConfig(**keys), count=20)
    assert len(asked) == 20 * len(SAID) + ASKED_AGAIN


def test_equal_prompts_have_samples_of_their_own(script):
    model, prompts, keys = script
    twice = prompts.select([0, 0, 1])
    found = infalign.with_references(twice, model, near, RLOOConfig(**keys), count=16)
    assert found[0]["ref_rewards"] != found[1]["ref_rewards"]
    other_way = infalign.with_references(twice.select([2, 1, 0]), model, near, RLOOConfig(**keys), count=16)
    assert sorted(map(tuple, other_way["ref_rewards"])) == sorted(map(tuple, found["ref_rewards"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rows: rows.to_iterable_dataset(),
            r"must be a datasets.Dataset \(one split, no stream\), got a Iterable",
        ),
        (lambda rows: DatasetDict({"train": rows}), r"must be a datasets.Dataset .* got a DatasetDict"),
        (lambda rows: list(rows), "must be a datasets.Dataset .* got a list"),
        (lambda rows: rows.select([]), "the data set is empty"),
        (lambda rows: rows.rename_column("prompt", "said"), "no column 'prompt'; its columns are 'said', 'target'"),
        (lambda rows: rows.add_column("image", SAID), "has a column 'image': base samples are drawn from texts"),
        (lambda rows: rows.with_transform(lambda batch: batch), "has the format 'custom': give it with_format"),
        (lambda rows: rows.map(lambda row: {"prompt": " "}), "5 of 5 rows cannot be used: .*the prompt is empty"),
    ],
)
def test_data_sets_that_can_not_be_used(change, words, script, drawn):
    model, prompts, keys = script
    with pytest.raises(InputError, match=words):
        infalign.with_references(change(prompts), model, longer, RLOOConfig(**keys), count=2)
    assert not drawn


@pytest.mark.parametrize(
    ("keys", "given", "words"),
    [
        ({}, {"model": 3}, "model must be the folder or Hub id that the trainer is given, got a int"),
        ({}, {"count": 0}, "count must be a whole number of samples, at least 1, got 0"),
        ({}, {"count": "3"}, "count must be a whole number of samples, at least 1, got '3'"),
        ({}, {"column": "target"}, "has a column 'target' already: choose another name"),
        ({"top_p": 0.9}, {}, "top_p=0.9: .*1.0"),
        ({"beta": 0.0}, {}, "beta must be above 0"),
        ({"generation_kwargs": {"top_p": 0.5}}, {}, "generation_kwargs would draw rollouts otherwise"),
        ({"model_init_kwargs": {"dtype": "half_"}}, {}, "dtype 'half_' in model_init_kwargs is none of torch's"),
        ({"max_completion_length": None}, {}, "max_completion_length is not set"),
        ({}, {"reward": silent}, "gave no score to any sample of 1 of 1 prompts"),
    ],
)  # fmt: skip
def test_mistakes_come_before_the_work(keys, given, words, script, drawn):
    model, prompts, usual = script
    arguments = {"model": model, "reward": longer, "count": 2, **given}
    with pytest.raises(InputError, match=words):
        infalign.with_references(prompts, args=RLOOConfig(**{**usual, **keys}), **arguments)
    assert sum(drawn) <= 2


def test_other_settings_need_another_folder(script, tmp_path):
    model, prompts, keys = script
    infalign.with_references(prompts, model, longer, RLOOConfig(**keys), count=2)
    other = RLOOConfig(**keys, temperature=0.5)
    with pytest.raises(InputError, match=r"holds samples drawn with other settings \(temperature"):
        infalign.with_references(prompts, model, longer, other, count=2)
    infalign.with_references(prompts, model, longer, other, count=2, folder=tmp_path / "t")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: give a folder"):
        infalign.with_references(prompts, model, longer, other, count=2, folder=tmp_path / "file")
    with pytest.raises(InputError, match="got a GRPOConfig: its keys are here under the same names"):
        infalign.with_references(prompts, model, longer, GRPOConfig(**keys), count=2)
