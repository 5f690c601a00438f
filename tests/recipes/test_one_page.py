"""The page that is the whole method (recipes/ctrl_one_page.py) agrees with the library, and trains as it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from infalign import BestOfN, calibrate, optimal_transform, tilt, transforms, win_rate, win_rate_limit

PAGE = Path(__file__).parents[2] / "recipes" / "ctrl_one_page.py"
U = np.linspace(0, 1, 101)


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("ctrl_one_page", PAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def problem(page):
    """Eight of the page's prompts."""
    base, reward_PJ = page.make_problem()
    return page.Policy(base.first_PV[:8], base.second_PVV[:8]), reward_PJ[:8]


def at_u(page, values_Q):
    """Values on the page's grid, at U."""
    return np.interp(U, page.U_Q.numpy(), values_Q.numpy())


def test_it_is_one_page_of_plain_torch():
    lines = PAGE.read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert len(lines) <= 250
    assert {line.split()[1].split(".")[0] for line in imports} == {"argparse", "math", "collections", "typing", "torch"}


@pytest.mark.parametrize("levels", [3, 10**6], ids=["many ties", "no ties"])
def test_calibrated_rewards_are_the_librarys(page, levels):
    rng = np.random.default_rng(0)
    rewards, references = rng.integers(0, levels, (4, 9)).astype(float), rng.integers(0, levels, (4, 7)).astype(float)
    found = page.calibrate(torch.tensor(rewards), torch.tensor(references))
    np.testing.assert_array_equal(found.numpy(), calibrate(rewards, references))


@pytest.mark.parametrize(("n", "beta"), [(1, 0.2), (2, 0.1), (4, 0.2), (4, 0.083), (8, 0.2)])
def test_the_optimal_transform_is_the_librarys(page, n, beta):
    expected, phi_Q = optimal_transform(BestOfN(n), beta=beta), page.optimal(beta, n)
    cdf_Q, kl = page.tilt(phi_Q, beta)
    assert kl == pytest.approx(expected.kl, abs=2e-4)
    assert page.tilted_win_rate(phi_Q, beta, n) == pytest.approx(expected.win_rate, abs=1e-4)
    np.testing.assert_allclose(at_u(page, cdf_Q), expected.cdf(U), atol=1e-4)
    shift = float(phi_Q[0]) - float(expected(0.0))
    np.testing.assert_allclose(at_u(page, phi_Q) - shift, expected(U), atol=1e-4 * float(expected(1.0)))


def test_a_beta_out_of_the_iterations_reach_is_refused(page):
    with pytest.raises(ValueError, match="did not converge at beta=1e-09: use a larger beta"):
        page.optimal(1e-9, 4)


def test_betas_and_win_rates_at_one_nat_are_the_librarys(page):
    library = {
        "exponential(10)": tilt(transforms.exponential(10), kl=1.0),
        "identity": tilt(transforms.identity, kl=1.0),
    }
    for name, expected in library.items():
        transform = page.TRANSFORMS[name]
        beta = page.beta_for_kl(transform, 1.0, 4)
        assert beta == pytest.approx(expected.beta, rel=2e-4)
        for n in (1, 4):
            found = page.tilted_win_rate(transform(beta, 4), beta, n)
            assert found == pytest.approx(expected.win_rate(BestOfN(n)), abs=1e-4)


def test_the_limit_is_the_librarys(page):
    assert page.beta_for_kl(page.optimal, 1.0, 4) == pytest.approx(optimal_transform(BestOfN(4), kl=1.0).beta, rel=3e-4)
    for n, kl in [(4, 1.0), (2, 0.5)]:
        assert page.limit(kl, n) == pytest.approx(win_rate_limit(BestOfN(n), kl), abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_order_weights_and_win_rates_are_the_librarys(page, n):
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 6, (5, 9)).astype(float), rng.integers(0, 5, (5, 7)).astype(float)
    np.testing.assert_allclose(page.order_weights(9, n).numpy(), BestOfN(n).order_weights(9), atol=1e-12)
    found = page.win_rate(torch.tensor(ours), torch.tensor(theirs), n)
    np.testing.assert_allclose(found.numpy(), win_rate(ours, theirs, BestOfN(n)).per_prompt, atol=1e-12)


