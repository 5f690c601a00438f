"""Early rejection gives up candidates, never exactness: what it finishes is what would have been drawn at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infalign import BestOfN, BottomOfN, RandomN, SoftBestOfN, TopOfN, WorstOfN
from infalign.decoding.early_rejection import EarlyRejection
from infalign.generation.hf import HFSampler
from infalign.generation.plan import Request
from infalign.models.loading import end_token_ids, load_policy, load_tokenizer
from infalign.types import InputError, SamplingSettings
from tests.decoding.toys import Digits, Levels, prompts, run
from tests.tiny import CLOSE, tiny_causal

PROMPTS = [(5, 6, 7, 8), (9, 10), (11,), (5, 6, 7, 8)]
REQUESTS = [Request(f"p{number}", index, ids) for number, ids in enumerate(PROMPTS) for index in range(6)]


def beginning(_, samples):
    """A reward that is a function of the first two tokens."""
    return np.array([float(sample.text[:2].ljust(2, "0")) for sample in samples])


def ending(_, samples):
    return np.array([float(sample.text[::-1]) for sample in samples])


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2", "gemma2"])
def sampler(request, tmp_path_factory):
    path = tiny_causal(tmp_path_factory.mktemp(request.param), request.param)
    model, tokenizer = load_policy(path, device=torch.device("cpu")), load_tokenizer(path)
    return HFSampler(model, tokenizer, SamplingSettings(12), end_token_ids(model, tokenizer), 0)


@pytest.mark.parametrize("length", [1, 5, 11])
def test_continued_completions_are_the_uninterrupted_ones(sampler, length):
    whole = sampler.sample(REQUESTS)
    begun = sampler.begin(REQUESTS, length)
    assert [one.token_ids for one in begun] == [one.token_ids[:length] for one in whole]
    assert [one.finished for one in begun] == [one.finished and len(one.token_ids) <= length for one in whole]
    going = [place for place, one in enumerate(begun) if not one.finished]
    assert going
    resumed = sampler.resume([REQUESTS[place] for place in going], [begun[place] for place in going])
    for place, one in zip(going, resumed, strict=True):
        assert (one.key, one.index, one.token_ids) == (whole[place].key, whole[place].index, whole[place].token_ids)
        assert (one.text, one.finished) == (whole[place].text, whole[place].finished)
        np.testing.assert_allclose(one.token_logps, whole[place].token_logps, atol=CLOSE)


def test_beginnings_of_several_lengths_go_on_together(sampler):
    whole = sampler.sample(REQUESTS)
    cut = [sampler.begin([request], 1 + place % 4)[0] for place, request in enumerate(REQUESTS)]
    going = [place for place, one in enumerate(cut) if not one.finished]
    resumed = sampler.resume([REQUESTS[place] for place in going], [cut[place] for place in going])
    assert [one.token_ids for one in resumed] == [whole[place].token_ids for place in going]


def test_a_check_beyond_the_limit_draws_whole_completions(sampler):
    assert [s.token_ids for s in sampler.begin(REQUESTS, 99)] == [s.token_ids for s in sampler.sample(REQUESTS)]


@pytest.mark.parametrize(
    "procedure", [BestOfN(5), SoftBestOfN(5, 3.0), RandomN([0.2, 0.3, 0.5]), TopOfN(2, 5)], ids=repr
)
@pytest.mark.parametrize("length", [1, 3, 6, 50])
def test_keeping_all_is_the_procedure_itself(procedure, length):
    given = prompts(40)
    plain = run(procedure, Digits(), ending, given=given)
    early = run(EarlyRejection(procedure, length, keep=1.0), Digits(), ending, given=given)
    for one, other in zip(plain, early, strict=True):
        assert one.chosen == other.chosen
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates]
        np.testing.assert_array_equal(one.rewards_N, other.rewards_N)
        assert one.spent.tokens == other.spent.tokens
        continued = sum(len(c.token_ids) > length for c in one.candidates)
        assert other.spent.reward_calls == one.spent.reward_calls + continued


def test_nothing_is_lost_when_the_beginning_decides():
    given = prompts(60)
    full = run(BestOfN(6), Digits(), beginning, given=given)
    early = run(EarlyRejection(BestOfN(6), 2, keep=1 / 6), Digits(), beginning, given=given)
    assert [max(one.rewards_N) for one in full] == [one.rewards_N[one.chosen] for one in early]
    assert sum(one.spent.tokens for one in early) < 0.6 * sum(one.spent.tokens for one in full)


def test_costs_and_survivors_by_hand():
    """Of 4 candidates the 2 best beginnings are finished; what is whole by the check stays, whatever its rank."""
    for one in run(EarlyRejection(BestOfN(4), 2, keep=0.5), Digits(), ending, given=prompts(60)):
        whole = [Digits()._drawn(Request(one.prompt.key, place, (1,)), 6) for place in range(4)]
        first = ending(None, [Digits()._drawn(Request(one.prompt.key, place, (1,)), 2) for place in range(4)])
        best = sorted(range(4), key=lambda place: (-first[place], place))[:2]
        short = [place for place in range(4) if len(whole[place].token_ids) <= 2]
        finished = [place for place in best if place not in short]
        kept = sorted({*best, *short})
        values = ending(None, whole)
        np.testing.assert_array_equal(one.rewards_N, [values[place] if place in kept else np.nan for place in range(4)])
        assert values[one.chosen] == max(values[place] for place in kept)
        tokens = [min(2, len(sample.token_ids)) for sample in whole]
        more = [len(whole[place].token_ids) - 2 for place in finished]
        assert one.spent.candidates == 4 and one.spent.reward_calls == 4 + len(finished)
        assert one.spent.tokens == sum(tokens) + sum(more)
        assert one.spent.scored_tokens == sum(tokens) + sum(len(whole[place].token_ids) for place in finished)


def test_shares_are_rounded_up():
    """30 % of 5 are 2; candidates with a beginning only are never chosen, though theirs looks better."""
    for one in run(EarlyRejection(BestOfN(5), 1, keep=0.3), Digits(), lambda p, s: -ending(p, s), given=prompts(60)):
        short = sum(len(candidate.token_ids) == 1 and candidate.finished for candidate in one.candidates)
        continued = sum(len(candidate.token_ids) > 1 for candidate in one.candidates)
        assert continued <= 2 <= continued + short
        assert one.rewards_N[one.chosen] == np.nanmax(one.rewards_N)


def test_beginnings_without_a_score_come_last():
    def partly(_, samples):
        return np.array([np.nan if len(one.token_ids) < 3 and one.index < 2 else float(one.index) for one in samples])

    for one in run(EarlyRejection(BestOfN(4), 2, keep=0.5), Digits(), partly, given=prompts(30)):
        assert one.chosen == 3
        assert all(np.isnan(one.rewards_N[place]) for place in (0, 1))
    for one in run(EarlyRejection(BestOfN(4), 2, keep=1.0), Digits(), partly, given=prompts(30)):
        assert sum(~np.isnan(one.rewards_N)) == 2 + sum(len(one.candidates[place].token_ids) > 2 for place in (0, 1))


def test_a_sampler_that_cannot_stop_is_named_before_it_draws():
    sampler = Levels((1.0,))
    with pytest.raises(InputError, match=r"which Levels can't: sample in process \(generation: transformers\)"):
        run(EarlyRejection(BestOfN(4), 2), sampler)
    assert sampler.batches == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WorstOfN(4), 2), r"gives up the lowest candidates, but WorstOfN\(4\) may choose them"),
        ((SoftBestOfN(4, -1.0), 2), "may choose them"),
        ((BottomOfN(2, 4), 2), "may choose them"),
        ((BestOfN(4), 0), "check_tokens must be a whole number >= 1; got 0"),
        ((BestOfN(4), 2, 0.0), "keep must be a number above 0 and at most 1"),
        ((BestOfN(4), 2, 1.1), "keep must be"),
        ((4, 2), "procedure must be a Procedure"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        EarlyRejection(*arguments)
