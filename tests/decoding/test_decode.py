"""The decoder chooses what the procedure says, whatever the order of prompts and the batches."""

from __future__ import annotations

import numpy as np
import pytest

from infalign import BestOfN, BottomOfN, KthOfN, PessimisticOfN, SoftBestOfN, TopOfN, WorstOfN
from infalign.decoding.decode import decode, plan_decoding
from infalign.runtime.seeds import uniforms
from infalign.types import Prompt, Sample, prompt_key

PROMPTS = [Prompt(text, prompt_key(text)) for text in ("a", "b b", "c c c", "d", "e e")]
IDS = [tuple(range(1, len(prompt.content) + 1)) for prompt in PROMPTS]


class Digits:
    """A sampler whose completions are the first digits of their own stream."""

    def __init__(self):
        self.batches = []

    def sample(self, requests):
        self.batches.append(len(requests))
        texts = [str(int(uniforms(0, one.key, one.index, 1)[0] * 1000)) for one in requests]
        return [
            Sample(one.key, one.index, (1,), np.zeros(1, np.float32), text, True)
            for one, text in zip(requests, texts, strict=True)
        ]


def score(prompts, samples):
    assert [prompt.key for prompt in prompts] == [sample.key for sample in samples]
    return np.array([float(sample.text) for sample in samples])


def decoded(procedure, sampler, score, prompts=PROMPTS, ids=IDS, tokens=20, seed=0):
    batches = plan_decoding(prompts, ids, procedure, max_tokens=2, tokens_per_batch=tokens)
    by_key = {prompt.key: prompt for prompt in prompts}
    return [one for batch in decode(batches, by_key, sampler, score, procedure, seed) for one in batch]


def chosen(procedure, **changes):
    return {one.prompt.content: one for one in decoded(procedure, Digits(), score, **changes)}


@pytest.mark.parametrize(("procedure", "rank"), [(BestOfN(4), -1), (WorstOfN(4), 0), (KthOfN(2, 4), -2)], ids=repr)
def test_it_picks_the_rank(procedure, rank):
    for one in chosen(procedure).values():
        assert float(one.text) == np.sort(one.rewards_N)[rank]
        assert len(one.candidates) == 4


@pytest.mark.parametrize(
    ("procedure", "ranks"),
    [(TopOfN(2, 4), {2, 3}), (BottomOfN(2, 4), {0, 1}), (PessimisticOfN(4, 0.1), {2, 3})],
    ids=repr,
)
def test_it_picks_one_of_the_ranks(procedure, ranks):
    """lam = 1 - sqrt(.2) = .55: the pessimistic decoder's weight begins in the third of four cells."""
    found = [one for seed in range(8) for one in chosen(procedure, seed=seed).values()]
    assert {int((one.rewards_N < float(one.text)).sum()) for one in found} == ranks


@pytest.mark.parametrize("procedure", [SoftBestOfN(4, 2.0), TopOfN(2, 4), PessimisticOfN(4, 0.1)], ids=repr)
def test_order_and_batches_do_not_matter(procedure):
    reordered = {"prompts": PROMPTS[::-1], "ids": IDS[::-1], "tokens": 9}
    first = {name: one.chosen for name, one in chosen(procedure).items()}
    assert first == {name: one.chosen for name, one in chosen(procedure, **reordered).items()}
    others = [{name: one.chosen for name, one in chosen(procedure, seed=seed).items()} for seed in range(1, 6)]
    assert any(first != other for other in others)


def test_unscored_candidates_are_never_chosen():
    def partly(prompts, samples):
        return np.array([np.nan if sample.index % 2 else float(sample.text) for sample in samples])

    assert all(one.chosen % 2 == 0 for one in decoded(BestOfN(4), Digits(), partly, tokens=50))


def test_a_batch_holds_whole_prompts():
    sampler = Digits()
    decoded(BestOfN(3), sampler, score, tokens=1)
    assert sampler.batches == [3] * 5
