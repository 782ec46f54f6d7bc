"""Kernels for a CPU: the parts of a block that are not matrix products, each as one pass over memory.

torch runs an RMS norm as six operators, a rotary embedding as fourteen, attention of a decode step as twenty. For a few
dozen rows the calls cost more than the work; for many, each operator reads and writes everything again. These are
compiled by numba when first used (a few seconds, kept on disk) and run on torch's own threads. Everything is computed
in at least fp32 and rounded once, where transformers rounds after each operator; rows do not depend on each other.

Kernels take addresses and shapes, which costs a call a tenth of what arrays cost: `operators.py` calls them with
tensors. bf16 numbers are 16-bit integers here, the upper halves of fp32 ones. like: a number of the stored type; other
scalars are of the type that is computed in. Sums may be reordered; NaN stays NaN. Results are written in inner loops:
what a `prange` body writes at its very end to an array made from an address seems to be taken for dead by numba.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numba as compiler
import numba.extending
import numpy as np
import torch

numba: Any = compiler  # to a type checker, what it compiles is not what it is called with
carray, njit, prange, types = numba.carray, numba.njit, numba.prange, numba.types
intrinsic, overload = numba.extending.intrinsic, numba.extending.overload

if sys.platform == "linux":  # one pool of threads: numba's own would take the cores from torch's, which spin
    numba.config.THREADING_LAYER = "omp"

_MATH = {"contract", "nsz", "arcp", "reassoc"}
_serial = njit(fastmath=_MATH, error_model="numpy", inline="always", cache=True)
_parallel = njit(fastmath=_MATH, error_model="numpy", parallel=True, nogil=True, cache=True)


# Names for compiled code only: what each does there, by the type that it is given, stands in the overloads below.
def _wide(x: Any) -> Any:
    """A number as it is computed with."""


def _narrow(x: Any, like: Any) -> Any:
    """A computed number in the type of `like`, to nearest even."""


def _exp(x: Any) -> Any:
    """e^x for x ≤ 88; below −87 as at −87."""


def _as(x: Any, like: Any) -> Any:
    """A whole number in the type of `like` (numba makes float32 × int64 a float64)."""


@overload(_as, inline="always")
def _as_of(x: Any, like: Any) -> Any:  # noqa: ARG001
    def single(x: Any, like: Any) -> Any:  # noqa: ARG001
        return np.float32(x)

    def double(x: Any, like: Any) -> Any:  # noqa: ARG001
        return np.float64(x)

    return double if like == types.float64 else single


@overload(_wide, inline="always")
def _wide_of(x: Any) -> Any:
    def risen(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def same(x: Any) -> Any:
        return x

    return risen if x == types.uint16 else same


@overload(_narrow, inline="always")
def _narrow_of(x: Any, like: Any) -> Any:  # noqa: ARG001
    def rounded(x: Any, like: Any) -> Any:  # noqa: ARG001
        bits = np.float32(x).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))

    def same(x: Any, like: Any) -> Any:  # noqa: ARG001
        return x

    return rounded if like == types.uint16 else same


@overload(_exp, inline="always")
def _exp_of(x: Any) -> Any:
    def exact(x: Any) -> Any:
        return math.exp(x)

    def exp(x: Any) -> Any:
        """2^n · e^r with |r| ≤ ln 2 / 2 and a polynomial of degree 6: within 2 units in the last place."""
        x = min(max(x, np.float32(-87.0)), np.float32(88.0))
        n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
        r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1)
        return p * np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)

    return exact if x == types.float64 else exp


@_serial
def _ranked(x: Any) -> Any:
    """fp32 as whole numbers in the same order, and back; NaN is largest (or, if negative, least)."""
    bits = np.int32(x)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


def _largest(row: Any) -> Any:
    """Of one row, as it is computed with. (Largest whole numbers are found many at a time, largest floats are not.)"""


@overload(_largest, inline="always")
def _largest_of(row: Any) -> Any:
    def exact(row: Any) -> Any:
        top = row[0]
        for j in range(row.shape[0]):
            top = max(top, row[j])
        return top

    def single(row: Any) -> Any:
        top = _ranked(np.float32(_wide(row[0])).view(np.int32))
        for j in range(row.shape[0]):
            top = max(top, _ranked(np.float32(_wide(row[j])).view(np.int32)))
        return np.int32(_ranked(top)).view(np.float32)

    return exact if row.dtype == types.float64 else single


@intrinsic
def _pointer(_context: Any, address: Any, like: Any) -> Any:
    """An integer as a pointer to numbers of the type of `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate


@_parallel
def rms_norm(
    x_at: int, weight_at: int, out_at: int, inverse_at: int, shape: Any, eps: Any, offset: Any, like: Any
) -> None:
    x, out = carray(_pointer(x_at, like), shape), carray(_pointer(out_at, like), shape)
    weight, inverse = carray(_pointer(weight_at, like), shape[1]), carray(_pointer(inverse_at, eps), shape[0])
    for i in prange(shape[0]):
        total = _as(0, eps)
        for j in range(shape[1]):
            total += _wide(x[i, j]) * _wide(x[i, j])
        scale = _as(1, eps) / np.sqrt(total / _as(shape[1], eps) + eps)
        inverse[i] = scale
        for j in range(shape[1]):
            out[i, j] = _narrow(_wide(x[i, j]) * inverse[i] * (_wide(weight[j]) + offset), like)


@_parallel
def rms_norm_back(
    grad_at: int, x_at: int, weight_at: int, out_at: int, inverse_at: int, shape: Any, offset: Any, like: Any
) -> None:
    grad, x = carray(_pointer(grad_at, like), shape), carray(_pointer(x_at, like), shape)
    weight, inverse = carray(_pointer(weight_at, like), shape[1]), carray(_pointer(inverse_at, offset), shape[0])
    out = carray(_pointer(out_at, like), shape)
    for i in prange(shape[0]):
        scale = inverse[i]
        along = _as(0, scale)
        for j in range(shape[1]):
            along += _wide(grad[i, j]) * (_wide(weight[j]) + offset) * _wide(x[i, j])
        along *= scale * scale * scale / _as(shape[1], scale)
        for j in range(shape[1]):
            slope = _wide(grad[i, j]) * (_wide(weight[j]) + offset) * scale - _wide(x[i, j]) * along
            out[i, j] = _narrow(slope, like)


@_parallel
def gate(gate_at: int, up_at: int, out_at: int, stride: int, shape: Any, like: Any) -> None:
    """Rows of gate and up are `stride` apart."""
    rows, width = shape
    gate, up = carray(_pointer(gate_at, like), (rows, stride)), carray(_pointer(up_at, like), (rows, stride))
    out = carray(_pointer(out_at, like), shape)
    for i in prange(rows):
        for j in range(width):
            g = _wide(gate[i, j])
            out[i, j] = _narrow(g / (_as(1, g) + _exp(-g)) * _wide(up[i, j]), like)


@_parallel
def gate_back(grad_at: int, gate_at: int, up_at: int, d_gate_at: int, d_up_at: int, shape: Any, like: Any) -> None:
    grad = carray(_pointer(grad_at, like), shape)
    gate, up = carray(_pointer(gate_at, like), shape), carray(_pointer(up_at, like), shape)
    d_gate, d_up = carray(_pointer(d_gate_at, like), shape), carray(_pointer(d_up_at, like), shape)
    for i in prange(shape[0]):
        for j in range(shape[1]):
            g, slope = _wide(gate[i, j]), _wide(grad[i, j])
            share = _as(1, g) / (_as(1, g) + _exp(-g))
            d_up[i, j] = _narrow(slope * g * share, like)
            d_gate[i, j] = _narrow(slope * _wide(up[i, j]) * (share + g * share * (_as(1, g) - share)), like)


@_serial
def _rotate_head(x: Any, cos: Any, sin: Any, sign: Any, out: Any, like: Any) -> None:
    half = cos.shape[0] // 2
    a, b, first, second = x[:half], x[half : 2 * half], out[:half], out[half : 2 * half]
    for j in range(half):
        first[j] = _narrow(_wide(a[j]) * _wide(cos[j]) - sign * _wide(b[j]) * _wide(sin[j]), like)
    for j in range(half):
        second[j] = _narrow(_wide(b[j]) * _wide(cos[half + j]) + sign * _wide(a[j]) * _wide(sin[half + j]), like)
    for j in range(2 * half, x.shape[0]):
        out[j] = x[j]


@_parallel
def rotate(
    x_at: Any, out_at: Any, cos_at: int, sin_at: int, strides: Any, shape: Any, rotary: int, sign: Any, like: Any
) -> None:
    """Of queries and keys, in this order. Their rows, (head · d), are `strides` apart; out (row, head, d). shape: rows,
    heads, kv heads, d. sign −1 turns back."""
    rows, heads, n_kv, d = shape
    query = carray(_pointer(x_at[0], like), (rows, strides[0]))
    key = carray(_pointer(x_at[1], like), (rows, strides[1]))
    turned = carray(_pointer(out_at[0], like), (rows, heads, d))
    turned_key = carray(_pointer(out_at[1], like), (rows, n_kv, d))
    cos, sin = carray(_pointer(cos_at, like), (rows, rotary)), carray(_pointer(sin_at, like), (rows, rotary))
    for i in prange(rows):
        for h in range(heads):
            _rotate_head(query[i, h * d : h * d + d], cos[i], sin[i], sign, turned[i, h], like)
        for h in range(n_kv):
            _rotate_head(key[i, h * d : h * d + d], cos[i], sin[i], sign, turned_key[i, h], like)


@_serial
def _scores(query: Any, keys: Any, start: int, stop: int, scale: Any, out: Any) -> None:
    """out[j] = query · keys[start + j] · scale, four keys at a time."""
    whole = start + (stop - start) // 4 * 4
    for j in range(start, whole, 4):
        first, second, third, fourth = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        a = b = c = d = _as(0, scale)
        for i in range(query.shape[0]):
            x = query[i]
            a += x * _wide(first[i])
            b += x * _wide(second[i])
            c += x * _wide(third[i])
            d += x * _wide(fourth[i])
        at = j - start
        out[at], out[at + 1], out[at + 2], out[at + 3] = a * scale, b * scale, c * scale, d * scale
    for j in range(whole, stop):
        a, first = _as(0, scale), keys[j]
        for i in range(query.shape[0]):
            a += query[i] * _wide(first[i])
        out[j - start] = a * scale


@_serial
def _softmax(scores: Any, n: int, softcap: Any) -> None:
    """Of the first n, in place."""
    if softcap > 0:
        for j in range(n):
            scores[j] = math.tanh(scores[j] / softcap) * softcap
    top = _largest(scores[:n])
    total = _as(0, top)
    for j in range(n):
        risen = _exp(scores[j] - top)
        scores[j] = risen
        total += risen
    share = _as(1, total) / total
    for j in range(n):
        scores[j] *= share


@_serial
def _mix(weights: Any, values: Any, start: int, stop: int, out: Any) -> None:
    """out += Σ_j weights[j] · values[start + j], eight values at a time."""
    whole = start + (stop - start) // 8 * 8
    for j in range(start, whole, 8):
        w, v = weights[j - start : j - start + 8], values[j : j + 8]
        a, b, c, d, e, f, g, h = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
        v0, v1, v2, v3, v4, v5, v6, v7 = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]
        for i in range(out.shape[0]):
            half = a * _wide(v0[i]) + b * _wide(v1[i]) + c * _wide(v2[i]) + d * _wide(v3[i])
            out[i] += half + e * _wide(v4[i]) + f * _wide(v5[i]) + g * _wide(v6[i]) + h * _wide(v7[i])
    for j in range(whole, stop):
        a, v0 = weights[j - start], values[j]
        for i in range(out.shape[0]):
            out[i] += a * _wide(v0[i])


@_parallel
def attend(
    new: Any,  # addresses of query (row, head, d), key and value (row, kv_head · d), out (row, head, d_value)
    strides: Any,  # between rows of key and value
    prompt: Any,  # addresses of keys and values (unit, kv_head, slot, d)
    own: Any,  # the same of (place, kv_head, slot, d)
    index: Any,  # addresses of unit (row), place (row), length (unit)
    sizes: Any,  # rows, heads, kv_heads, d, d_value, units, prompt slots, places, own slots, filled
    scale: Any,
    softcap: Any,  # 0 for none
    window: int,  # 0 for none
    threads: int,
    room: Any,  # addresses of (row, head, slot), (row, head, d), (row, head, d_value)
    like: Any,
) -> None:
    rows, heads, n_kv, d, d_value, units, prompt_slots, places, own_slots, filled = sizes
    repeat = heads // n_kv
    query = carray(_pointer(new[0], like), (rows, n_kv, repeat, d))
    out = carray(_pointer(new[3], like), (rows, n_kv, repeat, d_value))
    key, value = carray(_pointer(new[1], like), (rows, strides[0])), carray(_pointer(new[2], like), (rows, strides[1]))
    prompt_key = carray(_pointer(prompt[0], scale), (units, n_kv, prompt_slots, d))
    prompt_value = carray(_pointer(prompt[1], scale), (units, n_kv, prompt_slots, d_value))
    own_key = carray(_pointer(own[0], like), (places, n_kv, own_slots, d))
    own_value = carray(_pointer(own[1], like), (places, n_kv, own_slots, d_value))
    unit, place = carray(_pointer(index[0], rows), rows), carray(_pointer(index[1], rows), rows)
    length = carray(_pointer(index[2], rows), units)
    scores = carray(_pointer(room[0], scale), (rows, n_kv, repeat, prompt_slots + own_slots))
    asked = carray(_pointer(room[1], scale), (rows, n_kv, repeat, d))
    mixed = carray(_pointer(room[2], scale), (rows, n_kv, repeat, d_value))
    tasks = rows * n_kv
    share = (tasks + threads - 1) // threads
    for i in prange(share * threads):
        task = (i % share) * threads + i // share  # neighbours, which share a prompt, are spread over the threads
        if task < tasks:
            row, k = task // n_kv, task % n_kv
            u, at = unit[row], place[row]
            new_key, new_value = own_key[at, k, filled - 1], own_value[at, k, filled - 1]
            for j in range(d):
                new_key[j] = key[row, k * d + j]
            for j in range(d_value):
                new_value[j] = value[row, k * d_value + j]
            n = length[u]
            first = max(0, n + filled - window) if window > 0 else 0
            first_prompt, first_own = min(first, n), max(0, first - n)
            n_prompt = n - first_prompt
            for h in range(repeat):
                q, weights, total = asked[row, k, h], scores[row, k, h], mixed[row, k, h]
                on_own = weights[n_prompt:]
                for j in range(d):
                    q[j] = _wide(query[row, k, h, j])
                _scores(q, prompt_key[u, k], first_prompt, n, scale, weights)
                _scores(q, own_key[at, k], first_own, filled, scale, on_own)
                _softmax(weights, n_prompt + filled - first_own, softcap)
                for j in range(d_value):
                    total[j] = _as(0, scale)
                _mix(weights, prompt_value[u, k], first_prompt, n, total)
                _mix(on_own, own_value[at, k], first_own, filled, total)
                for j in range(d_value):
                    out[row, k, h, j] = _narrow(total[j], like)


@_parallel
def logprobs(
    logits_at: int, target_at: int, logprob_at: int, shape: Any, per_temperature: Any, slopes: bool, like: Any
) -> None:
    """log softmax(logits / temperature)[target] of every row, (token, d_vocab). slopes: logits become
    e_target − softmax, rounded once."""
    logits, target = carray(_pointer(logits_at, like), shape), carray(_pointer(target_at, shape[0]), shape[0])
    logprob = carray(_pointer(logprob_at, per_temperature), shape[0])
    for i in prange(shape[0]):
        row, y = logits[i], target[i]
        top, total = _largest(row), _as(0, per_temperature)
        for j in range(shape[1]):
            total += _exp((_wide(row[j]) - top) * per_temperature)
        chosen = (_wide(row[y]) - top) * per_temperature
        if slopes:
            share = _as(1, total) / total
            for j in range(shape[1]):
                row[j] = _narrow(-_exp((_wide(row[j]) - top) * per_temperature) * share, like)
        for j in range(y, y + 1):
            logprob[i] = chosen - np.log(total)
            if slopes:
                row[j] = _narrow(_as(1, total) - _exp(chosen) / total, like)


def use_threads() -> None:
    """As many threads as torch uses; for the calling thread, until told otherwise."""
    wanted = torch.get_num_threads()
    numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(wanted)  # numba, when it starts its threads, sets OpenMP's number, which is torch's too


def n_threads() -> int:
    """As told by `use_threads`."""
    return numba.get_num_threads()


use_threads()  # numba starts its threads here, before anything is computed: see there
