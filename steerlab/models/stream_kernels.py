"""Kernels for attention of the update (`attention.Stream`): causal softmax and its backward, in place, in one pass.

Built from the parts of `kernels.py`, under its rules. (numba keeps what it compiled until this file changes: after a
change of those parts, change the time of this file too.) A row of scores belongs to one query, `span` queries of one
sequence behind one another; query i sees keys up to `first` + i % span, and no more than `window` of them (0: all).
"""

from __future__ import annotations

from typing import Any

from steerlab.models.kernels import _as, _exp, _largest, _narrow, _parallel, _pointer, _wide, carray, prange


@_parallel
def softmax(scores_at: int, shape: Any, first: int, span: int, window: int, scale: Any, like: Any) -> None:
    """scores (row, key) → softmax(scale · scores) of the keys that are seen, 0 elsewhere."""
    scores = carray(_pointer(scores_at, like), shape)
    for i in prange(shape[0]):
        stop = first + i % span + 1
        start = max(0, stop - window) if window > 0 else 0
        row, seen = scores[i], scores[i, start:stop]
        top, total = _largest(seen), _as(0, scale)
        for j in range(seen.shape[0]):
            total += _exp((_wide(seen[j]) - top) * scale)
        share = _as(1, total) / total
        for j in range(seen.shape[0]):
            seen[j] = _narrow(_exp((_wide(seen[j]) - top) * scale) * share, like)
        for j in range(start):
            row[j] = _narrow(_as(0, total), like)
        for j in range(stop, shape[1]):
            row[j] = _narrow(_as(0, total), like)


@_parallel
def softmax_back(grad_at: int, pattern_at: int, shape: Any, first: int, span: int, scale: Any, like: Any) -> None:
    """Gradient of the pattern → gradient of the scores; both (row, key)."""
    grad, pattern = carray(_pointer(grad_at, like), shape), carray(_pointer(pattern_at, like), shape)
    for i in prange(shape[0]):
        stop = first + i % span + 1
        row, slope, weight = grad[i], grad[i, :stop], pattern[i, :stop]
        along = _as(0, scale)
        for j in range(stop):
            along += _wide(slope[j]) * _wide(weight[j])
        for j in range(stop):
            slope[j] = _narrow((_wide(slope[j]) - along) * _wide(weight[j]) * scale, like)
        for j in range(stop, shape[1]):
            row[j] = _narrow(_as(0, scale), like)
