"""One row in, one row out: no verb merges, drops or changes rows, whatever they are like."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from infalign.cli import main
from infalign.data.prompts import load_prompts
from infalign.stages.calibrate import calibrate
from infalign.stages.evaluate import evaluate
from infalign.stages.experiment import Experiment
from infalign.stages.generate import generate
from infalign.stages.recipe import load_recipe
from infalign.stages.train import train
from infalign.types import InputError, RewardError
from tests.e2e.experiment import WORDS, tiny_experiment

CASES = Path(__file__).parent.parent / "cases"

REWARD = """
import json
import os

HERE = os.path.dirname(__file__)


def seen(stage, values):
    with open(os.path.join(HERE, "seen.jsonl"), "a") as file:
        for value in values:
            file.write(json.dumps([os.environ.get("STAGE", ""), repr(value)]) + "\\n")


def answers(completion_ids, answer=None, **_):
    seen("answer", answer or [])
    return [sum(ids) + 0.01 * ids[0] for ids in completion_ids]


def tests(completion_ids, tests=None, **_):
    seen("tests", tests or [])
    return [sum(ids) + 0.01 * ids[0] for ids in completion_ids]


def completion(completion_ids, completion=None, prompt=None, **_):
    seen("completion", zip(completion, prompt) if prompt else completion)
    return [sum(ids) + 0.01 * ids[0] for ids in completion_ids]


def picky(prompts, completion_ids, **_):
    if any("dog" in prompt for prompt in prompts):
        raise ValueError("no dogs")
    return [float(sum(ids)) for ids in completion_ids]


def fails(prompts, completion_ids, **_):
    raise ValueError("always")
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    keys = tiny_experiment(folder)
    (folder / "reward.py").write_text(REWARD)
    return folder, keys


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def generated(base, prompts, output, **changed):
    folder, keys = base
    recipe = load_recipe({
        **keys, "policy_name_or_path": str(folder / "model"), "reward_retries": 0, "dtype": "float32", **changed
    })  # fmt: skip
    return read(generate(recipe, prompts=str(prompts), output=str(output)))


