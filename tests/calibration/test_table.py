"""The cached table: what older versions wrote is read, and scores belong to the columns that they were made with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from infalign.calibration.table import SampleTable, Wanted, write_samples
from infalign.data.prompts import load_prompts, numbered
from infalign.rewards.loader import load_reward
from infalign.stages.sampling import fill, table_rewards
from infalign.types import InputError, Sample, group_key, prompt_key

OLD = Path(__file__).parent.parent / "cases" / "calibration_0_1_0"
OLD_REWARD = "771b859ff363603e"


class Lengths:
    """A sampler of texts that say which prompt they answer."""

    def __init__(self):
        self.drawn = []

    def sample(self, requests):
        self.drawn += [(one.key, one.index) for one in requests]
        return [Sample(r.key, r.index, (r.index,), np.zeros(1, np.float32), f"{r.index}", True) for r in requests]


def fill_with(table, prompts, reward, count=3, sampler=None):
    wanted = [Wanted(prompt, (1, 2, len(prompt.content)), count) for prompt in prompts]
    sampler = sampler or Lengths()
    fill(table, wanted, [reward], lambda: sampler, max_tokens=4, tokens_per_batch=30, title="t")
    return sampler


# --- tables of version 0.1.0


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def old_table(folder):
    return SampleTable.open(folder, json.loads((folder / "plan.json").read_text())["parts"])


def test_an_older_table_is_read_by_the_exact_content(old):
    """It merged rows by normalised text: each of its prompts is the first row of its group, by that row's content."""
    table = old_table(old)
    rows = load_prompts(str(old / "prompts.jsonl")).prompts
    first = {}
    for prompt in rows:
        first.setdefault(group_key(prompt.content), prompt)
    samples, rewards = table.samples(), table.rewards(OLD_REWARD)
    assert len(samples) == 6 and samples.keys() == rewards.keys() <= {prompt.key for prompt in first.values()}
    for key, drawn in samples.items():
        assert [one.index for one in drawn] == list(range(12)) and all(one.key == key for one in drawn)
        np.testing.assert_array_equal(rewards[key], [sum(one.token_ids) + 0.01 * one.token_ids[0] for one in drawn])
    assert not {copy.key for copy in rows[-2:]} & samples.keys()  # near copies are prompts of their own now


def test_nothing_is_drawn_again_and_more_is_added(old):
    table = old_table(old)
    held = table.samples()
    prompts = [p for p in load_prompts(str(old / "prompts.jsonl")).prompts if p.key in held]
    ids = {table.key_of(key): ids for key, ids in table.stored_prompt_ids().items()}
    reward = load_reward(lambda completions: [float(len(c)) for c in completions], name="length")
    sampler = Lengths()

    def run(count):
        wanted = [Wanted(prompt, ids[prompt.key], count) for prompt in prompts]
        fill(table, wanted, [reward], lambda: sampler, max_tokens=5, tokens_per_batch=100, title="t")
        return old_table(old)

    again = run(12)
    assert sampler.drawn == [] and len(again.rewards(reward.fingerprint)) == 6
    more = run(14)
    assert sorted(sampler.drawn) == sorted((prompt.key, index) for prompt in prompts for index in (12, 13))
    assert all(len(drawn) == 14 for drawn in more.samples().values())
    assert all(row.size == 14 for row in table_rewards(more, reward, prompts).values())
    for key, drawn in more.samples().items():
        assert [one.text for one in drawn[:12]] == [one.text for one in held[key]]


def test_an_older_table_that_was_killed_goes_on_under_its_own_streams(old):
    """A batch that is missing is drawn for the keys, and so in the random streams, that it was planned with."""
    (old / "segment-000" / "00003.parquet").unlink()
    for shard in old.glob(f"scores-{OLD_REWARD}/000-00003-*"):
        shard.unlink()
    table = old_table(old)
    planned = {key for segment in table.segments for key, _, _ in segment.rows}
    ids = {table.key_of(key): ids for key, ids in table.stored_prompt_ids().items()}
    prompts = [p for p in load_prompts(str(old / "prompts.jsonl")).prompts if p.key in ids]
    reward = load_reward(lambda completions: [float(len(c)) for c in completions], name="length")
    sampler = Lengths()
    wanted = [Wanted(prompt, ids[prompt.key], 12) for prompt in prompts]
    fill(table, wanted, [reward], lambda: sampler, max_tokens=5, tokens_per_batch=100, title="t")
    assert sampler.drawn and {key for key, _ in sampler.drawn} <= planned
    assert all(len(drawn) == 12 for drawn in table.samples().values())


