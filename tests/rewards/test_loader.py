"""The loader: files, modules, TRL's rewards, builders, objects, models; and each way to miss."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infalign.rewards.loader import load_reward
from infalign.runtime.plugins import find_object
from infalign.types import InputError, RewardError
from tests.tiny import CLOSE, tiny_classifier

ROOT = Path(__file__).parents[2]
PROMPTS, COMPLETIONS = ["p", "q"], ["x", "yy"]
SOURCE = """
import helper
SIZE = 3

def lengths(completions, **kwargs):
    return [len(c) for c in completions]

def scaled(completions, factor=1.0):
    return [factor * len(c) for c in completions]

def build(factor=2.0):
    return lambda completions, **_: [factor * len(c) for c in completions]

def broken(factor):
    raise KeyError("no model")

def nothing():
    return 3

def open_builder(**options):
    return lambda completions: [options["value"]] * len(completions)

class Counter:
    def __init__(self, start=0):
        self.start = start
    def __call__(self, prompts, completions, completion_ids, **kwargs):
        return [self.start + len(c) for c in completions]

async def later(completions, **kwargs):
    return [0.5 for _ in completions]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "helper.py").write_text("")
    return tmp_path


def scores(*args, **options):
    return load_reward(*args, **options)(PROMPTS, COMPLETIONS).tolist()


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("lengths", None, [1, 2]),
        ("scaled", None, [1, 2]),
        ("scaled", {"factor": 3}, [3, 6]),
        ("build", None, [2, 4]),
        ("build", {"factor": 5}, [5, 10]),
        ("open_builder", {"value": 7}, [7, 7]),
        ("Counter", None, [1, 2]),
        ("Counter", {"start": 10}, [11, 12]),
        ("later", None, [0.5, 0.5]),
    ],
)
def test_what_is_called_how(folder, name, kwargs, expected):
    assert scores(f"mine.py:{name}", kwargs, base_dir=folder) == expected


def test_names():
    folder = ROOT / "reward_models"
    assert load_reward("length.py:build", base_dir=folder).name == "length"
    assert load_reward("length.py:build", base_dir=folder, name="words").__name__ == "words"
    assert load_reward("trl.rewards.think_format_reward").name == "think_format_reward"
    assert load_reward(lambda completions: []).name == "reward"


def test_paths_are_tried_from_the_recipe_then_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert scores("mine.py:lengths", base_dir=folder / "elsewhere") == [1, 2]
    assert scores(f"{folder / 'mine.py'}:lengths") == [1, 2]
    assert scores("mine:lengths", base_dir=folder) == [1, 2]
    assert scores("mine.lengths", base_dir=folder) == [1, 2]
    assert str(folder) not in sys.path


def test_objects():
    assert scores(lambda completions: [1, 2]) == [1, 2]
    again = load_reward(load_reward(lambda completions: [1, None], name="inner"))
    np.testing.assert_array_equal(again(PROMPTS, COMPLETIONS), [1, np.nan])
    assert again.name == "inner" and again.counts["missing"] == 1 and "inner" in repr(again)


def test_trl_rewards_by_name_on_chats():
    chats = [
        [{"role": "assistant", "content": "<think>a</think>b"}],
        [{"role": "assistant", "content": "b"}],
    ]
    for spec in ("trl.rewards.think_format_reward", "trl.rewards:think_format_reward"):
        assert load_reward(spec)([[]] * 2, chats).tolist() == [1.0, 0.0]
    overlong = load_reward(
        "trl.rewards.get_soft_overlong_punishment", {"max_completion_len": 100, "soft_punish_cache": 20}
    )
    assert overlong([[]] * 2, chats, [[1] * 90, [1] * 10]).tolist() == [-0.5, 0.0]
    repeats = load_reward("trl.rewards.get_repetition_penalty_reward", {"ngram_size": 2})
    assert repeats([[]] * 2, chats, [[1, 2, 3, 4], [5] * 5]).tolist() == [0.0, -0.75]


def test_guard_options_arrive(folder):
    reward = load_reward(
        "mine.py:lengths",
        base_dir=folder,
        on_error="mask",
        retries=0,
        timeout=3,
        backoff=0,
        strip_reasoning=("<t>", "</t>"),
    )
    assert reward(["p"], ["<t>x</t>ab"]).tolist() == [2]
    assert (reward.guard.on_error, reward.guard.retries, reward.guard.timeout) == ("mask", 0, 3)