def adversarial(seed: int, count: int) -> list[dict]:
    """Rows that differ in case, white space, composition, or not at all, with columns that come and go."""
    rng = random.Random(seed)
    changes = [
        str.upper,
        str.title,
        lambda text: f" {text}",
        lambda text: f"{text}\n",
        lambda text: text.replace(" ", "  "),
        lambda text: text.replace(" ", "\t"),
        lambda text: f"{text} \u00e9",
        lambda text: f"{text} e\u0301",
        lambda text: f"\uff41 {text}",
        lambda text: text,
    ]
    columns = [{}, {"id": 0}, {"id": None}, {"answer": ""}, {"answer": "x", "nested": {"a": [1, None]}}, {"id": 0}]
    texts = ["the cat", "a dog ran", "sat"]
    rows = []
    for _ in range(count):
        content = rng.choice(changes)(rng.choice(texts))
        rows.append({"prompt": content, **rng.choice(columns)})
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_generate_gives_a_row_for_a_row(seed, base, tmp_path):
    rows = adversarial(seed, 40)
    found = generated(base, write(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl")
    ours = {"completion", "reward", "chosen", "candidates", "spent"}
    assert [{name: value for name, value in row.items() if name not in ours} for row in found] == rows
    texts = Counter((row["prompt"], row["completion"], str(row["candidates"])) for row in found)
    assert len(texts) > 30  # equal rows have samples of their own: a chance repeat of five tokens is rare


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_in_a_split(seed, base, tmp_path):
    _, keys = base
    rows = [row | {"prompt": f"{row['prompt']} {i // 4}"} for i, row in enumerate(adversarial(seed, 60))]
    path = write(tmp_path / "p.jsonl", rows)
    changed = {**keys, "dataset_name": path, "num_train_prompts": None, "num_test_prompts": 7}
    splits = Experiment(load_recipe({**changed, "output_dir": str(tmp_path / "o")})).splits
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) + splits.left_out == 60 and len(splits.test) == 7
    kept = Counter((p.content, json.dumps(dict(p.columns))) for part in parts for p in part)
    given = Counter((row.pop("prompt"), json.dumps(row)) for row in rows)
    assert kept <= given and (kept == given or splits.left_out)


def test_prompts_that_differ_in_white_space_or_case(base, tmp_path):
    found = generated(base, CASES / "indentation.jsonl", tmp_path / "o.jsonl")
    assert [row["id"] for row in found] == [0, 1, 2, 3]


def test_equal_prompts_with_other_answers(base, tmp_path):
    found = generated(base, CASES / "same_prompt_other_answer.jsonl", tmp_path / "o.jsonl")
    assert [row["answer"] for row in found] == list("0123")
    assert len({str(row["candidates"]) for row in found}) == 4


def test_a_folder_of_prompts_with_several_splits(base, tmp_path):
    rows = {"train": [{"prompt": "the cat"}], "test": [{"prompt": "a dog"}]}
    saved = DatasetDict({split: Dataset.from_list(one) for split, one in rows.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    folder, keys = base
    recipe = load_recipe({**keys, "policy_name_or_path": str(folder / "model")})
    with pytest.raises(InputError, match="has the splits train, test: say which with --split"):
        generate(recipe, prompts=str(tmp_path / "saved"), output=str(tmp_path / "o.jsonl"))
    path = generate(recipe, prompts=str(tmp_path / "saved"), output=str(tmp_path / "o.jsonl"), split="test")
    assert [row["prompt"] for row in read(path)] == ["a dog"]


# --- a row's failure stands in the row


def test_a_row_that_cannot_be_decoded_says_why_and_the_others_go_on(base, tmp_path, capsys):
    rows = [
        {"prompt": "", "id": 0},
        {"prompt": "the cat", "id": 1, "reward": "mine", "completion": "old"},
        {"prompt": None, "id": 2},
        {"prompt": "cat " * 600, "id": 3},
        {"prompt": "a dog", "id": 4, "note": "\ud800"},
        {"prompt": "half \udc00", "id": 5},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    found = generated(base, path, tmp_path / "o.jsonl")
    assert [row["id"] for row in found] == [0, 1, 2, 3, 4, 5]
    assert ["error" in row for row in found] == [True, False, True, True, False, True]
    assert found[4]["note"] == "\ud800" and "half a surrogate pair" in found[5]["error"]
    assert found[0]["error"] == "the prompt is empty" and "neither text nor a chat" in found[2]["error"]
    assert "tokens, more than" in found[3]["error"] and found[3]["prompt"] == rows[3]["prompt"]
    assert found[1]["input"] == {"reward": "mine", "completion": "old"} and isinstance(found[1]["completion"], str)
    assert "4 of 6 rows have an error in place of a completion" in capsys.readouterr().err
    assert generated(base, path, tmp_path / "o.jsonl") == found
    assert "4 of its rows have an error: --overwrite tries" in capsys.readouterr().err
    streamed = main([
        "generate", *_flags(base, tmp_path), "--prompts", path, "--output", "-",
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert streamed == 0 and [json.loads(line) for line in lines] == found


def _flags(base, tmp_path) -> list[str]:
    folder, keys = base
    recipe = {**keys, "policy_name_or_path": str(folder / "model"), "reward_retries": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return ["--config", str(tmp_path / "recipe.yaml")]


def test_rows_without_a_single_prompt_are_refused(base, tmp_path):
    with pytest.raises(InputError, match="2 of 2 rows cannot be used: rows 1, 2: the prompt is empty"):
        generated(base, write(tmp_path / "p.jsonl", [{"prompt": ""}, {"prompt": " "}]), tmp_path / "o.jsonl")


@pytest.mark.parametrize("budget", [20, 4000])
def test_a_reward_that_fails_on_a_row(budget, base, tmp_path):
    folder, _ = base
    rows = [{"prompt": text} for text in ("the cat", "a dog", "the mat", "a dog ran", "a cat")]
    path = write(tmp_path / "p.jsonl", rows)
    spec = f"{folder / 'reward.py'}:picky"
    found = generated(base, path, tmp_path / "o.jsonl", reward=spec, tokens_per_batch=budget)
    assert ["no dogs" in row.get("error", "") for row in found] == [False, True, False, True, False]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]


def test_a_reward_that_fails_on_all_rows_ends_it(base, tmp_path):
    folder, _ = base
    path = write(tmp_path / "p.jsonl", [{"prompt": f"{word} {other}"} for word in WORDS for other in WORDS])
    with pytest.raises(RewardError, match="always"):
        generated(base, path, tmp_path / "o.jsonl", reward=f"{folder / 'reward.py'}:fails")
    assert not (tmp_path / "o.jsonl").exists()


# --- columns: the same Python value in every stage


def stages(base, tmp_path, monkeypatch, rows, name, **changed):
    """Run all stages; what the reward `name` saw, by stage."""
    folder, keys = base
    shutil.copy(folder / "reward.py", tmp_path / "reward.py")
    path = write(tmp_path / "p.jsonl", rows)
    recipe = load_recipe({
        **keys,
        "dataset_name": path,
        "output_dir": str(tmp_path / "out"),
        "reward": f"{tmp_path / 'reward.py'}:{name}",
        "num_train_prompts": 4,
        "num_validation_prompts": 1,
        "num_test_prompts": 3,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        **changed,
    })  # fmt: skip
    for stage, run in (("calibrate", calibrate), ("train", train), ("evaluate", evaluate)):
        monkeypatch.setenv("STAGE", stage)
        run(recipe)
    generated_rows = generate(recipe, prompts=path, output=str(tmp_path / "g.jsonl"))
    assert len(read(generated_rows)) == len(rows)
    found: dict[str, set[str]] = {}
    for stage, value in read(tmp_path / "seen.jsonl"):
        found.setdefault(stage, set()).add(value)
    return found


def cases(name):
    """A file of cases with prompts that the tiny model has words for."""
    rows = read(CASES / name)
    return [{**row, "prompt": f"{WORDS[i % 8]} {WORDS[(3 * i + 1) % 8]} {WORDS[i // 8]}"} for i, row in enumerate(rows)]


def test_integers_and_floats_in_one_column(base, tmp_path, monkeypatch):
    rows = cases("int_float.jsonl")
    found = stages(base, tmp_path, monkeypatch, rows, "answers")
    given = {repr(row["answer"]) for row in rows}
    assert "5" in given and found.keys() == {"calibrate", "train", "evaluate"}
    assert all(seen <= given for seen in found.values())
    assert found["calibrate"] | found["evaluate"] == given


def test_columns_that_arrow_has_no_type_for(base, tmp_path, monkeypatch):
    odd = [5, 3.5, "5", [1, "a"], {"a": 1}, None, 2**70, [[1], 2]]
    rows = [{**row, "answer": value} for row, value in zip(cases("int_float.jsonl"), odd, strict=True)]
    found = stages(base, tmp_path, monkeypatch, rows, "answers")
    assert all(seen <= set(map(repr, odd)) for seen in found.values())
    assert set.union(*found.values()) == set(map(repr, odd))


def test_dictionaries_keep_their_own_keys(base, tmp_path, monkeypatch):
    rows = cases("dict_keys.jsonl")
    found = stages(base, tmp_path, monkeypatch, rows, "tests")
    assert all(seen <= {repr(row["tests"]) for row in rows} for seen in found.values())


def test_a_column_completion_reaches_the_reward_in_every_stage(base, tmp_path, monkeypatch):
    rows = [{**row, "completion": f"the reference {i}"} for i, row in enumerate(cases("prompt_completion.jsonl"))]
    found = stages(base, tmp_path, monkeypatch, rows, "completion")
    assert found.keys() == {"calibrate", "train", "evaluate"}
    assert all(seen <= {repr(row["completion"]) for row in rows} for seen in found.values())


def test_a_column_prompt_beside_another_prompt_column(base, tmp_path, monkeypatch):
    rows = [
        {"q": row["prompt"], "prompt": f"note {i}", "completion": f"c {i}", "ref_rewards": "theirs"}
        for i, row in enumerate(cases("prompt_completion.jsonl"))
    ]
    found = stages(base, tmp_path, monkeypatch, rows, "completion", prompt_column="q")
    pairs = {repr((row["completion"], row["prompt"])) for row in rows}
    assert found.keys() == {"calibrate", "train", "evaluate"} and all(seen <= pairs for seen in found.values())


def test_a_float_among_the_answers_trains(base, tmp_path, monkeypatch):
    """`one_float.jsonl`: a run stopped at step 0, since 2 had become 2.0 and no longer was the answer "2"."""
    _, keys = base
    rows = [{**row, "prompt": f"{WORDS[i % 8]} {WORDS[i // 8]} {WORDS[(i * 5 + 2) % 8]}"} for i, row in enumerate(
        read(CASES / "one_float.jsonl"))]  # fmt: skip
    (tmp_path / "digits.py").write_text(
        "def reward(completion_ids, answer, **_):\n"
        "    return [float('.' in str(a)) + ids[0] / 100 for ids, a in zip(completion_ids, answer)]\n"
    )
    recipe = load_recipe({
        **keys,
        "dataset_name": write(tmp_path / "p.jsonl", rows),
        "output_dir": str(tmp_path / "out"),
        "reward": f"{tmp_path / 'digits.py'}:reward",
        "num_train_prompts": None,
        "num_test_prompts": 1,
        "max_steps": 1,
        "per_device_train_batch_size": 32,
        "num_generations": 2,
    })  # fmt: skip
    assert 0.5 in [prompt.columns["answer"] for prompt in Experiment(recipe).splits.train]
    calibrate(recipe)
    assert train(recipe)["steps"] == 1


# --- chats: tools, tool calls, template arguments


def test_what_a_chat_template_reads_reaches_it(base, tmp_path):
    """Tools, per-row template arguments and tool calls change the tokens, in TRL's names."""
    folder, keys = base
    shutil.copytree(folder / "model", tmp_path / "model")
    template = (
        "{%- if tools %}the {{ tools | length * 'cat ' }}{% endif %}"
        "{%- for m in messages %}user {{ m['content'] or '' }}"
        "{%- for call in m.get('tool_calls') or [] %} sat"
        " {{ call['function']['arguments']['city'] | replace('Oslo', 'dog') }}{%- endfor %}"
        "{%- if m.get('name') == 'weather' %} ran{% endif %} {% endfor %}"
        "{%- if enable_thinking is defined and not enable_thinking %}mat{% endif %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    recipe = load_recipe({**keys, "model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "o")})
    experiment = Experiment(recipe)

    def text_of(name):
        return experiment.tokenizer.decode(experiment.render(load_prompts(str(CASES / name)).prompts[0]))

    assert "the" not in text_of("text_parts.jsonl") and text_of("tools.jsonl").startswith("the cat")
    assert "mat" not in text_of("text_parts.jsonl") and text_of("template_kwargs_column.jsonl").endswith("mat")
    for name in ("tool_calls.jsonl", "tool_calls_none.jsonl"):
        assert "sat dog" in text_of(name) and "ran" in text_of(name)
