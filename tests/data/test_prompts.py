"""Prompts: what is read, what is refused, what is merged."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from infalign.data.mixture import load_mixture
from infalign.data.prompts import load_prompts, prompts_from_rows
from infalign.types import InputError, group_key, prompt_key

ROWS = [{"prompt": "one", "answer": 1}, {"prompt": "two", "answer": 2}, {"prompt": " ONE ", "answer": 3}]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def contents(loaded) -> list:
    return [prompt.content for prompt in loaded.prompts]


# -- keys


def test_a_group_is_the_hash_of_the_normalised_text():
    expected = hashlib.blake2b(b"hello world", digest_size=8).hexdigest()
    assert group_key("  Hello\n\tWORLD ") == expected
    assert group_key("\uff28ello world") == expected  # a full-width H is an H under NFKC
    assert len(expected) == 16


def test_the_group_of_a_chat_includes_roles_and_turns():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert group_key(chat) == group_key([{**turn, "content": f" {turn['content'].upper()} "} for turn in chat])
    swapped = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    joined = [{"role": "user", "content": "a assistant b"}]
    assert len({group_key(x) for x in (chat, swapped, joined, "a", [chat[0]])}) == 5


def test_the_identity_is_the_exact_content():
    """Whatever differs is another prompt; what Arrow adds to a turn (None) is no difference."""
    composed, decomposed = "\u00e9", "e\u0301"
    texts = ["a", "A", " a", "a ", "a\n", "a\t", "\uff41", composed, decomposed, "x\u00b2", "x2"]
    assert len({prompt_key(text) for text in texts}) == len(texts)
    chat = [{"role": "user", "content": "a"}]
    assert prompt_key(chat) == prompt_key([{**chat[0], "tool_calls": None, "name": None}])
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]
    other = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 2}}}]}]
    different = (chat, "a", [*chat, *call], [*chat, *other], [{"role": "user", "content": "a", "name": "b"}])
    assert len({prompt_key(x) for x in different}) == 5
    assert (
        len({prompt_key(chat), prompt_key(chat, {"tools": [1]}), prompt_key(chat, {}, 1), prompt_key(chat, {}, 2)}) == 4
    )


# -- formats of files


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "txt", "jsonl.gz", "txt.gz"])
def test_every_local_format(tmp_path, suffix):
    rows = [{"prompt": "a, \u201cb\u201d", "tag": "x"}, {"prompt": "c", "tag": "y"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif suffix == "csv":
        path.write_text('prompt,tag\n"a, \u201cb\u201d",x\nc,y\n', encoding="utf-8")
    else:
        lines = [row["prompt"] if "txt" in suffix else json.dumps(row) for row in rows]
        text = json.dumps(rows) if suffix == "json" else "\n\n".join(lines) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    loaded = load_prompts(path.name, base_dir=tmp_path)
    assert contents(loaded) == ["a, \u201cb\u201d", "c"]
    assert [dict(p.columns) for p in loaded.prompts] == ([{}, {}] if "txt" in suffix else [{"tag": "x"}, {"tag": "y"}])


def test_every_row_is_a_prompt_of_its_own(tmp_path):
    rows = [*ROWS, {"prompt": "one", "answer": 4}, {"prompt": "one", "answer": 4}]
    loaded = load_prompts(write(tmp_path / "r.jsonl", rows))
    assert contents(loaded) == ["one", "two", " ONE ", "one", "one"]
    assert [prompt.columns["answer"] for prompt in loaded.prompts] == [1, 2, 3, 4, 4]
    assert len({prompt.key for prompt in loaded.prompts}) == 5
    assert len({prompt.group for prompt in loaded.prompts}) == 2
    assert (loaded.repeated, loaded.columns) == (2, ("answer",))
    assert "5 prompts (2 repeat another row's; each row counts)" in loaded.summary()


def test_further_rows_leave_the_keys_of_those_before_them(tmp_path):
    few = load_prompts(write(tmp_path / "few.jsonl", ROWS)).prompts
    more = load_prompts(write(tmp_path / "more.jsonl", [*ROWS, *ROWS])).prompts
    changed = [{**row, "answer": 7, "id": 1} for row in ROWS]
    other = load_prompts(write(tmp_path / "other.jsonl", changed)).prompts
    assert [one.key for one in more[:3]] == [one.key for one in few] == [one.key for one in other]


def test_limit_takes_the_first_rows(tmp_path):
    path = write(tmp_path / "r.jsonl", ROWS)
    assert contents(load_prompts(path, limit=1)) == ["one"]
    with pytest.raises(InputError, match="limit must be at least 1"):
        load_prompts(path, limit=0)


def test_relative_paths_start_from_the_recipe_then_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "recipe").mkdir()
    write(tmp_path / "r.jsonl", [{"prompt": "cwd"}])
    monkeypatch.chdir(tmp_path)
    assert contents(load_prompts("r.jsonl", base_dir=tmp_path / "recipe")) == ["cwd"]
    write(tmp_path / "recipe" / "r.jsonl", [{"prompt": "recipe"}])
    assert contents(load_prompts("r.jsonl", base_dir=tmp_path / "recipe")) == ["recipe"]


def test_a_folder_is_read_by_split(tmp_path):
    write(tmp_path / "train-00000-of-00001.jsonl", [{"prompt": "a"}])
    write(tmp_path / "test.jsonl", [{"prompt": "b"}])
    assert contents(load_prompts(str(tmp_path))) == ["a"]
    assert contents(load_prompts(str(tmp_path), split="test")) == ["b"]
    with pytest.raises(InputError, match=r"no file of the split 'dev'; there are test.jsonl, train"):
        load_prompts(str(tmp_path), split="dev")


def test_a_folder_without_split_names_is_all_train(tmp_path):
    with pytest.raises(InputError, match="no data file in this folder"):
        load_prompts(str(tmp_path))
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.jsonl", [{"prompt": "a"}])
    write(tmp_path / "sub" / "b.jsonl", [{"prompt": "b"}])
    assert contents(load_prompts(str(tmp_path))) == ["a", "b"]
    assert contents(load_prompts(str(tmp_path), data_dir="sub", data_files="b.*")) == ["b"]


def test_a_saved_dataset(tmp_path):
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:2])})
    saved.save_to_disk(tmp_path / "saved")
    assert contents(load_prompts("saved", base_dir=tmp_path)) == ["one", "two"]
    with pytest.raises(InputError, match="no split 'test'; there are train"):
        load_prompts("saved", base_dir=tmp_path, split="test")
    (tmp_path / "saved" / "train" / "state.json").unlink()
    with pytest.raises(InputError, match="not a whole saved data set"):
        load_prompts("saved", base_dir=tmp_path)


# -- transcripts and chats


def test_transcripts_are_picked_by_auto():
    text = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant: because"
    loaded = prompts_from_rows([{"chosen": text, "rejected": text + "!", "id": 7}], "rows")
    assert loaded.data_format == "transcript"
    assert contents(loaded)[0] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "why"},
    ]
    assert loaded.prompts[0].columns == {"id": 7}


def test_chosen_may_be_a_chat():
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert contents(prompts_from_rows([{"chosen": chat}], "rows")) == [chat[:1]]


def test_neighbours_of_one_role_are_joined():
    text = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d"
    turns = contents(prompts_from_rows([{"chosen": text}], "rows"))[0]
    assert [turn["content"] for turn in turns] == ["a", "b\n\nc", "d"]


def test_a_prompt_column_wins_over_chosen():
    loaded = prompts_from_rows([{"prompt": "p", "chosen": "c"}], "rows")
    assert contents(loaded) == ["p"]
    assert loaded.prompts[0].columns == {"chosen": "c"}


# -- refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, r"1 of 2 rows cannot be used: row 2: the prompt is empty"),
        ({"prompt": None}, r"row 2: the prompt is None, neither text nor a chat"),
        ({"prompt": 3}, r"row 2: the prompt is 3"),
        ({"other": "x"}, r"row 2: the prompt is None"),
        ({"prompt": []}, r"row 2: an empty chat"),
        ({"prompt": ["hi"]}, r"row 2: turn 1 is not"),
        ({"prompt": [{"role": "human", "content": "x"}]}, r"row 2: turn 1 has the role 'human'; one of system"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, r"row 2: the last turn is the assistant's"),
        ({"prompt": [{"role": "user", "content": " "}]}, r"row 2: the user's last turn is empty"),
        ({"prompt": [{"role": "user", "content": "x"}]}, r"some prompts are text and some are chats"),
    ],
)
def test_bad_prompts_are_named_with_their_row(row, message):
    with pytest.raises(InputError, match=message):
        prompts_from_rows([{"prompt": "good"}, row], "rows")


def test_all_problems_are_collected():
    with pytest.raises(InputError, match=r"8 of 8 rows.*: rows 1, 2, 3, 4, 5 and 3 more: the prompt is empty$"):
        prompts_from_rows([{"prompt": ""}] * 8, "rows")
    rows = [{"prompt": number} for number in range(7)]
    with pytest.raises(InputError, match=r"7 of 7 rows.*; row 5: the prompt is 4, .*; and 2 other problems$"):
        prompts_from_rows(rows, "rows")


def test_a_missing_column_names_those_there_are():
    with pytest.raises(
        InputError, match=r"no column 'prompt' \(nor messages, .* chosen\); the columns are 'text', 'id'"
    ):
        prompts_from_rows([{"text": "x", "id": 1}], "rows")
    with pytest.raises(InputError, match=r"no column 'chosen'; the columns are 'prompt'"):
        prompts_from_rows([{"prompt": "x"}], "rows", data_format="transcript")
    with pytest.raises(InputError, match=r"no column 'q'; the columns are 'chosen'"):
        prompts_from_rows([{"chosen": "x"}], "rows", data_format="prompt", prompt_column="q")


def test_reserved_columns_empty_data_and_unknown_formats():
    loaded = prompts_from_rows([{"prompt": "x", "completions": "y", "self": 1, "id": 2}], "rows")
    assert loaded.prompts[0].columns == {"id": 2} and "left out" in loaded.notes[0]
    assert loaded.notes[0].endswith("argument of every reward: 'completions', 'self'")
    with pytest.raises(InputError, match="rows: no rows"):
        prompts_from_rows([], "rows")
    with pytest.raises(InputError, match="data_format 'chats' is unknown; one of auto, chat, prompt, transcript"):
        load_prompts("x", data_format="chats")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n\n[1]\n', r"a.jsonl, line 3: a JSON object is wanted, got list"),
        ("a.json", '{"prompt": "x"}\n{"prompt": "y"', r"line 2: not JSON \(Expecting ',' delimiter"),
        ("a.json", '{"data":\n[{"prompt": "x"}]}', r"a JSON list of objects is wanted"),
        ("a.json", "3", r"a JSON list of objects is wanted"),
        ("a.csv", "prompt\nx,y\n", r"row 1: more fields than the header"),
        ("a.csv", 'prompt\n"x\n', r"a.csv, in the row that begins in line 2: not CSV \(unexpected end"),
        ("a.tsv", 'prompt\tb\nx\t1\n"y" z\t2\nq\t3\n', r"a.tsv, in the row that begins in line 3: not TSV \("),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv: two columns are called 'a': rename one"),
        ("a.parquet", "PARnothing", r"a.parquet: cannot be read"),
        ("a.txt.gz", "no gzip", r"a.txt.gz: cannot be read"),
        ("a.xlsx", "", r"cannot read '.xlsx'; one of .jsonl"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_prompts(name, base_dir=tmp_path)


def test_a_name_that_is_nowhere(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"'rows.jsonl': no such file or folder under"):
        load_prompts("rows.jsonl", base_dir=tmp_path)
    with pytest.raises(InputError, match="dataset_name is empty"):
        load_prompts(" ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'no-such/data' \(split 'train'\) is no local file.*Hub: \w+: .*network"):
        load_prompts("no-such/data", base_dir=tmp_path)


# -- mixtures


def test_a_mixture_joins(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.jsonl", [{"prompt": "TWO", "tag": "t"}, {"prompt": "three", "tag": "u"}])
    loaded = load_mixture([{"path": "a.jsonl"}, {"path": "json", "data_files": "b.jsonl"}], base_dir=tmp_path)
    assert contents(loaded) == ["one", "two", "TWO", "three"]
    assert [prompt.columns for prompt in loaded.prompts[1:3]] == [{"answer": 2}, {"tag": "t"}]
    assert loaded.columns == ("answer", "tag")


def test_fractions_follow_trl(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": f"a{i}"} for i in range(10)])
    write(tmp_path / "b.jsonl", [{"prompt": f"b{i}"} for i in range(6)])
    entries = [{"path": "a.jsonl", "fraction": 1}, {"path": "b.jsonl", "fraction": 3}]
    loaded = load_mixture(entries, base_dir=tmp_path)  # the largest mixture 1:3 without repeats is 2 + 6
    assert contents(loaded) == ["a0", "a1", *(f"b{i}" for i in range(6))]


def test_columns_of_an_entry(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    assert load_mixture([{"path": "a.jsonl", "columns": ["prompt"]}], base_dir=tmp_path).columns == ()
    with pytest.raises(InputError, match="no column 'x'; the columns are 'prompt', 'answer'"):
        load_mixture([{"path": "a.jsonl", "columns": ["x"]}], base_dir=tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty.jsonl: no rows; leave the entry out"):
        load_mixture([{"path": "a.jsonl"}, {"path": "empty.jsonl"}], base_dir=tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "the list is empty"),
        (["a.jsonl"], "entry 1: a mapping with a path is wanted"),
        ([{"path": "a.jsonl", "spilt": "x"}], "unknown key 'spilt'; did you mean 'split'"),
        ([{"path": "a.jsonl", "fraction": 1}, {"path": "a.jsonl"}], "in every entry or in none"),
        ([{"path": "a.jsonl", "fraction": 0}], "the fractions are all 0"),
        ([{"path": "a.jsonl"}, {"path": "c.jsonl"}], "some entries have text prompts and some chats"),
        ([{"path": "json", "data_files": "zz.jsonl"}], "data_files 'zz.jsonl': no such file"),
        ([{"path": "json", "data_files": {"test": "a.jsonl"}}], "data_files has no split 'train'; it has test"),
    ],
)
def test_bad_mixtures(tmp_path, entries, message):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "c.jsonl", [{"prompt": [{"role": "user", "content": "x"}]}])
    with pytest.raises(InputError, match=message):
        load_mixture(entries, base_dir=tmp_path)


class TestTextsAsChats:
    @pytest.mark.parametrize("column", ["prompt", "question"])
    def test_a_text_is_the_users_turn(self, column):
        loaded = prompts_from_rows([{column: "hi", "answer": "4"}], "rows", data_format="chat")
        (one,) = loaded.prompts
        assert one.content == [{"role": "user", "content": "hi"}] and one.columns == {"answer": "4"}
        text, *_ = prompts_from_rows([{column: "hi", "answer": "4"}], "rows").prompts
        assert text.content == "hi" and text.key != one.key

    def test_chats_stay_what_they_are(self):
        chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
        for rows in ([{"prompt": chat}], [{"messages": chat}]):
            assert prompts_from_rows(rows, "rows", data_format="chat").prompts[0].content == chat

    def test_what_is_no_prompt_is_refused_as_ever(self):
        with pytest.raises(InputError, match="row 1: the prompt is empty"):
            prompts_from_rows([{"prompt": " "}], "rows", data_format="chat")
        with pytest.raises(InputError, match="no column 'prompt'"):
            prompts_from_rows([{"other": "x"}], "rows", data_format="chat")
