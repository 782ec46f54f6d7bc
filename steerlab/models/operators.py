"""RMS norm, gate, rotary embedding and attention of a decode step as torch functions on kernels, for a CPU.

Differentiable where training needs it, once and by hand: an operator keeps its inputs and nothing else. Leaves out:
gradients of weights (models are frozen) and second derivatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerlab.models import attention_kernels, kernels, numbers
from steerlab.models.vectors import CHUNK, LANES

if TYPE_CHECKING:
    from steerlab.models.distributions import Final, Known

_STORED = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0), torch.float64: np.float64(0)}
_EXACT = {torch.bfloat16: np.float32, torch.float32: np.float32, torch.float64: np.float64}
DTYPES = tuple(_STORED)


def working(dtype: torch.dtype) -> torch.dtype:
    """What numbers of `dtype` are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _wants_gradient(x: Tensor, also: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or also.requires_grad)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        out, inverse = _normalised(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        out, grad, width, dtype = torch.empty_like(x), grads[0].contiguous(), x.shape[-1], x.dtype
        at = grad.data_ptr(), x.data_ptr(), weight.data_ptr(), out.data_ptr(), inverse.data_ptr()
        kernels.rms_norm_back(*at, (inverse.numel(), width), _EXACT[dtype](ctx.offset), _STORED[dtype])
        return out, None, None, None


def _normalised(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    width, exact = x.shape[-1], _EXACT[x.dtype]
    out = torch.empty_like(x)
    inverse = torch.empty(x.numel() // width, dtype=working(x.dtype))
    at = x.data_ptr(), weight.data_ptr(), out.data_ptr(), inverse.data_ptr()
    kernels.rms_norm(*at, (inverse.numel(), width), exact(eps), exact(offset), _STORED[x.dtype])
    return out, inverse


def rms_norm(
    x: Float[Tensor, "*batch width"], weight: Float[Tensor, " width"], eps: float, offset: float = 0.0
) -> Float[Tensor, "*batch width"]:
    """x / √(mean x² + eps) · (weight + offset), differentiable in x. offset: 1 in Gemma's norms."""
    x, weight = x.contiguous(), weight.to(x.dtype)
    if _wants_gradient(x, x):
        return _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[return-value]
    return _normalised(x, weight, eps, offset)[0]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, d_gate, d_up, width = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
        at = grad.data_ptr(), gate.data_ptr(), up.data_ptr(), d_gate.data_ptr(), d_up.data_ptr()
        kernels.gate_back(*at, (gate.numel() // width, width), _STORED[gate.dtype])
        return d_gate, d_up


def _stride(x: Tensor, inner: int) -> int | None:
    """Distance between rows, all axes but the last `inner` being rows; None where they are not evenly spaced."""
    sizes, steps = x.shape, x.stride()
    apart = expected = None
    for axis in range(x.ndim - inner - 1, -1, -1):
        if sizes[axis] == 1:
            continue
        if expected is None:
            apart = steps[axis]
        elif steps[axis] != expected:
            return None
        expected = steps[axis] * sizes[axis]
    return sizes[-inner:].numel() if apart is None else apart


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    width, stride = gate.shape[-1], _stride(gate, 1)
    if stride is None or stride != _stride(up, 1) or gate.stride(-1) != 1 or up.stride(-1) != 1:
        gate, up, stride = gate.contiguous(), up.contiguous(), width
    out = torch.empty(gate.shape, dtype=gate.dtype)
    shape = gate.numel() // width, width
    kernels.gate(gate.data_ptr(), up.data_ptr(), out.data_ptr(), stride, shape, _STORED[gate.dtype])
    return out


def silu_gate(gate: Float[Tensor, "*batch d_mlp"], up: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
    """silu(gate) · up, differentiable in both."""
    if _wants_gradient(gate, up):
        return _Gate.apply(gate.contiguous(), up.contiguous())  # type: ignore[return-value]
    return _gated(gate, up)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(query, key, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotated(grads[0], grads[1], cos, sin, -1), None, None


def _by_row(x: Tensor) -> tuple[Tensor, int]:
    """(batch, head, pos, d), which mostly is a transposed (batch, pos, head, d): that, and how far apart rows are."""
    by_row = x.transpose(1, 2)
    stride = _stride(by_row, 2)
    if stride is None or by_row.stride(3) != 1 or by_row.stride(2) != by_row.shape[3]:
        by_row = by_row.contiguous()
        stride = by_row.shape[2] * by_row.shape[3]
    return by_row, stride


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    (rows, stride), (key_rows, key_stride), dtype = _by_row(query), _by_row(key), query.dtype
    batch, length, heads, d = rows.shape
    out, key_out = torch.empty(rows.shape, dtype=dtype), torch.empty(key_rows.shape, dtype=dtype)
    kernels.rotate(
        (rows.data_ptr(), key_rows.data_ptr()),
        (out.data_ptr(), key_out.data_ptr()),
        cos.data_ptr(),
        sin.data_ptr(),
        (stride, key_stride),
        (batch * length, heads, key_rows.shape[2], d),
        cos.shape[-1],
        _EXACT[dtype](sign),
        _STORED[dtype],
    )
    return out.transpose(1, 2), key_out.transpose(1, 2)


def _angles(x: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """One row per token, in the dtype of what is turned."""
    if x.shape[0] == batch and x.dtype == dtype and x.is_contiguous():
        return x
    return x.to(dtype).expand(batch, -1, -1).contiguous()


def rotate(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    cos: Float[Tensor, "one_or_batch pos d_rotary"],
    sin: Float[Tensor, "one_or_batch pos d_rotary"],
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the first d_rotary numbers of every head, in the form of transformers' function."""
    assert unsqueeze_dim == 1
    batch, dtype = query.shape[0], query.dtype
    cos, sin = _angles(cos, batch, dtype), _angles(sin, batch, dtype)
    if _wants_gradient(query, key):
        return _Rotation.apply(query, key, cos, sin)  # type: ignore[return-value]
    return _rotated(query, key, cos, sin, 1)


def keys_in_blocks(key: Float[Tensor, "*batch slot d"]) -> Float[Tensor, "*batch block d lane"]:
    """As `attend` reads keys: LANES slots side by side, zeros behind the last."""
    blocks = nn.functional.pad(key, (0, 0, 0, -key.shape[-2] % LANES)).unflatten(-2, (-1, LANES))
    return blocks.transpose(-1, -2).contiguous()


def padded_values(value: Float[Tensor, "*batch slot d_value"]) -> Float[Tensor, "*batch padded_slot padded"]:
    """As `attend` reads values: zeros behind each and behind the last."""
    behind = -value.shape[-1] % (LANES * CHUNK), -value.shape[-2] % LANES
    return nn.functional.pad(value, (0, behind[0], 0, behind[1])).contiguous()


def room_for_keys(like: Tensor, places: int, kv_heads: int, slots: int) -> Tensor:
    """Room for keys as `attend` reads them, nothing written. like: keys, (…, d)."""
    return like.new_empty(places, kv_heads, -(-slots // LANES), like.shape[-1], LANES)


def room_for_values(like: Tensor, places: int, kv_heads: int, slots: int) -> Tensor:
    """The same for values, (…, d_value), with zeros behind each."""
    width = like.shape[-1]
    behind = -width % (LANES * CHUNK)
    make = like.new_zeros if behind else like.new_empty
    return make(places, kv_heads, -(-slots // LANES) * LANES, width + behind)


def attend(
    query: Float[Tensor, "row head one d"],
    key: Float[Tensor, "row kv_head one d"],
    value: Float[Tensor, "row kv_head one d_value"],
    prompt: tuple[Float[Tensor, "unit kv_head block d lane"], Float[Tensor, "unit kv_head slot padded"]],
    own: tuple[Float[Tensor, "place kv_head own_block d lane"], Float[Tensor, "place kv_head own_slot padded"]],
    index: tuple[Int[Tensor, " row"], Int[Tensor, " row"], Int[Tensor, " unit"]],
    filled: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    scratch: Tensor,
) -> Float[Tensor, "row head one d_value"]:
    """Attention of one new token per row; its key and value become slot `filled` − 1 of the row's own.

    prompt, own: keys and values of each unit and of each place, from `keys_in_blocks` and `padded_values`, in the dtype
    of `key`. index: unit of each row, place of each row, tokens of each unit. window: keys seen, None for all. scratch:
    `scratch_size` numbers or more. d is even (it is turned).
    """
    (rows, heads, _, d), d_value, dtype = query.shape, value.shape[3], query.dtype
    strides = tuple(_stride(x, 3) if x.stride(3) == 1 and x.stride(1) == x.shape[3] else None for x in (key, value))
    if None in strides:
        key, value, strides = key.contiguous(), value.contiguous(), (key[0].numel(), value[0].numel())
    query, exact = query.contiguous(), _EXACT[dtype]
    out = torch.empty(rows, heads, 1, d_value, dtype=dtype)
    (units, n_kv, prompt_slots, padded), (places, _, own_slots, _) = prompt[1].shape, own[1].shape
    n_scores = rows * heads * (prompt_slots + own_slots + LANES)
    room, repeat = (0, n_scores, n_scores + rows * heads * d), heads // n_kv
    attention_kernels.attend(
        (0,) * max(n for n in (1, 2, 3, 4) if repeat % n == 0),
        tuple(x.data_ptr() for x in (query, key, value, out)),
        strides,
        (prompt[0].data_ptr(), prompt[1].data_ptr()),
        (own[0].data_ptr(), own[1].data_ptr()),
        tuple(x.data_ptr() for x in index),
        (rows, heads, n_kv, d, d_value, padded, units, prompt_slots, places, own_slots, filled),
        (dtype.itemsize, scratch.element_size()),
        exact(scale),
        exact(softcap or 0),
        window or 0,
        numbers.n_threads(),
        tuple(scratch.data_ptr() + at * scratch.element_size() for at in room),
        _STORED[dtype],
    )
    return out


def causal_softmax_(
    scores: Float[Tensor, "kv_head query key"], first: int, span: int, window: int | None, scale: float
) -> Float[Tensor, "kv_head query key"]:
    """Softmax of scale · scores over the keys that each query sees, in place; see `attention_kernels`."""
    dtype, shape = scores.dtype, (scores.shape[0] * scores.shape[1], scores.shape[2])
    at, exact = scores.data_ptr(), _EXACT[dtype](scale)
    attention_kernels.causal_softmax(at, shape, first, span, window or 0, exact, _STORED[dtype])
    return scores


def causal_softmax_back_(
    grad: Float[Tensor, "kv_head query key"],
    pattern: Float[Tensor, "kv_head query key"],
    first: int,
    span: int,
    scale: float,
) -> Float[Tensor, "kv_head query key"]:
    """Its derivative: the gradient of a pattern becomes that of the scores, in place."""
    dtype, shape = grad.dtype, (grad.shape[0] * grad.shape[1], grad.shape[2])
    at = grad.data_ptr(), pattern.data_ptr()
    attention_kernels.causal_softmax_back(*at, shape, first, span, _EXACT[dtype](scale), _STORED[dtype])
    return grad


def logprobs(
    logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, " token"], temperature: float, slopes: bool
) -> Float[Tensor, " token"]:
    """log softmax(logits / temperature)[target] in one pass. slopes: `logits` are overwritten by its derivative with
    respect to logits / temperature, e_target − softmax."""
    targets, dtype = targets.contiguous(), logits.dtype
    out = torch.empty(len(targets), dtype=working(dtype))
    at = logits.data_ptr(), targets.data_ptr(), out.data_ptr()
    kernels.logprobs(*at, tuple(logits.shape), _EXACT[dtype](1 / temperature), slopes, _STORED[dtype])
    return out


def absorb(
    logits: Float[Tensor, "row token"],
    first: int,
    known: Known,
    final: Final,
    watch: Int[Tensor, " watched"],
    is_final: bool,
) -> None:
    """`distributions.absorb` in one pass."""
    logits, (rows, width), dtype = logits.contiguous(), logits.shape, logits.dtype
    share = final.share if width == final.share.shape[1] else final.share[:, :width].contiguous()
    kernels.read_logits(
        logits.data_ptr(),
        share.data_ptr(),
        final.shift.data_ptr(),
        (known.sums.data_ptr(), known.best.data_ptr(), known.best_ids.data_ptr()),
        (known.seen.data_ptr(), known.above.data_ptr(), watch.data_ptr()),
        (rows, width, first, known.best.shape[1], len(watch)),
        is_final,
        _EXACT[dtype](1),
        _STORED[dtype],
    )
    if is_final and share is not final.share:
        final.share[:, :width] = share


def scratch_size(rows: int, heads: int, d: int, prompt_value: Tensor, own_value: Tensor) -> int:
    """Numbers that `attend` needs room for, in the dtype that is computed in."""
    return rows * heads * (prompt_value.shape[2] + own_value.shape[2] + LANES + d + own_value.shape[3])
