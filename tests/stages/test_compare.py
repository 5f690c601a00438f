"""`infalign evaluate --base --policy`: any two files of samples under any procedure, with no model loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from infalign import BestOfN, KthOfN, WorstOfN, win_rate
from infalign.cli import main
from infalign.evaluation.winrate import judged_win_rate
from infalign.stages.compare import compare, load_comparison
from infalign.types import InputError

RNG = np.random.default_rng(0)
OURS, THEIRS = RNG.normal(0.5, 1, (20, 8)).round(2), RNG.normal(0, 1, (20, 8)).round(2)
GOLD, BASE_GOLD = OURS + RNG.normal(0, 1, OURS.shape), THEIRS + RNG.normal(0, 1, THEIRS.shape)
LENGTHS, BASE_LENGTHS = RNG.integers(3, 30, OURS.shape), RNG.integers(3, 20, OURS.shape)
REWARD = """
def build(sign=1.0):
    def score(prompts, completions, topic, **_):
        return [sign * len(text) if name else None for text, name in zip(completions, topic)]
    return score

def judge(prompts, firsts, seconds):
    return [1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5 for a, b in zip(firsts, seconds)]

def first(prompts, firsts, seconds):
    return [1.0] * len(firsts)
"""


def write(path, rewards, lengths, gold=None, prompts=None, scored=True, **columns):
    with open(path, "w") as file:
        for number, row in enumerate(rewards):
            texts = ["w" * int(length) for length in lengths[number]]
            content = {"prompt": prompts[number] if prompts else f"question {number}", "completions": texts, **columns}
            if scored:
                content["rewards"] = [None if value != value else float(value) for value in row]
            if gold is not None:
                content["gold_rewards"] = [None if value != value else float(value) for value in gold[number]]
            file.write(json.dumps(content) + "\n")
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {
        "policy": write(tmp_path / "b.jsonl", OURS, LENGTHS),
        "base": write(tmp_path / "a.jsonl", THEIRS, BASE_LENGTHS),
    }


def run(files, **more):
    return compare(load_comparison({**files, **more}))


def by_label(found):
    return {row.label: row for row in found.win_rates}


def test_all_n_at_once_are_those_of_the_estimator(files):
    found = run(files, procedure="kth_of_n", n=3, procedure_kwargs={"k": 2})
    rows = by_label(found)
    assert next(iter(rows)) == "KthOfN(2, 3)" and found.prompts == 20
    wanted = [KthOfN(2, 3), *(kind(n) for kind in (BestOfN, WorstOfN) for n in (1, 2, 4, 8))]
    assert set(rows) == {repr(one) for one in dict.fromkeys(wanted)}  # the worst of one is the best of one
    for one in dict.fromkeys(wanted):
        exact = win_rate(OURS, THEIRS, one, seed=42)
        row = rows[repr(one)]
        assert (row.mean, row.low, row.high) == (exact.mean, exact.low, exact.high)
    assert rows["BestOfN(8)"].policy_reward == pytest.approx(OURS.max(1).mean())
    assert rows["WorstOfN(8)"].base_reward == pytest.approx(THEIRS.min(1).mean())


def test_sides_swap_to_one_and_prompts_may_come_in_any_order(files, tmp_path):
    there = by_label(run(files))["BestOfN(4)"]
    back = by_label(run({"policy": files["base"], "base": files["policy"]}))["BestOfN(4)"]
    assert there.mean + back.mean == pytest.approx(1.0)
    assert there.length_controlled.mean + back.length_controlled.mean == pytest.approx(1.0, abs=5e-3)
    order = [3, 1, 2, 0, *range(4, 20)]
    names = [f"question {number}" for number in order]
    shuffled = write(tmp_path / "c.jsonl", THEIRS[order], BASE_LENGTHS[order], prompts=names)
    assert by_label(run({**files, "base": shuffled}))["BestOfN(4)"].mean == pytest.approx(there.mean, abs=1e-12)


def test_a_gold_reward_judges_what_the_proxy_decodes(tmp_path):
    files = {
        "policy": write(tmp_path / "b.jsonl", OURS, LENGTHS, GOLD),
        "base": write(tmp_path / "a.jsonl", THEIRS, BASE_LENGTHS, BASE_GOLD),
    }
    found = run(files)
    exact = judged_win_rate((OURS, GOLD), (THEIRS, BASE_GOLD), BestOfN(4), seed=42)
    assert by_label(found)["BestOfN(4)"].mean == exact.mean and found.judged_by == "gold"
    assert by_label(found)["BestOfN(8)"].policy_reward == pytest.approx(GOLD[np.arange(20), OURS.argmax(1)].mean())


def test_a_sample_that_either_reward_does_not_score_is_left_out(tmp_path, capsys):
    """Missing gold scores count like missing rewards, also for how many candidates a prompt has."""
    gold = GOLD.copy()
    gold[0, :5] = np.nan  # three are left
    files = {
        "policy": write(tmp_path / "b.jsonl", OURS, LENGTHS, gold),
        "base": write(tmp_path / "a.jsonl", THEIRS, BASE_LENGTHS, BASE_GOLD),
    }
    found = run(files)
    assert found.prompts == 19 and "1 of 20 prompts have fewer than 4 scored samples" in capsys.readouterr().err
    assert run(files, n=3).samples["least"] == 3


def test_a_reward_scores_what_has_none_with_the_files_own_columns(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    files = {
        "policy": write(tmp_path / "b.jsonl", OURS, LENGTHS, scored=False, topic="t"),
        "base": write(tmp_path / "a.jsonl", THEIRS, BASE_LENGTHS, scored=False, topic="t"),
    }
    spec = f"{tmp_path}/reward.py:build"
    assert by_label(run(files, reward=spec))["BestOfN(4)"].mean == win_rate(LENGTHS, BASE_LENGTHS, BestOfN(4)).mean
    turned = by_label(run(files, reward=spec, reward_kwargs={"sign": -1.0}))["BestOfN(4)"].mean
    assert turned == win_rate(-LENGTHS, -BASE_LENGTHS, BestOfN(4)).mean
    with pytest.raises(InputError, match=r"20 of 20 prompts in .*b.jsonl have no rewards: add them .*, or score with"):
        run(files)


def test_a_judge_is_asked_in_both_orders(files, tmp_path):
    (tmp_path / "judges.py").write_text(REWARD)
    longer = run(files, judge=f"{tmp_path}/judges.py:judge", judge_samples=40, n=1).judge
    exact = win_rate(LENGTHS, BASE_LENGTHS, BestOfN(1)).mean
    assert longer.win_rate.mean == pytest.approx(exact, abs=4 * 0.5 / np.sqrt(800))
    assert (longer.pairs, longer.disagreement, longer.unjudged) == (800, 0.0, 0)
    assert longer.first_preferred == pytest.approx(0.5)
    biased = run(files, judge=f"{tmp_path}/judges.py:first").judge
    assert (biased.win_rate.mean, biased.disagreement, biased.first_preferred) == (0.5, 1.0, 1.0)


def test_a_known_kl_brings_the_limit(files):
    row = by_label(run(files, kl=1.0))["BestOfN(4)"]
    assert row.limit == pytest.approx(0.941123, abs=1e-5)  # of `win_rate_limit`, known to more digits
    assert row.attainment == pytest.approx((row.mean - 0.5) / 0.441123, abs=1e-4)


def test_prompts_of_one_file_and_prompts_with_few_scores_are_left_out(files, tmp_path, capsys):
    few = THEIRS.copy()
    few[0, 2:] = np.nan
    base = write(tmp_path / "few.jsonl", few[:15], BASE_LENGTHS[:15])
    found = run({**files, "base": base})
    told = capsys.readouterr().err
    assert "5 of 20 prompts in" in told and "1 of 15 prompts have fewer than 4 scored samples" in told
    assert found.prompts == 14
    assert by_label(found)["BestOfN(4)"].mean == win_rate(OURS[1:15], THEIRS[1:15], BestOfN(4)).mean


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"base": ""}, "--base FILE is needed"),
        ({"n": 0}, "n must be at least 1"),
        ({"judge_samples": 0}, "judge_samples must be at least 1"),
        ({"eval_n": [0]}, "eval_n must be positive"),
        ({"eval_n": [16]}, "16 candidates are drawn, but a prompt has 8 scored samples"),
        ({"n": 9}, "no prompt has the 9 scored samples a side"),
        ({"confidence": 1.0}, "confidence must be between"),
        ({"kl": -1.0}, "kl must be nats of at least 0"),
        ({"seed": -1}, "seed must be between"),
        ({"procedure": "best_of_m"}, "did you mean 'best_of_n'"),
        ({"polici": "x"}, "unknown flag --polici: did you mean 'policy'"),
    ],
)
def test_mistakes_are_told_in_one_line(files, flags, message):
    with pytest.raises(InputError, match=message):
        run({**files, **flags})


def test_other_prompts_or_half_of_the_gold_rewards(files, tmp_path):
    other = write(tmp_path / "o.jsonl", THEIRS[:2], BASE_LENGTHS, prompts=["x", "y"])
    with pytest.raises(InputError, match="no prompt in common"):
        run({**files, "base": other})
    gold = write(tmp_path / "g.jsonl", THEIRS, BASE_LENGTHS, BASE_GOLD)
    with pytest.raises(InputError, match="20 rows have no gold_rewards and others have"):
        run({**files, "base": gold})


def test_an_output_never_replaces_what_it_is_made_from(files):
    before = Path(files["base"]).read_bytes()
    with pytest.raises(InputError, match=r"--output .* is --base's file, which would be lost"):
        run(files, output=files["base"])
    assert Path(files["base"]).read_bytes() == before


def test_no_score_at_all_and_no_such_file(files, tmp_path):
    none = write(tmp_path / "none.jsonl", np.full((20, 8), np.nan), LENGTHS)
    with pytest.raises(InputError, match="no sample has a score: look at the rewards"):
        run({"policy": none, "base": none})
    with pytest.raises(InputError, match=r"nofile.jsonl: no such file of samples"):
        run({**files, "policy": "nofile.jsonl"})


def test_random_n_takes_no_n(files):
    keys = {**files, "procedure": "random_n", "procedure_kwargs": {"pmf": [0.5, 0.5]}}
    assert run(keys).procedure == "RandomN([0.5, 0.5])"
    with pytest.raises(InputError, match="procedure random_n takes no n, got 8: pmf says"):
        run({**keys, "n": 8})


def test_from_the_command_line(files, tmp_path, capsys):
    words = [word for name, value in files.items() for word in (f"--{name}", value)]
    output = tmp_path / "out.json"
    assert main(["evaluate", *words, "--procedure", "best_of_n", "--n", "4", "--output", str(output)]) == 0
    told = capsys.readouterr().out
    exact = win_rate(OURS, THEIRS, BestOfN(4), seed=42)
    assert re.search(rf"\* Best-of-4 +{exact.mean:.3f} +\[{exact.low:.3f}, {exact.high:.3f}\]", told)
    assert json.loads(output.read_text())["win_rates"][0]["mean"] == exact.mean
    assert main(["evaluate", "--base", files["base"]]) == 2
    assert "--policy FILE is needed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_thousand_prompts_take_seconds_and_load_no_torch(tmp_path):
    """The issue's size, in a process of its own: CPU seconds, since other work may run beside it."""
    rng = np.random.default_rng(1)
    for name, shift in (("a", 0.0), ("b", 0.4)):
        rewards, lengths = rng.normal(shift, 1, (1000, 64)).round(4), rng.integers(20, 200, (1000, 64))
        write(tmp_path / f"{name}.jsonl", rewards, lengths)
    code = f"""
import sys
from infalign.cli import main
code = main(["evaluate", "--base", {str(tmp_path / "a.jsonl")!r}, "--policy", {str(tmp_path / "b.jsonl")!r}])
assert "torch" not in sys.modules, "torch was loaded"
sys.exit(code)
"""
    start = time.process_time(), sum(_children())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd(), timeout=300)
    assert done.returncode == 0, done.stderr
    seconds = sum(_children()) - start[1]
    print(f"1000 prompts x 64 samples: {seconds:.1f} CPU seconds")
    assert "Best-of-64 " in done.stdout and seconds < 60.0


def _children():
    import os  # noqa: PLC0415 - only here

    times = os.times()
    return times.children_user, times.children_system
