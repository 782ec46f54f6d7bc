"""Frozen weights laid out once in the order that oneDNN's kernels read them: matrix products on a CPU, faster.

torch lays a weight out anew at every product, which for the few dozen rows of a decode step costs more than the product
itself. Weights here never change, so it is done once (torch's own operators, those that `torch.compile` uses when it
freezes a model); projections that read the same input (q, k, v; gate and up) become one product. The copy costs as
much memory as the block weights and is made only if it fits (`possible`). In use, the modules' `forward` is
replaced, so hooks and everything else that watches them work as before.

Decoding uses it. The update does not: at a thousand rows laying out a weight is nothing, and the halves of a joint
product are slower to work on than two products (measured: analyses/benchmarks/README.md).

Leaves out: devices other than the CPU, dtypes other than fp32 and bf16 (fp64 is for tests of identities).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from steerlab.models.sites import architecture
from steerlab.runs import free_memory_bytes

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 32  # the layout is chosen for about this many rows; it serves any number
SHARE = 0.25  # of the free memory that the copy may take
TRIALS = 4  # the first of them is a warm-up
Products = Literal["plain", "packed"]


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class _Siblings:
    """Linear modules that read one input, as one product; the first called computes it for all."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.weights = tuple(_plain(module) for module in modules)
        self.versions = [weight._version for weight in self.weights]
        joined = torch.cat([w.detach() for w in self.weights]) if len(modules) > 1 else self.weights[0].detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(joined.contiguous(), ROWS)
        biases: list[Tensor | None] = [module.bias for module in modules]  # type: ignore[misc]
        found = [b for b in biases if b is not None]
        if found:
            full = [
                found[0].new_zeros(len(w)) if b is None else b.detach()
                for b, w in zip(biases, self.weights, strict=True)
            ]
            self.bias: Tensor | None = torch.cat(full)
        else:
            self.bias = None
        self.modules = modules
        self.sizes = [weight.shape[0] for weight in self.weights]
        self.seen: Tensor | None = None
        self.parts: dict[int, Tensor] = {}

    @property
    def current(self) -> bool:
        """Whether the weights are still those that were packed."""
        return [_plain(module)._version for module in self.modules] == self.versions

    def forwards(self) -> list[Callable[[Tensor], Tensor]]:
        """What each module's `forward` becomes."""
        if len(self.modules) == 1:
            return [self.whole]
        return [self._part(i) for i in range(len(self.modules))]

    def whole(self, x: Tensor) -> Tensor:
        return _product(x, self.packed, self.bias)

    def _part(self, index: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self.seen is not x:
                self.seen = x
                self.parts = dict(enumerate(self.whole(x).split(self.sizes, -1)))
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
        modules = [module for s in self.siblings for module in s.modules]
        for s in self.siblings:
            for module, forward in zip(s.modules, s.forwards(), strict=True):
                module.forward = forward
        try:
            yield
        finally:
            for module in modules:
                del module.forward
            for s in self.siblings:
                s.forget()


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def possible(model: LanguageModel) -> bool:
    """Whether this machine, dtype and build of torch can do it, and the copy fits into a share of free memory."""
    ops = torch.ops.mkldnn
    there = torch.backends.mkldnn.is_available() and hasattr(ops, "_reorder_linear_weight")
    if not there or not hasattr(ops, "_linear_pointwise") or model.device.type != "cpu" or model.dtype not in DTYPES:
        return False
    free = free_memory_bytes()
    return free is None or packed_bytes(model) <= SHARE * free


def packed_bytes(model: LanguageModel) -> int:
    """Size of the copy."""
    linears = [m.weight for block in model.blocks for m in block.modules() if _is_linear(m)]
    return sum(w.numel() * w.element_size() for w in (*linears, model.unembedding.weight))  # type: ignore[union-attr]


def measured_choice(model: LanguageModel, rows: int = ROWS) -> Products:
    """What is faster here and now for one decode step's products of `rows` rows: all blocks' once each, in turns."""
    if not possible(model):
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
    """The model's packed copy, made anew if a weight has changed since."""
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
