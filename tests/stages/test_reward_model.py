"""`infalign reward-model` end to end on a tiny model: three ways to train, a split by prompt, a reward by its path."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from infalign.cli import main
from infalign.rewards import load_reward
from infalign.stages.reward_model.recipe import load_reward_model_recipe
from infalign.stages.reward_model.train import encoded, load_pairs, reward_model
from infalign.types import InputError
from tests.tiny import CLOSE, tiny_causal, tiny_classifier

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "on", "in", "mat", "tree", "is", "was", "i", "you", "we"]


def write_pairs(path: Path, count: int = 400) -> str:
    """Answers that end well are chosen: easy to learn, whatever their length. Some prompts have several pairs."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        prompt = " ".join(WORDS[(number // 2 + i * i) % len(WORDS)] for i in range(4)) + f" {number // 2}"
        sides = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(2)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": sides[0] + " good"}],
                "rejected": [{"role": "assistant", "content": sides[1] + " bad"}],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    return {
        "model_name_or_path": tiny_causal(folder / "base", layers=3),
        "dataset_name": write_pairs(folder / "pairs.jsonl"),
        "num_test_prompts": 50,
        "use_cpu": True,
    }


def run(keys, output, **more):
    return reward_model(load_reward_model_recipe({**keys, "output_dir": str(output), **more}))


def test_a_head_learns_what_can_be_learnt_and_plugs_in_by_its_path(keys, tmp_path):
    found = run(keys, tmp_path / "out", freeze_backbone=True)
    assert found["accuracy"]["low"] > 0.5 and found["log_loss"] < 0.6
    assert (found["prompts"], found["training_prompts"]) == (50, 150)
    assert found["batch_difference"] < 1e-4 < found["score_spread"]
    reward = load_reward(found["folder"])
    chat, answer = [{"role": "user", "content": "the cat"}], "a dog ran on the mat"
    good, bad = ([{"role": "assistant", "content": f"{answer} {end}"}] for end in ("good", "bad"))
    scores = reward([chat, chat], [good, bad])
    assert scores[0] > scores[1]
    assert (tmp_path / "out" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "reward_model.json").read_text())["accuracy"] == found["accuracy"]


def test_a_head_s_accuracy_is_that_of_plain_forward_passes(keys, tmp_path):
    """The saved model, one pair at a time with plain transformers: as many right as reported."""
    found = run(keys, tmp_path / "out", freeze_backbone=True, keep_layers=2)
    model = AutoModelForSequenceClassification.from_pretrained(found["folder"]).eval()
    assert model.config.num_hidden_layers == 2
    pairs = load_pairs(load_reward_model_recipe({**keys, "output_dir": "unused", "freeze_backbone": True}))
    right: dict[str, list[float]] = {}
    for pair in pairs.test:
        scores = []
        for side in (pair.chosen, pair.rejected):
            ids = pairs.tokenizer.apply_chat_template(pair.prompt + side, tokenize=True, return_dict=False)
            with torch.no_grad():
                state = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
                scores.append(float(model.score(state)))
        right.setdefault(pair.key, []).append(float(scores[0] > scores[1]))
    assert found["accuracy"]["mean"] == pytest.approx(np.mean([np.mean(one) for one in right.values()]))


def test_no_prompt_is_in_both_parts_and_the_split_follows_the_seed(keys):
    def split(**more):
        pairs = load_pairs(load_reward_model_recipe({**keys, "output_dir": "unused", **more}))
        return {pair.key for pair in pairs.train}, {pair.key for pair in pairs.test}

    train, test = split()
    assert len(test) == 50 and len(train) == 150 and not train & test
    assert split() == (train, test) and split(seed=1)[1] != test
    assert split(num_test_prompts=10)[1] < test  # fewer: a part of them
    assert len(split(num_train_prompts=15)[0]) == 15


