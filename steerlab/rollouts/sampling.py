"""How one token is drawn from logits: temperature, top-p, and the inverse of the cumulative distribution.

A token is the place where the cumulative probability passes a given uniform number. The sum runs over blocks of
the vocabulary first and inside one block second, in float64: exact enough for 10^5 tokens and far cheaper than
one noise number per vocabulary entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from steerlab.errors import UsageError

BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy. top_p: smallest set of tokens with this much probability. max_new_tokens: cap per
    completion. stop: extra stop tokens by their text, beside the model's own end tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


def draw(
    logits: Float[Tensor, "row d_vocab"], uniform: Float64[Tensor, " row"], sampling: Sampling
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """One token per row and its log-probability at the sampling temperature, before any top-p cut (nats, fp32 or more).

    Greedy rows report the log-probability at temperature 1.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    heat = sampling.temperature or 1.0
    probs = torch.softmax(logits if heat == 1 else logits.to(exact) / heat, -1, dtype=exact)
    if sampling.temperature == 0:
        token = logits.argmax(-1)
    else:
        token = inverse_cdf(nucleus(probs, sampling.top_p) if sampling.top_p < 1 else probs, uniform)
    return token, probs.gather(-1, token[:, None]).squeeze(-1).log()


def nucleus(probs: Float[Tensor, "row d_vocab"], top_p: float) -> Float[Tensor, "row d_vocab"]:
    """Zero outside the smallest set of most likely tokens whose probability reaches `top_p`; not renormalised."""
    ordered, index = probs.sort(-1, descending=True)
    before = ordered.double().cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(-1, index, ordered * (before < top_p))


def inverse_cdf(weights: Float[Tensor, "row d_vocab"], uniform: Float64[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The index where the cumulative weight, as a share of its total, first exceeds `uniform`."""
    rows, vocabulary = weights.shape
    missing = -vocabulary % BLOCK
    blocks = (torch.nn.functional.pad(weights, (0, missing)) if missing else weights).view(rows, -1, BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    target = (uniform * ends[:, -1])[:, None]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    begin = ends.gather(-1, (block - 1).clamp(min=0)).where(block > 0, torch.zeros_like(target))
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    index = torch.searchsorted(inside, target - begin, right=True)
    # Rounding can carry the target past the last positive weight of a block; stay on a token that can occur.
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    token = (block * BLOCK + torch.minimum(index, last)).squeeze(-1)
    return token.clamp(max=vocabulary - 1)
