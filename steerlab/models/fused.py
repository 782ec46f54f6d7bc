"""A model's norms, gates and rotary embeddings as single kernels, in place of the family's operators, on a CPU.

What a module computes is not assumed from its name: it is compared with the kernel's formula on numbers, and modules
that compute something else (layer norms, GELU) keep their own forward. In use, the modules' `forward` and the family's
function `apply_rotary_pos_emb` are replaced, so hooks and everything else that watches modules work as before. While
decoding, attention is a kernel too (`decoding.ByRow`). Rounding differs from the family's: once, at a kernel's end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from steerlab.models.sites import architecture
from steerlab.models.swap import swapped

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

Kernels = Literal["family", "fused"]
Forward = Callable[[Tensor], Tensor]
ROTATION = "apply_rotary_pos_emb"
ROWS = 32  # of a decode step, for which the choice is measured
TRIALS = 16  # the first of them compiles; the rest are short, and other work on the machine must not decide


class Fused:
    """The modules of a model that have a kernel, and the source file of its family if the rotary embedding has one."""

    def __init__(self, model: LanguageModel) -> None:
        arch = architecture(model.family)
        self.norms = _norms(model.backbone)
        self.gates: list[tuple[nn.Module, Forward]] = []
        for block in model.blocks if arch.gated else ():
            mlp, *parts = (block.get_submodule(path) for path in (arch.mlp, *arch.gated, arch.down))
            if _is_silu_gate(mlp, *parts):
                self.gates.append((mlp, _gated(*parts)))
        source = sys.modules[type(model.blocks[0].get_submodule(arch.attn)).__module__]
        self.source: ModuleType | None = source if _is_rotation(getattr(source, ROTATION, None)) else None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the `with` kernels take the place of the family's operators."""
        from steerlab.models import numbers, operators

        numbers.use_threads()
        before = getattr(self.source, ROTATION, None)
        with swapped([*self.norms, *self.gates]):
            if self.source is not None:
                setattr(self.source, ROTATION, operators.rotate)
            try:
                yield
            finally:
                if self.source is not None:
                    setattr(self.source, ROTATION, before)


def _norms(backbone: nn.Module) -> list[tuple[nn.Module, Forward]]:
    found: list[tuple[nn.Module, Forward]] = []
    offsets: dict[type, float | None] = {}
    for module in backbone.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(eps, float) and isinstance(weight, Tensor) and bias is None:
            if type(module) not in offsets:
                offsets[type(module)] = _offset(module, eps)
            offset = offsets[type(module)]
            if offset is not None:
                found.append((module, _norm(module, eps, offset)))
    return found


def _offset(module: Any, eps: float) -> float | None:
    """What an RMS norm adds to its weight; None for a module that is no RMS norm."""
    x = torch.randn(3, len(module.weight), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, plain = module(x), x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            if torch.allclose(own.double(), (plain * (module.weight.float() + offset)).double(), rtol=1e-5, atol=1e-6):
                return offset
    return None


def _norm(module: Any, eps: float, offset: float) -> Forward:
    from steerlab.models.operators import rms_norm

    return lambda x: rms_norm(x, module.weight, eps, offset)


def _is_silu_gate(mlp: Any, gate: nn.Module, up: nn.Module, down: nn.Module) -> bool:
    weight, x = next(gate.parameters()), torch.linspace(-6, 6, 25)
    if not hasattr(mlp, "act_fn") or not torch.allclose(mlp.act_fn(x), torch.nn.functional.silu(x), atol=1e-6):
        return False
    given = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    with torch.no_grad():
        return torch.equal(mlp(given), down(mlp.act_fn(gate(given)) * up(given)))


def _gated(gate: nn.Module, up: nn.Module, down: nn.Module) -> Forward:
    from steerlab.models.operators import silu_gate

    return lambda x: down(silu_gate(gate(x), up(x)))


def _is_rotation(function: Any) -> bool:
    from steerlab.models.operators import rotate

    if function is None:
        return False
    numbers = torch.linspace(-1, 1, 2 * 3 * 8 + 3 * 8 + 3 * 4)
    query, key, cos = numbers[:48].view(1, 2, 3, 8), numbers[48:72].view(1, 1, 3, 8), numbers[72:].view(1, 3, 4)
    cos = cos.repeat(1, 1, 2)
    own, kernel = function(query, key, cos, -2 * cos), rotate(query, key, cos, -2 * cos)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(own, kernel, strict=True))


def able(model: LanguageModel) -> bool:
    """Whether there are kernels for this device and dtype, and numba works here."""
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return False
    try:
        from steerlab.models import kernels  # noqa: F401
    except (ImportError, RuntimeError):  # no numba for this Python; no folder where it may keep what it compiled
        return False
    return True


def measured_choice(model: LanguageModel, rows: int = ROWS) -> Kernels:
    """What is faster here and now for one decode step's norms of `rows` rows, in turns."""
    if not able(model) or model.dtype == torch.float64 or not fused_of(model).norms:  # fp64 is for tests of identities
        return "family"
    x = torch.ones(rows, 1, model.d_model, dtype=model.dtype)
    norms = [module for module, _ in fused_of(model).norms if len(module.weight) == model.d_model]  # type: ignore[arg-type]
    spent: dict[Kernels, list[float]] = {"family": [], "fused": []}
    with torch.no_grad():
        for _ in range(TRIALS):
            for choice, times in spent.items():
                with operators_of(model, choice):
                    start = time.perf_counter()
                    for norm in norms:
                        norm(x)
                    times.append(time.perf_counter() - start)
    return min(spent, key=lambda choice: min(spent[choice][1:]))


def fused_of(model: LanguageModel) -> Fused:
    """The model's kernels, found once."""
    if model.fused is None:
        model.fused = Fused(model)
    return model.fused


@contextmanager
def operators_of(model: LanguageModel, choice: Kernels | None = None) -> Iterator[None]:
    """Inside the `with` norms, gates and rotary embeddings are computed as `choice` (or `model.kernels`) says."""
    if (choice or model.kernels) == "family":
        yield
        return
    with fused_of(model).in_use():
        yield