def test_a_test_split_of_its_own_is_taken_out_of_the_training_pairs(keys, tmp_path):
    rows = [json.loads(line) for line in Path(keys["dataset_name"]).read_text().splitlines()]
    for name, part in (("train", rows), ("test", rows[:100])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    more = {"dataset_name": str(tmp_path), "dataset_test_split": "test", "output_dir": "unused"}
    pairs = load_pairs(load_reward_model_recipe({**keys, **more}))
    assert len({pair.key for pair in pairs.test}) == 50
    assert not {pair.key for pair in pairs.train} & {pair.key for pair in pairs.test}


LEARNING = {"max_steps": 25, "learning_rate": 5e-3, "per_device_train_batch_size": 16, "lr_scheduler_type": "constant"}


def test_a_whole_model_learns_with_trl(keys, tmp_path):
    found = run(keys, tmp_path / "out", **LEARNING)
    assert found["accuracy"]["low"] > 0.5 and found["manifest"]["method"] == "full"


def with_margins(keys, folder, margin):
    """The pairs with a margin in every row, as TRL reads it."""
    rows = [json.loads(line) for line in Path(keys["dataset_name"]).read_text().splitlines()]
    (folder / "pairs.jsonl").write_text("".join(json.dumps({**row, "margin": margin}) + "\n" for row in rows))
    return {**keys, "dataset_name": str(folder / "pairs.jsonl")}


def test_margins_shape_both_ways_of_training(keys, tmp_path, capsys):
    """A margin of m asks for a difference that is larger by m: the head's scores spread further."""
    plain = run(keys, tmp_path / "plain", freeze_backbone=True)
    wide = run(with_margins(keys, tmp_path, 5.0), tmp_path / "wide", freeze_backbone=True)
    assert "the data's margins are part of the loss (300 pairs)" in capsys.readouterr().out
    assert wide["score_spread"] > 1.5 * plain["score_spread"]
    none = run(with_margins(keys, tmp_path, 0.0), tmp_path / "none", freeze_backbone=True)
    assert none["score_spread"] == pytest.approx(plain["score_spread"], rel=1e-3)
    losses = {}
    for margin in (0.0, 5.0):
        options = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-6}
        out = tmp_path / f"trained{margin}"
        run(with_margins(keys, tmp_path, margin), out, **options)
        log = next((out / "training").rglob("trainer_state.json"))
        losses[margin] = json.loads(log.read_text())["log_history"][0]["loss"]
    assert losses[0.0] + 2.0 < losses[5.0] < losses[0.0] + 5.0  # log(1 + e^(m - d)) grows by less than m


def test_pairs_that_differ_in_tool_calls_are_pairs(keys, tmp_path):
    """What the template makes of a call is trained on; the row's tools reach the template too."""
    base = tmp_path / "base"
    shutil.copytree(keys["model_name_or_path"], base)
    (base / "chat_template.jinja").write_text(
        "{% if tools %}the {% endif %}{% for m in messages %}{{ m['content'] or '' }} "
        "{% for c in m.get('tool_calls') or [] %}"
        "{{ 'cat' if c['function']['arguments']['city'] == 'Oslo' else 'dog' }} {% endfor %}{% endfor %}"
    )
    data = Path(__file__).parent.parent / "cases" / "rm_tools.jsonl"
    changed = {**keys, "model_name_or_path": str(base), "dataset_name": str(data), "num_test_prompts": 1}
    recipe = load_reward_model_recipe({**changed, "output_dir": str(tmp_path / "o")})
    pairs = load_pairs(recipe)
    assert len(pairs.train) + len(pairs.test) == 4
    for chosen, rejected in encoded(recipe, pairs.tokenizer, pairs.train):
        texts = [pairs.tokenizer.decode(ids) for ids in (chosen, rejected)]
        assert all(text.startswith("the ") for text in texts)
        assert "cat" in texts[0] and "dog" in texts[1]


def test_adapters_are_merged_and_score_as_they_were_trained(keys, tmp_path):
    """The saved model against peft's own, adapters attached; every weight of it is trained or the base's."""
    from peft import PeftModel  # noqa: PLC0415 - only this test needs it

    more = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 2e-2}
    found = run(keys, tmp_path / "out", **{**LEARNING, **more})
    assert found["manifest"]["method"] == "adapters" and found["accuracy"]["low"] > 0.5
    base = AutoModelForSequenceClassification.from_pretrained(keys["model_name_or_path"], num_labels=1)
    attached = PeftModel.from_pretrained(base, str(tmp_path / "out" / "training" / "adapter")).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(found["folder"]).eval()
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    attached.config.pad_token_id = merged.config.pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, attached(input_ids=ids).logits, atol=CLOSE, rtol=0)
    original = AutoModelForSequenceClassification.from_pretrained(keys["model_name_or_path"], num_labels=1).state_dict()
    for name, weight in merged.state_dict().items():
        if name != "score.weight":
            assert torch.equal(weight, original[name]) != ("q_proj" in name or "v_proj" in name), name