def test_fingerprints_follow_source_and_arguments_not_the_place(folder, tmp_path_factory):
    def print_of(*args, **options):
        return load_reward(*args, **{"base_dir": folder, **options}).fingerprint

    first = print_of("mine.py:build")
    other = tmp_path_factory.mktemp("copy")
    (other / "renamed.py").write_text(SOURCE.replace("import helper", "import helper", 1))
    (other / "helper.py").write_text("")
    assert first == print_of("mine.py:build") == print_of("renamed.py:build", base_dir=other)
    changed = [
        print_of("mine.py:build", {"factor": 2.5}),
        print_of("mine.py:Counter"),
        print_of("mine.py:build", strip_reasoning=("a", "b")),
    ]
    (folder / "mine.py").write_text(SOURCE + "\n# another version\n")
    assert len({first, *changed, print_of("mine.py:build")}) == 5
    assert first == load_reward("renamed.py:build", base_dir=other, on_error="mask").fingerprint
    assert print_of("trl.rewards.think_format_reward") == print_of("trl.rewards:think_format_reward")


def test_fingerprints_of_objects_follow_what_they_hold():
    def constant(value):
        return lambda completions: [value] * len(completions)

    class Held:
        def __init__(self, value):
            self.value = value

        def __call__(self, completions):
            return [self.value] * len(completions)

    lambdas = [lambda completions: [1], lambda completions: [2]]
    made = [constant(1), constant(1), constant(2), Held(1), Held(1), Held(2), *lambdas]
    prints = [load_reward(function).fingerprint for function in made]
    assert prints[0] == prints[1] and prints[3] == prints[4]
    assert len(set(prints)) == 6


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("missing.py:f", None, r"'missing.py': no such file under .*; that folder has helper.py, mine.py; paths are"),
        ("mine.py:length", None, r"'mine.py' has no 'length'; did you mean 'lengths'\? it has Counter, broken, build"),
        ("mine.py", None, r"say which name of it, mine.py:NAME; it has Counter"),
        ("mine.py:", None, r"say which name of it"),
        ("mine.py:SIZE", None, r"reward 'SIZE' is not callable: 3 \(int\)"),
        ("mine.py:broken", {"factor": 1}, r"building it with \{'factor': 1\} failed \(KeyError: 'no model'\)"),
        ("mine.py:build", {"fcator": 1}, r"failed \(TypeError: .*unexpected keyword argument 'fcator'"),
        ("mine.py:nothing", None, r"the builder returned 3 \(int\), no callable"),
        ("bad.py:f", None, r"bad.py: importing the file failed \(ModuleNotFoundError: No module named 'nowhere_x'\)"),
        ("bad:f", None, r"'bad:f': importing bad failed \(ModuleNotFoundError: No module named 'nowhere_x'\)"),
        ("worse:f", None, r"'worse:f': importing worse failed \(ZeroDivisionError"),
        ("nowhere_y.sub:f", None, r"no module named 'nowhere_y'; give package.module:name"),
        ("trl.rewards.think_reward", None, r"'trl.rewards' has no 'think_reward'; did you mean 'think_format_reward'"),
        ("./folder", None, r"no such folder under"),
        ("a b", None, r"not of the form path/to/file.py:name"),
        ("empty", None, r"holds no model \(no config.json, no adapter_config.json\)"),
        (3, None, r"a reward is a spec, a callable or a model, got 3 \(int\)"),
    ],
)
def test_each_way_to_miss(folder, spec, kwargs, message):
    (folder / "bad.py").write_text("import nowhere_x\n") if "bad" in str(spec) else None
    (folder / "worse.py").write_text("1 / 0\n") if "worse" in str(spec) else None
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        load_reward(spec, kwargs, base_dir=folder)


def test_other_things_can_be_looked_up_by_the_same_names(folder):
    assert find_object("mine.py:SIZE", folder, what="transform").value == 3
    for spec in ("mine.py:size", "missing.py:f", "nowhere_y:f", "mine.py"):
        with pytest.raises(InputError, match=r"^transform "):
            find_object(spec, folder, what="transform")
    assert find_object("owner/model", folder) is None


