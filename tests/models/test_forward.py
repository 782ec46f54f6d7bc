"""A forward pass that begins at a block is the whole forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, attention, forward, hooks, tiny

TOKENS = torch.randint(5, 261, (3, 30), generator=torch.Generator().manual_seed(0))


def written(model: LanguageModel, block: int) -> Tensor:
    seen: list[Tensor] = []
    with hooks.written(model, {block: seen.append}):
        model.hidden(TOKENS)
    return seen[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_start_is_the_full_forward(family: str) -> None:
    model = tiny.model(family, dtype=torch.float64)
    with torch.no_grad():
        whole = model.hidden(TOKENS)
        for block in range(1, model.n_layers + 1):
            assert torch.equal(model.forward_from(block, written(model, block)), whole), block


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neo", "gpt_neox"])
def test_a_vector_at_the_seam_is_added_and_gets_its_gradient(family: str) -> None:
    model = tiny.model(family, dtype=torch.float64)
    grads = []
    for block in (None, 2):
        vectors = SteeringVectors({Site("resid_post", 1): torch.linspace(-1, 1, 32).double()})
        with torch.no_grad(), vectors.attach(model):
            entry = written(model, 2)
        with vectors.attach(model):
            hidden = model.hidden(TOKENS) if block is None else model.forward_from(block, entry)
        hidden.square().sum().backward()
        grads.append((hidden.detach(), next(iter(vectors.parameters())).grad))
    (whole, grad), (begun, begun_grad) = grads
    assert torch.equal(begun, whole)
    assert torch.allclose(begun_grad, grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neo", "gpt_neox"])
def test_a_pass_that_ends_early_has_the_values_up_to_there(family: str, tiny_models: dict[str, LanguageModel]) -> None:
    model = tiny_models[family]
    sites = [Site("resid_pre", 1), Site("mlp_out", 1), Site("resid_post", 1)]
    ran: list[Tensor] = []
    with torch.no_grad(), model.doors.open((), [(Site("mlp_out", 2), ran.append)]):
        whole = model.cache(TOKENS, sites)
        assert len(ran) == 1
        with forward.ending_after(model, 1):
            found = model.cache(TOKENS, sites)
        assert len(ran) == 1
        assert all(torch.equal(found[site], whole[site]) for site in sites)
        model.hidden(TOKENS)
    assert len(ran) == 2


def test_notes_are_taken_before_edits_and_reads_after() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    site = Site("resid_post", 1)
    clean = model.cache(TOKENS, [site])[site]
    with model.intervene({site: lambda x: x + 1}):
        assert torch.equal(written(model, 2), clean)
        assert torch.equal(model.cache(TOKENS, [site])[site], clean + 1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


@contextmanager
def untouched(model: LanguageModel) -> Iterator[None]:
    before = model.hidden(TOKENS)
    yield
    assert torch.equal(model.hidden(TOKENS), before)
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize("block", [-1, 0, 5])
def test_blocks_that_do_not_exist_are_refused(block: int) -> None:
    model = tiny.model("llama")
    with untouched(model), pytest.raises(UsageError, match="cannot begin at block"):
        model.forward_from(block, torch.zeros(3, 30, 32))


def test_the_model_is_as_before_after_an_error() -> None:
    model = tiny.model("llama")
    with untouched(model), pytest.raises(RuntimeError):
        model.forward_from(2, torch.zeros(3, 30, 7))


def test_a_forward_that_a_module_had_of_its_own_is_put_back() -> None:
    """accelerate keeps its offload hooks there."""
    model = tiny.model("llama")
    entry, own = written(model, 2), [block.forward for block in model.blocks[:2]]
    for block, computed in zip(model.blocks, own, strict=False):
        block.forward = computed
    model.forward_from(2, entry)
    assert [vars(block).get("forward") for block in model.blocks] == [*own, None, None]


def test_masks_of_many_lengths_are_not_kept() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    for width in range(2, 14):
        segment = attention.Segment.of(0, [width], (0, 0), model.device)
        forward.planned(model, attention.Stream([segment]), TOKENS[:1, :width], torch.arange(width)[None])
    kept = attention._hidden.cache_info()
    assert kept.misses >= 12 and kept.currsize <= 8
