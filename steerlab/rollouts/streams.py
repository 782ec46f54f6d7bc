"""Random numbers that belong to a token, not to a batch.

Every draw is a pure function of (seed, step, problem, sample, position), so the same completion comes out however
rows are batched, compacted or spread over machines. The generator is SplitMix64 (Steele, Lea, Flood 2014) used
as a counter-based hash; 53 bits make a double in [0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_words(values: Sequence[int] | np.ndarray | int) -> np.ndarray:
    return np.atleast_1d(np.asarray(values, dtype=np.int64)).astype(np.uint64)


def uniforms(
    seed: int, step: int, problems: Sequence[int] | np.ndarray, samples: Sequence[int] | np.ndarray, n_positions: int
) -> Float64[np.ndarray, "row pos"]:
    """One uniform number per row and position. `problems[i]`, `samples[i]` name row i; `step` separates steps."""
    with np.errstate(over="ignore"):
        key = _mix(_as_words(seed) + _GOLDEN)
        for word in (_as_words(step), _as_words(problems), _as_words(samples)):
            # The key is mixed once more than the word, so that (a, b) and (b, a) differ and (a, a) does not cancel.
            key = _mix(_mix(key + _GOLDEN) ^ _mix(word + _GOLDEN))
        counter = (np.arange(1, n_positions + 1, dtype=np.uint64) * _GOLDEN)[None, :]
        bits = _mix(key[:, None] + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
