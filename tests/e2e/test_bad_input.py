"""Every mistake gets one clear line and exit code 2, and what was there stays there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from infalign.cli import main
from infalign.runtime.console import notice
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal, tiny_classifier, tiny_tokenizer


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A finished calibration to make mistakes with."""
    folder = tmp_path_factory.mktemp("calibrated")
    keys = tiny_experiment(folder)
    assert run_cli(folder, keys, "calibrate") == 0
    return folder, keys


def run_cli(folder: Path, keys: dict, verb: str, *flags: str) -> int:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({name: value for name, value in keys.items() if value is not None}))
    return main([verb, "--config", str(recipe), *flags])


@pytest.fixture
def copy(calibrated, tmp_path):
    """The calibrated experiment in a folder of its own."""
    folder, keys = calibrated
    shutil.copytree(folder / "out", tmp_path / "out")
    return tmp_path, {**keys, "output_dir": str(tmp_path / "out")}


def refused(capsys, folder, keys, verb="calibrate", *flags) -> str:
    """The one line that the command ends with."""
    before = snapshot(folder)
    capsys.readouterr()
    assert run_cli(folder, keys, verb, *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("infalign: error: "), lines
    assert snapshot(folder) >= before, "something was lost"
    return lines[0]


def snapshot(folder: Path) -> set[tuple[str, int]]:
    """Every Parquet file and manifest with its size: none of them may vanish or shrink."""
    kept = [path for path in folder.rglob("*") if path.suffix == ".parquet" or path.name == "manifest.json"]
    return {(str(path), path.stat().st_size) for path in kept}


CHANGES = {
    "both beta and target_kl": ({"beta": 0.1}, "give exactly one of beta and target_kl, got both"),
    "neither": ({"target_kl": None}, "give exactly one of beta and target_kl, got neither"),
    "unknown procedure": ({"procedure": "best_off_n"}, "procedure 'best_off_n' is unknown: did you mean 'best_of_n'?"),
    "unknown transform": ({"transform": "exponental"}, "is unknown: did you mean 'exponential'?"),
    "exponential without t": ({"transform": "exponential"}, "transform exponential needs transform_kwargs: {t: ...}"),
    "wrong transform_kwargs": ({"transform": "identity", "transform_kwargs": {"t": 1}}, "does not take transform_"),
    "wrong procedure_kwargs": ({"procedure_kwargs": {"x": 1}}, "does not take procedure_kwargs"),
    "k beyond n": ({"procedure": "kth_of_n", "procedure_kwargs": {"k": 5}}, "5"),
    "misspelt key": ({"num_calibration_sample": 8}, "did you mean 'num_calibration_samples'?"),
    "missing model": ({"model_name_or_path": "./nowhere"}, "model_name_or_path './nowhere': no such file or folder"),
    "missing package": ({"model_name_or_path": "package://nopackage/x.gguf"}, "package 'nopackage' is not installed"),
    "missing dataset": ({"dataset_name": "./nowhere.jsonl"}, "nowhere.jsonl"),
    "missing column": ({"prompt_column": "question"}, "question"),
    "no reward": ({"reward": None}, "the recipe lacks reward"),
    "missing reward file": ({"reward": "nowhere.py:f"}, "nowhere.py"),
    "too many prompts asked for": ({"num_train_prompts": 100}, "100"),
    "prompt too long": ({"max_prompt_length": 1}, "longer than 1 token"),
    "truncating sampling": ({"top_p": 0.9}, "log-probabilities and KL would be those of another distribution"),
    "constant transform": ({"transform": "CONSTANT:flat"}, "is constant: it must tell"),
    "k missing": ({"procedure": "kth_of_n"}, "needs procedure_kwargs"),
    "pmf of words": ({"procedure": "random_n", "procedure_kwargs": {"pmf": "abc"}}, "procedure_kwargs {'pmf': 'abc'}"),
    "seed out of range": ({"seed": -1}, "seed must be between 0 and 2**32 - 1, got -1"),
    "top_p out of range": ({"top_p": 2.0}, "top_p in (0, 1]"),
    "half a surrogate": ({"system_prompt": "\ud800"}, "system_prompt: expected text"),
    "output_dir is a file": ({"output_dir": "FOLDER/score.py"}, "is a file: give a folder"),
    "a directory of something else": ({"output_dir": "FOLDER"}, "is not empty and is not infalign's"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_recipes_that_do_not_fit(case, calibrated, tmp_path, capsys):
    folder, keys = calibrated
    change, message = CHANGES[case]
    (tmp_path / "flat.py").write_text("def flat(u):\n    return u * 0.0\n")
    places = {"FOLDER": str(folder), "CONSTANT": str(tmp_path / "flat.py")}
    for place, path in places.items():
        change = {n: v.replace(place, path) if isinstance(v, str) else v for n, v in change.items()}
    work = tmp_path / "work"
    work.mkdir()
    given = {**keys, "output_dir": str(tmp_path / "fresh"), **change}
    if given.get("procedure") == "random_n":
        del given["n"]  # which it does not take
    line = refused(capsys, work, given)
    assert message in line


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": ""}, {"prompt": "the cat"}], "row"),
        ([{"prompt": None}, {"prompt": "the cat"}], "row"),
        ([{"prompt": 7}], "row"),
        ([], "no rows"),
        ([{"prompt": [{"role": "assistant", "content": "hi"}]}], "row"),
    ],
)
def test_bad_prompts_are_named_by_row(rows, message, calibrated, tmp_path, capsys):
    _, keys = calibrated
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert message in refused(
        capsys, tmp_path, {**keys, "dataset_name": str(path), "output_dir": str(tmp_path / "fresh")}
    )


def test_a_half_line_is_named(calibrated, tmp_path, capsys):
    _, keys = calibrated
    (tmp_path / "bad.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "half')
    line = refused(
        capsys, tmp_path, {**keys, "dataset_name": str(tmp_path / "bad.jsonl"), "output_dir": str(tmp_path / "o")}
    )
    assert "line 2" in line


def test_repeated_rows_all_count(calibrated, tmp_path, capsys):
    folder, keys = calibrated
    rows = (folder / "prompts.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(rows + rows)
    changed = {**keys, "dataset_name": str(tmp_path / "twice.jsonl"), "output_dir": str(tmp_path / "fresh")}
    assert run_cli(tmp_path, changed, "calibrate") == 0
    assert "24 prompts (12 repeat another row's; each row counts)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "the reward server is down"),
        ("short", "returned 1 values for"),
        ("strings", "'good'"),
        ("infinite", "inf"),
    ],
)
def test_rewards_that_break(name, message, calibrated, copy, capsys):
    folder, _ = calibrated
    work, keys = copy
    assert message in refused(capsys, work, {**keys, "reward": f"{folder / 'score.py'}:{name}"})


def test_a_reward_that_hangs(calibrated, copy, capsys):
    folder, _ = calibrated
    work, keys = copy
    line = refused(capsys, work, {**keys, "reward": f"{folder / 'score.py'}:slow", "reward_timeout": 0.2})
    assert "0.2" in line


@pytest.mark.parametrize("name", ["nothing", "nan"])
def test_rewards_that_score_nothing(name, calibrated, copy, capsys):
    folder, _ = calibrated
    work, keys = copy
    line = refused(capsys, work, {**keys, "reward": f"{folder / 'score.py'}:{name}"})
    assert "gave no score to any sample of 6 of 6 prompts" in line


def test_a_fresh_head_and_several_labels(calibrated, copy, capsys, tmp_path):
    work, keys = copy
    fresh = tiny_causal(tmp_path / "fresh", "llama")
    assert "head" in refused(capsys, work, {**keys, "reward": fresh})
    three = tiny_classifier(tmp_path / "three", "llama", num_labels=3)
    assert "label" in refused(capsys, work, {**keys, "reward": three})


class TestTraining:
    def test_without_calibration(self, calibrated, tmp_path, capsys):
        _, keys = calibrated
        line = refused(capsys, tmp_path, {**keys, "output_dir": str(tmp_path / "fresh")}, "train")
        assert "lack calibration samples" in line and "run `infalign calibrate`" in line

    def test_with_more_samples_than_calibrated(self, copy, capsys):
        work, keys = copy
        assert "lack calibration samples" in refused(capsys, work, {**keys, "num_calibration_samples": 50}, "train")

    def test_a_data_set_smaller_than_a_batch(self, copy, capsys):
        work, keys = copy
        line = refused(capsys, work, {**keys, "per_device_train_batch_size": 64}, "train")
        assert "6 training prompts are fewer than the 16 of one batch" in line

    def test_a_batch_that_groups_do_not_divide(self, copy, capsys):
        work, keys = copy
        assert "num_generations" in refused(capsys, work, {**keys, "num_generations": 3}, "train")

    def test_no_steps(self, copy, capsys):
        work, keys = copy
        assert "training made 0 steps" in refused(
            capsys, work, {**keys, "max_steps": -1, "num_train_epochs": 0.0}, "train"
        )

    def test_scaled_advantages(self, copy, capsys):
        work, keys = copy
        assert "normalize_advantages" in refused(capsys, work, {**keys, "normalize_advantages": True}, "train")


class TestResume:
    @pytest.fixture
    def interrupted(self, copy):
        """A training that was stopped after two checkpoints, before its manifest."""
        work, keys = copy
        keys = {**keys, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 5}
        assert run_cli(work, keys, "train") == 0
        policy = Path(keys["output_dir"]) / "policy"
        for name in ("manifest.json", "model.safetensors", "training_log.json"):
            (policy / name).unlink()
        return work, keys, policy

    def test_it_continues(self, interrupted, capsys):
        work, keys, policy = interrupted
        assert run_cli(work, {**keys, "max_steps": 3}, "train") == 2  # another recipe: refused
        assert run_cli(work, keys, "train") == 0
        assert "continuing from checkpoint-2" in capsys.readouterr().out
        assert (policy / "manifest.json").is_file()

    def test_a_half_written_checkpoint_is_passed_over(self, interrupted, capsys):
        work, keys, policy = interrupted
        (policy / "checkpoint-2" / "trainer_state.json").unlink()
        assert run_cli(work, keys, "train") == 0
        captured = capsys.readouterr()
        assert "checkpoint-2 is skipped: trainer_state.json is missing" in captured.err
        assert "continuing from checkpoint-1" in captured.out

    def test_another_recipe_is_refused(self, interrupted, capsys):
        work, keys, _policy = interrupted
        line = refused(capsys, work, {**keys, "learning_rate": 1e-9, "procedure": "worst_of_n"}, "train")
        assert "unfinished training with other settings" in line and "learning_rate: 0.001 -> 1e-09" in line
        with (work / "prompts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"prompt": "the bird ran"}) + "\n")
        line = refused(capsys, work, {**keys, "num_train_prompts": keys["num_train_prompts"] + 1}, "run")
        assert "other settings (calibration prompts: other content)" in line
        assert run_cli(work, {**keys, "learning_rate": 1e-9}, "train", "--overwrite") == 0
        assert "continuing" not in capsys.readouterr().out


class TestTables:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"temperature": 0.7}, "temperature: 1.0 -> 0.7"),
            ({"max_completion_length": 4}, "max_tokens: 5 -> 4"),
            ({"dtype": "bfloat16"}, 'dtype: "float32" -> "bfloat16"'),
        ],
    )
    def test_other_sampling_settings(self, change, message, copy, capsys):
        work, keys = copy
        line = refused(capsys, work, {**keys, **change})
        assert message in line and "--overwrite" in line

    def test_another_recipe(self, copy, capsys):
        work, keys = copy
        line = refused(capsys, work, {**keys, "seed": 7})
        assert "belongs to another recipe (seed: 42 -> 7)" in line

    def test_another_model_in_the_same_place(self, calibrated, tmp_path, capsys):
        folder, keys = calibrated
        shutil.copytree(folder / "model", tmp_path / "model")
        changed = {**keys, "model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "out")}
        assert run_cli(tmp_path, changed, "calibrate") == 0
        shutil.rmtree(tmp_path / "model")
        tiny_causal(tmp_path / "model", "llama", seed=5)
        assert "model: " in refused(capsys, tmp_path, changed)

    def test_another_template(self, tmp_path, capsys):
        keys = tiny_experiment(tmp_path)
        rows = [
            {"prompt": [{"role": "user", "content": f"the cat {word}"}]}
            for word in ["a", "the", "on", "sat", "ran", "dog", "mat", "cat"]
        ]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys |= {"num_train_prompts": 4, "num_test_prompts": 2}
        assert run_cli(tmp_path, keys, "calibrate") == 0
        other = tiny_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}")
        other.save_pretrained(tmp_path / "model")
        line = refused(capsys, tmp_path, keys)
        assert "model: " in line or "rendered to other tokens" in line

    def test_a_half_written_plan(self, copy, capsys):
        work, keys = copy
        plan = Path(keys["output_dir"]) / "calibration" / "plan.json"
        plan.write_text(plan.read_text()[:20])
        assert "is damaged" in refused(capsys, work, keys)

    def test_a_half_written_shard(self, copy, capsys):
        work, keys = copy
        shard = next(Path(keys["output_dir"]).glob("calibration/segment-000/0*.parquet"))
        shard.write_bytes(shard.read_bytes()[:50])
        assert "is not a whole Parquet file" in refused(capsys, work, keys)

    def test_overwrite_makes_it_anew(self, copy, capsys):
        work, keys = copy
        assert run_cli(work, {**keys, "temperature": 0.7}, "calibrate", "--overwrite") == 0
        assert "removing stale" in capsys.readouterr().out

    def test_a_stale_policy(self, copy, capsys):
        work, keys = copy
        assert run_cli(work, keys, "train") == 0
        line = refused(capsys, work, {**keys, "learning_rate": 5e-4}, "train")
        assert "learning_rate: 0.001 -> 0.0005" in line and "--overwrite" in line


