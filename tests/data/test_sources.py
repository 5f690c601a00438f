"""Files: every format and compression, what is said of broken ones, folders with several splits."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from infalign.cli import main
from infalign.data.completions import read_completions
from infalign.data.prompts import load_prompts
from infalign.data.sources import iter_rows, read_rows
from infalign.types import InputError

ROWS = [{"prompt": "a, “b”", "tag": "x"}, {"prompt": "c\td\ne", "tag": ""}]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def packed(content: bytes, suffix: str) -> bytes:
    if suffix in (".zst", ".lz4"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, {".zst": "zstd", ".lz4": "lz4"}[suffix]) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst", ".lz4"])
@pytest.mark.parametrize("form", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_every_format_in_every_packing(form, suffix, tmp_path):
    content = {
        "json": json.dumps(ROWS).encode(),
        "csv": 'prompt,tag\n"a, “b”",x\n"c\td\ne",\n'.encode(),
        "tsv": 'prompt\ttag\n"a, “b”"\tx\n"c\td\ne"\t\n'.encode(),
    }.get(form, jsonl(ROWS))
    path = tmp_path / f"rows.{form}{suffix}"
    path.write_bytes(packed(content, suffix))
    assert read_rows(str(path)) == ROWS == list(iter_rows(str(path)))


def test_pandas_index_and_commas_at_the_ends_of_lines(tmp_path):
    (tmp_path / "a.csv").write_text(",prompt,tag\n0,x,a\n1,y,b\n")
    (tmp_path / "b.csv").write_text("prompt,tag,\nx,a,\ny,b,\n")
    (tmp_path / "c.csv").write_text("prompt,tag\nx,a,\ny,b,\n")
    wanted = [{"prompt": "x", "tag": "a"}, {"prompt": "y", "tag": "b"}]
    assert all(read_rows(str(tmp_path / f"{name}.csv")) == wanted for name in "abc")


def test_a_slice_of_a_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    with pytest.raises(
        InputError, match=r"split 'train\[:50%\]' of the file .*a.jsonl: slices are read from the Hub only"
    ):
        load_prompts("a.jsonl", split="train[:50%]", base_dir=tmp_path)


def test_tools_may_be_json_text(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": [{"role": "user", "content": "a"}], "tools": json.dumps(tools)}
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    assert load_prompts("a.jsonl", base_dir=tmp_path).prompts[0].template == {"tools": tools}


def test_depth_counts_not_the_number_of_lists(tmp_path):
    row = {"prompt": "a", "x": [[i] for i in range(500)], "y": {"a": {"b": [1]}}}
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    assert read_rows(str(tmp_path / "a.jsonl")) == [row]


def test_hidden_files_of_a_folder_are_no_data(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("a.jsonl", ".a.jsonl", ".cache/b.jsonl"):
        (tmp_path / name).write_bytes(jsonl(ROWS[:1]))
    assert len(read_rows(str(tmp_path))) == 1


def test_a_csv_with_semicolons(tmp_path):
    (tmp_path / "a.csv").write_text('prompt;tag\n"a; b";1,5\n')
    assert read_rows(str(tmp_path / "a.csv")) == [{"prompt": "a; b", "tag": "1,5"}]
    (tmp_path / "b.csv").write_text("prompt\na; b\n")
    assert read_rows(str(tmp_path / "b.csv")) == [{"prompt": "a; b"}]


def test_json_that_is_an_object_a_line(tmp_path):
    (tmp_path / "a.json").write_bytes(jsonl(ROWS))
    (tmp_path / "one.json").write_bytes(jsonl(ROWS[:1]))
    assert read_rows(str(tmp_path / "a.json")) == ROWS and read_rows(str(tmp_path / "one.json")) == ROWS[:1]


@pytest.mark.parametrize(
    ("encoding", "likely"),
    [("cp1252", "Windows-1252 or Latin-1"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16")],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json", "a.jsonl.gz"])
def test_another_encoding_is_named_with_its_line(name, encoding, likely, tmp_path):
    text = {
        "a.csv": "prompt\nplain\ncafé\n",
        "a.json": '[{"prompt": "plain"},\n\n{"prompt": "café"}]\n',
        "a.txt": "plain\nplain\ncafé\n",
    }.get(name, '{"prompt": "plain"}\n\n{"prompt": "café"}\n')
    (tmp_path / name).write_bytes(packed(text.encode(encoding), Path(name).suffix if name.endswith(".gz") else ""))
    line = 3 if encoding == "cp1252" else r"\d"
    with pytest.raises(InputError, match=rf"{name}, line {line}: (not UTF-8 .*{likely}|not JSON)"):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_python_does_not_read(name, tmp_path):
    where = f"{name}, line 2" if name == "a.jsonl" else name
    for value, message in (
        ("1" * 5000, f"a number has too many digits to be read \\({sys.get_int_max_str_digits()} at most\\)"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": ' * 150 + "1" + "}" * 150, r"nested too deeply to be read \(100 levels"),
    ):
        row = f'{{"prompt": "a", "completion": "c", "x": {value}}}'
        first = '{"prompt": "b", "completion": "c"}'
        text = f"{first}\n{row}\n" if name == "a.jsonl" else f"[{first},\n{row}]"
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"{where}: .*{message}"):
            load_prompts(name, base_dir=tmp_path)
        with pytest.raises(InputError, match=message):
            read_completions(str(tmp_path / name))


def test_a_folder_with_several_splits_asks_which(tmp_path, capsys):
    rows = {split: [{"prompt": split, "completions": ["a"], "rewards": [1.0]}] for split in ("train", "test")}
    saved = datasets.DatasetDict({split: datasets.Dataset.from_list(one) for split, one in rows.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    for split, one in rows.items():
        (tmp_path / "files" / f"{split}.jsonl").write_bytes(jsonl(one))
    for name in ("saved", "files"):
        with pytest.raises(InputError, match=r"has the splits (train, test|test, train): say which with --split"):
            read_completions(str(tmp_path / name))
        (one,) = read_completions(str(tmp_path / name), split="test").rows
        assert one.prompt.content == "test"
        with pytest.raises(InputError, match="split 'dev'"):
            read_completions(str(tmp_path / name), split="dev")
    saved.select_columns(["prompt"]).save_to_disk(str(tmp_path / "prompts"))
    loaded = load_prompts(str(tmp_path / "prompts"), split="test")
    assert loaded.notes == ("split 'test' of train, test",)
    reward = tmp_path / "r.py"
    reward.write_text("def one(completions, **_):\n    return [1.0 + len(c) for c in completions]\n")
    for flag, name in (("--samples", "saved"), ("--prompts", "prompts")):
        words = ["reward", "check", f"{reward}:one", flag, str(tmp_path / name)]
        assert main(words) == 2 and "say which with --split" in capsys.readouterr().err
        assert main([*words, "--split", "test"]) == 0
        capsys.readouterr()
    datasets.DatasetDict({"only": saved["test"]}).save_to_disk(str(tmp_path / "single"))
    assert read_completions(str(tmp_path / "single")).rows[0].prompt.content == "test"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "part of type 'image_url'; only text",
        ),
        ([{"role": "user", "content": ["plain"]}], "part of type 'str'; only text"),
        ([{"role": "assistant", "content": None}, {"role": "user", "content": "a"}], "turn 1 has no content"),
        ([{"role": "user"}], "turn 1 has no content"),
        ([{"content": "a"}], "turn 1 is not"),
        ([{"role": "user", "content": 3}], "turn 1 is not"),
        ([{"role": "critic", "content": "a"}], "role 'critic'; one of system"),
    ],
)
def test_turns_that_cannot_be_read(prompt, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"prompt": [{"role": "user", "content": "fine"}]}, {"prompt": prompt}]))
    with pytest.raises(InputError, match=rf"row 2: .*{message}"):
        load_prompts("a.jsonl", base_dir=tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is from 'narrator'; one of human"),
        ({"conversations": "x"}, "the conversation is 'x', not a list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no user turn to answer"),
        ({"instruction": "a", "input": 3}, "input is 3, which is not text"),
        ({"instruction": None}, "the prompt is None, which is not text"),
        ({"prompt": [{"role": "user", "content": "a"}], "tools": "f"}, "tools must be a list of tools, got 'f'"),
        ({"prompt": [{"role": "user", "content": "a"}], "chat_template_kwargs": [1]}, "must be a mapping, got"),
    ],
)
def test_rows_of_other_forms_that_cannot_be_read(row, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    with pytest.raises(InputError, match=message):
        load_prompts("a.jsonl", base_dir=tmp_path)


def test_chats_in_csv_as_json_or_as_python_wrote_them(tmp_path):
    chat = [{"role": "user", "content": 'it\'s "so"'}]
    datasets.Dataset.from_dict({"prompt": [json.dumps(chat), repr(chat), "[1, 2]"]}).to_csv(str(tmp_path / "a.csv"))
    with pytest.raises(InputError, match="some prompts are text and some are chats"):
        load_prompts("a.csv", base_dir=tmp_path)
    datasets.Dataset.from_dict({"prompt": [json.dumps(chat), repr(chat)]}).to_csv(str(tmp_path / "b.csv"))
    loaded = load_prompts("b.csv", base_dir=tmp_path)
    assert [prompt.content for prompt in loaded.prompts] == [chat, chat]
    assert loaded.notes == ("2 of 2 prompts are chats written out as text: read as chats",)


def test_other_names_in_a_recipe(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"q": "hi", "prompt": "hidden", "answer": 1}]))
    loaded = load_prompts("a.jsonl", base_dir=tmp_path, columns={"prompt": "q"})
    assert loaded.prompts[0].content == "hi" and loaded.prompts[0].columns == {"answer": 1}
    with pytest.raises(
        InputError, match="columns prompt=nope: no column 'nope'; the columns are 'q', 'prompt', 'answer'"
    ):
        load_prompts("a.jsonl", base_dir=tmp_path, columns={"prompt": "nope"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("prompt", "'prompt' needs the name of a column"),
        ("question=prompt", "'question' is not a name that is read; one of prompt"),
        ({"prompt": 3}, "'prompt' needs the name of a column"),
    ],
)
def test_columns_that_are_not_understood(given, message):
    from infalign.data.columns import parse_columns  # noqa: PLC0415

    with pytest.raises(InputError, match=message):
        parse_columns(given)
