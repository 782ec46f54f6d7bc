"""LoRA (arXiv 2106.09685): a low-rank change of linear modules, y' = y + (alpha / rank) · B A x; all else is frozen.

A is drawn Kaiming-uniform (a = √5), B is zero, so a fresh adapter changes no bit. Both live in at least fp32; products
run in the model's dtype and the gradients of A and B are summed over tokens in fp32. The change belongs to the module:
it is there before every edit and every read at a site. `adapters/formats/peft.py` reads and writes PEFT's files, PEFT
is the oracle. Rank 1 on `down_proj` of one layer is a steering vector whose strength depends on the token.
Left out: dropout, merging into the weights (it would round them), embeddings and the head, DoRA and other variants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerlab.adapters.adapter import Everywhere, Layout
from steerlab.adapters.steering import check_layers
from steerlab.errors import UsageError, unknown
from steerlab.models import LanguageModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRA:
    """Spec of a low-rank change. alpha: its scale times `rank`. layers: which blocks, None for all.

    targets: module names as PEFT takes them, each the end of a module's path ("q_proj", "down_proj", "mlp.c_proj"), or
    "all-linear" for every linear module of the blocks. Blocks only: never embeddings or the head.
    Learning rate unless told otherwise: 1e-3; 3e-2 for rank 1 on one target, a vector whose strength depends on the
    token (`analyses/small_vectors/adaptive.py`: 3e-3 learned nothing in 20 steps).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ALL_LINEAR
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"LoRA rank is {self.rank}; it must be at least 1")
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise UsageError(f'LoRA targets {self.targets!r} is one text; write ("{self.targets}",) or "all-linear"')
        if not self.targets:
            raise UsageError('LoRA has no targets; name modules, e.g. ("q_proj", "v_proj"), or "all-linear"')

    @property
    def learning_rate(self) -> float:
        one_vector = self.rank == 1 and self.targets != ALL_LINEAR and len(self.targets) == 1
        return 3e-2 if one_vector else 1e-3

    def init(self, model: LanguageModel, generator: torch.Generator | None = None) -> LoRAWeights:
        """A drawn on the CPU from `generator` (None: one of seed 0), B zero.

        Raises UsageError for a layer or a target that the model does not have.
        """
        generator = generator or torch.Generator().manual_seed(0)
        modules, pairs = self.modules(model), {}
        for module in modules:
            down = torch.empty(self.rank, module.d_in)
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
            pairs[module.path] = (down.to(model.device), torch.zeros(module.d_out, self.rank, device=model.device))
        return LoRAWeights(self, pairs, transposed=modules[0].transposed)

    def modules(self, model: LanguageModel) -> list[Linear]:
        """The modules of `model` that are changed, in the model's order. Raises UsageError as `init` does."""
        there = linear_modules(model)
        layers = range(model.n_layers) if self.layers is None else self.layers
        check_layers(layers, model.n_layers)
        if self.targets == ALL_LINEAR:
            found = [module for module in there if module.layer in layers]
        else:
            for target in self.targets:
                if not any(is_target(module.path, target) for module in there):
                    raise unknown(f"LoRA target of {model.name}", target, {m.path.rpartition(".")[2] for m in there})
            named = [m for m in there if any(is_target(m.path, target) for target in self.targets)]
            found = [module for module in named if module.layer in layers]
        if not found:
            raise UsageError(f"LoRA targets {self.targets} name no module of layers {list(layers)}; choose others")
        return found


@dataclass(frozen=True)
class Linear:
    """A linear module of a block. path: in the Hugging Face model. transposed: stores its weight as (in, out)."""

    path: str
    layer: int
    d_in: int
    d_out: int
    transposed: bool


def is_target(path: str, target: str) -> bool:
    """Whether `target` names the module at `path`: the whole path or its end, cut at a dot (PEFT's rule)."""
    return path == target or path.endswith(f".{target}")


def layer_of(path: str) -> int:
    """The block that a module belongs to: the first number in its path."""
    return next(int(part) for part in path.split(".") if part.isdecimal())


def linear_modules(model: LanguageModel) -> list[Linear]:
    """Every linear module of the blocks, block by block; GPT-2's Conv1D is one."""
    from transformers.pytorch_utils import Conv1D

    paths = {id(module): path for path, module in model.hf.named_modules()}
    found = []
    for layer, block in enumerate(model.blocks):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                found.append(Linear(paths[id(module)], layer, module.in_features, module.out_features, False))
            elif isinstance(module, Conv1D):
                d_in, d_out = module.weight.shape
                found.append(Linear(paths[id(module)], layer, d_in, d_out, True))
    return found


