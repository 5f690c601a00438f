"""`infalign generate`: files of every format, standard input and output, streams, and what a line holds."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from infalign.cli import main
from infalign.generation.hf import HFSampler
from infalign.models.loading import end_token_ids, load_policy, load_tokenizer
from infalign.stages.generate import generate
from infalign.stages.recipe import load_recipe
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.generation.completions import Served, serving

TEXTS = ["the cat sat on a mat", "a dog", "the dog ran on the mat and sat", "ran", "a cat sat", "the mat"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    found = tiny_experiment(folder)
    names = ("model_name_or_path", "reward", "procedure", "max_completion_length", "use_cpu", "reward_retries")
    return {
        **{name: found[name] for name in names},
        "policy_name_or_path": found["model_name_or_path"],
        "n": 3,
        "tokens_per_batch": 70,  # a prompt or two a batch
    }


@pytest.fixture(scope="module")
def rows(keys, tmp_path_factory):
    """What a file of the texts gives."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    path = generate(load_recipe(keys), prompts=str(folder / "prompts.txt"), output=str(folder / "out.jsonl"))
    return path.read_text()


class Input(io.StringIO):
    """Standard input of a test, with the bytes below it."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.buffer = io.BytesIO(content)


def jsonl(values):
    return "".join(json.dumps(value) + "\n" for value in values)


# --- what a line holds


def test_a_line_is_the_choice_and_what_it_cost(rows):
    for text, row in zip(TEXTS, map(json.loads, rows.splitlines()), strict=True):
        rewards = [one["reward"] for one in row["candidates"]]
        assert row["prompt"] == text and len(rewards) == 3 and row["reward"] == max(rewards)
        assert row["completion"] == row["candidates"][row["chosen"]]["completion"]
        assert set(row) == {"prompt", "completion", "reward", "chosen", "candidates", "spent"}
        assert row["spent"]["candidates"] == row["spent"]["reward_calls"] == 3
        assert 3 <= row["spent"]["tokens"] <= 15


# --- prompts


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv", "parquet", "txt.gz", "folder"])
def test_every_format_of_prompts(form, keys, rows, tmp_path):
    path = tmp_path / f"prompts.{form}"
    listed = [{"prompt": text} for text in TEXTS]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(listed), path)
    elif form == "txt.gz":
        path.write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    elif form == "folder":
        path.mkdir()
        (path / "prompts.jsonl").write_text(jsonl(listed))
    else:
        written = {"txt": "\n".join(TEXTS), "jsonl": jsonl(listed), "json": json.dumps(listed)}
        path.write_text(written.get(form, "prompt\n" + "\n".join(TEXTS)))
    assert generate(load_recipe(keys), prompts=str(path), output=str(tmp_path / "out.jsonl")).read_text() == rows


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(TEXTS).encode(),
        ("\ufeff" + "\r\n\r\n".join(TEXTS) + "\r\n").encode(),
        jsonl({"prompt": text, "id": text[:1]} for text in TEXTS).encode(),
    ],
)
def test_standard_input(content, keys, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Input(content))
    lines = generate(load_recipe(keys), prompts="-", output=str(tmp_path / "out.jsonl")).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    ids = [row.pop("id", None) for row in found]
    assert found == [json.loads(line) for line in rows.splitlines()]
    assert ids == ([text[:1] for text in TEXTS] if b"id" in content else [None] * len(TEXTS))


def test_a_text_that_begins_with_a_brace_is_a_text(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Input(b"{cat\n[1, 2]\n"))
    path = generate(load_recipe(keys), prompts="-", output=str(tmp_path / "out.jsonl"))
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == ["{cat", "[1, 2]"]


def test_chats_on_standard_input(keys, tmp_path, monkeypatch):
    chats = [[{"role": "user", "content": text}] for text in TEXTS[:2]]
    monkeypatch.setattr(sys, "stdin", Input(jsonl({"prompt": chat} for chat in chats).encode()))
    path = generate(load_recipe(keys), prompts="-", output=str(tmp_path / "out.jsonl"))
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == chats


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input: no rows"),
        (b" \n\n", "standard input: no rows"),
        (b'{"prompt": "a"}\n\nthe cat\n', "standard input, line 3: not a JSON object, as line 1 is"),
        (b'{"prompt": "a"}\n[1]\n', "standard input, line 2: not a JSON object, as line 1 is"),
        (b'{"text": "a"}\n', "standard input: no column 'prompt'"),
        (b'{"prompt": 3}\n', "row 1: the prompt is 3, neither text nor a chat"),
        (b"the \xff cat", "standard input is not UTF-8 text"),
        (b"the cat " * 300, "all 1 prompts are longer than 507 tokens"),
    ],
)
def test_standard_input_that_is_none(content, message, keys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Input(content))
    with pytest.raises(InputError, match=message):
        generate(load_recipe(keys), prompts="-", output=str(tmp_path / "out.jsonl"))


def test_a_file_that_is_not_there(keys, tmp_path):
    with pytest.raises(InputError, match=r"--prompts 'nowhere.txt': no such file"):
        generate(load_recipe(keys), prompts="nowhere.txt", output=str(tmp_path / "out.jsonl"))
    with pytest.raises(InputError, match="is a folder: name a file"):
        generate(load_recipe(keys), prompts="nowhere.txt", output=str(tmp_path))


def test_an_output_that_promises_another_format(keys, tmp_path):
    for name in ("a.csv", "a.jsonl.gz"):
        with pytest.raises(InputError, match="what is written is JSON lines"):
            generate(load_recipe(keys), output=str(tmp_path / name))


def test_standard_streams_are_one_process_own(keys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--prompts - and --output - are one process' own"):
        generate(load_recipe(keys), prompts="-", output="out.jsonl")


def test_a_finished_file_is_known_again_and_never_replaced_unasked(keys, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the cat\na dog\n")
    prompts, output = str(tmp_path / "prompts.txt"), str(tmp_path / "answers.jsonl")
    path = generate(load_recipe(keys), prompts=prompts, output=output)
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    generate(load_recipe(keys), prompts=prompts, output=output)
    assert "is made already" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"was made with other settings .*procedure.*, or give --overwrite"):
        generate(load_recipe({**keys, "n": 5}), prompts=prompts, output=output)
    generate(load_recipe({**keys, "n": 5, "overwrite": True}), prompts=prompts, output=output)
    assert path.stat().st_mtime_ns != before
    path.write_text("mine\n")
    with pytest.raises(InputError, match="is there and holds something else"):
        generate(load_recipe({**keys, "n": 5}), prompts=prompts, output=output)
    with pytest.raises(InputError, match="is the file of prompts, which would be lost"):
        generate(load_recipe(keys), prompts=prompts, output=prompts)
    assert path.read_text() == "mine\n"


# --- standard output


def test_standard_output_is_the_lines_alone(keys, rows, tmp_path, capsys):
    """The same bytes as in a file; everything else is on standard error."""
    (tmp_path / "prompts.txt").write_text("\n".join([*TEXTS, TEXTS[0]]))
    assert generate(load_recipe(keys), prompts=str(tmp_path / "prompts.txt"), output="-") is None
    out, err = capsys.readouterr()
    lines = out.splitlines(keepends=True)
    assert "".join(lines[:6]) == rows and json.loads(lines[6])["prompt"] == TEXTS[0]
    assert "generate: BestOfN(3): 7 prompts in" in err and "7 prompts (1 repeat another row's" in err
    assert [one.name for one in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_batch_is_printed_as_soon_as_it_is_done(keys, rows, tmp_path, monkeypatch, capsys):
    """Before every further batch, all of the earlier ones' lines are out, in the order of the prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    printed: list[str] = []
    drawn: list[int] = []

    def watch(self, requests, plain=HFSampler.sample):
        printed.append(capsys.readouterr().out)
        assert "".join(printed).splitlines() == rows.splitlines()[: sum(drawn) // 3]
        drawn.append(len(requests))
        return plain(self, requests)

    monkeypatch.setattr(HFSampler, "sample", watch)
    generate(load_recipe(keys), prompts=str(tmp_path / "prompts.txt"), output="-")
    assert len(drawn) >= 3 and max(drawn) > 3 and sum(drawn) == 18
    assert "".join(printed) + capsys.readouterr().out == rows


def test_batches_of_neighbours_keep_to_the_budget(keys, tmp_path, monkeypatch):
    """Rows times the longest prompt and the completion: never above tokens_per_batch, but for a single prompt."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    seen: list[list[int]] = []

    def watch(self, requests, plain=HFSampler.sample):
        seen.append([len(request.prompt_ids) for request in requests])
        return plain(self, requests)

    monkeypatch.setattr(HFSampler, "sample", watch)
    for budget in (10, 70, 100, 10000):
        seen.clear()
        generate(load_recipe({**keys, "tokens_per_batch": budget}), prompts=str(tmp_path / "prompts.txt"), output="-")
        assert all(len(lengths) * (max(lengths) + 5) <= budget or len(lengths) == 3 for lengths in seen)
        assert len(seen) == {10: 6, 10000: 1}.get(budget, len(seen))


def test_a_server_and_standard_streams(keys, rows, tmp_path, monkeypatch, capsys):
    """`generation: openai`: lines on standard output, what the client says on standard error."""
    model = load_policy(keys["model_name_or_path"], device=torch.device("cpu"))
    tokenizer = load_tokenizer(keys["model_name_or_path"])
    policy = tmp_path / "policy"
    model.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    monkeypatch.setattr(sys, "stdin", Input("\n".join(TEXTS).encode()))
    with serving(Served(model, tokenizer, ends=end_token_ids(model, tokenizer))) as url:
        served = {**keys, "policy_name_or_path": str(policy), "generation": "openai", "policy_base_url": url}
        generate(load_recipe(served), prompts="-", output="-")
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in found] == TEXTS and out != rows
    assert all(row["reward"] == max(one["reward"] for one in row["candidates"]) for row in found)
    assert "follow the recipe's model" in err


def test_the_command_line_takes_dashes(keys, rows, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    monkeypatch.setattr(sys, "stdin", Input("\n".join(TEXTS).encode()))
    assert main(["generate", "--config", str(recipe), "--prompts", "-", "--output", "-"]) == 0
    assert capsys.readouterr().out == rows


@pytest.mark.slow
def test_a_reader_that_has_had_enough_ends_it_quietly(keys, tmp_path):
    """`| head -1`: one line, no word on standard error about it, exit code 0."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**keys, "tokens_per_batch": 10}))
    (tmp_path / "prompts.txt").write_text("".join(f"the cat {n}\n" for n in range(400)))
    command = [sys.executable, "-m", "infalign", "generate", "--config", str(recipe), "--prompts"]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(
        [*command, str(tmp_path / "prompts.txt"), "--output", "-"], cwd=root, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        line = process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert json.loads(line)["prompt"] == "the cat 0"
    assert "Broken" not in err and "Traceback" not in err and "Exception" not in err
    assert "400 prompts in" not in err


@pytest.mark.parametrize(
    ("procedure", "own", "never"),
    [("top_of_n", {"k": 2}, min), ("bottom_of_n", {"k": 2}, max), ("pessimistic_of_n", {"beta": 0.2}, min)],
)
def test_procedures_that_keep_one_of_several_ranks(procedure, own, never, keys, tmp_path):
    """lam = 1 - sqrt(.4) = .37: the pessimistic decoder has no weight in the lowest of three cells."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    recipe = load_recipe({**keys, "procedure": procedure, "procedure_kwargs": own})
    path = generate(recipe, prompts=str(tmp_path / "prompts.txt"), output=str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rewards = [[one["reward"] for one in row["candidates"]] for row in rows]
    apart = [len(set(three)) == 3 for three in rewards]
    assert any(apart) and len(rows) == len(TEXTS)
    assert all(row["reward"] != never(three) for row, three, one in zip(rows, rewards, apart, strict=True) if one)
