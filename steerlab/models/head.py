"""Log-probabilities of given tokens from final hidden states, without a tokens × vocabulary tensor.

The derivative of one token's log-probability with respect to its hidden state does not depend on what is done
with it later: (e_y − softmax) W / T. So the forward pass forms it chunk by chunk and the backward pass is one
multiplication; the head costs two projections instead of three and never keeps logits. (The idea of forming
the head's gradient in the forward pass is that of fused cross-entropy kernels; here the weights are frozen.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_TOKENS = 128


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(targets), dtype=exact)
        needs_grad = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        slopes = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, len(targets), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            logits = torch.nn.functional.linear(hidden[rows], weight, bias)
            if softcap is not None:
                logits = torch.tanh(logits.to(exact) / softcap) * softcap
            scaled = logits.to(exact) / temperature if temperature != 1.0 else logits
            probs = torch.softmax(scaled, -1, dtype=exact)
            # log Σ exp from the largest entry: one fused pass over the vocabulary, and no logarithm of a tiny number
            total = scaled.amax(-1).to(exact) - probs.amax(-1).log()
            target = targets[rows]
            logprobs[rows] = scaled.gather(-1, target[:, None]).squeeze(-1).to(exact) - total
            if slopes is not None:
                slopes[rows] = _slope(probs, target, weight, logits, softcap) / temperature
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return logprobs

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grads[0].to(slopes.dtype)[:, None] * slopes, None, None, None, None, None)


def _slope(probs: Tensor, target: Tensor, weight: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """(e_y − softmax) W, through the soft cap where there is one. `probs` is overwritten.

    e_y goes in before rounding to the weights' dtype: taken from W[y] afterwards, a confident token's slope would be
    noise.
    """
    minus = probs.scatter_add_(-1, target[:, None], -torch.ones_like(probs[:, :1]))
    if softcap is not None:
        minus *= 1 - (logits / softcap) ** 2
    return -(minus.to(weight.dtype) @ weight)


def token_logprobs(
    hidden: Float[Tensor, "token d_model"],
    targets: Int[Tensor, " token"],
    weight: Float[Tensor, "d_vocab d_model"],
    bias: Float[Tensor, " d_vocab"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, " token"]:
    """log softmax(logits / temperature)[target] per token, in nats, at least fp32; differentiable in `hidden` only."""
    return _TokenLogprobs.apply(hidden, targets, weight, bias, temperature, softcap)  # type: ignore[return-value]
