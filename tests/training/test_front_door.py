"""`CTRLTrainer` from Python: it takes what TRL's trainer takes, in the same order, and says what it can't do."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM
from trl import RLOOTrainer

from infalign.theory.procedures import (
    BestOfN,
    BottomOfN,
    KthOfN,
    PessimisticOfN,
    Procedure,
    RandomN,
    SoftBestOfN,
    TopOfN,
    WorstOfN,
)
from infalign.theory.transforms import identity, log, log_mirror
from infalign.training.card import model_card
from infalign.training.config import CTRLConfig
from infalign.training.direct import Direct
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.tiny import tiny_causal, tiny_tokenizer
from tests.training.test_trainer import PROMPTS, config, references, token_sum, trainer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


class TestSignature:
    def test_is_trls_with_ours_after_it(self):
        theirs, ours = (list(inspect.signature(one.__init__).parameters.values()) for one in (RLOOTrainer, CTRLTrainer))
        count = len(theirs)
        assert [(one.name, one.kind, one.default) for one in ours[:count]] == [
            (one.name, one.kind, one.default) for one in theirs
        ]
        assert [one.name for one in ours[count:]] == ["procedure", "render", "identity"]
        assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in ours[count:])

    def test_positions(self, llama, tmp_path):
        arguments = CTRLConfig(**config(tmp_path, num_generations_eval=2))
        tokenizer = tiny_tokenizer()
        subject = CTRLTrainer(llama, CTRLReward(token_sum, identity), arguments, references(), references(), tokenizer)
        assert subject.processing_class is tokenizer and len(subject.eval_dataset) == len(PROMPTS)
        subject.train()
        assert subject.state.global_step == 2

    def test_no_arguments(self, llama, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        reward = CTRLReward(token_sum, type("Transform", (), {"beta": 0.2, "__call__": lambda self, u: u})())
        rows = Dataset.from_dict({"prompt": PROMPTS * 2, "ref_rewards": [[1.0, 2.0]] * 2 * len(PROMPTS)})
        subject = CTRLTrainer(llama, reward, train_dataset=rows)
        assert isinstance(subject.args, CTRLConfig) and subject.args.beta == 0.2
        assert subject.args.output_dir == f"{llama.rpartition('/')[2]}-CTRL" and subject.args.num_generations == 8

    def test_no_arguments_and_a_loaded_model(self, llama, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        reward = CTRLReward(token_sum, type("Transform", (), {"beta": 0.2, "__call__": lambda self, u: u})())
        subject = CTRLTrainer(AutoModelForCausalLM.from_pretrained(llama), reward, train_dataset=references())
        assert subject.args.output_dir == f"{llama.rpartition('/')[2]}-CTRL"

    @pytest.mark.parametrize("several", [list, tuple])
    def test_several_rewards(self, several, llama, tmp_path):
        def short(completion_ids, **_):
            return [-float(len(ids)) for ids in completion_ids]

        functions = several([CTRLReward(token_sum, identity), short])
        subject = CTRLTrainer(llama, functions, CTRLConfig(**config(tmp_path)), references())
        subject.train()
        assert {"rewards/ctrl/mean", "rewards/short/mean"} <= subject.state.log_history[0].keys()


def test_a_dictionary_of_splits_is_no_training_set(llama, tmp_path):
    splits = DatasetDict({"train": references(), "test": references()})
    with pytest.raises(InputError, match=r"train_dataset is a dictionary of data sets \('train', 'test'\): give one"):
        CTRLTrainer(llama, CTRLReward(token_sum, identity), CTRLConfig(**config(tmp_path)), splits)


class TestHeldOut:
    def subject(self, llama, folder, held_out, **changes):
        return CTRLTrainer(
            llama,
            CTRLReward(token_sum, identity),
            CTRLConfig(**config(folder, **changes)),
            references(),
            held_out,
            procedure=BestOfN(2),
        )

    @pytest.mark.parametrize("kind", [dict, DatasetDict])
    def test_several_sets_each_by_its_name(self, kind, llama, tmp_path):
        sets = kind({"near": references(), "far": references(value=1000.0)})
        subject = self.subject(llama, tmp_path, sets, eval_strategy="steps", eval_steps=1)
        metrics = subject.evaluate()
        names = ("winrate", "winrate_1", "kl_seq", "completion_length", "quantile_distance")
        assert set(metrics) == {f"eval_{kind}_{name}" for kind in ("near", "far") for name in names}
        assert metrics["eval_far_winrate"] == 0.0 < metrics["eval_near_winrate"]
        subject.train()
        logged = [row for row in subject.state.log_history if "eval_near_winrate" in row]
        assert len(logged) == 2 and sum("eval_far_kl_seq" in row for row in subject.state.log_history) == 2

    def test_one_of_them_by_name(self, llama, tmp_path):
        subject = self.subject(llama, tmp_path, {"near": references(), "far": references(value=1000.0)})
        assert subject.evaluate("far")["eval_winrate"] == 0.0
        with pytest.raises(InputError, match=r"evaluate\('fat'\): the trainer's eval_dataset has \['near', 'far'\]"):
            subject.evaluate("fat")
        with pytest.raises(InputError, match="has no names: it is one data set"):
            self.subject(llama, tmp_path, references()).evaluate("near")

    def test_sets_that_are_handed_over(self, llama, tmp_path):
        subject = self.subject(llama, tmp_path, None)
        metrics = subject.evaluate({"far": references(value=1000.0)}, metric_key_prefix="test")
        assert {"test_far_winrate", "test_far_winrate_1", "test_far_kl_seq"} <= set(metrics)
        assert all(name.startswith("test_far_") for name in metrics)

    def test_without_reference_rewards(self, llama, tmp_path):
        bare = Dataset.from_dict({"prompt": PROMPTS})
        for held_out, where in ((bare, "eval_dataset has"), ({"a": references(), "b": bare}, "eval_dataset 'b' has")):
            with pytest.raises(InputError, match=f"{where} no column 'ref_rewards' with the reference rewards: attach"):
                self.subject(llama, tmp_path, held_out)
        with pytest.raises(InputError, match="the eval_dataset has no column 'ref_rewards'"):
            self.subject(llama, tmp_path, None).evaluate(bare)
        with pytest.raises(InputError, match="the eval_dataset is empty"):
            self.subject(llama, tmp_path, None).evaluate(references().select([]))

    def test_training_data_without_reference_rewards(self, llama, tmp_path):
        with pytest.raises(InputError, match="train_dataset has no column 'ref_rewards'"):
            trainer(llama, tmp_path, dataset=Dataset.from_dict({"prompt": PROMPTS}))

    @pytest.mark.parametrize("name", ["prompts", "completions", "trainer_state", "self"])
    def test_a_column_called_like_an_argument_of_a_reward(self, name, llama, tmp_path):
        """TRL would hand it over twice, a TypeError in the first step, or put its own in its place."""
        rows = references().add_column(name, ["x"] * len(references()))
        with pytest.raises(InputError, match=f"train_dataset has a column called '{name}', like an argument of every"):
            trainer(llama, tmp_path, dataset=rows)
        with pytest.raises(InputError, match=f"eval_dataset 'b' has a column called '{name}'"):
            self.subject(llama, tmp_path, {"a": references(), "b": rows})
        trainer(llama, tmp_path, dataset=rows.rename_column(name, f"my_{name}")).train()

    @pytest.mark.parametrize("nothing", [[], None])
    def test_a_row_without_reference_rewards(self, nothing, llama, tmp_path):
        rows = [dict(row) for row in references()]
        rows[1]["ref_rewards"] = rows[3]["ref_rewards"] = nothing
        dataset = Dataset.from_list(rows)
        with pytest.raises(InputError, match=r"ref_rewards is empty in rows 1, 3 \(from 0\): leave those"):
            trainer(llama, tmp_path, dataset=dataset)
        trainer(llama, tmp_path, dataset=dataset.filter(lambda row: row["ref_rewards"]).repeat(2)).train()

    def test_reference_rewards_that_are_no_lists(self, llama, tmp_path):
        rows = Dataset.from_list([{**row, "ref_rewards": 1.5} for row in references()])
        with pytest.raises(InputError, match=r"ref_rewards must hold a list of numbers in every row, got 1.5"):
            trainer(llama, tmp_path, dataset=rows)


class TestPadding:
    """A tokenizer whose padding was added without an embedding: what is under the mask does not matter."""

    def model(self, folder, vocabulary):
        tokenizer = tiny_tokenizer(pad=None)
        path = tiny_causal(folder, "llama", tokenizer=tokenizer, vocab_size=vocabulary or len(tokenizer))
        tokenizer.add_special_tokens({"pad_token": "<pads>"})
        tokenizer.save_pretrained(path)
        return path, tokenizer

    def test_trains_as_with_a_token_inside(self, tmp_path, capsys):
        path, tokenizer = self.model(tmp_path / "model", None)
        assert tokenizer.pad_token_id == AutoModelForCausalLM.from_pretrained(path).config.vocab_size
        moved = []
        for shared in (True, False):
            for inside in (False, True):
                if inside:
                    tokenizer.pad_token = tokenizer.unk_token
                    tokenizer.save_pretrained(path)
                subject = trainer(path, tmp_path / "out", shared_prefix=shared)
                subject.train()
                moved.append(torch.cat([p.detach().flatten() for p in subject.model.parameters()]))
                told = "the pad token '<pads>'" in capsys.readouterr().err
                assert told == (not inside)
            tokenizer.pad_token = "<pads>"
            tokenizer.save_pretrained(path)
        assert torch.equal(moved[0], moved[1]) and torch.equal(moved[2], moved[3])

    def test_what_is_saved_can_be_loaded(self, tmp_path):
        path, _ = self.model(tmp_path / "model", None)
        subject = trainer(path, tmp_path / "out")
        subject.save_model(str(tmp_path / "saved"))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert saved.config.pad_token_id == subject.processing_class.eos_token_id

    def test_another_models_tokenizer_is_refused(self, tmp_path):
        path, _ = self.model(tmp_path / "model", 2)  # the end token is the third
        config_file = tmp_path / "model" / "config.json"
        held = json.loads(config_file.read_text()) | {"pad_token_id": None, "eos_token_id": None}
        config_file.write_text(json.dumps(held))
        with pytest.raises(InputError, match="outside the model's vocabulary of 2: it is another model's tokenizer"):
            trainer(path, tmp_path / "out")


class TestResumingWithSomethingElse:
    def run(self, llama, folder, reward=token_sum, transform=identity, dataset=None, **changes):
        settings = {"save_strategy": "steps", "save_steps": 1, **changes}
        return trainer(llama, folder, CTRLReward(reward, transform), dataset, **settings)

    @pytest.fixture(scope="class")
    def stopped(self, llama, tmp_path_factory):
        folder = tmp_path_factory.mktemp("stopped")
        self.run(llama, folder, max_steps=1).train()
        return folder / "checkpoint-1"

    def test_the_same_goes_on(self, llama, stopped, tmp_path, capsys):
        again = self.run(llama, tmp_path, dataset=Dataset.from_list(references().to_list()))
        again.train(resume_from_checkpoint=str(stopped))
        assert again.state.global_step == 2 and "another reward" not in capsys.readouterr().err

    def test_another_reward_is_told(self, llama, stopped, tmp_path, capsys):
        """It may be the same one with a fault mended, which goes on."""

        def other(completion_ids, **_):
            return [-float(sum(ids)) for ids in completion_ids]

        again = self.run(llama, tmp_path, reward=other)
        again.train(resume_from_checkpoint=str(stopped))
        assert again.state.global_step == 2
        assert "checkpoint-1 was trained with another reward, or with other source of it" in capsys.readouterr().err

    @pytest.mark.parametrize("what", ["data", "transform", "beta"])
    def test_another_is_refused(self, what, llama, stopped, tmp_path):
        changed = references().to_list()
        changed[-1]["prompt"] = "a tree"
        changes = {
            "data": {"dataset": Dataset.from_list(changed)},
            "transform": {"transform": log},
            "beta": {"beta": 0.2},
        }[what]
        with pytest.raises(InputError, match=rf"was made by another run \({what}: .*--initial_weights"):
            self.run(llama, tmp_path, **changes).train(resume_from_checkpoint=str(stopped))

    def test_fewer_rows_and_images_are_content_too(self, llama, tmp_path):
        """Of a long data set some rows are read, and their number; a row's images by their type."""
        rows = [{"prompt": f"the cat {number}", "ref_rewards": [float(number)]} for number in range(300)]
        found = {
            self.run(llama, tmp_path, dataset=Dataset.from_list(some)).identity["data"]
            for some in (rows, rows[:-1], rows[1:], rows[::-1], rows)
        }
        assert len(found) == 4