def test_a_finished_model_is_reused_and_another_recipe_is_refused(keys, tmp_path, capsys):
    run(keys, tmp_path / "out", freeze_backbone=True)
    model = tmp_path / "out" / "reward_model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    capsys.readouterr()
    run(keys, tmp_path / "out", freeze_backbone=True)
    assert "is trained already" in capsys.readouterr().out and model.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"was made with other settings \(max_length"):
        run(keys, tmp_path / "out", freeze_backbone=True, max_length=64)
    run(keys, tmp_path / "out", freeze_backbone=True, max_length=64, overwrite=True)
    assert model.stat().st_mtime_ns != before


def test_a_killed_training_goes_on_from_its_checkpoint(keys, tmp_path, capsys, monkeypatch):
    """Stopped after step 4 of 8 and run again: the weights of a run that was not stopped."""
    from infalign.training.progress import TrainingProgress  # noqa: PLC0415 - patched

    steps = {**LEARNING, "max_steps": 8, "save_steps": 4}
    whole = run(keys, tmp_path / "whole", **steps)

    class Stop(Exception):
        pass

    def stop(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 5:
            raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(TrainingProgress, "on_log", stop)
        run(keys, tmp_path / "killed", **steps)
    made = []
    monkeypatch.setattr(TrainingProgress, "on_step_end", lambda *args, **kwargs: made.append(1))
    resumed = run(keys, tmp_path / "killed", **steps)
    assert len(made) == 4  # the other four were made before
    models = [AutoModelForSequenceClassification.from_pretrained(one["folder"]) for one in (whole, resumed)]
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_long_pairs_lose_tokens_at_the_left_in_training_and_in_use(keys, tmp_path, capsys):
    found = run(keys, tmp_path / "out", freeze_backbone=True, max_length=8)
    assert "300 of 300 training pairs are longer than 8 tokens" in capsys.readouterr().err
    assert found["accuracy"]["low"] > 0.5  # the end is what tells


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freeze_backbone": True, "learning_rate": 1e-3}, "takes no training keys .learning_rate."),
        ({"keep_layers": 2}, "keep_layers goes with freeze_backbone"),
        ({"freeze_backbone": True, "keep_layers": 9}, "keep_layers is 9, the backbone has 3 layers"),
        ({"num_test_prompts": 0}, "num_test_prompts must be at least 1"),
        ({"confidence": 1.5}, "confidence must be between 0 and 1"),
        ({"seed": -1}, "seed must be between 0"),
        ({"num_test_prompts": 500}, "asked for 500 test prompts"),
        ({"dataset_name": "nowhere.jsonl"}, "no such file or folder"),
        ({"max_steps": -1, "num_train_epochs": 0}, "training made 0 steps"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"learnin_rate": 1.0}, "unknown key learnin_rate: did you mean 'learning_rate'"),
    ],
)
def test_mistakes_are_told_in_one_line(keys, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run(keys, tmp_path / "out", **flags)


def test_an_output_that_is_a_file(keys, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"output_dir .*out is a file: give a folder"):
        run(keys, tmp_path / "out", freeze_backbone=True)


def test_an_encoder_cannot_be_frozen(keys, tmp_path):
    encoder = tiny_classifier(tmp_path / "bert", "bert")
    with pytest.raises(InputError, match="freeze_backbone needs a decoder"):
        run({**keys, "model_name_or_path": encoder}, tmp_path / "out", freeze_backbone=True)


def test_from_the_command_line(keys, tmp_path, capsys):
    words = [w for name, value in keys.items() if name != "use_cpu" for w in (f"--{name}", str(value))]
    assert main(["reward-model", *words, "--output_dir", str(tmp_path / "out"), "--freeze_backbone"]) == 0
    told = capsys.readouterr().out
    for part in ("held out: ", "of 50 prompts, none of which was trained on", "95 % interval", "calibration error",
                 f"use it: reward: {tmp_path / 'out' / 'reward_model'}"):  # fmt: skip
        assert part in told
    assert main(["reward-model", "--output_dir", "x"]) == 2
    assert "model_name_or_path, dataset_name must be given" in capsys.readouterr().err
