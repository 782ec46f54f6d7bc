"""Grouped attention is the fused one up to bf16 rounding, and is used nowhere else."""

from __future__ import annotations

import pytest
import torch

from steerlab.models import LanguageModel, attention, tiny
from steerlab.models.kv_cache import GrowingCache

FAMILIES = [family for family in tiny.FAMILIES if family not in ("gemma2", "gpt_neo")]  # these have no fused attention


@pytest.mark.parametrize("family", FAMILIES)
def test_it_agrees_with_fused_attention_with_padding_and_a_cache(family: str) -> None:
    model = tiny.model(family, dtype=torch.bfloat16)
    tokens = torch.randint(4, 200, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0

    def both() -> torch.Tensor:
        kv = GrowingCache()
        first = model.hidden(tokens[:, :30], mask=mask[:, :30], kv=kv)
        return torch.cat([first, model.hidden(tokens[:, 30:], mask=mask, kv=kv)], 1)

    fused = both()
    with attention.short_sequences(model):
        assert model.hf.config._attn_implementation == attention.NAME
        grouped = both()
    real = mask.bool()
    assert not torch.equal(grouped[real], fused[real]), "it was not used"
    scale = fused[real].float().std()
    assert (grouped[real] - fused[real]).float().abs().mean() < 0.02 * scale
    assert torch.equal(both(), fused), "the model is as before"


def test_without_a_mask_it_is_causal() -> None:
    model = tiny.model("llama", dtype=torch.bfloat16)
    tokens = torch.randint(4, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] = 3
    with attention.short_sequences(model):
        assert torch.equal(model.hidden(tokens)[:, :-1], model.hidden(changed)[:, :-1])


def test_gradients_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((6, 5), (2, 12), (2, 12)))
    mask = torch.ones(5, 12, dtype=torch.bool).tril(7)[None, None]
    parts = {}
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        module = torch.nn.Module()
        module.num_key_value_groups = 3  # type: ignore[assignment]
        out, _ = attention.grouped_attention(module, *leaves, mask)
        parts[dtype] = [out, *torch.autograd.grad(out.sum(), leaves)]
    for exact, rounded in zip(parts[torch.float64], parts[torch.bfloat16], strict=True):
        assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_keep_their_own(dtype: torch.dtype, tiny_llama: LanguageModel) -> None:
    model = tiny.model("llama", dtype=dtype)
    with attention.short_sequences(model):
        assert model.hf.config._attn_implementation == "sdpa"


def test_an_exception_inside_restores() -> None:
    model = tiny.model("llama", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="stop"), attention.short_sequences(model):
        raise RuntimeError("stop")
    assert model.hf.config._attn_implementation == "sdpa"