@pytest.mark.parametrize(
    ("procedure", "tag"),
    [
        (BestOfN(4), "best-of-n"),
        (WorstOfN(4), "worst-of-n"),
        (KthOfN(2, 4), "kth-of-n"),
        (RandomN([0.5, 0.5]), "random-n"),
        (SoftBestOfN(4, 2.0), "soft-best-of-n"),
        (TopOfN(2, 4), "top-of-n"),
        (BottomOfN(2, 4), "bottom-of-n"),
        (PessimisticOfN(4, 0.1), "pessimistic-of-n"),
        (Procedure(BestOfN(4).components, "mine"), None),
        (None, None),
    ],
)
def test_the_card_has_the_procedures_tag(procedure, tag, llama, tmp_path):
    subject = trainer(llama, tmp_path)
    subject.procedure = procedure
    header = yaml.safe_load(model_card(subject, "name").split("---")[1])
    assert header["tags"] == ["infalign", "ctrl", "trl", "rloo", *([tag] if tag else [])]
    assert np.isfinite(subject.args.beta)


def test_the_card_knows_the_kl_of_every_transform(llama, tmp_path):
    """Identity at beta .2 aims at .650117 nats; a transform without a policy has no KL."""
    subject = CTRLTrainer(llama, CTRLReward(token_sum, identity), CTRLConfig(**config(tmp_path)), references())
    subject.args.beta = 0.2
    assert "| KL coefficient | 0.2 (target KL 0.6501 nats) |" in model_card(subject, "name")
    subject.ctrl_reward.transform = log_mirror  # it diverges below a beta of 1
    assert "| KL coefficient | 0.2 (target KL not known) |" in model_card(subject, "name")


def test_the_card_of_the_direct_objective_and_of_a_steered_kl(llama, tmp_path):
    arguments = CTRLConfig(**config(tmp_path, beta=0.2, target_kl=0.5, save_strategy="steps", save_steps=1))
    subject = CTRLTrainer(llama, CTRLReward(token_sum, Direct(BestOfN(2))), arguments, references())
    subject.train()
    card = (tmp_path / "README.md").read_text()
    assert "| transform | none: the win rate itself (direct objective) |" in card
    assert (
        f"| KL coefficient | {subject.kl_control.beta:.6g} (at the end; it was steered: target KL 0.5 nats) |" in card
    )