# --- identity


def test_rows_of_equal_content_have_samples_of_their_own(tmp_path):
    prompts = numbered([("hi", {"answer": "0"}), ("hi", {"answer": "1"}), ("Hi", {"answer": "0"})])
    reward = load_reward(
        lambda completions, answer: [float(a == c) for a, c in zip(answer, completions, strict=True)], name="right"
    )
    table = SampleTable.open(tmp_path / "t", {"model": "m"})
    sampler = fill_with(table, prompts, reward)
    assert len(set(sampler.drawn)) == 9
    found = table_rewards(table, reward, prompts)
    assert [found[prompt.key].tolist() for prompt in prompts] == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_a_changed_column_is_scored_anew_and_nothing_is_drawn(tmp_path):
    def right(completions, answer, **_):
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    reward = load_reward(right, name="right")
    first, second = ([("hi", {"answer": answer})] for answer in "02")
    table = SampleTable.open(tmp_path / "t", {"model": "m"})
    fill_with(table, numbered(first), reward)
    sampler = fill_with(table, numbered(second), reward)
    assert sampler.drawn == []
    (key,) = table.samples()
    assert table_rewards(table, reward, numbered(second))[key].tolist() == [0, 0, 1]
    assert table_rewards(table, reward, numbered(first))[key].tolist() == [1, 0, 0]


def test_a_column_that_the_reward_does_not_read_changes_nothing(tmp_path):
    calls = []

    def counted(completions):
        calls.append(len(completions))
        return [0.0] * len(completions)

    reward = load_reward(counted, name="counted")
    table = SampleTable.open(tmp_path / "t", {"model": "m"})
    fill_with(table, numbered([("hi", {})]), reward)
    before = len(calls)
    fill_with(table, numbered([("hi", {"id": 7})]), reward)
    assert len(calls) == before


def test_attach_gives_rows_of_equal_content_their_own_references(tmp_path):
    prompts = numbered([("hi", {}), ("yo", {}), ("hi", {})])
    reward = load_reward(
        lambda prompts, completions: [
            float(p == "yo") + 10 * int(c) for p, c in zip(prompts, completions, strict=True)
        ],
        name="r",
    )
    table = SampleTable.open(tmp_path / "t", {"model": "m"})
    fill_with(table, prompts[:2], reward)
    data = Dataset.from_dict({"prompt": ["hi", "yo"]})
    assert table.attach(data, reward.fingerprint)["ref_rewards"][:] == [[0, 10, 20], [1, 11, 21]]
    with pytest.raises(InputError, match="1 of 3 prompts have no reference reward"):
        table.attach(Dataset.from_dict({"prompt": ["hi", "yo", "hi"]}), reward.fingerprint)
    fill_with(table, prompts, reward)
    assert len(table.attach(Dataset.from_dict({"prompt": ["hi", "yo", "hi"]}), reward.fingerprint)) == 3


def test_attach_does_not_choose_between_scores_of_several_columns(tmp_path):
    def right(completions, answer, **_):
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    reward = load_reward(right, name="right")
    table = SampleTable.open(tmp_path / "t", {"model": "m"})
    data = Dataset.from_dict({"prompt": ["hi"]})
    fill_with(table, numbered([("hi", {"answer": "0"})]), reward)
    assert table.attach(data, reward.fingerprint)["ref_rewards"][:] == [[1, 0, 0]]
    fill_with(table, numbered([("hi", {"answer": "2"})]), reward)
    with pytest.raises(InputError, match="scored with several values of the columns that the reward reads"):
        table.attach(data, reward.fingerprint)


def test_keys_of_tables_written_now_are_not_translated(tmp_path):
    table = SampleTable.open(tmp_path / "t", {"model": "m"})
    table.request([Wanted(prompt, (1,), 1) for prompt in numbered([("Hi", {})])], 10)
    write_samples(table.shard(table.segments[0], 0), Lengths().sample([]))
    again = SampleTable.open(tmp_path / "t", {"model": "m"})
    assert again.names == {} and again.stored_prompt_ids() == {prompt_key("Hi"): (1,)}
