"""Kernels for a CPU: the parts of a block that are not matrix products, each as one pass over memory.

torch runs an RMS norm as six operators, a rotary embedding as fourteen. For a few dozen rows the calls cost more than
the work; for many, each operator reads and writes everything again. Rules and parts: `numbers.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerlab.models.numbers import called, carray, exp, largest, narrow, parallel, pointer, prange, serial, whole, wide


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


@called
def _keep_likeliest(row: Any, first: int, best: Any, best_id: Any) -> None:
    """Those of `row` above the last of the k best take their places among them; earlier ids before equals."""
    least = best[best.shape[0] - 1]
    if largest(row) <= least:
        return
    for j in range(row.shape[0]):
        x = wide(row[j])
        if x > least:
            place = best.shape[0] - 1
            while place > 0 and best[place - 1] < x:
                best[place], best_id[place] = best[place - 1], best_id[place - 1]
                place -= 1
            best[place], best_id[place] = x, first + j
            least = best[best.shape[0] - 1]


@called
def _others_above(row: Any, level: Any, own: int) -> int:
    """How many of `row` but its place `own` (if it has one) exceed `level`."""
    n = 0
    for j in range(row.shape[0]):
        n += wide(row[j]) > level
    if own >= 0 and own < row.shape[0] and wide(row[own]) > level:
        n -= 1
    return n


@parallel
def read_logits(
    logits_at: int,
    share_at: int,
    shift_at: int,
    kept_at: Any,
    seen_at: Any,
    sizes: Any,
    final: bool,
    one: Any,
    like: Any,
) -> None:
    """What one block of the vocabulary, from token `first` on, adds to what is known of each row's distribution.

    sizes: rows, block, first, k, watched. kept_at: of every row the largest logit, Σe, Σe·logit and Σe·logit of the
    final distribution's e, where e = exp(logit − largest); the k largest logits; their ids. seen_at: logits of the
    watched tokens of every row, how many others exceed them, which tokens they are. final: these are the rows of the
    final distribution: its e are written to `share`, and by what its sums so far shrink to `shift`. one: of the type
    that is computed in.
    """
    rows, width, first, k, watched = sizes
    logits, share = carray(pointer(logits_at, like), (rows, width)), carray(pointer(share_at, one), (rows, width))
    shift, sums = carray(pointer(shift_at, one), rows), carray(pointer(kept_at[0], one), (rows, 4))
    best, best_id = carray(pointer(kept_at[1], one), (rows, k)), carray(pointer(kept_at[2], rows), (rows, k))
    seen, above = carray(pointer(seen_at[0], one), (rows, watched)), carray(pointer(seen_at[1], rows), (rows, watched))
    watch = carray(pointer(seen_at[2], rows), watched)
    for i in prange(rows):
        row, here = logits[i], largest(logits[i])
        top = max(sums[i, 0], here)
        total, along, crossed = whole(0, one), whole(0, one), whole(0, one)
        if final:
            for j in range(width):
                x = wide(row[j])
                e = exp(x - top)
                share[i, j] = e
                total += e
                along += e * x
            crossed = along
        else:
            for j in range(width):
                x = wide(row[j])
                e = exp(x - top)
                total += e
                along += e * x
                crossed += share[i, j] * x
        for w in range(watched):
            above[i, w] += _others_above(row, seen[i, w], watch[w] - first)
        if here > best[i, k - 1]:
            for start in range(0, width, 128):
                _keep_likeliest(row[start : min(start + 128, width)], first + start, best[i], best_id[i])
        for j in range(i, i + 1):
            shrunk = exp(sums[j, 0] - top)
            if final:
                shift[j] = shrunk
            sums[j, 0] = top
            sums[j, 1] = sums[j, 1] * shrunk + total
            sums[j, 2] = sums[j, 2] * shrunk + along
            sums[j, 3] = sums[j, 3] * shift[j] + crossed
