"""Packed matrix products are the plain ones up to rounding; nothing of them is left behind."""

from __future__ import annotations

import pytest
import torch

from steerlab.models import LanguageModel, Site, packed, tiny
from steerlab.models.packed import PackedWeights, measured_choice, possible, products
from steerlab.rollouts import Policy, Rows, Sampling

TOKENS = torch.randint(5, 261, (2, 9), generator=torch.Generator().manual_seed(0))
needed = pytest.mark.skipif(not possible(tiny.model("llama")), reason="torch has no oneDNN linear operators here")


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS)


@needed
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_is_plain(family: str) -> None:
    model = tiny.model(family)
    plain = logits(model)
    with PackedWeights(model).in_use():
        assert torch.allclose(logits(model), plain, rtol=0, atol=1e-4)
    assert torch.equal(logits(model), plain)
    assert not any("forward" in vars(module) for module in model.hf.modules())


@needed
def test_packed_samples_are_plain_samples() -> None:
    model = tiny.model("llama")
    rows = Rows.grid([0, 1], 3)
    prompts = [[40, 41, 42], [50, 51, 52, 53, 54]]
    found = {}
    for choice in ("plain", "packed"):
        model.products = choice
        found[choice] = Policy(model).sample(prompts, rows, Sampling(max_new_tokens=8), seed=0)
    assert torch.equal(found["plain"].tokens, found["packed"].tokens)
    assert torch.allclose(found["plain"].logprobs, found["packed"].logprobs, rtol=0, atol=1e-4)


@needed
def test_sites_of_joined_projections_are_still_theirs() -> None:
    """q, k, v and the MLP's neurons are read and written as before."""
    model = tiny.model("llama")
    sites = [Site(kind, 1) for kind in ("q", "k", "v", "z", "mlp_neurons")]

    def seen() -> list[torch.Tensor]:
        with torch.no_grad(), model.intervene({Site("k", 1): lambda x: 2 * x}):
            values = model.cache(TOKENS, sites)
        return [values[site] for site in sites]

    plain = seen()
    with PackedWeights(model).in_use():
        for a, b in zip(seen(), plain, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-4)


@needed
def test_a_changed_weight_is_packed_anew() -> None:
    model = tiny.model("llama")
    model.products = "packed"
    with products(model):
        logits(model)
    with torch.no_grad():
        model.blocks[0].get_submodule("mlp.down_proj").weight.mul_(2)
    plain = logits(model)
    with products(model):
        assert torch.allclose(logits(model), plain, rtol=0, atol=1e-4)


@needed
def test_the_choice_is_one_of_two_and_plain_keeps_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    assert measured_choice(model) in ("plain", "packed")
    clock = iter(range(1_000_000))
    monkeypatch.setattr(packed.time, "perf_counter", lambda: next(clock) ** 2)  # every later trial takes longer
    assert measured_choice(model) == "plain"
    assert model.packed is None


def test_fp64_and_too_little_memory_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_choice(tiny.model("llama", dtype=torch.float64)) == "plain"
    monkeypatch.setattr(packed, "free_memory_bytes", lambda: 1_000)
    assert measured_choice(tiny.model("llama")) == "plain"
