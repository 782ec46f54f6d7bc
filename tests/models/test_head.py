"""token_logprobs against log_softmax and autograd."""

from __future__ import annotations

import pytest
import torch

from steerlab.models.head import CHUNK_TOKENS, token_logprobs

N_VOCAB, D_MODEL = 97, 12


@pytest.mark.parametrize("n_tokens", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 5])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_value_and_gradient_are_autograds(
    n_tokens: int, temperature: float, softcap: float | None, with_bias: bool, fused: bool
) -> None:
    generator = torch.Generator().manual_seed(n_tokens)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = drawn(n_tokens, D_MODEL), drawn(N_VOCAB, D_MODEL)
    bias = drawn(N_VOCAB) if with_bias else None
    targets = torch.randint(0, N_VOCAB, (n_tokens,), generator=generator)
    credit = drawn(n_tokens)
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = token_logprobs(ours, targets, weight, bias, temperature, softcap, fused)
    logits = torch.nn.functional.linear(plain, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (got * credit).sum().backward()
    (expected * credit).sum().backward()
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert torch.allclose(ours.grad, plain.grad, rtol=0, atol=1e-12)


def test_no_tokens() -> None:
    hidden = torch.zeros(0, D_MODEL, requires_grad=True)
    got = token_logprobs(hidden, torch.zeros(0, dtype=torch.long), torch.zeros(N_VOCAB, D_MODEL))
    got.sum().backward()
    assert got.shape == (0,) and hidden.grad is not None and hidden.grad.shape == (0, D_MODEL)


@pytest.mark.parametrize("fused", [False, True])
def test_bf16_is_computed_in_fp32(fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(N_VOCAB, 64, generator=generator) * 0.3).bfloat16()
    targets = torch.randint(0, N_VOCAB, (40,), generator=generator)
    got = token_logprobs(hidden, targets, weight, fused=fused)
    expected = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-5)
    got.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("fused", [False, True])
def test_no_graph_under_no_grad(fused: bool) -> None:
    hidden = torch.randn(3, D_MODEL, requires_grad=True)
    with torch.no_grad():
        got = token_logprobs(hidden, torch.tensor([1, 2, 3]), torch.randn(N_VOCAB, D_MODEL), fused=fused)
    assert not got.requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_a_confident_tokens_slope_is_rounded_once(fused: bool) -> None:
    """1 − p of a token with p near 1, in bf16: as near as bf16 comes, where e − softmax of rounded numbers is 0."""
    hidden = torch.tensor([[9.0, 0.0]]).bfloat16().requires_grad_()
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).bfloat16()
    token_logprobs(hidden, torch.tensor([0]), weight, fused=fused).sum().backward()
    p = torch.tensor([9.0, 0.0]).double().softmax(0)[0]
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad[0, 0].double(), 1 - p, rtol=2**-8)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_a_number_stays_so(fused: bool) -> None:
    hidden = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    got = token_logprobs(hidden, torch.tensor([0, 0]), torch.eye(2), fused=fused)
    assert torch.isnan(got[0]) and torch.isfinite(got[1])


@pytest.mark.parametrize("fused", [False, True])
def test_extreme_logits_stay_finite(fused: bool) -> None:
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    got = token_logprobs(hidden, torch.tensor([0, 0]), weight, fused=fused)
    got.sum().backward()
    assert got.tolist() == [0.0, -2e4]
    assert torch.isfinite(hidden.grad).all()
