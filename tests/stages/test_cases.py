"""Files as people have them, through the command line: what each is read as, and what the verb makes of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infalign.cli import main
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from tests.e2e.experiment import tiny_experiment

CASES = Path(__file__).parent.parent / "cases"
LENGTH = "def length(completions, **_):\n    return [len(str(c)) for c in completions]\n"


def compare(capsys, base, policy, *flags, verb="evaluate"):
    """The table of two files: {decoder: win rate}, and everything that was said."""
    code = main([verb, "--base", str(CASES / base), "--policy", str(CASES / policy), *map(str, flags)])
    told = capsys.readouterr()
    assert code == 0, told.err
    rows = re.findall(r"^[* ] (one sample|\S+) +([\d.]+) +(?:\[|\N{EN DASH})", told.out, flags=re.MULTILINE)
    return {decoder: float(mean) for decoder, mean in rows}, told.out + told.err


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_row_a_sample(suffix, verb, capsys):
    found, told = compare(capsys, f"long_base.{suffix}", f"long_policy.{suffix}", verb=verb)
    assert found["Best-of-4"] == 1.0 and found["Worst-of-4"] == 1.0 and "4 prompts, at least 4 scored samples" in told
    assert 0.5 < found["one sample"] < 1.0


def test_scores_and_responses(capsys):
    found, _ = compare(capsys, "scores.jsonl", "scores.jsonl")
    assert found == {"Best-of-4": 0.5, "one sample": 0.5, "Best-of-2": 0.5, "Worst-of-2": 0.5, "Worst-of-4": 0.5}


def test_alpaca_eval_has_one_completion_a_prompt(capsys, tmp_path):
    (tmp_path / "length.py").write_text(LENGTH)
    flags = ("--reward", f"{tmp_path}/length.py:length")
    found, told = compare(capsys, "alpaca_eval.json", "alpaca_eval.json", *flags)
    assert found == {"one sample": 0.5} and "one completion a prompt: only N = 1" in told
    assert main(["compare", *(f"--{side}={CASES / 'alpaca_eval.json'}" for side in ("base", "policy"))]) == 2
    assert "have no rewards: add them" in capsys.readouterr().err


def test_lm_eval_with_a_metric_by_name(capsys):
    found, told = compare(capsys, "lm_eval_samples.jsonl", "lm_eval_samples.jsonl", "--columns", "rewards=exact_match")
    assert found == {"one sample": 0.5} and "read as lm-eval's logged samples" in told


def test_openai_batches_need_their_requests(capsys, tmp_path):
    (tmp_path / "length.py").write_text(LENGTH)
    files = [f"--{side}={CASES / 'openai_batch.jsonl'}" for side in ("base", "policy")]
    assert main(["compare", *files]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"custom_id": f"r{i}", "body": {"messages": [{"role": "user", "content": f"q{i}"}]}}) + "\n"
                for i in range(4))
    )  # fmt: skip
    flags = ("--requests", tmp_path / "q.jsonl", "--reward", f"{tmp_path}/length.py:length")
    assert compare(capsys, "openai_batch.jsonl", "openai_batch.jsonl", *flags)[0]["Best-of-4"] == 0.5


def test_equal_prompts_with_other_answers(capsys):
    flags = ("--reward", f"{CASES}/answer_reward.py:reward", "--n", 1)
    found, told = compare(capsys, "ref_rows_base.jsonl", "ref_rows_policy.jsonl", *flags)
    assert found["one sample"] == 1.0 and "told apart by 'answer'" in told


def test_prompts_that_differ_in_case(capsys):
    assert compare(capsys, "case_base.jsonl", "case_policy.jsonl", "--n", 1)[0]["one sample"] == 1.0


def test_other_names(capsys):
    flags = ("--columns", "completions=responses,rewards=scores")
    assert compare(capsys, "scores.jsonl", "scores.jsonl", *flags)[0]["Best-of-4"] == 0.5


def test_the_help_of_each_form_shows_its_flags(capsys):
    shown = {}
    for words in (["evaluate"], ["compare"], ["evaluate", "--base", "a.jsonl"]):
        assert main([*words, "--help"]) == 0
        shown[" ".join(words)] = capsys.readouterr().out
    assert "--base FILE --policy FILE" in shown["evaluate"] and "--prompt_column" in shown["evaluate"]
    for form in ("compare", "evaluate --base a.jsonl"):
        assert all(flag in shown[form] for flag in ("--base", "--policy", "--columns", "--requests", "--split"))
        assert "--prompt_column" not in shown[form]


# --- recipes


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("messages.jsonl", "prompts are read from 'messages'; 4 of 4 end with the assistant's turn, which is left out"),
        ("sharegpt.jsonl", "from 'conversations'; 4 of 4 end with the assistant's turn, which is left out"),
        ("instruction_input.jsonl", "prompts are read from 'instruction' and 'input'"),
        ("question.jsonl", "prompts are read from 'question'"),
        ("text_parts.jsonl", ""),
        ("tools.jsonl", ""),
        ("indentation.jsonl", ""),
        ("same_prompt_other_answer.jsonl", "4 prompts (3 repeat another row's; each row counts)"),
        ("chat_as_string.csv", "8 of 8 prompts are chats written out as text: read as chats"),
    ],
)
def test_recipes_read_them_and_lose_no_row(name, line, tmp_path, capsys):
    keys = tiny_experiment(tmp_path / "e")
    recipe = load_recipe({**keys, "dataset_name": str(CASES / name), "num_train_prompts": None, "num_test_prompts": 0})
    splits = Experiment(recipe).splits
    told = capsys.readouterr()
    assert len(splits.train) == (8 if name.endswith("csv") else 4) and line in told.out
    assert name not in told.err


def test_reward_check_reads_other_names(tmp_path, capsys):
    (tmp_path / "length.py").write_text(LENGTH)
    spec = f"{tmp_path}/length.py:length"
    flags = ["--samples", str(CASES / "scores.jsonl"), "--columns", "completions=responses"]
    assert main(["reward", "check", spec, *flags]) == 0
    assert "text prompts, 16 completions" in capsys.readouterr().out
    assert main(["reward", "check", spec, "--prompts", str(CASES / "question.jsonl")]) == 0


# --- many samples


PEAK = """
import resource, sys
from infalign.cli import main
main(["compare", "--base", sys.argv[1], "--policy", sys.argv[1]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_comparison_keeps_numbers_not_texts(tmp_path):
    """Before, a sample of 200 characters took 1,200 bytes; numbers alone take a fraction of it."""
    peaks = []
    for prompts in (500, 2500):
        path = tmp_path / f"{prompts}.jsonl"
        with path.open("w") as file:
            for number in range(prompts):
                texts = ["x" * (100 + (number * 64 + i) * 7 % 200) for i in range(64)]
                row = {"prompt": f"p{number}", "completions": texts, "rewards": [i * 37 % 64 for i in range(64)]}
                file.write(json.dumps(row) + "\n")
        done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stderr.split()[-1]) * 1024)
    samples = 2 * 64 * (2500 - 500)
    assert (peaks[1] - peaks[0]) / samples < 300, f"{(peaks[1] - peaks[0]) / samples:.0f} bytes a sample"
