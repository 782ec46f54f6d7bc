"""How a model's arithmetic is done on this machine: which matrix products, whose norms, gates and attention, and how a
decode step is launched.

There are three choices, each between what the family does and what is usually faster: `products` (packed.py) and
`kernels` (fused.py) on a CPU, `steps` (graphs.py) on a GPU. `tune` measures and puts in force; a run keeps what it
settled in its manifest and puts that in force again (`use`), so that a resumed run rounds as it did. All of them are
the same mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from steerlab.errors import UsageError
from steerlab.models import fused, graphs, packed

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

PLAIN = {"products": "plain", "kernels": "family", "steps": "eager"}


def tune(model: LanguageModel, processes: int = 1) -> dict[str, str]:
    """Measure what is faster here, put it in force, and say what it is. processes: how many of this machine do so."""
    found = {
        "products": packed.measured_choice(model, processes=processes),
        "kernels": fused.measured_choice(model),
        "steps": graphs.measured_choice(model),
    }
    use(model, found)
    return found


def use(model: LanguageModel, before: Mapping[str, Any]) -> None:
    """Put in force what was settled before; what is not named is as the family does it. Raises UsageError if this
    machine cannot."""
    settled: dict[str, Any] = PLAIN | {name: before[name] for name in PLAIN if name in before}
    cannot = [
        name
        for name, able in (("products", packed.able), ("kernels", fused.able), ("steps", graphs.able))
        if settled[name] != PLAIN[name] and not able(model)
    ]
    if cannot:
        asked = " and ".join(f"{settled[name]} {name}" for name in cannot)
        raise UsageError(
            f"the run was begun with {asked}, which this machine cannot do; go on where it was begun, or choose a new "
            "folder"
        )
    model.products, model.kernels, model.steps = (settled[name] for name in PLAIN)
    if model.products == "packed":
        packed.packed_copy(model)


@contextmanager
def decoding(model: LanguageModel) -> Iterator[None]:
    """Inside the `with` the model computes as chosen, for few rows at a time."""
    with packed.products(model), fused.operators_of(model):
        yield


@contextmanager
def reading(model: LanguageModel) -> Iterator[None]:
    """The same for many rows at a time, where packed products gain nothing."""
    with fused.operators_of(model):
        yield
