"""How a batch is cut changes nothing: 8 x 1 = 2 x 4 = 1 x 8 accumulated, in losses and weights (test_many: processes).

In float64 with SGD, so that what differs is no rounding; the second pass over each generation is off-policy, so that
losses are not zero.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from tests.tiny import tiny_causal
from tests.training.test_resume import rows
from tests.training.test_trainer import config, token_sum


def train(model, folder, batch, accumulated):
    """Losses and weights after four steps."""
    arguments = CTRLConfig(
        **config(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=4,
            num_iterations=2,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
        )
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    subject = CTRLTrainer(policy, CTRLReward(token_sum, identity), arguments, train_dataset=rows())
    subject.train()
    losses = [row["loss"] for row in subject.state.log_history if "loss" in row]
    return torch.tensor(losses), torch.cat([p.detach().flatten() for p in subject.model.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_causal(folder / "model", "llama")
    return model, *train(model, folder / "8x1", 8, 1)


@pytest.mark.parametrize(("batch", "accumulated"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_trains_like_one_batch(batch, accumulated, whole, tmp_path):
    model, losses, weights = whole
    found, moved = train(model, tmp_path, batch, accumulated)
    assert losses.abs().max() > 1e-2, "a loss of zero compares nothing"
    torch.testing.assert_close(found, losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(moved, weights, atol=1e-5, rtol=0)