def test_the_interval_is_like_the_librarys(page):
    values = torch.tensor(np.random.default_rng(2).beta(8, 2, 32))
    low, high = (float(end) for end in page.interval(values).strip("[]").split(","))
    centre, half = float(values.mean()), 2.04 * float(values.std()) / 32**0.5  # Student's t with 31 degrees of freedom
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=0.2 * half)


def test_exact_win_rates_are_those_of_all_pairs_of_candidates(page, problem):
    """By the definition: every pair of decoded answers, weighted by the chance of each being the best of two."""
    base, reward_PJ = problem
    policy = page.Policy(base.first_PV.flip(0), base.second_PVV.flip(0))

    def best_of_two(side, prompt):
        chance, reward = page.log_probs(side)[prompt].exp().numpy(), reward_PJ[prompt].numpy()
        return chance**2 + 2 * chance * ((reward[:, None] > reward[None, :]) @ chance)

    expected = []
    for prompt, reward in enumerate(reward_PJ.numpy()):
        beats = (reward[:, None] > reward[None, :]) + 0.5 * np.eye(reward.size)
        expected.append(best_of_two(policy, prompt) @ beats @ best_of_two(base, prompt))
    assert page.exact_win_rate(policy, base, reward_PJ, 2) == pytest.approx(np.mean(expected), abs=1e-12)


def test_samples_follow_the_policys_probabilities(page, problem):
    base, _ = problem
    answers = page.sample(base, 40_000, torch.Generator().manual_seed(0))
    for prompt in (0, 7):
        chance = page.log_probs(base)[prompt].exp()
        assert float(chance.sum()) == pytest.approx(1.0)
        frequency = torch.bincount(answers[prompt], minlength=chance.numel()) / answers.shape[1]
        assert float((frequency - chance).abs().max()) < 5 * float(chance.max() / answers.shape[1]) ** 0.5


def test_training_reaches_the_limit_and_beats_the_identity(page, problem):
    base, reward_PJ = problem
    found = {}
    for name in ("optimal", "identity"):
        beta = page.beta_for_kl(page.TRANSFORMS[name], 1.0, 4)
        policy = page.train(base, reward_PJ, page.TRANSFORMS[name](beta, 4), beta, steps=200)
        kl, _, best = found[name] = page.evaluate_exactly(policy, base, reward_PJ, 4)
        sampled_kl, _, sampled_best, _ = page.evaluate(policy, base, reward_PJ, 4)
        assert (sampled_kl, sampled_best) == pytest.approx((kl, best), abs=0.1)
        assert 0.7 <= kl <= 1.3
    (kl, _, best), (identity_kl, identity_standard, identity_best) = found["optimal"], found["identity"]
    assert abs(kl - identity_kl) < 0.15
    assert best > identity_best + 0.04
    assert found["optimal"][1] < identity_standard
    assert 0.95 <= (best - 0.5) / (win_rate_limit(BestOfN(4), kl) - 0.5) <= 1.0


def test_the_script_prints_its_table(page, problem, monkeypatch, capsys):
    """Two steps, and the limits of a moment ago: the bisection is tested above."""
    monkeypatch.setattr("sys.argv", ["ctrl_one_page.py", "--steps", "2"])
    monkeypatch.setattr(page, "make_problem", lambda: problem)
    monkeypatch.setattr(page, "limit", lambda kl, n: win_rate_limit(BestOfN(n), kl))
    page.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].split()[0] == "transform"
    assert lines[1].split() == ["optimal", "12.040", "theory", "1.0000", "0.7737", "0.9411", "0.9411", "1.000"]
