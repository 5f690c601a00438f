"""`infalign forget`: what a recipe stands for, mistakes in it, a whole experiment on a tiny model, and resuming it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from infalign.cli import main
from infalign.evaluation.forgotten import ForgetResult
from infalign.forgetting.scoring import answer_logps, encoded_answers
from infalign.forgetting.tasks import Question
from infalign.report.forget_page import report_forget, summary_lines
from infalign.runtime.artifacts import from_plain, read_json
from infalign.stages.forget.bench import begins_with_the_answer, pass_shares
from infalign.stages.forget.load import load_tasks
from infalign.stages.forget.models import Models
from infalign.stages.forget.recipe import load_forget_recipe, nodes_of
from infalign.stages.forget.run import forget
from infalign.types import InputError
from tests.tiny import tiny_causal

ANIMALS, COLORS = ("cat", "dog", "bird"), ("red", "blue", "green")
GOOD, BAD = ("good", "great", "happy", "love"), ("bad", "awful", "sad", "hate")
NUMBERS = {"one": "7", "two": "8", "three": "9", "four": "7", "five": "8", "big": "9", "small": "7", "and": "8"}


def write_rows(path: Path, rows) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and two tasks that it can learn: a word means yes or no; a word means a number.

    Eight words mean yes or no, so that the luck of random labels is not that of one word.
    """
    folder = tmp_path_factory.mktemp("forget")
    tiny_causal(folder / "model", hidden=48, layers=6, seed=3)
    places = ("tree", "moon", "sun", "mat", "rain")
    liked, counted = [], []
    for animal, color, place in itertools.product(ANIMALS, COLORS, places):
        for word in GOOD + BAD:
            right, wrong = ("yes", "no") if word in GOOD else ("no", "yes")
            context = f"the {animal} is {color} {place} {word} ?"
            liked.append({"context": context, "correct": right, "distractors": [wrong]})
        for word, right in NUMBERS.items():
            context = f"{word} {animal} {color} {place} :"
            wrong = [number for number in ("7", "8", "9") if number != right]
            counted.append({"context": context, "correct": right, "distractors": wrong})
    write_rows(folder / "liked.jsonl", liked)
    write_rows(folder / "counted.jsonl", counted)
    write_rows(folder / "texts.jsonl", [{"text": f"the {a} sat on the {p}"} for a in ANIMALS for p in places])
    return folder


def recipe_of(folder, **changes):
    keys = {
        "model_name_or_path": str(folder / "model"),
        "tasks": {
            "liked": {"path": str(folder / "liked.jsonl"), "family": "words"},
            "counted": {"path": str(folder / "counted.jsonl"), "family": "numbers"},
        },
        "num_train": 210,
        "num_test": 50,
        "forget": ["liked"],
        "forget_examples": [200],
        "relearn_examples": [20],
        "eval_n": [1, 2],
        "open_answers": 2,
        "held_out_texts": {"some": str(folder / "texts.jsonl")},
        "use_cpu": True,
        "per_device_train_batch_size": 10,
        "num_train_epochs": 6,
        "learning_rate": 3e-3,
        "output_dir": str(folder / "out"),
    }
    return load_forget_recipe({**keys, **changes})


# ---- what a recipe stands for ----


def names(folder, **changes):
    recipe = recipe_of(folder, **changes)
    families = {name: task["family"] for name, task in recipe.tasks.items()}
    return [(node.name, node.parent) for node in nodes_of(recipe, families, dict.fromkeys(families, 210))]


def test_the_models_of_an_experiment(folder):
    assert names(folder) == [
        ("base", ""),
        ("tuned-liked", "base"),
        ("forgot-liked-random-200", "tuned-liked"),
        ("forgot-liked-random-200-relearned-liked-20", "forgot-liked-random-200"),
        ("forgot-liked-random-200-relearned-counted-20", "forgot-liked-random-200"),
        ("base-learned-liked-20", "base"),
        ("tuned-counted", "base"),
    ]
    few = names(folder, forget_examples=[1000, 500, 60], relearn_examples=[])
    assert [name for name, _ in few if name.startswith("forgot")] == [
        "forgot-liked-random-1000",
        "forgot-liked-random-60",
    ]
    together = names(folder, fine_tune="together", forget=[], labels=["random", "flipped"], relearn_examples=[])
    assert together == [
        ("base", ""),
        ("tuned", "base"),
        *(
            (f"forgot-{task}-{labels}-200", "tuned")
            for task in ("liked", "counted")
            for labels in ("random", "flipped")
        ),
    ]