class TestEvaluation:
    def test_a_policy_trained_for_something_else(self, copy, capsys):
        work, keys = copy
        assert run_cli(work, keys, "train") == 0
        line = refused(capsys, work, {**keys, "n": 3}, "evaluate")
        assert "was trained for something else" in line and "BestOfN(2)" in line and "BestOfN(3)" in line
        recorded = json.loads((Path(keys["output_dir"]) / "recipe.json").read_text())
        assert recorded["recipe"]["n"] == 2, "a refused command must not rewrite the record"
        policy = str(Path(keys["output_dir"]) / "policy")
        assert run_cli(work, {**keys, "n": 3}, "evaluate", "--policy_name_or_path", policy) == 0

    def test_a_huge_reward_does_not_cost_the_table(self, calibrated, tmp_path, capsys):
        _folder, keys = calibrated
        (tmp_path / "big.py").write_text(
            "def big(completion_ids, **_):\n    return [1e308 if i[0] % 2 else 1.0 for i in completion_ids]\n"
        )
        changed = {**keys, "reward": str(tmp_path / "big.py") + ":big", "output_dir": str(tmp_path / "out")}
        assert run_cli(tmp_path, changed, "run") == 0
        assert "report: " in capsys.readouterr().out

    def test_generate_with_unscored_candidates(self, calibrated, tmp_path, capsys):
        folder, keys = calibrated
        (tmp_path / "none.py").write_text("def none(completions, **_):\n    return [None] * len(completions)\n")
        flags = ["--policy_name_or_path", str(folder / "model"), "--reward", str(tmp_path / "none.py") + ":none"]
        assert run_cli(tmp_path, keys, "generate", *flags, "--output", str(tmp_path / "o.jsonl")) == 0
        rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
        assert [row["completion"] for row in rows] == [None] * 4
        assert [row["error"] for row in rows] == ["no candidate has a score"] * 4
        assert "4 of 4 rows have an error in place of a completion" in capsys.readouterr().err

    def test_n_above_the_samples(self, copy, capsys):
        work, keys = copy
        line = refused(capsys, work, {**keys, "n": 16}, "evaluate")
        assert "eval_samples is 8, but 16 candidates are drawn" in line

    def test_without_a_policy(self, copy, capsys):
        work, keys = copy
        assert "no finished policy" in refused(capsys, work, keys, "evaluate")
        assert "no finished policy" in refused(capsys, work, keys, "generate")

    def test_nothing_to_report(self, tmp_path, capsys):
        assert main(["report", "--output_dir", str(tmp_path)]) == 2
        assert "holds nothing to report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_n", "1", "50"], "eval_samples is 8, but 50 candidates are drawn"),
        (["--num_test_prompts", "0"], "num_test_prompts must be at least 1"),
        (["--per_device_train_batch_size", "64"], "6 training prompts are fewer than the 16"),
        (["--policy_name_or_path", "x"], "policy_name_or_path is for evaluate and generate"),
        (["--max_steps", "0"], "max_steps is 0"),
        (["--dtype", "float16"], "dtype float16 can't be trained in"),
        (["--gold_reward", "nowhere.py:f"], "nowhere.py"),
        (["--config", "a", "b"], "--config is given twice"),
    ],
)
def test_run_and_dry_run_refuse_before_any_work(flags, message, calibrated, tmp_path, capsys):
    _, keys = calibrated
    fresh = {**keys, "output_dir": str(tmp_path / "fresh")}
    for dry in ([], ["--dry_run"]):
        assert message in refused(capsys, tmp_path, fresh, "run", *flags, *dry)
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_to", "nonexist"], "the training keys do not fit: nonexist is not supported"),
        (["--eval_strategy", "steps"], "eval_strategy steps needs prompts that are held out for it"),
        (["--resume_from_checkpoint", "nope"], "nope is no whole checkpoint: there is no such folder"),
    ],
)
def test_what_trl_refuses_is_one_line(flags, message, copy, capsys):
    work, keys = copy
    assert message in refused(capsys, work, keys, "train", *flags)


def test_prose_in_a_flag_stays_prose(copy, capsys):
    work, keys = copy
    line = refused(capsys, work, keys, "calibrate", "--system_prompt", "Answer: yes: no", "--beta", "[x")
    assert "--beta: expected a number" in line


def test_an_unknown_flag(copy, capsys):
    work, keys = copy
    assert "unknown flag --learning_rat: did you mean 'learning_rate'?" in refused(
        capsys, work, keys, "calibrate", "--learning_rat", "1"
    )


def test_notices_go_to_standard_error(capsys):
    notice("look here")
    assert capsys.readouterr().err == "warning: look here\n"
