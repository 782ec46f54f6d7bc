"""Kernels for a CPU: the parts of a block that are not matrix products, each as one pass over memory.

torch runs an RMS norm as six operators, a rotary embedding as fourteen. For a few dozen rows the calls cost more than
the work; for many, each operator reads and writes everything again. Rules and parts: `numbers.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerlab.models.numbers import carray, exp, largest, narrow, parallel, pointer, prange, serial, whole, wide


@parallel
def rms_norm(
    x_at: int, weight_at: int, out_at: int, inverse_at: int, shape: Any, eps: Any, offset: Any, like: Any
) -> None:
    x, out = carray(pointer(x_at, like), shape), carray(pointer(out_at, like), shape)
    weight, inverse = carray(pointer(weight_at, like), shape[1]), carray(pointer(inverse_at, eps), shape[0])
    for i in prange(shape[0]):
        total = whole(0, eps)
        for j in range(shape[1]):
            total += wide(x[i, j]) * wide(x[i, j])
        scale = whole(1, eps) / np.sqrt(total / whole(shape[1], eps) + eps)
        inverse[i] = scale
        for j in range(shape[1]):
            out[i, j] = narrow(wide(x[i, j]) * inverse[i] * (wide(weight[j]) + offset), like)


@parallel
def rms_norm_back(
    grad_at: int, x_at: int, weight_at: int, out_at: int, inverse_at: int, shape: Any, offset: Any, like: Any
) -> None:
    grad, x = carray(pointer(grad_at, like), shape), carray(pointer(x_at, like), shape)
    weight, inverse = carray(pointer(weight_at, like), shape[1]), carray(pointer(inverse_at, offset), shape[0])
    out = carray(pointer(out_at, like), shape)
    for i in prange(shape[0]):
        scale = inverse[i]
        along = whole(0, scale)
        for j in range(shape[1]):
            along += wide(grad[i, j]) * (wide(weight[j]) + offset) * wide(x[i, j])
        along *= scale * scale * scale / whole(shape[1], scale)
        for j in range(shape[1]):
            slope = wide(grad[i, j]) * (wide(weight[j]) + offset) * scale - wide(x[i, j]) * along
            out[i, j] = narrow(slope, like)


@parallel
def gate(gate_at: int, up_at: int, out_at: int, stride: int, shape: Any, like: Any) -> None:
    """Rows of gate and up are `stride` apart."""
    rows, width = shape
    gate, up = carray(pointer(gate_at, like), (rows, stride)), carray(pointer(up_at, like), (rows, stride))
    out = carray(pointer(out_at, like), shape)
    for i in prange(rows):
        for j in range(width):
            g = wide(gate[i, j])
            out[i, j] = narrow(g / (whole(1, g) + exp(-g)) * wide(up[i, j]), like)


@parallel
def gate_back(grad_at: int, gate_at: int, up_at: int, d_gate_at: int, d_up_at: int, shape: Any, like: Any) -> None:
    grad = carray(pointer(grad_at, like), shape)
    gate, up = carray(pointer(gate_at, like), shape), carray(pointer(up_at, like), shape)
    d_gate, d_up = carray(pointer(d_gate_at, like), shape), carray(pointer(d_up_at, like), shape)
    for i in prange(shape[0]):
        for j in range(shape[1]):
            g, slope = wide(gate[i, j]), wide(grad[i, j])
            share = whole(1, g) / (whole(1, g) + exp(-g))
            d_up[i, j] = narrow(slope * g * share, like)
            d_gate[i, j] = narrow(slope * wide(up[i, j]) * (share + g * share * (whole(1, g) - share)), like)


@serial
def _rotate_head(x: Any, cos: Any, sin: Any, sign: Any, out: Any, like: Any) -> None:
    half = cos.shape[0] // 2
    a, b, first, second = x[:half], x[half : 2 * half], out[:half], out[half : 2 * half]
    for j in range(half):
        first[j] = narrow(wide(a[j]) * wide(cos[j]) - sign * wide(b[j]) * wide(sin[j]), like)
    for j in range(half):
        second[j] = narrow(wide(b[j]) * wide(cos[half + j]) + sign * wide(a[j]) * wide(sin[half + j]), like)
    for j in range(2 * half, x.shape[0]):
        out[j] = x[j]


@parallel
def rotate(
    x_at: Any, out_at: Any, cos_at: int, sin_at: int, strides: Any, shape: Any, rotary: int, sign: Any, like: Any
) -> None:
    """Of queries and keys, in this order. Their rows, (head · d), are `strides` apart; out (row, head, d). shape: rows,
    heads, kv heads, d. sign −1 turns back."""
    rows, heads, n_kv, d = shape
    query = carray(pointer(x_at[0], like), (rows, strides[0]))
    key = carray(pointer(x_at[1], like), (rows, strides[1]))
    turned = carray(pointer(out_at[0], like), (rows, heads, d))
    turned_key = carray(pointer(out_at[1], like), (rows, n_kv, d))
    cos, sin = carray(pointer(cos_at, like), (rows, rotary)), carray(pointer(sin_at, like), (rows, rotary))
    for i in prange(rows):
        for h in range(heads):
            _rotate_head(query[i, h * d : h * d + d], cos[i], sin[i], sign, turned[i, h], like)
        for h in range(n_kv):
            _rotate_head(key[i, h * d : h * d + d], cos[i], sin[i], sign, turned_key[i, h], like)


@parallel
def logprobs(
    logits_at: int, target_at: int, logprob_at: int, shape: Any, per_temperature: Any, slopes: bool, like: Any
) -> None:
    """log softmax(logits / temperature)[target] of every row, (token, d_vocab). slopes: logits become
    e_target − softmax, rounded once."""
    logits, target = carray(pointer(logits_at, like), shape), carray(pointer(target_at, shape[0]), shape[0])
    logprob = carray(pointer(logprob_at, per_temperature), shape[0])
    for i in prange(shape[0]):
        row, y = logits[i], target[i]
        top, total = largest(row), whole(0, per_temperature)
        for j in range(shape[1]):
            total += exp((wide(row[j]) - top) * per_temperature)
        chosen = (wide(row[y]) - top) * per_temperature
        if slopes:
            share = whole(1, total) / total
            for j in range(shape[1]):
                row[j] = narrow(-exp((wide(row[j]) - top) * per_temperature) * share, like)
        for j in range(y, y + 1):
            logprob[i] = chosen - np.log(total)
            if slopes:
                row[j] = narrow(whole(1, total) - exp(chosen) / total, like)