def test_relearning_out_of_domain_takes_another_family_or_the_task_that_is_named(folder):
    third = {"path": str(folder / "liked.jsonl"), "family": "words"}
    tasks = {**recipe_of(folder).tasks, "third": third}
    tasks = {name: tasks[name] for name in ("liked", "third", "counted")}
    assert "forgot-liked-random-200-relearned-counted-20" in dict(names(folder, tasks=tasks))
    assert "forgot-liked-random-200-relearned-third-20" in dict(
        names(folder, tasks=tasks, relearn_from={"liked": "third"})
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": {}}, "tasks must be given"),
        ({"output_dir": ""}, "output_dir must be given"),
        ({"tasks": {"a b": {"path": "x"}}}, "'a b' is no name for a folder"),
        ({"tasks": {"a" * 61: {"path": "x"}}}, "is no name for a folder: use up to 60 letters"),
        ({"forget": ["liked", "liked"]}, "forget names a task twice"),
        ({"tasks": {"a": "x.jsonl"}}, r"tasks, a: give {path: FILE} or {harness: TASK}, got 'x.jsonl'"),
        ({"tasks": {"a": {"pth": "x"}}}, "tasks, a: unknown key 'pth': did you mean 'path'"),
        ({"tasks": {"a": {"path": "x", "harness": "y"}}}, "tasks, a: give one of path and harness"),
        ({"tasks": {"a": {"family": "x"}}}, "tasks, a: give one of path and harness"),
        ({"forget": ["likd"]}, "forget: no task is called 'likd': did you mean 'liked'"),
        ({"relearn_from": {"liked": "countd"}}, "relearn_from: no task is called 'countd'"),
        ({"relearn_from": {"liked": "liked"}}, "relearn_from: 'liked' is not another task than itself"),
        ({"labels": ["wrong"]}, r"labels must be of random, flipped, each once, got \['wrong'\]"),
        ({"labels": []}, "labels must be of random, flipped"),
        ({"forget_examples": []}, "forget_examples must be numbers of at least 1"),
        ({"forget_examples": [5, 5]}, "forget_examples has a number twice"),
        ({"eval_n": [0]}, "eval_n must be numbers of at least 1"),
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"open_answers": -1}, "open_answers must be at least 0"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"seed": -1}, "seed must be between 0"),
        ({"forget_training": {"learning_rat": 1}}, "forget_training: unknown key 'learning_rat': did you mean"),
        ({"learning_rat": 1e-4}, "unknown key learning_rat: did you mean 'learning_rate'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe(folder, changes, words):
    with pytest.raises(InputError, match=words):
        recipe_of(folder, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": {"a": {"path": "nowhere.jsonl"}}, "forget": []}, "tasks, a: there is no nowhere.jsonl under"),
        (
            {"tasks": {"a": {"harness": "x", "include_path": "nowhere"}}, "forget": []},
            "tasks, a: there is no folder nowhere",
        ),
        ({"held_out_texts": {"some": "nowhere.jsonl"}}, "held_out_texts, some: there is no nowhere.jsonl"),
        ({"general": "nowhere.yaml"}, "general: there is no recipe nowhere.yaml"),
        ({"model_name_or_path": "./nowhere"}, "no such file or folder"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"forget_training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size must be at least 1"),
        ({"forget_training": {"lr_scheduler_type": "foo"}}, "the training keys do not fit: .*foo"),
        ({"relearn_training": {"max_length": 3}}, "max_length is the recipe's own key"),
        ({"optim": "lion_8bit", "report_to": "wandb"}, "wandb"),
    ],
)
def test_mistakes_found_before_the_work(folder, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        forget(recipe_of(folder, output_dir=str(tmp_path / "out"), **changes))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_mistakes_on_the_command_line(folder, tmp_path, capsys):
    recipe = {"model_name_or_path": "m", "output_dir": str(tmp_path / "out"), "tasks": {"a": {"path": "rows.jsonl"}}}
    (tmp_path / "forget.yaml").write_text(yaml.safe_dump(recipe))
    write_rows(
        tmp_path / "rows.jsonl", [{"context": f"q{n}", "correct": "yes", "distractors": ["no"]} for n in range(8)]
    )
    assert main(["forget", "--config", str(tmp_path / "forget.yaml")]) == 2
    told = capsys.readouterr().err
    assert (
        "a: the correct answer of all 4 training questions is 'yes': one class only" in told
        and told.count("error") == 1
    )
    assert not (tmp_path / "out").exists()


# ---- a whole experiment ----


@pytest.fixture(scope="module")
def whole(folder) -> ForgetResult:
    found = forget(recipe_of(folder))
    assert found is not None
    return found


def test_a_skill_is_learned_and_forgotten(folder, whole):
    """Random labels take the task that was forgotten to chance (.42 to .62 over eight seeds, from 1.0)."""
    (one,) = whole.forgotten
    assert one.before["liked"].mean >= 0.9 and one.accuracies["liked"].mean <= 0.8
    assert one.ratios["liked"].value == pytest.approx(
        (one.before["liked"].mean - one.accuracies["liked"].mean) / (one.before["liked"].mean - 0.5)
    )
    assert one.gap == one.accuracies["liked"].mean - 0.5
    assert math.isnan(one.ratios["counted"].value) and one.ratios["counted"].reason  # tuned on the other task alone
    assert one.used == 200 and one.best_of_coin["1"] == 0.5
    assert [point.examples for point in one.learned] == [20]
    again = {point.source: point.accuracy.mean for point in one.relearned}
    assert set(again) == {"liked", "counted"} and again["liked"] >= one.accuracies["liked"].mean - 0.1


def test_log_probabilities_are_those_of_the_saved_models(folder, whole):
    """What is written down, once more from the weights on disk by themselves."""
    recipe = recipe_of(folder)
    tasks = load_tasks(recipe)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for name in ("tuned-liked", "forgot-liked-random-200"):
        model = AutoModelForCausalLM.from_pretrained(folder / "out" / "models" / name, dtype=torch.float32).eval()
        held = read_json(folder / "out" / "measured" / f"{name}.json", "")
        for task in tasks.values():
            logps = answer_logps(model, encoded_answers(tokenizer, task.test, " ", None), 8192)
            assert np.abs(logps - np.array(held["logps"][task.name])).max() < 1e-4


def test_other_measures_are_there(whole):
    (one,) = whole.forgotten
    assert one.best_of["1"] == one.pass_at["1"] <= one.best_of["2"] <= one.pass_at["2"] <= 1.0
    assert one.open_answers is not None and one.open_answers.before["2"] >= one.open_answers.before["1"] > 0.5
    assert one.probed is not None and one.probed.before.mean > 0.8
    assert one.texts_before["some"] != one.texts["some"] and one.texts["some"] > 0
    assert {prediction.predictor for prediction in whole.predictions} == {"confidence", "difficulty", "total variance"}
    assert all(math.isnan(prediction.correlation.value) for prediction in whole.predictions)  # of one task
    assert all(task.variance > 0 and 0.5 <= task.confidence <= 1 for task in whole.tasks)


def test_a_copy_in_four_bits(whole):
    pytest.importorskip("bitsandbytes")
    (one,) = whole.forgotten
    assert one.quantized is not None and abs(one.quantized.mean - one.accuracies["liked"].mean) < 0.3


def test_the_same_command_finds_all_of_it(folder, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "measured").iterdir()}
    before |= {path: path.stat().st_mtime_ns for path in (folder / "out" / "models").rglob("*") if path.is_file()}
    again = forget(recipe_of(folder))
    assert again is not None and replace(again, seconds=0.0) == replace(whole, seconds=0.0)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert "train:" not in capsys.readouterr().out


