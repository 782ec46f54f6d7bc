"""Frozen weights laid out once in the order that oneDNN's kernels read them: matrix products on a CPU, faster.

torch lays a weight out anew at every product, which for the few dozen rows of a decode step costs more than the product
itself. Weights here never change, so it is done once (torch's own operators, those that `torch.compile` uses when it
freezes a model); projections that read the same input (q, k, v; gate and up) become one product. The copy costs as
much memory as the block weights and is chosen only if it fits (`fits`). In use, the modules' `forward` is
replaced, so hooks and everything else that watches them work as before.

Decoding uses it. The update does not: at a thousand rows laying out a weight is nothing, and the halves of a joint
product are slower to work on than two products (measured: analyses/benchmarks/README.md).

Leaves out: devices other than the CPU, dtypes other than fp32 and bf16 (fp64 is for tests of identities), changes that
autograd does not see either (`weight.data.mul_`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerlab.models.sites import architecture
from steerlab.models.swap import swapped
from steerlab.runs import free_memory_bytes

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 32  # the layout is chosen for about this many rows; it serves any number
SHARE = 0.25  # of the free memory that the copy may take
TRIALS = 8  # the first of them is a warm-up
Products = Literal["plain", "packed"]


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def product(
    weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None, rows: int = ROWS
) -> Callable[[Tensor], Tensor]:
    """x ↦ x Wᵀ + b with a laid out copy of a weight, for about so many rows; where `able`."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: _product(x, copy, bias)


class _Siblings:
    """Linear modules that read one input, as one product; the first called computes it for all."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.packed_from = [(tensor, _stamp(tensor)) for tensor in _held(modules)]
        weights = [_plain(module).detach() for module in modules]
        joined = torch.cat(weights) if len(modules) > 1 else weights[0]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(joined.contiguous(), ROWS)
        biases: list[Tensor | None] = [module.bias for module in modules]  # type: ignore[misc]
        found = [b for b in biases if b is not None]
        if found:
            full = [
                found[0].new_zeros(len(w)) if b is None else b.detach() for b, w in zip(biases, weights, strict=True)
            ]
            self.bias: Tensor | None = torch.cat(full)
        else:
            self.bias = None
        self.modules = modules
        self.sizes = [len(weight) for weight in weights]
        self.seen: Tensor | None = None
        self.parts: dict[int, Tensor] = {}

    @property
    def current(self) -> bool:
        """Whether weights and biases are still those that were packed: the same tensors, unchanged since."""
        now = _held(self.modules)
        return len(now) == len(self.packed_from) and all(
            tensor is packed and _stamp(tensor) == stamp
            for tensor, (packed, stamp) in zip(now, self.packed_from, strict=True)
        )

    def forwards(self) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The modules, each with what its `forward` becomes."""
        if len(self.modules) == 1:
            return [(self.modules[0], self.whole)]
        return [(module, self._part(i)) for i, module in enumerate(self.modules)]

    def whole(self, x: Tensor) -> Tensor:
        return _product(x, self.packed, self.bias)

    def _part(self, index: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self.seen is not x:
                self.seen = x
                self.parts = dict(enumerate(torch.split_with_sizes(self.whole(x), self.sizes, -1)))
            part = self.parts.pop(index)
            if not self.parts:
                self.seen = None  # nothing outlives the forward pass
            return part

        return forward

    def forget(self) -> None:
        self.seen, self.parts = None, {}


def _plain(module: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.t()


def _held(modules: list[nn.Module]) -> list[Tensor]:
    """Weights and biases, those that there are."""
    return [tensor for module in modules for tensor in (module.weight, module.bias) if isinstance(tensor, Tensor)]


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor is written to, or given other storage (`Module.to`)."""
    return tensor._version, tensor.data_ptr()


class PackedWeights:
    """The packed copy of a model's projections and head."""

    def __init__(self, model: LanguageModel) -> None:
        arch = architecture(model.family)
        groups = [arch.qkv, arch.gated] if arch.gated else [arch.qkv]
        self.siblings: list[_Siblings] = []
        for block in model.blocks:
            taken: set[str] = set()
            for paths in groups:
                self.siblings.append(_Siblings([block.get_submodule(path) for path in paths]))
                taken.update(paths)
            for name, module in block.named_modules():
                if name not in taken and _is_linear(module):
                    self.siblings.append(_Siblings([module]))
        self.siblings.append(_Siblings([model.unembedding]))

    @property
    def current(self) -> bool:
        return all(s.current for s in self.siblings)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the `with` the model's projections are products with packed weights."""
        try:
            with swapped(pair for s in self.siblings for pair in s.forwards()):
                yield
        finally:
            for s in self.siblings:
                s.forget()


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def able(model: LanguageModel) -> bool:
    """Whether this machine and build of torch can do it for the model's dtype and device."""
    ops = torch.ops.mkldnn
    there = torch.backends.mkldnn.is_available() and hasattr(ops, "_reorder_linear_weight")
    return there and hasattr(ops, "_linear_pointwise") and model.device.type == "cpu" and model.dtype in DTYPES


def fits(model: LanguageModel, processes: int = 1) -> bool:
    """Whether a copy not made yet fits into a share of free memory, one for each of `processes` on this machine."""
    free = free_memory_bytes()
    return free is None or processes * packed_bytes(model) <= SHARE * free


def packed_bytes(model: LanguageModel) -> int:
    """Size of the copy."""
    linears = [m.weight for block in model.blocks for m in block.modules() if _is_linear(m)]
    return sum(w.numel() * w.element_size() for w in (*linears, model.unembedding.weight))  # type: ignore[union-attr]


def measured_choice(model: LanguageModel, rows: int = ROWS, processes: int = 1) -> Products:
    """What is faster here and now for one decode step's products of `rows` rows: all blocks' once each, in turns.

    The copy is kept if it is chosen. `processes`: how many of this machine will each make one.
    """
    if not able(model) or (model.packed is None and not fits(model, processes)):
        return "plain"
    copy = packed_copy(model)
    linears = [(m, _plain(m).shape[1]) for block in model.blocks for m in block.modules() if _is_linear(m)]
    inputs = {d_in: torch.zeros(rows, d_in, dtype=model.dtype) for _, d_in in linears}
    spent: dict[Products, list[float]] = {"plain": [], "packed": []}
    with torch.no_grad():
        for _ in range(TRIALS):
            for choice, times in spent.items():
                with copy.in_use() if choice == "packed" else nullcontext():
                    start = time.perf_counter()
                    for module, d_in in linears:
                        module(inputs[d_in])
                    times.append(time.perf_counter() - start)
    faster: Products = min(spent, key=lambda choice: min(spent[choice][1:]))
    if faster == "plain":
        model.packed = None
    return faster


def packed_copy(model: LanguageModel) -> PackedWeights:
    """The model's packed copy, made anew if a weight or a bias has changed since."""
    if model.packed is None or not model.packed.current:
        model.packed = PackedWeights(model)
    return model.packed


@contextmanager
def products(model: LanguageModel) -> Iterator[None]:
    """Inside the `with` matrix products are done as `model.products` says. For decoding: see the module's header."""
    if model.products == "plain":
        yield
        return
    with packed_copy(model).in_use():
        yield
