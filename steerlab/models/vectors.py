# ruff: noqa: ARG001 (numba tells what a call gives by the names of an intrinsic's arguments)
"""Products of attention for compiled code, LANES numbers at a time, with sums that stay in registers.

What numba makes of loops stores a sum after every term. These are written as LLVM's vector instructions instead, which
any processor's compiler turns into its own. Several query heads that share keys are worked at once: a key or value is
read, and made wide, one time for all of them. heads: a tuple as long as there are heads (its length is known when the
code is made; its numbers are not read).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from steerlab.models.numbers import intrinsic, types

LANES = 16
CHUNK = 2  # vectors of a value that are summed at a time
FAST = ("contract", "reassoc", "nsz")
_STORED = {types.uint16: ir.IntType(16), types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_BYTES = {types.uint16: 2, types.float32: 4, types.float64: 8}


class _Vectors:
    """Writes vector instructions. like: the stored type (numba's)."""

    def __init__(self, builder: Any, like: Any) -> None:
        self.builder, self.stored, self.stored_bytes = builder, _STORED[like], _BYTES[like]
        self.exact = ir.DoubleType() if like == types.float64 else ir.FloatType()
        self.exact_bytes = 8 if like == types.float64 else 4
        self.type = ir.VectorType(self.exact, LANES)

    def sums(self, n: int) -> list[Any]:
        """Places for vectors, which the compiler keeps in registers."""
        return [cgutils.alloca_once(self.builder, self.type) for _ in range(n)]

    def zero(self, place: Any) -> None:
        self.builder.store(ir.Constant(self.type, [0.0] * LANES), place)

    def stored_at(self, address: Any) -> Any:
        return self.builder.inttoptr(address, self.stored.as_pointer())

    def exact_at(self, address: Any) -> Any:
        return self.builder.inttoptr(address, self.exact.as_pointer())

    def times(self, index: Any, n: int) -> Any:
        return self.builder.mul(index, index.type(n))

    def behind(self, index: Any, n: int) -> Any:
        return self.builder.add(index, index.type(n))

    def rows(self, start: Any, stride: Any, n: int) -> list[Any]:
        """The first n rows of exact numbers, `stride` apart."""
        return [self.builder.gep(start, [self.times(stride, h)], source_etype=self.exact) for h in range(n)]

    def wide(self, start: Any, index: Any) -> Any:
        """LANES stored numbers from `index` on, as they are computed with."""
        build = self.builder
        at = build.gep(start, [index], source_etype=self.stored)
        kind = ir.VectorType(self.stored, LANES)
        x = build.load(build.bitcast(at, kind.as_pointer()), align=self.stored_bytes)
        if not isinstance(self.stored, ir.IntType):
            return x
        bits = ir.VectorType(ir.IntType(32), LANES)
        return build.bitcast(build.shl(build.zext(x, bits), ir.Constant(bits, [16] * LANES)), self.type)

    def place(self, start: Any, index: Any) -> Any:
        """Where LANES exact numbers are, from `index` on."""
        at = self.builder.gep(start, [index], source_etype=self.exact)
        return self.builder.bitcast(at, self.type.as_pointer())

    def load(self, place: Any) -> Any:
        return self.builder.load(place, align=self.exact_bytes)

    def store(self, x: Any, place: Any) -> None:
        self.builder.store(x, place, align=self.exact_bytes)

    def all(self, start: Any, index: Any) -> Any:
        """One exact number in every lane."""
        x = self.builder.load(self.builder.gep(start, [index], source_etype=self.exact))
        first = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), x, ir.IntType(32)(0))
        spread = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(first, first, spread)

    def add_product(self, x: Any, y: Any, total: Any) -> None:
        """total += x · y."""
        product = self.builder.fmul(x, y, flags=FAST)
        self.builder.store(self.builder.fadd(product, self.builder.load(total), flags=FAST), total)

    def loop(self, n: Any) -> Any:
        """`with … as loop`: loop.index from 0 to n − 1."""
        return cgutils.for_range(self.builder, n)


def _paired(rows: Sequence[Any], sums: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, Any]]:
    return zip(rows, sums, strict=True)


@intrinsic
def score_keys(
    _context: Any, heads: Any, query_at: Any, width: Any, key_at: Any, blocks: Any, out_at: Any, stride: Any, like: Any
) -> Any:
    """out[h, block · LANES + lane] = Σ_i query[h, i] · key[block, i, lane].

    query: exact, (head, width), width even. key: stored, (block, width, lane). out: exact, rows `stride` apart.
    """
    n_heads = len(heads)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _, query_at, width, key_at, blocks, out_at, stride, _ = arguments
        of = _Vectors(builder, like)
        key, sums = of.stored_at(key_at), [of.sums(2) for _ in range(n_heads)]
        queries = of.rows(of.exact_at(query_at), width, n_heads)
        outs = of.rows(of.exact_at(out_at), stride, n_heads)
        with of.loop(blocks) as block:
            for pair in sums:
                for total in pair:
                    of.zero(total)
            start = of.builder.mul(block.index, width)
            with of.loop(builder.udiv(width, width.type(2))) as loop:
                for half in (0, 1):
                    i = of.behind(of.times(loop.index, 2), half)
                    keys = of.wide(key, of.times(builder.add(start, i), LANES))
                    for query, pair in _paired(queries, sums):
                        of.add_product(of.all(query, i), keys, pair[half])
            for out, (first, second) in _paired(outs, sums):
                scores = builder.fadd(builder.load(first), builder.load(second), flags=FAST)
                of.store(scores, of.place(out, of.times(block.index, LANES)))
        return context.get_dummy_value()

    n = types.intp
    return types.void(heads, n, n, n, n, n, n, like), generate


@intrinsic
def add_values(
    _context: Any,
    heads: Any,
    weight_at: Any,
    stride: Any,
    value_at: Any,
    width: Any,
    n_values: Any,
    out_at: Any,
    like: Any,
) -> Any:
    """out[h, i] += Σ_j weight[h, j] · value[j, i].

    weight: exact, rows `stride` apart. value: stored, (value, width), width a multiple of LANES · CHUNK. out: exact,
    (head, width).
    """
    n_heads = len(heads)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _, weight_at, stride, value_at, width, n_values, out_at, _ = arguments
        of = _Vectors(builder, like)
        value, sums = of.stored_at(value_at), [of.sums(CHUNK) for _ in range(n_heads)]
        weights = of.rows(of.exact_at(weight_at), stride, n_heads)
        outs = of.rows(of.exact_at(out_at), width, n_heads)
        with of.loop(builder.udiv(width, width.type(LANES * CHUNK))) as chunk:
            places = [of.behind(of.times(chunk.index, LANES * CHUNK), LANES * c) for c in range(CHUNK)]
            for out, totals in _paired(outs, sums):
                for place, total in _paired(places, totals):
                    builder.store(of.load(of.place(out, place)), total)
            with of.loop(n_values) as loop:
                row = builder.mul(loop.index, width)
                values = [of.wide(value, builder.add(row, place)) for place in places]
                for weight, totals in _paired(weights, sums):
                    shared = of.all(weight, loop.index)
                    for x, total in _paired(values, totals):
                        of.add_product(shared, x, total)
            for out, totals in _paired(outs, sums):
                for place, total in _paired(places, totals):
                    of.store(builder.load(total), of.place(out, place))
        return context.get_dummy_value()

    n = types.intp
    return types.void(heads, n, n, n, n, n, n, like), generate