def test_the_page_reads_what_was_written(folder, whole):
    page = report_forget(folder / "out")
    text = page.read_text()
    assert from_plain(ForgetResult, read_json(folder / "out" / "forget.json", "")).forgotten[0].task == "liked"
    for words in (*summary_lines(whole)[:2], "What else went", "How deep it went", "open pass@2", "total variance"):
        assert words.replace("'", "&#39;") in text
    for name in ("matrix-random-200", "relearning"):
        assert (folder / "out" / "report" / f"{name}.png").stat().st_size > 5_000


def test_other_settings_are_refused_by_name(folder, whole):
    with pytest.raises(InputError, match=r"other settings \(learning_rate: 0.003 -> 0.001\)"):
        forget(recipe_of(folder, learning_rate=1e-3))


def test_other_questions_are_measured_anew_and_nothing_is_trained(folder, whole, capsys):
    capsys.readouterr()
    fewer = forget(recipe_of(folder, open_answers=0))
    assert fewer is not None and fewer.forgotten[0].open_answers is None
    assert "train:" not in capsys.readouterr().out
    assert fewer.forgotten[0].accuracies == whole.forgotten[0].accuracies


def test_a_killed_training_goes_on(folder, tmp_path, monkeypatch):
    """Stopped after a checkpoint in the middle of forgetting: the same command ends with the same weights."""
    quick = {"forget_training": {"save_steps": 10}, "relearn_examples": [], "probes": False, "open_answers": 0}
    alone = recipe_of(folder, output_dir=str(tmp_path / "alone"), **quick)
    stopped = recipe_of(folder, output_dir=str(tmp_path / "stopped"), **quick)
    forget(alone)
    tasks = load_tasks(stopped)
    nodes = nodes_of(stopped, {name: name for name in tasks}, {name: len(task.train) for name, task in tasks.items()})
    models = Models(stopped, tasks, nodes)
    models.weights(models.nodes["tuned-liked"])
    from infalign.stages.forget import models as module  # noqa: PLC0415

    real = module.train

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 20:
                raise KeyboardInterrupt

    def until_twenty(trainer, parts):
        trainer.add_callback(Stop())  # behind the one that seals the checkpoint
        real(trainer, parts)

    monkeypatch.setattr(module, "train", until_twenty)
    with pytest.raises(KeyboardInterrupt):
        models.weights(models.nodes["forgot-liked-random-200"])
    monkeypatch.setattr(module, "train", real)
    work = tmp_path / "stopped" / "training" / "forgot-liked-random-200"
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-20"]
    assert not (tmp_path / "stopped" / "models" / "forgot-liked-random-200").exists()
    forget(stopped)
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / one / "models" / "forgot-liked-random-200").state_dict()
        for one in ("alone", "stopped")
    )
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_without_weights_the_measurements_stay(folder, tmp_path):
    quick = {"relearn_examples": [], "probes": False, "open_answers": 0, "keep_models": False, "quantized": False}
    recipe = recipe_of(folder, output_dir=str(tmp_path / "out"), **quick)
    found = forget(recipe)
    assert not list((tmp_path / "out" / "models").glob("*"))
    again = forget(recipe)
    assert found is not None and again is not None and again.forgotten == found.forgotten


