"""The tuned lens' loss: the plain mean when nothing is cut, whatever the cutting."""

from __future__ import annotations

import pytest
import torch

from steerlab.adapters import Steering, Translators, TunedLens
from steerlab.batches import TokenBatch
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, tiny
from steerlab.objectives import LensDivergence, lens_divergence_loss
from steerlab.rollouts import Policy


def lens_of(model: LanguageModel) -> TunedLens:
    lens, draw = Translators().init(model), torch.Generator().manual_seed(3)
    lens.restore({name: 0.05 * torch.randn(x.shape, generator=draw) for name, x in lens.snapshot().items()})
    return lens


def texts() -> TokenBatch:
    draw = torch.Generator().manual_seed(0)
    return TokenBatch(torch.randint(5, 200, (5, 12), generator=draw), torch.rand(5, 12, generator=draw) < 0.5)


def test_the_pure_function() -> None:
    kl = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert float(lens_divergence_loss(kl, 4.0)) == pytest.approx(12 / 8)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "olmo2"])
def test_value_and_gradient_are_those_written_out(family: str) -> None:
    """Gemma 2 has a soft cap and norms behind its blocks' branches, GPT-2 layer norms with biases."""
    model = tiny.model(family, dtype=torch.float64)
    lens, batch = lens_of(model), texts()
    objective = LensDivergence()
    loss = objective(Policy(model, lens), objective.prepare(batch)).value
    loss.backward()
    found = {name: x.grad.clone() for name, x in lens.named().items()}
    for parameter in lens.parameters():
        parameter.grad = None
    states = model.cache(batch.tokens, [Site("resid_post", layer) for layer in range(3)])
    own = model.logits(batch.tokens)[batch.counted].log_softmax(-1)
    kl = [
        (own.exp() * (own - model.unembed(model.final_norm(lens(site.layer, h[batch.counted]))).log_softmax(-1))).sum(
            -1
        )
        for site, h in states.items()
    ]
    written_out = torch.stack(kl).mean()
    written_out.backward()
    assert loss.item() == pytest.approx(written_out.item(), rel=1e-9)
    for name, x in lens.named().items():
        torch.testing.assert_close(found[name], x.grad, rtol=1e-5, atol=1e-8)


def test_micro_batches_add_up() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    lens, objective = lens_of(model), LensDivergence()
    ready = objective.prepare(texts())
    whole = objective(Policy(model, lens), ready).value
    parts = [objective(Policy(model, lens), micro).value for micro in ready.micro_batches(24)]
    assert len(parts) == 3
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)


def test_what_it_needs(tiny_llama: LanguageModel) -> None:
    objective = LensDivergence()
    with pytest.raises(ValueError, match="prepare"):
        objective(Policy(tiny_llama, lens_of(tiny_llama)), texts())
    with pytest.raises(UsageError, match="Translators"):
        objective(Policy(tiny_llama, Steering().init(tiny_llama)), objective.prepare(texts()))
