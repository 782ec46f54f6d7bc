"""How far what states say is from what the model says: KL through final norm and head, without all logits at once.

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v),    p = softmax(head(norm(h_last))),  q = softmax(head(norm(h)))

For one chunk of tokens p is formed once and every layer's q behind it, one after the other, so that nothing of size
layers × tokens × vocabulary is ever held. The derivative with respect to a state h goes through head, soft cap and
norm, none of which is trained: it is formed there and then, as the slopes of `models/head.py` are, and the backward
pass is one multiplication. With z the logits behind the soft cap, ∂KL/∂z = q − p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steerlab.models.head import CHUNK_TOKENS

Norm = Callable[[Tensor], Tensor]


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        last: Tensor,
        norm: Norm,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        *states: Tensor,
    ) -> Tensor:
        exact = torch.promote_types(last.dtype, torch.float32)
        found = last.new_empty(len(states), len(last), dtype=exact)
        wanted: Sequence[bool] = ctx.needs_input_grad[5:]  # type: ignore[attr-defined]
        slopes = [torch.empty_like(h) if needed else None for h, needed in zip(states, wanted, strict=True)]
        for start in range(0, len(last), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            own = _logits(norm(last[rows]), weight, bias, softcap)
            p = own.softmax(-1)
            certain = torch.linalg.vecdot(p, own) - own.logsumexp(-1)  # Σ p log p
            for number, (h, slope) in enumerate(zip(states, slopes, strict=True)):
                with torch.set_grad_enabled(slope is not None):
                    there = h[rows].detach().requires_grad_(slope is not None)
                    normed = norm(there)
                z = _logits(normed.detach(), weight, bias, softcap)
                found[number, rows] = certain + z.logsumexp(-1) - torch.linalg.vecdot(p, z)
                if slope is not None:
                    steep = z.softmax(-1).sub_(p)
                    if softcap is not None:
                        steep *= 1 - (z / softcap) ** 2
                    (slope[rows],) = torch.autograd.grad(normed, there, steep.to(weight.dtype) @ weight)
        ctx.save_for_backward(*(slope for slope in slopes if slope is not None))
        return found

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = iter(ctx.saved_tensors)  # type: ignore[attr-defined]
        wanted: Sequence[bool] = ctx.needs_input_grad[5:]  # type: ignore[attr-defined]
        through = [
            grad.to(slope.dtype)[:, None] * slope if needed and (slope := next(kept)) is not None else None
            for grad, needed in zip(grads[0], wanted, strict=True)
        ]
        return (None, None, None, None, None, *through)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """In at least fp32, behind the soft cap."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def divergences(
    last: Float[Tensor, "token d_model"],
    states: Sequence[Float[Tensor, "token d_model"]],
    norm: Norm,
    weight: Float[Tensor, "d_vocab d_model"],
    bias: Float[Tensor, " d_vocab"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "state token"]:
    """KL in nats, at least fp32, of what each of `states` says from what `last` says; differentiable in `states` only.

    last, states: of the residual stream, before the final norm.
    """
    return _Divergences.apply(last, norm, weight, bias, softcap, *states)  # type: ignore[return-value]
