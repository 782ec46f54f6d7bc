"""Steering vectors: one vector per layer, added to a site of a frozen model (arXiv 2505.18706, 2509.06608).

For `resid_post` of layer l: h' = h + s_l at every token in scope. In a pre-norm block this equals a bias on
`mlp.down_proj`. Vectors start at zero, live in fp32 whatever the model's dtype, and their gradient is summed over
tokens in fp32 (a bf16 sum would lose what small learning rates move).

`RowBank` lets every row of a batch carry its own set (base and steered, layers, magnitudes, seeds in one batch).
Left out: low-rank sets, learned gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerlab.adapters.adapter import Layout
from steerlab.adapters.scopes import Scope
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site

Shift = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Steering:
    """Spec of a set of vectors. layers: which blocks, None for all. site: site kind. scope: at which tokens.

    Learning rate unless told otherwise: 1e-2, best for vectors at all layers (`analyses/bias_only/layer_and_rate.py`).
    """

    layers: tuple[int, ...] | None = None
    site: str = "resid_post"
    scope: Scope = Scope()

    @property
    def learning_rate(self) -> float:
        return 1e-2

    def init(self, model: LanguageModel, generator: torch.Generator | None = None) -> SteeringVectors:  # noqa: ARG002
        """Zero vectors for `model`; draws nothing. Raises UsageError for a layer the model does not have."""
        layers = tuple(range(model.n_layers)) if self.layers is None else self.layers
        check_layers(layers, model.n_layers)
        width = model.width(self.site)
        zero = torch.zeros(width, device=model.device)
        return SteeringVectors({Site(self.site, layer): zero for layer in layers}, self.scope)


class AddVector(torch.autograd.Function):
    """x + v with the gradient of v summed over rows and positions in at least fp32."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, vector: Tensor) -> Tensor:
        ctx.like = vector.new_empty(0)  # type: ignore[attr-defined]
        return x + vector.to(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        like: Tensor = ctx.like  # type: ignore[attr-defined]
        total = torch.promote_types(like.dtype, grad.dtype)
        return grad, grad.flatten(0, -2).sum(0, dtype=total).to(like)


class SteeringVectors:
    """A set of steering vectors, trainable, with the algebra one expects of vectors.

    vectors: one tensor per site, shape (width of the site,), at least fp32.
    Operations return new sets and leave their arguments alone. `a + b` is the union of their sites, summed where
    both have one; sets of different token scopes cannot be added.
    """

    def __init__(self, vectors: Mapping[Site, Tensor], scope: Scope = Scope()) -> None:
        if not vectors:
            raise UsageError("a set of steering vectors needs at least one site; the selection was empty")
        self.vectors: dict[Site, nn.Parameter] = {
            site: nn.Parameter(
                vectors[site].detach().clone().to(torch.promote_types(vectors[site].dtype, torch.float32))
            )
            for site in sorted(vectors)
        }
        self.scope = scope

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.vectors)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({site.layer for site in self.vectors}))

    @property
    def first_block(self) -> int:
        return min(site.layer + (site.kind == "resid_post") for site in self.vectors)

    @property
    def keeps_inputs(self) -> bool:
        """The gradient of a vector is a sum of gradients."""
        return False

    @property
    def n_parameters(self) -> int:
        return sum(vector.numel() for vector in self.vectors.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.vectors.values()

    def __repr__(self) -> str:
        return f"SteeringVectors({len(self.vectors)} sites, layers {self.layers}, {self.n_parameters:,} parameters)"

    def __add__(self, other: SteeringVectors) -> SteeringVectors:
        self._same_scope(other)
        total = {site: vector.detach() for site, vector in self.vectors.items()}
        for site, vector in other.vectors.items():
            total[site] = total[site] + vector.detach() if site in total else vector.detach()
        return SteeringVectors(total, self.scope)

    def __sub__(self, other: SteeringVectors) -> SteeringVectors:
        return self + (-other)

    def __mul__(self, factor: float) -> SteeringVectors:
        return self._map(lambda vector: vector * factor)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVectors:
        return self * -1.0

    def randomise(self, generator: torch.Generator) -> SteeringVectors:
        """Random directions of the same lengths: the control of what is said of a direction."""

        def drawn(vector: Tensor) -> Tensor:
            noise = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
            return (noise * (vector.double().norm().cpu() / noise.norm())).to(vector)

        return self._map(drawn)

    def normalise(self) -> SteeringVectors:
        """Every vector at length one. Raises UsageError for a zero vector, which has no direction."""
        zero = [str(site) for site, vector in self.vectors.items() if not vector.any()]
        if zero:
            raise UsageError(f"cannot normalise zero vectors ({', '.join(zero)}); select the other layers first")
        return self._map(lambda vector: vector / vector.norm())

    def select(self, layers: Iterable[int]) -> SteeringVectors:
        """Only the vectors of these layers. Raises UsageError if a layer has none."""
        wanted = set(layers)
        missing = wanted - set(self.layers)
        if missing:
            raise UsageError(f"no vector at layers {sorted(missing)}; this set has {list(self.layers)}")
        return SteeringVectors({s: v for s, v in self.vectors.items() if s.layer in wanted}, self.scope)

    def merge(self, other: SteeringVectors) -> SteeringVectors:
        """Union of two sets with no site in common; use `+` to sum. Raises UsageError on a common site."""
        common = sorted(set(self.vectors) & set(other.vectors))
        if common:
            raise UsageError(f"both sets have a vector at {', '.join(map(str, common))}; use + to sum them")
        return self + other

    def norms(self) -> dict[Site, float]:
        """Euclidean length of each vector."""
        return {site: float(vector.detach().norm()) for site, vector in self.vectors.items()}

    def snapshot(self) -> dict[str, Tensor]:
        return {f"vectors.{s.kind}.{s.layer}": v.detach().clone() for s, v in self.vectors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        names = {f"vectors.{s.kind}.{s.layer}": v for s, v in self.vectors.items()}
        if names.keys() != state.keys():
            raise UsageError(f"snapshot holds {sorted(state)}, this set needs {sorted(names)}")
        with torch.no_grad():
            for name, vector in names.items():
                vector.copy_(state[name])

    @contextmanager
    def attach(
        self, model: LanguageModel, rows: Int[Tensor, " batch"] | None = None, layout: Layout | None = None
    ) -> Iterator[Placement]:
        """Add the vectors to `model` inside the `with`.

        Scopes other than `all` need a `layout`, which holds for one forward; whoever decodes places it anew.
        """
        self.check(model)
        placement = Placement(self.scope, (self.first_block,), None if rows is None else rows[:, None], layout)
        with model.intervene({site: placement.adding(vector) for site, vector in self.vectors.items()}):
            yield placement

    def check(self, model: LanguageModel) -> None:
        """Raise UsageError if these vectors do not fit `model`."""
        check_layers(self.layers, model.n_layers)
        for site, vector in self.vectors.items():
            if vector.shape != (model.width(site.kind),):
                raise UsageError(
                    f"the vector at {site} has shape {tuple(vector.shape)}, {model.name} needs "
                    f"({model.width(site.kind)},); these vectors belong to another model"
                )

    def _map(self, change: Callable[[Tensor], Tensor]) -> SteeringVectors:
        return SteeringVectors({site: change(vector.detach()) for site, vector in self.vectors.items()}, self.scope)

    def _same_scope(self, other: SteeringVectors) -> None:
        if self.scope != other.scope:
            raise UsageError(
                f"token scopes differ ({self.scope.kind} and {other.scope.kind}); attach both sets instead"
            )


class Placement:
    """An attached set: holds which tokens the next forward feeds, and of which member of a row bank they are."""

    def __init__(
        self, scope: Scope, first_blocks: tuple[int, ...], members: Tensor | None = None, layout: Layout | None = None
    ) -> None:
        self.scope, self.first_blocks = scope, first_blocks
        self.place(members, layout)

    def place(self, members: Int[Tensor, "batch new"] | None, layout: Layout | None) -> None:
        self.members, self.layout, self._mask = members, layout, None

    def adding(self, vector: Tensor) -> Shift:
        """The function that a site goes through."""

        def shift(x: Tensor) -> Tensor:
            moved: Tensor = AddVector.apply(x, vector) if torch.is_grad_enabled() else x + vector.to(x)  # type: ignore[assignment]
            return moved if self.scope.kind == "all" else torch.where(self._inside(x), moved, x)

        return shift

    def adding_rows(self, bank: Float[Tensor, "set width"]) -> Shift:
        """The same with one vector per set, each fed token using the set that `members` names."""

        def shift(x: Tensor) -> Tensor:
            if self.members is None:
                raise UsageError("a row bank needs to know which set each row uses: attach(model, rows=…)")
            # Vectors are gathered before rounding, so that the gradients of tokens with one set add up in fp32.
            moved = x + bank.to(x.device)[self.members].to(x.dtype)
            return moved if self.scope.kind == "all" else torch.where(self._inside(x), moved, x)

        return shift

    def _inside(self, x: Tensor) -> Tensor:
        if self.layout is None:
            raise UsageError(
                f"token scope '{self.scope.kind}' needs to know where the prompt ends: sample through Policy, "
                "or attach(model, layout=Layout.of_texts(tokens, prompt_length))"
            )
        if self._mask is None:
            self._mask = self.scope.mask(self.layout)[..., None]
        if self._mask.shape[:2] != x.shape[:2]:
            raise UsageError(
                f"tokens of shape {tuple(x.shape[:2])} were fed, the layout describes {tuple(self._mask.shape[:2])}; "
                "attach with a layout of exactly the tokens that are fed"
            )
        return self._mask


class RowBank:
    """Several sets in one batch: row i of the batch uses set `rows[i]`. None is the base model.

    All sets must have the same token scope. Sites that a set lacks are zero for its rows, so a row of the base
    model goes through the same additions (of zero) as its neighbours.
    """

    def __init__(self, sets: Sequence[SteeringVectors | None]) -> None:
        real = [s for s in sets if s is not None]
        if not real:
            raise UsageError("a row bank needs at least one set of steering vectors")
        for other in real[1:]:
            real[0]._same_scope(other)
        self.sets, self.scope = tuple(sets), real[0].scope

    @property
    def first_block(self) -> int:
        return min(s.first_block for s in self.sets if s is not None)

    @property
    def keeps_inputs(self) -> bool:
        """The gradient of a vector is a sum of gradients."""
        return False

    @property
    def n_parameters(self) -> int:
        return sum(s.n_parameters for s in self.sets if s is not None)

    def parameters(self) -> Iterator[nn.Parameter]:
        for member in self.sets:
            if member is not None:
                yield from member.parameters()

    @contextmanager
    def attach(
        self, model: LanguageModel, rows: Int[Tensor, " batch"] | None = None, layout: Layout | None = None
    ) -> Iterator[Placement]:
        """Add to every row the vectors of its own set inside the `with`."""
        real = [s for s in self.sets if s is not None]
        for member in real:
            member.check(model)
        blocks = tuple(model.n_layers if s is None else s.first_block for s in self.sets)
        placement = Placement(self.scope, blocks, None if rows is None else rows[:, None], layout)
        with model.intervene({site: placement.adding_rows(self.bank(site)) for site in self.sites}):
            yield placement

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(sorted({site for s in self.sets if s is not None for site in s.vectors}))

    def bank(self, site: Site) -> Float[Tensor, "set width"]:
        """The vectors of all sets at one site, zeros where a set has none and once more behind the last (member −1 is
        the base model); differentiable."""
        found = [None if s is None else s.vectors.get(site) for s in (*self.sets, None)]
        like = next(v for v in found if v is not None)
        return torch.stack([torch.zeros_like(like) if v is None else v for v in found])

    def snapshot(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": tensor
            for i, s in enumerate(self.sets)
            if s is not None
            for name, tensor in s.snapshot().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for i, member in enumerate(self.sets):
            if member is not None:
                prefix = f"{i}."
                member.restore({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})


def check_layers(layers: Iterable[int], n_layers: int) -> None:
    """Raise UsageError unless every layer is in 0 … n_layers−1."""
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong:
        raise UsageError(f"layers {wrong} do not exist; this model has layers 0 to {n_layers - 1}")
