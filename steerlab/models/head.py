"""Log-probabilities of given tokens from final hidden states, without a tokens × vocabulary tensor.

The derivative of one token's log-probability with respect to its hidden state, its slope, does not depend on what is
done with it later: (e_y − softmax) W / T. So the forward pass forms it chunk by chunk and the backward pass is one
multiplication; the head costs two projections instead of three and never keeps logits. (The idea of forming
the head's gradient in the forward pass is that of fused cross-entropy kernels; here the weights are frozen.) Whoever
draws a token has its logits at hand and can form the slope there and then: see `recorded_logprobs`.
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
        fused: bool,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(targets), dtype=exact)
        needs_grad = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        slopes = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, len(targets), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            logits = torch.nn.functional.linear(hidden[rows], weight, bias)
            logprobs[rows], slope = logit_slopes(logits, targets[rows], temperature, softcap, fused, needs_grad)
            if slopes is not None and slope is not None:
                slopes[rows] = slope @ weight / temperature
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return logprobs

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grads[0].to(slopes.dtype)[:, None] * slopes, None, None, None, None, None, None)


def logit_slopes(
    logits: Float[Tensor, "token d_vocab"],
    target: Int[Tensor, " token"],
    temperature: float,
    softcap: float | None,
    fused: bool,
    needs_grad: bool = True,
) -> tuple[Float[Tensor, " token"], Float[Tensor, "token d_vocab"] | None]:
    """Log-probabilities of one chunk, and temperature × their derivative with respect to logits before the soft cap;
    `logits` may be overwritten with it. fused: by a kernel for CPUs (`fused.able`), where there is no soft cap.

    e_y − softmax is rounded to the weights' dtype as one number: were W[y] added afterwards, a confident token's slope
    would be noise.
    """
    if fused and softcap is None:
        from steerlab.models import operators

        return operators.logprobs(logits, target, temperature, needs_grad), logits if needs_grad else None
    exact = torch.promote_types(logits.dtype, torch.float32)
    capped = logits if softcap is None else torch.tanh(logits.to(exact) / softcap) * softcap
    scaled = capped.to(exact) / temperature if temperature != 1.0 else capped
    probs = torch.softmax(scaled, -1, dtype=exact)
    # log Σ exp from the largest entry: one fused pass over the vocabulary, and no logarithm of a tiny number
    total = scaled.amax(-1).to(exact) - probs.amax(-1).log()
    logprobs = scaled.gather(-1, target[:, None]).squeeze(-1).to(exact) - total
    if not needs_grad:
        return logprobs, None
    slope = probs.neg_().scatter_add_(-1, target[:, None], torch.ones_like(probs[:, :1]))
    if softcap is not None:
        slope *= 1 - (capped / softcap) ** 2
    return logprobs, slope.to(logits.dtype)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, _hidden: Tensor, logprobs: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        return logprobs.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grads[0].to(slopes.dtype)[:, None] * slopes, None, None)


def recorded_logprobs(
    hidden: Float[Tensor, "token d_model"], logprobs: Float[Tensor, " token"], slopes: Float[Tensor, "token d_model"]
) -> Float[Tensor, " token"]:
    """`logprobs`, which were recorded together with their `slopes` when `hidden` was last computed, as a function of
    `hidden`: no projection at all. Right as long as nothing that `hidden` depends on has changed since."""
    return _Recorded.apply(hidden, logprobs, slopes)  # type: ignore[return-value]


def token_logprobs(
    hidden: Float[Tensor, "token d_model"],
    targets: Int[Tensor, " token"],
    weight: Float[Tensor, "d_vocab d_model"],
    bias: Float[Tensor, " d_vocab"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    fused: bool = False,
) -> Float[Tensor, " token"]:
    """log softmax(logits / temperature)[target] per token, in nats, at least fp32; differentiable in `hidden` only.

    fused: see `logit_slopes`.
    """
    return _TokenLogprobs.apply(hidden, targets, weight, bias, temperature, softcap, fused)  # type: ignore[return-value]