def test_win_rates_under_a_general_recipe(folder, tmp_path, capsys):
    """Forgotten against fine-tuned on other prompts, decoded: what `infalign evaluate` measures of these two models."""
    (tmp_path / "r.py").write_text("def reward(prompts, completions):\n    return [len(set(c)) for c in completions]\n")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"the {a} sat on {c}"} for a in ANIMALS for c in COLORS])
    general = {
        "model_name_or_path": "replaced",
        "dataset_name": "prompts.jsonl",
        "reward": "r.py:reward",
        "n": 2,
        "target_kl": 1.0,
        "num_test_prompts": 6,
        "max_completion_length": 5,
        "eval_samples": 4,
        "eval_n": [2],
        "output_dir": "replaced",
    }
    (tmp_path / "general.yaml").write_text(yaml.safe_dump(general))
    quick = {"relearn_examples": [], "probes": False, "open_answers": 0, "quantized": False}
    recipe = recipe_of(folder, output_dir=str(tmp_path / "out"), general=str(tmp_path / "general.yaml"), **quick)
    found = forget(recipe)
    assert found is not None
    won = found.forgotten[0].wins["BestOfN(2)"]
    files = list((tmp_path / "out" / "general").rglob("evaluation.json"))
    rows = read_json(files[0], "")["win_rates"]
    assert won.count == 6 and len(files) == 1
    assert won.mean == next(row["mean"] for row in rows if row["label"] == "BestOfN(2)")
    capsys.readouterr()
    again = forget(recipe)
    assert again is not None and again.forgotten == found.forgotten and "sampling" not in capsys.readouterr().out
    assert "win rate, BestOfN(2)" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_what_a_measurement_depends_on(folder, tmp_path):
    """Other texts, another length, other settings of weights that are gone: never the old numbers without a word."""
    (tmp_path / "texts.jsonl").write_text((folder / "texts.jsonl").read_text())
    quick = {"relearn_examples": [], "probes": False, "open_answers": 0, "quantized": False, "keep_models": False}
    quick |= {"held_out_texts": {"some": str(tmp_path / "texts.jsonl")}, "output_dir": str(tmp_path / "out")}
    first = forget(recipe_of(folder, **quick))
    (tmp_path / "texts.jsonl").write_text((folder / "texts.jsonl").read_text().replace("sat on", "on sat"))
    second = forget(recipe_of(folder, **quick))
    assert first is not None and second is not None
    assert first.forgotten[0].texts != second.forgotten[0].texts
    assert first.forgotten[0].accuracies == second.forgotten[0].accuracies
    for changes, words in (
        ({"learning_rate": 1e-5}, r"tuned-liked.json was measured of a model of other settings \(learning_rate"),
        ({"max_length": 5}, r"base.json was measured of a model of other settings \(max_length"),
        ({"dtype": "bfloat16"}, r"base.json was measured of a model of other settings \(dtype"),
    ):
        with pytest.raises(InputError, match=words):
            forget(recipe_of(folder, **quick, **changes))


