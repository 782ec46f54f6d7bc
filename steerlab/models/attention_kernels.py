"""Kernels for attention on a CPU: of a decode step, whole; of the update (`attention.Stream`), its softmax.

Rules and parts: `numbers.py`, `vectors.py`. In the update a row of scores belongs to one query, `span` queries of one
sequence behind one another; query i sees keys up to `first` + i % span, and no more than `window` of them (0: all).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from steerlab.models.numbers import carray, exp, largest, narrow, parallel, pointer, prange, serial, whole, wide
from steerlab.models.vectors import LANES, add_values, score_keys


@serial
def _softmax(scores: Any, n: int, softcap: Any) -> None:
    """Of the first n, in place; what is behind them, up to a multiple of LANES, is overwritten."""
    if softcap > 0:
        for j in range(n):
            scores[j] = math.tanh(scores[j] / softcap) * softcap
    padded = (n + LANES - 1) // LANES * LANES
    for j in range(n, padded):
        scores[j] = -np.inf
    top = largest(scores[:padded])
    total = whole(0, top)
    for j in range(padded):
        risen = exp(scores[j] - top)
        scores[j] = risen
        total += risen
    share = whole(1, total) / total
    for j in range(n):
        scores[j] *= share


@serial
def _seen(n: int, filled: int, window: int) -> tuple[int, int, int, int, int]:
    """What the newest of n prompt keys and `filled` own ones sees, and where its scores stand. Whole blocks are
    multiplied: own scores overwrite what lies behind the prompt's.

    Returns first prompt key, first own key; of the scores, the first own block's, the first that is seen, the first own
    one that is seen.
    """
    first = max(0, n + filled - window) if window > 0 else 0
    if first >= n:
        return n, first - n, 0, (first - n) % LANES, (first - n) % LANES
    own = n - first // LANES * LANES
    return first, 0, own, first % LANES, own


@serial
def _begin(query: Any, scale: Any, asked: Any, mixed: Any) -> None:
    """Queries, (head, d), as they are multiplied; sums of values, (head, padded d_value), at 0."""
    for h in range(query.shape[0]):
        for j in range(query.shape[1]):
            asked[h, j] = wide(query[h, j]) * scale
        for j in range(mixed.shape[1]):
            mixed[h, j] = whole(0, scale)


@serial
def _remember(key: Any, keys: Any, slot: int) -> None:
    """keys: (block, d, lane)."""
    lane = keys[slot // LANES, :, slot % LANES]
    for j in range(key.shape[0]):
        lane[j] = key[j]


@serial
def _remember_value(value: Any, values: Any, slot: int) -> None:
    for j in range(value.shape[0]):
        values[slot, j] = value[j]


@parallel
def attend(
    heads: Any,  # as many zeros as query heads are worked at once; they divide those of a key head
    new: Any,  # addresses of query (row, head, d), key and value (row, kv_head · d), out (row, head, d_value)
    strides: Any,  # between rows of key and value
    prompt: Any,  # addresses of keys (unit, kv_head, block, d, lane) and values (unit, kv_head, slot, padded d_value)
    own: Any,  # the same of (place, …)
    index: Any,  # addresses of unit (row), place (row), length (unit)
    sizes: Any,  # rows, heads, kv_heads, d, d_value, padded d_value, units, prompt slots, places, own slots, filled
    n_bytes: Any,  # of a stored and of a computed number
    scale: Any,
    softcap: Any,  # 0 for none
    window: int,  # 0 for none
    threads: int,
    room: Any,  # addresses of (row, head, slot), (row, head, d), (row, head, padded d_value)
    like: Any,
) -> None:
    """Slots are a multiple of LANES; scores have room for LANES more. Padding behind a value is 0."""
    rows, n_heads, n_kv, d, d_value, padded, units, prompt_slots, places, own_slots, filled = sizes
    stored, exact = n_bytes
    repeat, together, slots = n_heads // n_kv, len(heads), prompt_slots + own_slots + LANES
    query = carray(pointer(new[0], like), (rows, n_kv, repeat, d))
    out = carray(pointer(new[3], like), (rows, n_kv, repeat, d_value))
    key, value = carray(pointer(new[1], like), (rows, strides[0])), carray(pointer(new[2], like), (rows, strides[1]))
    own_key = carray(pointer(own[0], like), (places, n_kv, own_slots // LANES, d, LANES))
    own_value = carray(pointer(own[1], like), (places, n_kv, own_slots, padded))
    unit, place = carray(pointer(index[0], rows), rows), carray(pointer(index[1], rows), rows)
    length = carray(pointer(index[2], rows), units)
    scores = carray(pointer(room[0], scale), (rows, n_kv, repeat, slots))
    asked = carray(pointer(room[1], scale), (rows, n_kv, repeat, d))
    mixed = carray(pointer(room[2], scale), (rows, n_kv, repeat, padded))
    tasks, share = rows * n_kv, (rows * n_kv + threads - 1) // threads
    for i in prange(share * threads):
        task = (i % share) * threads + i // share  # neighbours, which share a prompt, are spread over the threads
        if task < tasks:
            row, k = task // n_kv, task % n_kv
            u, at = unit[row] * n_kv + k, place[row] * n_kv + k
            _remember(key[row, k * d : k * d + d], own_key[place[row], k], filled - 1)
            _remember_value(value[row, k * d_value : k * d_value + d_value], own_value[place[row], k], filled - 1)
            n = length[unit[row]]
            first_prompt, first_own, on_own, begin, behind = _seen(n, filled, window)
            blocks = (on_own + LANES - 1) // LANES, (filled - first_own // LANES * LANES + LANES - 1) // LANES
            prompt_key = prompt[0] + (u * prompt_slots + first_prompt // LANES * LANES) * d * stored
            prompt_value = prompt[1] + (u * prompt_slots + first_prompt) * padded * stored
            keys = own[0] + (at * own_slots + first_own // LANES * LANES) * d * stored
            values = own[1] + (at * own_slots + first_own) * padded * stored
            _begin(query[row, k], scale, asked[row, k], mixed[row, k])
            for h in range(0, repeat, together):
                queries = room[1] + (task * repeat + h) * d * exact
                weights = room[0] + (task * repeat + h) * slots * exact
                total = room[2] + (task * repeat + h) * padded * exact
                score_keys(heads, queries, d, prompt_key, blocks[0], weights, slots, like)
                score_keys(heads, queries, d, keys, blocks[1], weights + on_own * exact, slots, like)
                for g in range(h, h + together):
                    _softmax(scores[row, k, g, begin:], behind + filled - first_own - begin, softcap)
                add_values(heads, weights + begin * exact, slots, prompt_value, padded, n - first_prompt, total, like)
                add_values(heads, weights + behind * exact, slots, values, padded, filled - first_own, total, like)
            for h in range(repeat):
                for j in range(d_value):
                    out[row, k, h, j] = narrow(mixed[row, k, h, j], like)


@parallel
def causal_softmax(scores_at: int, shape: Any, first: int, span: int, window: int, scale: Any, like: Any) -> None:
    """scores (row, key) → softmax(scale · scores) of the keys that are seen, 0 elsewhere."""
    scores = carray(pointer(scores_at, like), shape)
    for i in prange(shape[0]):
        stop = first + i % span + 1
        start = max(0, stop - window) if window > 0 else 0
        row, seen = scores[i], scores[i, start:stop]
        top, total = largest(seen), whole(0, scale)
        for j in range(seen.shape[0]):
            total += exp((wide(seen[j]) - top) * scale)
        share = whole(1, total) / total
        for j in range(seen.shape[0]):
            seen[j] = narrow(exp((wide(seen[j]) - top) * scale) * share, like)
        for j in range(start):
            row[j] = narrow(whole(0, total), like)
        for j in range(stop, shape[1]):
            row[j] = narrow(whole(0, total), like)


@parallel
def causal_softmax_back(
    grad_at: int, pattern_at: int, shape: Any, first: int, span: int, scale: Any, like: Any
) -> None:
    """Gradient of the pattern → gradient of the scores; both (row, key)."""
    grad, pattern = carray(pointer(grad_at, like), shape), carray(pointer(pattern_at, like), shape)
    for i in prange(shape[0]):
        stop = first + i % span + 1
        row, slope, weight = grad[i], grad[i, :stop], pattern[i, :stop]
        along = whole(0, scale)
        for j in range(stop):
            along += wide(slope[j]) * wide(weight[j])
        for j in range(stop):
            slope[j] = narrow((wide(slope[j]) - along) * wide(weight[j]) * scale, like)
        for j in range(stop, shape[1]):
            row[j] = narrow(whole(0, scale), like)
