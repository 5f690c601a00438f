"""Samples made elsewhere: the forms they come in, how rows are paired, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infalign.data.completions import read_completions
from infalign.data.pairing import paired, prompts_of
from infalign.types import InputError

CASES = Path(__file__).parent.parent / "cases"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path, **options):
    return read_completions(str(path), **options).rows


# --- forms


def test_rewards_are_read_and_null_is_no_score(tmp_path):
    row = {"prompt": "p", "completions": ["a", "b"], "rewards": [1, None], "gold_rewards": [2.5, 3], "topic": "x"}
    (one,) = rows_of(write(tmp_path / "a.jsonl", row))
    assert one.texts == ("a", "b") and one.prompt.columns == {"topic": "x"} and len(one) == 2
    np.testing.assert_array_equal(one.rewards_M, [1.0, np.nan])
    np.testing.assert_array_equal(one.gold_M, [2.5, 3.0])


@pytest.mark.parametrize("many", ["completions", "responses", "outputs"])
@pytest.mark.parametrize(("scores", "gold"), [("rewards", "gold_rewards"), ("scores", "gold_scores")])
def test_names_that_mean_the_same(many, scores, gold, tmp_path):
    (one,) = rows_of(write(tmp_path / "a.jsonl", {"prompt": "v", many: ["a", "b"], scores: [1, 2], gold: [3, 4]}))
    assert one.texts == ("a", "b") and one.prompt.columns == {}
    np.testing.assert_array_equal([one.rewards_M, one.gold_M], [[1, 2], [3, 4]])


def test_completions_that_are_objects_with_their_scores(tmp_path):
    rated = [{"model": "m", "response": "x", "overall_score": 7.5}, {"model": "n", "response": "y", "overall_score": 3}]
    outputs = [{"text": "x", "cumulative_logprob": -1.0}, {"text": "y", "cumulative_logprob": -2.0}]
    rows = [{"instruction": "a", "completions": rated}, {"prompt": "b", "outputs": outputs, "rewards": [True, False]}]
    first, second = rows_of(write(tmp_path / "a.jsonl", *rows))
    assert first.texts == second.texts == ("x", "y")
    np.testing.assert_array_equal([first.rewards_M, second.rewards_M], [[7.5, 3], [1, 0]])


def test_rows_of_several_forms_in_one_file(tmp_path):
    rows = [
        {"prompt": "a", "completions": ["x", "y"], "rewards": [1, 2]},
        {"prompt": "b", "completion": "z", "reward": 3},
        {"input": "c", "output": "w", "score": 4, "id": 5},
    ]
    found = rows_of(write(tmp_path / "a.jsonl", *rows))
    assert [(one.prompt.content, one.texts) for one in found] == [("a", ("x", "y")), ("b", ("z",)), ("c", ("w",))]
    with pytest.raises(InputError, match=r"a.jsonl, row 2: no completions; the row has 'prompt'. Accepted"):
        rows_of(write(tmp_path / "a.jsonl", rows[0], {"prompt": "b"}))


@pytest.mark.parametrize("name", ["completion", "response", "output"])
def test_a_row_a_sample(name, tmp_path):
    rows = [{"prompt": p, name: f"{p}{i}", "reward": i, "gold_reward": -i} for p in "vw" for i in range(3)]
    file = read_completions(write(tmp_path / "a.jsonl", *rows))
    assert file.single
    joined = prompts_of(file)
    assert [one.texts for one in joined] == [("v0", "v1", "v2"), ("w0", "w1", "w2")]
    np.testing.assert_array_equal(joined[0].rewards_M, [0, 1, 2])
    np.testing.assert_array_equal(joined[0].gold_M, [0, -1, -2])


def test_what_generate_writes(tmp_path):
    candidates = [{"completion": "a", "reward": 1.5}, {"completion": "b", "reward": None}]
    good = {"prompt": "g", "answer": 4, "completion": "a", "reward": 1.5, "candidates": candidates, "spent": {}}
    bad = {"prompt": "", "completion": None, "candidates": [], "error": "the prompt is empty"}
    file = read_completions(write(tmp_path / "a.jsonl", good, bad))
    (one,) = file.rows
    assert one.texts == ("a", "b") and one.prompt.columns == {"answer": 4}
    np.testing.assert_array_equal(one.rewards_M, [1.5, np.nan])
    assert file.notes == ("1 of 2 rows have no samples (failed) and are left out",)


def test_chats_and_their_answers(tmp_path):
    chat = [{"role": "assistant", "content": "c"}]
    (one,) = rows_of(write(tmp_path / "a.jsonl", {"prompt": [{"role": "user", "content": "t"}], "completions": [chat]}))
    assert one.texts == ("c",) and one.rewards_M is None
    messages, sharegpt = rows_of(CASES / "messages.jsonl"), rows_of(CASES / "sharegpt.jsonl")
    assert [one.texts for one in (*messages, *sharegpt)] == [("yes",)] * 8
    assert messages[0].prompt.content[-1] == {"role": "user", "content": "Name a colour, any colour"}
    assert sharegpt[0].prompt.content == [{"role": "user", "content": "Name a colour, any colour"}]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_long_files_with_commas_quotes_and_line_ends(suffix):
    joined = prompts_of(read_completions(str(CASES / f"long_base.{suffix}")))
    assert [one.prompt.content for one in joined][1] == 'Write "hello"\nin two lines' and len(joined) == 4
    assert joined[0].texts == tuple(f'answer {i}, "base"\nsecond line' for i in range(4))
    np.testing.assert_array_equal(joined[0].rewards_M, [1.288, 1.449, 0.066, -0.765])


def test_lists_in_a_csv_are_json(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,responses,scores\np,"[""a"", ""b""]","[1, null]"\n')
    (one,) = rows_of(tmp_path / "a.csv")
    assert one.texts == ("a", "b")
    np.testing.assert_array_equal(one.rewards_M, [1, np.nan])
    (tmp_path / "b.csv").write_text("prompt,responses\np,plain\n")
    with pytest.raises(InputError, match="got 'plain'; CSV can hold none: write a row a sample, or a JSON list"):
        rows_of(tmp_path / "b.csv")


def test_alpaca_eval():
    rows = rows_of(CASES / "alpaca_eval.json")
    assert [one.texts for one in rows] == [(f"out {i}",) for i in range(4)]
    assert rows[0].prompt.columns == {"generator": "model-a", "dataset": "d"}


def test_lm_eval():
    plain = rows_of(CASES / "lm_eval_samples.jsonl")
    assert plain[0].texts == ("a0", "a1", "a2", "a3") and plain[0].rewards_M is None
    assert plain[0].prompt.content == "Name a colour, any colour" and plain[0].prompt.columns["target"] == "4"
    judged = rows_of(CASES / "lm_eval_samples.jsonl", columns={"rewards": "exact_match"})
    assert [one.texts for one in judged] == [("a0",)] * 4  # one value judges one response
    assert [float(one.rewards_M[0]) for one in judged] == [0.0, 1.0, 0.0, 1.0]


def test_lm_eval_with_several_filters(tmp_path):
    row = json.loads((CASES / "lm_eval_samples.jsonl").read_text().splitlines()[0])
    file = read_completions(write(tmp_path / "a.jsonl", {**row, "filter": "strict"}, {**row, "filter": "flexible"}))
    assert len(file.rows) == 1 and "several filters (strict, flexible): rows of 'strict' are read" in file.notes


def test_an_openai_batch(tmp_path):
    batch = CASES / "openai_batch.jsonl"
    with pytest.raises(InputError, match=r"have a custom_id and no prompt: give the request files, --requests"):
        rows_of(batch)
    requests = [
        {"custom_id": f"r{i}", "method": "POST", "body": {"messages": [{"role": "user", "content": f"q{i}"}]}}
        for i in range(4)
    ]
    rows = rows_of(batch, requests=[write(tmp_path / "q.jsonl", *requests)])
    assert [one.texts for one in rows] == [("c0", "c1", "c2", "c3")] * 4
    assert rows[3].prompt.content == [{"role": "user", "content": "q3"}]
    with pytest.raises(InputError, match="custom_id 'r3' is in no request file"):
        rows_of(batch, requests=[write(tmp_path / "q.jsonl", *requests[:3])])
    twice = write(tmp_path / "q.jsonl", requests[0], {**requests[1], "custom_id": "r0"})
    with pytest.raises(InputError, match="row 2: custom_id 'r0' stands for two prompts"):
        rows_of(batch, requests=[twice])
    with pytest.raises(InputError, match="row 1: a request has custom_id and body, got 'prompt'"):
        rows_of(batch, requests=[write(tmp_path / "q.jsonl", {"prompt": "x"})])
    failed = {"custom_id": "r1", "response": {"status_code": 500, "body": {}}, "error": {"message": "no"}}
    first = json.loads(batch.read_text().splitlines()[0])
    file = read_completions(
        write(tmp_path / "b.jsonl", first, failed), requests=[write(tmp_path / "q.jsonl", *requests)]
    )
    assert len(file.rows) == 1 and "1 of 2 rows have no samples (failed) and are left out" in file.notes


def test_columns_under_other_names(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "p", "ys": ["a"], "s": [2], "prompt": "hidden"})
    (one,) = rows_of(path, columns={"prompt": "q", "completions": "ys", "rewards": "s"})
    assert (one.prompt.content, one.texts, one.rewards_M.tolist(), one.prompt.columns) == ("p", ("a",), [2.0], {})
    with pytest.raises(InputError, match="no column 'nope'; the columns are 'q', 'ys', 's', 'prompt'"):
        rows_of(path, columns={"prompt": "nope", "completions": "ys"})
    with pytest.raises(InputError, match="no row has a column 'nope'"):
        rows_of(path, columns={"prompt": "q", "completions": "ys", "rewards": "nope"})


def test_texts_that_nobody_needs_are_not_kept(tmp_path):
    (one,) = rows_of(write(tmp_path / "a.jsonl", {"prompt": "p", "completions": ["a", "bcd"]}), keep_texts=False)
    assert one.texts is None and one.lengths_M.tolist() == [1, 3]


# --- pairing


def pair(tmp_path, policy, base):
    return paired(
        read_completions(write(tmp_path / "p.jsonl", *policy)), read_completions(write(tmp_path / "b.jsonl", *base))
    )


def test_prompts_are_paired_by_their_exact_content(tmp_path):
    texts = ["a", "A", " a", "\u00e9", "e\u0301", "a\n"]
    policy = [{"prompt": text, "completions": [str(i)]} for i, text in enumerate(texts)]
    found = pair(tmp_path, policy, policy[::-1])
    assert [(ours.texts, theirs.texts) for ours, theirs in found.pairs] == [((str(i),), (str(i),)) for i in range(6)]
    assert found.alone == (0, 0) and found.joined == 0 and len({one[0].prompt.key for one in found.pairs}) == 6


def test_equal_prompts_are_told_apart_by_the_columns_that_both_files_share():
    found = paired(*(read_completions(str(CASES / f"ref_rows_{side}.jsonl")) for side in ("policy", "base")))
    assert [(ours.texts, theirs.texts) for ours, theirs in found.pairs] == [((a, a), ("0", "0")) for a in "379"]
    assert found.told_apart == ("answer",)
    assert [ours.prompt.columns["answer"] for ours, _ in found.pairs] == ["3", "7", "9"]


def test_a_column_that_differs_between_the_files_tells_nothing_apart(tmp_path):
    policy = [{"prompt": "p", "completions": [text], "generator": "ours", "id": text} for text in "ab"]
    base = [{"prompt": "p", "completions": [text], "generator": "theirs", "id": text} for text in "cd"]
    found = pair(tmp_path, policy, base)
    assert [(ours.texts, theirs.texts) for ours, theirs in found.pairs] == [(("a", "b"), ("c", "d"))]
    assert found.told_apart == () and found.joined == 2


def test_a_number_of_the_sample_tells_nothing_apart_an_answer_does(tmp_path):
    def rows(name):
        return [
            {"prompt": "p", "completion": f"{name}{answer}{i}", "sample": 2 * answer + i, "answer": answer}
            for answer in (0, 1)
            for i in (0, 1)
        ]

    found = pair(tmp_path, rows("x"), rows("y"))
    assert [ours.texts for ours, _ in found.pairs] == [("x00", "x01"), ("x10", "x11")]
    assert found.told_apart == ("answer",)


def answered(answers, shift=0, form=int):
    return [
        {"prompt": "q", "answer": form(a), "completions": ["a", "b"], "rewards": [10 * a + shift, 10 * a + 1 + shift]}
        for a in answers
    ]


def test_a_row_that_one_file_lacks_stands_alone(tmp_path):
    found = pair(tmp_path, answered([1, 3], 2), answered([1, 2, 3]))
    assert [(p.rewards_M[0], b.rewards_M[0]) for p, b in found.pairs] == [(12, 10), (32, 30)]
    assert found.alone == (0, 1) and found.told_apart == ("answer",) and found.joined == 0


@pytest.mark.parametrize("form", [float, str])
def test_five_is_five_however_it_is_written(form, tmp_path):
    found = pair(tmp_path, answered([1, 2, 3], 2, form), answered([1, 2, 3]))
    assert [(p.rewards_M[0], b.rewards_M[0]) for p, b in found.pairs] == [(12, 10), (22, 20), (32, 30)]


def test_an_answer_with_one_sample_each_is_unclear_and_can_be_named(tmp_path):
    def rows(shift):
        return [{"prompt": "q", "answer": a, "completion": "c", "reward": 10 * a + shift} for a in (1, 2, 3)]

    found = pair(tmp_path, rows(2), rows(0))
    assert (len(found.pairs), found.unclear, found.told_apart) == (1, ("answer",), ())
    files = [read_completions(str(tmp_path / f"{side}.jsonl")) for side in "pb"]
    named = paired(*files, match=["answer"])
    assert [(p.rewards_M.tolist(), b.rewards_M.tolist()) for p, b in named.pairs] == [
        ([12], [10]),
        ([22], [20]),
        ([32], [30]),
    ]
    with pytest.raises(InputError, match=r"--match id: .*p.jsonl has no such column"):
        paired(*files, match=["id"])


def test_one_file_with_a_row_a_sample_beside_lists(tmp_path):
    long = [
        {"prompt": "q", "answer": str(a), "completion": text, "reward": 10 * a + 2 + i}
        for a in (1, 2)
        for i, text in enumerate("ab")
    ]
    found = pair(tmp_path, long, answered([1, 2]))
    assert [(p.rewards_M.tolist(), b.rewards_M.tolist()) for p, b in found.pairs] == [
        ([12, 13], [10, 11]),
        ([22, 23], [20, 21]),
    ]


def test_what_one_file_alone_has_is_counted(tmp_path):
    found = pair(
        tmp_path,
        [{"prompt": text, "completions": ["a"]} for text in "pqr"],
        [{"prompt": text, "completions": ["b"]} for text in "qs"],
    )
    assert len(found.pairs) == 1 and found.alone == (2, 1)
    with pytest.raises(InputError, match="have no prompt in common: sample the same prompts"):
        pair(tmp_path, [{"prompt": "a", "completions": ["a"]}], [{"prompt": "b", "completions": ["b"]}])


def test_texts_against_chats_name_the_cause(tmp_path):
    chat = [{"role": "user", "content": "p"}]
    with pytest.raises(InputError, match=r"p.jsonl are texts and those of .*b.jsonl chats: write them alike"):
        pair(tmp_path, [{"prompt": "p", "completions": ["a"]}], [{"prompt": chat, "completions": ["a"]}])


# --- refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a"]}, "no column 'prompt'"),
        (
            {"prompt": "p", "text": "a"},
            "no completions; the row has 'prompt', 'text'. Accepted are a list in completions",
        ),
        ({"prompt": "p", "completions": "a"}, "completions is a list of texts, got 'a'"),
        ({"prompt": "p", "completions": []}, "no completions"),
        ({"prompt": "p", "completions": ["a", 3]}, "completion 1 is 3, no text"),
        ({"prompt": "p", "completions": ["a"], "rewards": [1, 2]}, "rewards must be a list of 1 numbers"),
        ({"prompt": "p", "completions": ["a"], "rewards": ["x"]}, "is 'x'; a finite number or null"),
        (
            {"prompt": "p", "completions": ["a"], "rewards": [10**400]},
            r"rewards\[0\] is '10{39}'; a finite number or null",
        ),
        ({"prompt": "p", "completions": ["a"], "gold_rewards": [[True]]}, r"is '\[True\]'; a finite number or null"),
        ({"prompt": "", "completions": ["a"]}, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "does not end with a text of the assistant's"),
    ],
)
def test_what_is_no_row_is_refused(row, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_completions(write(tmp_path / "a.jsonl", row))


def test_one_problem_of_many_rows_is_told_once(tmp_path):
    rows = [{"prompt": "p", "completions": []}] * 7
    with pytest.raises(InputError) as told:
        read_completions(write(tmp_path / "a.jsonl", *rows))
    assert str(told.value).count("no completions") == 1 and "7 of 7 rows cannot be used" in str(told.value)


def test_an_empty_file_and_an_infinite_reward(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        read_completions(write(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completions": ["a"], "rewards": [Infinity]}\n')
    with pytest.raises(InputError, match="is 'inf'; a finite number or null"):
        read_completions(str(tmp_path / "b.jsonl"))
    with pytest.raises(InputError, match="no such file of samples"):
        read_completions(str(tmp_path / "nowhere.jsonl"))