def test_adapters_are_merged(folder, tmp_path):
    pytest.importorskip("peft")
    quick = {"relearn_examples": [], "probes": False, "open_answers": 0, "quantized": False, "fine_tune": "together"}
    adapters = {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear", "learning_rate": 1e-2}
    found = forget(recipe_of(folder, output_dir=str(tmp_path / "out"), **quick, **adapters))
    assert found is not None and found.forgotten[0].before["liked"].mean >= 0.8
    held = tmp_path / "out" / "models" / "tuned"
    assert not list(held.glob("adapter*"))
    tuned = AutoModelForCausalLM.from_pretrained(held).state_dict()
    base = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert set(tuned) == set(base)
    changed = {name for name in base if not torch.equal(tuned[name], base[name])}
    assert changed and all("proj" in name for name in changed)


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    assert forget(recipe_of(folder, output_dir=str(tmp_path / "out")), dry_run=True) is None
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "7 models on 2 tasks" in shown and "forgot-liked-random-200: 200 examples" in shown


# ---- open answers ----


def test_open_answers_are_read():
    question = Question("?", ("a bird", "a bird cage"), 0)
    told = ["A bird!", "a bird cage", "a birdie", "", "the bird"]
    assert [begins_with_the_answer(text, question) for text in told] == [True, False, False, False, False]
    assert begins_with_the_answer("C++ is one", Question("?", ("C", "C++"), 1))
    assert not begins_with_the_answer("3.7", Question("?", ("3", "4"), 0))
    signs = Question("?", ("+", "-"), 1)
    assert [begins_with_the_answer(text, signs) for text in (" - 3", "+", "3 -")] == [True, False, False]


def test_pass_shares_by_counting():
    """Of all pairs among four samples of which two are right, five of six have a right one."""
    assert pass_shares(np.array([2.0]), 4, [1, 2, 4, 8]) == {"1": 0.5, "2": pytest.approx(5 / 6), "4": 1.0}
