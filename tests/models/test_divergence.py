"""KL through norm and head: the same as written out, gradient and all, and no logits of all layers at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerlab.models import LanguageModel, Site, tiny
from steerlab.models.divergence import divergences
from steerlab.models.head import CHUNK_TOKENS


def written_out(
    last: Tensor, states: Tensor, norm: torch.nn.Module, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    def says(h: Tensor) -> Tensor:
        z = torch.nn.functional.linear(norm(h), weight, bias)
        return (z if softcap is None else torch.tanh(z / softcap) * softcap).log_softmax(-1)

    own = says(last)
    return (own.exp() * (own - says(states))).sum(-1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(8, dtype=torch.float64), torch.nn.RMSNorm(8, dtype=torch.float64)])
def test_gradient_is_autograds(softcap: float | None, biased: bool, norm: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    n = CHUNK_TOKENS + 7
    last, states, weight, credit = normal(n, 8), normal(3, n, 8), 2 * normal(11, 8), normal(3, n)
    bias = normal(11) if biased else None
    ours, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    found = divergences(last, list(ours), norm, weight, bias, softcap)
    expected = written_out(last, theirs, norm, weight, bias, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (found * credit).sum().backward()
    (expected * credit).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_states_without_a_gradient_among_others() -> None:
    draw = torch.Generator().manual_seed(1)
    last, fixed, free = torch.randn(3, 5, 4, generator=draw).unbind()
    free.requires_grad_()
    norm, weight = torch.nn.LayerNorm(4).requires_grad_(False), torch.randn(6, 4, generator=draw)
    divergences(last, [fixed, free, fixed], norm, weight).sum().backward()
    alone = free.detach().clone().requires_grad_()
    divergences(last, [alone], norm, weight).sum().backward()
    assert torch.equal(free.grad, alone.grad)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_what_every_family_says(family: str, tiny_models: dict[str, LanguageModel]) -> None:
    """The last block's own state is at no distance, the first's at that of the logits written out."""
    model = tiny_models[family]
    tokens = torch.arange(40, 60)[None]
    states = {site.layer: x[0] for site, x in model.cache(tokens, [Site("resid_post", at) for at in (0, 3)]).items()}
    own = model.logits(tokens)[0].log_softmax(-1)
    first = model.unembed(model.final_norm(states[0])).log_softmax(-1)
    head = model.unembedding
    found = divergences(
        states[3], [states[0], states[3]], model.final_norm, head.weight, head.bias, model.logit_softcap
    )
    torch.testing.assert_close(found[0], (own.exp() * (own - first)).sum(-1), rtol=1e-4, atol=1e-5)
    assert found[1].abs().max() < 1e-6
