"""Numbers as kernels store and compute them, and how kernels are compiled: what `kernels.py` and `attention_kernels.py`
are made of.

numba compiles on first use (a few seconds, kept on disk until the file of the kernel changes: after a change here,
change the times of those files too) and runs on torch's own threads. Everything is computed in at least fp32 and
rounded once, where transformers rounds after each operator; rows do not depend on each other.

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
serial = njit(fastmath=_MATH, error_model="numpy", inline="always", cache=True)
called = njit(fastmath=_MATH, error_model="numpy", cache=True)  # not written out in numba's own form
parallel = njit(fastmath=_MATH, error_model="numpy", parallel=True, nogil=True, cache=True)


# Names for compiled code only: what each does there, by the type that it is given, stands in the overloads below.
def wide(x: Any) -> Any:
    """A number as it is computed with."""


def narrow(x: Any, like: Any) -> Any:
    """A computed number in the type of `like`, to nearest even."""


def exp(x: Any) -> Any:
    """e^x for x ≤ 88; below −87 as at −87."""


def whole(x: Any, like: Any) -> Any:
    """A whole number in the type of `like` (numba makes float32 × int64 a float64)."""


@overload(whole, inline="always")
def _as_of(x: Any, like: Any) -> Any:  # noqa: ARG001
    def single(x: Any, like: Any) -> Any:  # noqa: ARG001
        return np.float32(x)

    def double(x: Any, like: Any) -> Any:  # noqa: ARG001
        return np.float64(x)

    return double if like == types.float64 else single


@overload(wide, inline="always")
def _wide_of(x: Any) -> Any:
    def risen(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def same(x: Any) -> Any:
        return x

    return risen if x == types.uint16 else same


@overload(narrow, inline="always")
def _narrow_of(x: Any, like: Any) -> Any:  # noqa: ARG001
    def rounded(x: Any, like: Any) -> Any:  # noqa: ARG001
        bits = np.float32(x).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))

    def same(x: Any, like: Any) -> Any:  # noqa: ARG001
        return x

    return rounded if like == types.uint16 else same


@overload(exp, inline="always")
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


@serial
def _ranked(x: Any) -> Any:
    """fp32 as whole numbers in the same order, and back; NaN is largest (or, if negative, least)."""
    bits = np.int32(x)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


def largest(row: Any) -> Any:
    """Of one row, as it is computed with. (Largest whole numbers are found many at a time, largest floats are not.)"""


@overload(largest, inline="always")
def _largest_of(row: Any) -> Any:
    def exact(row: Any) -> Any:
        top = row[0]
        for j in range(row.shape[0]):
            top = max(top, row[j])
        return top

    def single(row: Any) -> Any:
        top = _ranked(np.float32(wide(row[0])).view(np.int32))
        for j in range(row.shape[0]):
            top = max(top, _ranked(np.float32(wide(row[j])).view(np.int32)))
        return np.int32(_ranked(top)).view(np.float32)

    return exact if row.dtype == types.float64 else single


@intrinsic
def pointer(_context: Any, address: Any, like: Any) -> Any:
    """An integer as a pointer to numbers of the type of `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate


def use_threads() -> None:
    """As many threads as torch uses; for the calling thread, until told otherwise."""
    wanted = torch.get_num_threads()
    numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(wanted)  # numba, when it starts its threads, sets OpenMP's number, which is torch's too


def n_threads() -> int:
    """As told by `use_threads`."""
    return numba.get_num_threads()


use_threads()  # numba starts its threads here, before anything is computed: see there
