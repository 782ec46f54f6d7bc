"""The tuned lens' translators: one affine map per layer into the last layer's basis (Belrose et al. 2023, 2303.08112).

    h'_l = h_l + W_l h_l + b_l,    what layer l says = softmax(head(norm(h'_l)))

h_l is what block l writes (`resid_post`). W and b start at zero, which is the plain logit lens, and live in fp32
whatever the model's dtype. A lens reads the model and changes nothing in it: attached, the model computes the same
bits. It is an adapter because it is trained, kept and resumed like one.
Left out: a translator of the embeddings, which no layer of ours has written; whole matrices in place of the change
(the same function; but weight decay pulls the change to the plain lens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerlab.adapters.adapter import Everywhere, Layout
from steerlab.errors import UsageError
from steerlab.models import LanguageModel

Map = tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]


@dataclass(frozen=True)
class Translators:
    """Spec of a tuned lens. layers: which blocks get a translator, None for all but the last."""

    layers: tuple[int, ...] | None = None

    @property
    def learning_rate(self) -> float:
        """Of Adam, from `analyses/README.md`: higher is better on the mean and worse at the last layers."""
        return 1e-3

    def init(self, model: LanguageModel, generator: torch.Generator | None = None) -> TunedLens:  # noqa: ARG002
        """Zeros for `model`, the plain lens; draws nothing. Raises UsageError for a layer that cannot have one."""
        layers = tuple(range(model.n_layers - 1)) if self.layers is None else self.layers
        weight = torch.zeros(model.d_model, model.d_model, device=model.device)
        return TunedLens(dict.fromkeys(layers, (weight, weight[0])), model.n_layers)


class TunedLens:
    """The translators of some layers of a model.

    maps: by layer, W as (out, in) and b. n_layers: of the model. Raises UsageError for no layer at all, and for one
    that the model does not have or that is its last, which says what the model says and needs none.
    """

    def __init__(self, maps: Mapping[int, Map], n_layers: int) -> None:
        wrong = [layer for layer in maps if not 0 <= layer < n_layers - 1]
        if wrong or not maps:
            raise UsageError(
                f"layers {wrong or 'none'} cannot be translated; of {n_layers} layers choose some of the first "
                f"{n_layers - 1} (the last one's lens is the model's own output)"
            )
        self.maps = {layer: (_master(maps[layer][0]), _master(maps[layer][1])) for layer in sorted(maps)}
        self.n_layers = n_layers

    def __call__(self, layer: int, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What block `layer` wrote, translated, in its own dtype; as it is where the layer has no translator."""
        if layer not in self.maps:
            return h
        exact = torch.promote_types(h.dtype, torch.float32)
        weight, bias = (part.to(exact) for part in self.maps[layer])
        x = h.to(exact)
        return (x + nn.functional.linear(x, weight, bias)).to(h.dtype)

    def __repr__(self) -> str:
        return f"TunedLens({len(self.maps)} of {self.n_layers} layers, {self.n_parameters:,} parameters)"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.maps)

    @property
    def d_model(self) -> int:
        return len(next(iter(self.maps.values()))[1])

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def first_block(self) -> int:
        """No block depends on a translator."""
        return self.n_layers

    @property
    def keeps_inputs(self) -> bool:
        """The states it needs are read without a graph."""
        return False

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.named().values()

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by layer, as `3.weight` and `3.bias`, in the order of `parameters`."""
        return {
            f"{layer}.{name}": part
            for layer, pair in self.maps.items()
            for name, part in zip(("weight", "bias"), pair, strict=True)
        }

    def snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        names = self.named()
        if names.keys() != state.keys():
            raise UsageError(f"snapshot holds translators {sorted(state)}, this lens needs {sorted(names)}")
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(state[name])

    @contextmanager
    def attach(
        self,
        model: LanguageModel,
        rows: Int[Tensor, " batch"] | None = None,  # noqa: ARG002 - nothing is changed in any row
        layout: Layout | None = None,  # noqa: ARG002 - nor at any token
    ) -> Iterator[Everywhere]:
        """Changes nothing in `model`."""
        self.check(model)
        yield Everywhere((self.first_block,))

    def check(self, model: LanguageModel) -> None:
        """Raise UsageError if this lens does not fit `model`."""
        if (self.n_layers, self.d_model) != (model.n_layers, model.d_model):
            raise UsageError(
                f"the tuned lens is of {self.n_layers} layers of width {self.d_model}, {model.name} has "
                f"{model.n_layers} of {model.d_model}; it belongs to another model"
            )


def _master(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone().to(torch.promote_types(tensor.dtype, torch.float32)))