def test_models_by_folder_and_by_object(tmp_path):
    path = tiny_classifier(tmp_path / "rm")
    by_path = load_reward("rm", {"batch_tokens": 64}, base_dir=tmp_path)
    by_absolute = load_reward(path)
    by_object = load_reward(by_path.function.model, {"tokenizer": by_path.function.tokenizer})
    texts = ["the cat", "the dog ran"], [" sat", " ."]
    expected = by_path(*texts)
    np.testing.assert_allclose(by_absolute(*texts), expected, atol=CLOSE)
    np.testing.assert_allclose(by_object(*texts), expected, atol=CLOSE)
    assert by_path.name == "rm" and expected.dtype == np.float64
    assert by_path.fingerprint == by_absolute.fingerprint == by_object.fingerprint
    other = load_reward(tiny_classifier(tmp_path / "other", seed=1))
    assert other.fingerprint != by_path.fingerprint
    with pytest.raises(InputError, match=r"takes no argument 'labels'; one of .*label"):
        load_reward(path, {"labels": 1})


def test_loading_a_function_imports_no_torch():
    code = (
        "import sys; from infalign.rewards import load_reward;"
        "r = load_reward('reward_models/length.py:build'); assert r(['p'], ['a b']).tolist() == [2.0];"
        "import infalign.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the plug-ins that a user copies from


def plugin(name, kwargs=None):
    return load_reward(f"{name}.py:build", kwargs, base_dir=ROOT / "reward_models")


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_vader():
    good, bad, plain = plugin("vader")([""] * 3, chat("I love this, great!", "I hate this, awful.", "the chair"))
    assert good > 0.5 > -0.5 > bad and plain == 0.0


def test_vader_says_what_is_missing(monkeypatch, tmp_path):
    shutil.copy(ROOT / "reward_models" / "vader.py", tmp_path)  # a file runs once a process, and this one has run
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(InputError, match="vaderSentiment is not installed; pip install"):
        load_reward("vader.py:build", base_dir=tmp_path)


def test_length():
    assert plugin("length")([""] * 2, ["a b c", ""]).tolist() == [3, 0]
    assert plugin("length", {"target": 2})([""] * 2, chat("a b c", "a b")).tolist() == [-1, 0]
    assert plugin("length", {"unit": "characters"})([""], ["a b"]).tolist() == [3]
    assert plugin("length", {"unit": "tokens"})([""], ["a b"], [[7, 8, 9, 10]]).tolist() == [4]
    with pytest.raises(InputError, match="unit is words, characters or tokens, got 'lines'"):
        plugin("length", {"unit": "lines"})


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("so it is 42.", "42", 1.0),
        ("42 or rather 43", 42, 0.0),
        ("it costs $1,234.50", "1234.5", 1.0),
        (r"so \boxed{7}, after 2 steps", "7", 1.0),
        ("#### 8\n", "work 3 + 5\n#### 8", 1.0),
        ("-3", "3", 0.0),
        ("Paris", " paris ", 1.0),
        (r"\boxed{Paris} in 2 steps", "Paris", 1.0),
        ("London", "Paris", 0.0),
        ("", "1", 0.0),
    ],
)
def test_verifier(text, answer, expected):
    assert plugin("verifier")(["q"], chat(text), answer=[answer]).tolist() == [expected]


def test_verifier_without_an_answer_or_a_column():
    np.testing.assert_array_equal(plugin("verifier")(["q"], ["1"], answer=[None]), [np.nan])
    assert plugin("verifier", {"column": "solution"})(["q"], ["1"], solution=[1]).tolist() == [1.0]
    reward = load_reward("verifier.py:build", base_dir=ROOT / "reward_models", retries=0)
    with pytest.raises(RewardError, match="no column 'answer'"):
        reward(["q"], ["1"], other=[1])


@pytest.mark.parametrize("where", ["import", "build"])
def test_a_file_that_exits_does_not_end_the_run_in_silence(tmp_path, where):
    body = "raise SystemExit(0)" if where == "import" else "def build():\n    raise SystemExit(0)"
    (tmp_path / "bad.py").write_text(f"{body}\n")
    with pytest.raises(InputError, match="SystemExit"):
        load_reward("bad.py:build", base_dir=tmp_path)
