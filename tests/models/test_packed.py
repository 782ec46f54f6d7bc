"""Packed matrix products are the plain ones up to rounding; nothing of them is left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from steerlab.models import LanguageModel, Site, packed, tiny
from steerlab.models.packed import PackedWeights, able, fits, measured_choice, products
from steerlab.rollouts import Policy, Rows, Sampling

TOKENS = torch.randint(5, 261, (2, 9), generator=torch.Generator().manual_seed(0))
needed = pytest.mark.skipif(not able(tiny.model("llama")), reason="torch has no oneDNN linear operators here")


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


def scaled(model: LanguageModel) -> None:
    with torch.no_grad():
        model.blocks[0].get_submodule("mlp.down_proj").weight.mul_(2)


def shifted(model: LanguageModel) -> None:
    with torch.no_grad():
        model.blocks[0].get_submodule("self_attn.q_proj").bias.add_(1)


def replaced(model: LanguageModel) -> None:
    module = model.blocks[0].get_submodule("mlp.down_proj")
    other = torch.nn.Parameter(2 * module.weight.detach(), requires_grad=False)
    for _ in range(module.weight._version):
        other.add_(0)
    assert other._version == module.weight._version
    module.weight = other


def moved(model: LanguageModel) -> None:
    weight = model.blocks[0].get_submodule("mlp.down_proj").weight
    weight.data = 2 * weight.data


@needed
@pytest.mark.parametrize("change", [scaled, shifted, replaced, moved])
def test_what_has_changed_is_packed_anew(change: Callable[[LanguageModel], None]) -> None:
    model = tiny.model("qwen2")
    model.products = "packed"
    with products(model):
        before = logits(model)
    change(model)
    plain = logits(model)
    assert not torch.allclose(plain, before, rtol=0, atol=1e-3)
    with products(model):
        assert torch.allclose(logits(model), plain, rtol=0, atol=1e-4)


@needed
def test_a_forward_of_the_module_itself_is_put_back() -> None:
    """An offload hook lives in the module's own `forward`; the copy stands in for it and then it is there again."""
    model = tiny.model("llama")
    module, calls = model.blocks[0].get_submodule("mlp.down_proj"), []
    original = module.forward

    def hooked(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return original(x)

    module.forward = hooked
    with pytest.raises(ZeroDivisionError), PackedWeights(model).in_use():
        logits(model)
        raise ZeroDivisionError
    assert not calls and module.forward is hooked
    logits(model)
    assert len(calls) == 1


@needed
def test_the_copy_is_not_charged_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free shrinks by the copy; that says nothing of whether the copy that is there fits."""
    model = tiny.model("llama")
    size = packed.packed_bytes(model)
    monkeypatch.setattr(packed, "free_memory_bytes", lambda: 4 * size - (0 if model.packed is None else size))
    assert fits(model) and not fits(model, processes=2)
    assert measured_choice(model, processes=2) == "plain" and model.packed is None
    kept = packed.packed_copy(model)
    assert able(model) and not fits(model)
    monkeypatch.setattr(packed, "PackedWeights", lambda model: pytest.fail("made again"))
    if measured_choice(model) == "packed":
        assert model.packed is kept


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
