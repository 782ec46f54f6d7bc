"""Drawing one token: the distribution, its support, ties with the log-probability, bad settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from steerlab.errors import UsageError
from steerlab.rollouts.sampling import BLOCK, Sampling, draw, inverse_cdf, nucleus

BELOW_ONE = 1 - 2.0**-53  # the largest number that a stream can give


def spread(n: int) -> torch.Tensor:
    """n numbers that fill [0, 1) evenly in random order."""
    return torch.from_numpy(np.random.default_rng(0).permutation((np.arange(n) + 0.5) / n))


def frequencies(logits: torch.Tensor, sampling: Sampling, n: int = 20_000) -> np.ndarray:
    uniform = torch.from_numpy(np.random.default_rng(1).random(n))
    token, _ = draw(logits.expand(n, -1), uniform, sampling)
    return np.bincount(token.numpy(), minlength=len(logits))


@pytest.mark.parametrize("vocabulary", [5, BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_frequencies_are_the_probabilities(vocabulary: int, temperature: float) -> None:
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    seen = frequencies(logits, Sampling(temperature=temperature))
    expected = (logits.double() / temperature).softmax(-1).numpy() * seen.sum()
    common = expected >= 5
    if not common.all():  # chi-square needs expected counts of five: the rare tokens together are one class
        seen = np.append(seen[common], seen[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(seen, expected).pvalue > 0.001


def test_even_numbers_give_exact_shares() -> None:
    """The inverse of the cumulative distribution is monotone, so evenly spaced numbers split without noise."""
    weights = torch.tensor([0.1, 0.0, 0.4, 0.25, 0.0, 0.25])
    token = inverse_cdf(weights.expand(1000, -1), spread(1000))
    assert np.bincount(token, minlength=6).tolist() == [100, 0, 400, 250, 0, 250]


def test_weights_need_not_sum_to_one() -> None:
    weights = torch.rand(700, generator=torch.Generator().manual_seed(0))
    uniform = spread(2000)
    assert torch.equal(
        inverse_cdf(weights.expand(2000, -1), uniform), inverse_cdf(8 * weights.expand(2000, -1), uniform)
    )


@pytest.mark.parametrize("vocabulary", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_a_token_of_zero_probability_is_never_drawn(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(64, vocabulary, generator=generator) * (torch.rand(64, vocabulary, generator=generator) < 0.02)
    weights[:, vocabulary // 2] = 0.1
    for u in (0.0, 2.0**-53, 0.3, 0.5, 0.999999, BELOW_ONE):
        token = inverse_cdf(weights, torch.full((64,), u, dtype=torch.float64))
        assert (weights.gather(1, token[:, None]) > 0).all(), u


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 40, 4 * BLOCK + 2])
def test_the_ends_of_the_interval_stay_on_the_only_token(place: int) -> None:
    weights = torch.zeros(3, 4 * BLOCK + 3)
    weights[:, place] = torch.tensor([1.0, 1e-30, 0.7])
    for u in (0.0, 0.5, BELOW_ONE):
        assert inverse_cdf(weights, torch.full((3,), u, dtype=torch.float64)).tolist() == [place] * 3


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float) -> None:
    probs = (3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).softmax(-1)
    kept = nucleus(probs, top_p)
    for row, before in zip(kept, probs, strict=True):
        inside = row > 0
        assert torch.equal(row[inside], before[inside])
        assert row.sum() >= top_p
        assert row.sum() - row[inside].min() < top_p
        assert inside.all() or row[inside].min() >= before[~inside].max()


def test_top_p_draws_only_from_the_nucleus_in_proportion() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    seen = frequencies(logits, Sampling(top_p=0.75))
    assert seen[2:].tolist() == [0, 0]
    assert stats.chisquare(seen[:2], np.array([5, 3]) / 8 * seen.sum()).pvalue > 0.001
    assert frequencies(logits, Sampling(top_p=1e-6)).tolist() == [20_000, 0, 0, 0]


def test_log_probability_is_that_of_the_tempered_softmax() -> None:
    logits = 2 * torch.randn(50, 99, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for sampling in (Sampling(), Sampling(temperature=0.6), Sampling(temperature=0.6, top_p=0.7)):
        token, logprob = draw(logits, spread(50), sampling)
        expected = (logits / sampling.temperature).log_softmax(-1).gather(-1, token[:, None])[:, 0]
        assert torch.allclose(logprob, expected, rtol=0, atol=1e-12)


def test_greedy_is_the_most_likely_token_at_temperature_one() -> None:
    logits = 2 * torch.randn(50, 99, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    token, logprob = draw(logits, spread(50), Sampling(temperature=0.0))
    assert torch.equal(token, logits.argmax(-1))
    assert torch.allclose(logprob, logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-12)


def test_arguments_are_left_alone() -> None:
    logits = torch.randn(4, 300)
    before = logits.clone()
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(top_p=0.5), Sampling(temperature=0.0)):
        draw(logits, spread(4), sampling)
        assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"temperature": float("nan")}],
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)
