"""Translators: zero ones are the plain lens bit for bit, and no model notices them."""

from __future__ import annotations

import pytest
import torch

from steerlab.adapters import Translators, TunedLens
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, tiny


def drawn(model: LanguageModel, seed: int = 0) -> TunedLens:
    lens = Translators().init(model)
    draw = torch.Generator().manual_seed(seed)
    lens.restore({name: 0.1 * torch.randn(x.shape, generator=draw) for name, x in lens.snapshot().items()})
    return lens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_change_no_bit(dtype: torch.dtype) -> None:
    model = tiny.model("llama", dtype=dtype)
    lens = Translators().init(model)
    h = torch.randn(2, 5, model.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert lens.layers == (0, 1, 2)
    for layer in range(model.n_layers):
        assert torch.equal(lens(layer, h), h)


def test_a_translator_adds_its_affine_change(tiny_llama: LanguageModel) -> None:
    lens = drawn(tiny_llama)
    h = torch.randn(7, tiny_llama.d_model, generator=torch.Generator().manual_seed(1))
    weight, bias = lens.maps[1]
    torch.testing.assert_close(lens(1, h), h + h @ weight.T + bias)
    assert torch.equal(lens(3, h), h)
    assert lens.n_parameters == 3 * 32 * 33


def test_attached_it_changes_nothing(tiny_llama: LanguageModel) -> None:
    tokens = torch.arange(20)[None]
    before = tiny_llama.logits(tokens)
    with drawn(tiny_llama).attach(tiny_llama) as attached:
        assert torch.equal(tiny_llama.logits(tokens), before)
        assert attached.first_blocks == (4,)


def test_snapshot_round_trip(tiny_llama: LanguageModel) -> None:
    lens, other = drawn(tiny_llama), Translators().init(tiny_llama)
    other.restore(lens.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(lens.parameters(), other.parameters(), strict=True))
    with pytest.raises(UsageError, match="this lens needs"):
        Translators((1,)).init(tiny_llama).restore(lens.snapshot())


@pytest.mark.parametrize("layers", [(), (3,), (-1,), (0, 9)])
def test_layers_that_cannot_be_translated(tiny_llama: LanguageModel, layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="cannot be translated"):
        Translators(layers).init(tiny_llama)


def test_another_model_is_refused(tiny_llama: LanguageModel) -> None:
    lens = TunedLens({0: (torch.zeros(16, 16), torch.zeros(16))}, 4)
    with pytest.raises(UsageError, match="another model"), lens.attach(tiny_llama):
        pass
