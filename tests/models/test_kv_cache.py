"""The two caches against one pass without a cache, in values, in gradients and after rows have been taken."""

from __future__ import annotations

import pytest
import torch

from steerlab.models import LanguageModel, Site, tiny
from steerlab.models.kv_cache import GrowingCache, ReservedCache

TOKENS = torch.randint(5, 261, (3, 40), generator=torch.Generator().manual_seed(1))  # longer than the tiny window
EXACT = {"gemma2": 1e-4, "gpt_neo": 1e-4}  # eager attention rounds its probabilities to fp32


def positions(start: int, stop: int, batch: int = 3) -> torch.Tensor:
    return torch.arange(start, stop).expand(batch, -1)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny.model(request.param, dtype=torch.float64)


@pytest.fixture(scope="module", params=["mistral", "phi3"])
def windowed(request: pytest.FixtureRequest) -> LanguageModel:
    """Families whose tiny models have no sliding window, with one of 8."""
    made = tiny.model(request.param, dtype=torch.float64)
    unlimited = made.logits(TOKENS)
    made.hf.config.sliding_window = 8
    assert not torch.allclose(made.logits(TOKENS), unlimited), "the window has no effect, so the test shows nothing"
    return made


def check_steps(model: LanguageModel, kv: GrowingCache | ReservedCache) -> None:
    """Feed TOKENS in pieces, changing which rows there are in between."""
    atol = EXACT.get(model.hf.config.model_type, 1e-9)
    with torch.no_grad():
        full = model.hidden(TOKENS)
        first = model.hidden(TOKENS[:, :30], positions=positions(0, 30), kv=kv)
        assert torch.allclose(first, full[:, :30], rtol=0, atol=atol)
        rows = torch.tensor([2, 0, 0, 1])
        kv.take_rows(rows)
        piece = model.hidden(TOKENS[rows, 30:33], positions=positions(30, 33, 4), kv=kv)
        assert torch.allclose(piece, full[rows, 30:33], rtol=0, atol=atol)
        left = torch.tensor([0, 3])
        kv.take_rows(left)
        for t in range(33, 40):
            one = model.hidden(TOKENS[rows[left], t : t + 1], positions=positions(t, t + 1, 2), kv=kv)
            assert torch.allclose(one, full[rows[left], t : t + 1], rtol=0, atol=atol)


def test_reserved_cache_is_one_full_pass(model: LanguageModel) -> None:
    check_steps(model, ReservedCache(model.n_layers, 40))


def test_growing_cache_is_one_full_pass(model: LanguageModel) -> None:
    check_steps(model, GrowingCache())


def test_sliding_windows(windowed: LanguageModel) -> None:
    check_steps(windowed, ReservedCache(windowed.n_layers, 40))
    check_steps(windowed, GrowingCache())


@pytest.mark.parametrize(("family", "rtol"), [("gpt2", 1e-9), ("llama", 1e-6), ("gemma3", 1e-6)])
def test_growing_cache_keeps_gradients_of_shared_rows(family: str, rtol: float) -> None:
    """Transformers' RMS norms pass gradients in fp32 also in fp64 models; GPT-2's layer norm does not."""
    model = tiny.model(family, dtype=torch.float64)
    group = torch.tensor([0, 0, 1])
    tails = TOKENS[:, 6:10]

    def loss(shared: bool, vector: torch.Tensor) -> torch.Tensor:
        with model.intervene({Site("resid_post", 0): lambda x: x + vector}):
            if not shared:
                return (model.hidden(torch.cat([TOKENS[group, :6], tails], 1))[:, 6:] ** 3).sum()
            kv = GrowingCache()
            model.hidden(TOKENS[:2, :6], positions=positions(0, 6, 2), kv=kv)
            kv.take_rows(group)
            return (model.hidden(tails, positions=positions(6, 10), kv=kv) ** 3).sum()

    gradients = []
    for shared in (True, False):
        vector = torch.full((32,), 0.1, dtype=torch.float64, requires_grad=True)
        loss(shared, vector).backward()
        gradients.append(vector.grad)
    assert (gradients[0] - gradients[1]).abs().max() < rtol * gradients[1].abs().max()


def test_reserved_cache_reports_its_length() -> None:
    model = tiny.model("llama")
    kv = ReservedCache(model.n_layers, 12)
    assert kv.get_seq_length() == 0
    with torch.no_grad():
        model.hidden(TOKENS[:, :5], positions=positions(0, 5), kv=kv)
    assert kv.get_seq_length() == 5
