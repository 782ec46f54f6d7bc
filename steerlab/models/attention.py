"""Attention for short sequences in bf16 on a CPU, several times faster than the fused kernel, forward and backward.

torch's fused CPU kernel is made for long sequences: for a few dozen positions its bf16 backward takes five times as
long as a few small matrix products. Here the query heads that share a key head become rows of one product, so keys
and values are never repeated. Scores are rounded to bf16 and the softmax is taken in fp32, as in transformers'
eager attention. Everything else (other dtypes, devices, long sequences, a model set to another implementation) keeps
transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

NAME = "steerlab_grouped"
LONGEST = 512  # positions seen; beyond it the score matrix costs more than the fused kernel does


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # transformers' interface: what a family passes to every implementation
) -> tuple[Tensor, None]:
    """Shapes as transformers has them: query (batch, heads, new, d), key (batch, kv heads, seen, d)."""
    batch, heads, new, width = query.shape
    kv_heads, seen = key.shape[1:3]
    if new == 1 or query.dtype != torch.bfloat16 or seen > LONGEST or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    rows = query.reshape(batch * kv_heads, -1, width) * (width**-0.5 if scaling is None else scaling)
    scores = torch.bmm(rows, key.reshape(batch * kv_heads, seen, width).transpose(1, 2))
    scores = scores.view(batch, kv_heads, heads // kv_heads, new, seen)
    if attention_mask is None:
        attention_mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)[None, None]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(scores.dtype).min)
    pattern = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype).view(batch * kv_heads, -1, seen)
    mixed = torch.bmm(pattern, value.reshape(batch * kv_heads, seen, -1))
    return mixed.view(batch, heads, new, -1).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@contextmanager
def short_sequences(model: LanguageModel) -> Iterator[None]:
    """Use grouped attention inside the `with` where it is faster: bf16, on a CPU, in place of fused attention."""
    config = model.hf.config
    before = config._attn_implementation
    if before != "sdpa" or model.dtype != torch.bfloat16 or model.device.type != "cpu":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