def low_rank(x: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """`x` as rows, and A x of every row, in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    return rows, rows @ down.to(x.dtype).T


def add_to(y: Tensor, inner: Tensor, up: Tensor, scale: float) -> Tensor:
    """y + scale · B inner, for rows `inner` of the tokens of y, in y's dtype."""
    return torch.addmm(y.reshape(-1, y.shape[-1]), inner, up.to(y.dtype).T, alpha=scale).view(y.shape)


class AddLowRank(torch.autograd.Function):
    """y + scale · (x Aᵀ) Bᵀ, with the gradients of A and B summed over all leading axes in at least fp32."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        inputs, inner = low_rank(x, down)
        ctx.save_for_backward(inputs, inner, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return add_to(y, inner, up, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inputs, inner, down, up = ctx.saved_tensors
        # `rank` columns are cheap in fp32; a bf16 sum over tokens would lose what small learning rates move.
        wide = grad.reshape(-1, grad.shape[-1]).to(up.dtype)
        to_up = ctx.scale * (wide.T @ inner.to(up.dtype)) if ctx.needs_input_grad[3] else None
        to_inner = ctx.scale * (wide @ up)
        to_down = to_inner.T @ inputs.to(down.dtype) if ctx.needs_input_grad[2] else None
        to_x = (to_inner.to(grad.dtype) @ down.to(grad.dtype)).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, to_x, to_down, to_up, None


class LoRAWeights:
    """The matrices of a LoRA, trainable.

    pairs: module path → (A, B) in the order of layers, A of shape (rank, in), B of shape (out, rank), at least fp32.
    transposed: the modules store their weights as (in, out), which PEFT wants to know. `factor * weights` is a new
    adapter of that many times the change.
    """

    def __init__(
        self,
        spec: LoRA,
        pairs: Mapping[str, tuple[Float[Tensor, "rank _"], Float[Tensor, "_ rank"]]],
        transposed: bool = False,
    ) -> None:
        if not pairs:
            raise UsageError("a LoRA needs at least one module; the selection was empty")
        self.spec, self.transposed = spec, transposed
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {
            path: (_master(pairs[path][0]), _master(pairs[path][1])) for path in sorted(pairs, key=_by_layer)
        }

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.spec.alpha / self.spec.rank

    @property
    def first_block(self) -> int:
        """The lowest layer with a changed module."""
        return min(layer_of(path) for path in self.pairs)

    @property
    def keeps_inputs(self) -> bool:
        """The gradient of A is a product with x."""
        return True

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        for pair in self.pairs.values():
            yield from pair

    def __repr__(self) -> str:
        return f"LoRAWeights({len(self.pairs)} modules, rank {self.spec.rank}, {self.n_parameters:,} parameters)"

    def __mul__(self, factor: float) -> LoRAWeights:
        pairs = {path: (down.detach(), up.detach() * factor) for path, (down, up) in self.pairs.items()}
        return LoRAWeights(self.spec, pairs, self.transposed)

    __rmul__ = __mul__

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by PEFT's names without its prefix, in the order of `parameters`."""
        return {
            f"{path}.lora_{letter}.weight": parameter
            for path, pair in self.pairs.items()
            for letter, parameter in zip("AB", pair, strict=True)
        }

    def snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        names = self.named()
        if names.keys() != state.keys():
            raise UsageError(f"snapshot holds {_few(state)}, this LoRA needs {_few(names)}; it belongs to another spec")
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(state[name])

    @contextmanager
    def attach(
        self,
        model: LanguageModel,
        rows: Int[Tensor, " batch"] | None = None,  # noqa: ARG002 - every row has the same matrices
        layout: Layout | None = None,  # noqa: ARG002 - and every token
    ) -> Iterator[Everywhere]:
        """Change the modules of `model` inside the `with`; all rows and all tokens alike."""
        self.check(model)
        with ExitStack() as stack:
            for path, pair in self.pairs.items():
                module = model.hf.get_submodule(path)
                # First of the module's hooks: sites see the output of the changed module.
                handle = module.register_forward_hook(_adding(*pair, self.scale), prepend=True)
                stack.callback(handle.remove)
            yield Everywhere((self.first_block,))

    def check(self, model: LanguageModel) -> None:
        """Raise UsageError if these matrices do not fit `model`."""
        there = {module.path: module for module in linear_modules(model)}
        for path, (down, up) in self.pairs.items():
            if path not in there:
                raise UsageError(f"{model.name} has no linear module {path}; this LoRA belongs to another model")
            d_in, d_out = there[path].d_in, there[path].d_out
            if down.shape != (self.spec.rank, d_in) or up.shape != (d_out, self.spec.rank):
                raise UsageError(
                    f"the LoRA at {path} has shapes {tuple(down.shape)} and {tuple(up.shape)}, {model.name} needs "
                    f"({self.spec.rank}, {d_in}) and ({d_out}, {self.spec.rank}); it belongs to another model"
                )


def _adding(down: Tensor, up: Tensor, scale: float) -> Any:
    def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return AddLowRank.apply(output, args[0], down, up, scale)  # type: ignore[return-value]
        return add_to(output, low_rank(args[0], down)[1], up, scale)

    return after


def _by_layer(path: str) -> list[tuple[int, int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.split(".")]


def _master(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone().to(torch.promote_types(tensor.dtype, torch.float32)))


def _few(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f", … ({len(shown)})" if len(shown) > 3 else "")
