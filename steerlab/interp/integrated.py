"""The way from a corrupted to a clean run, for integrated gradients (Sundararajan et al. 2017; Hanna et al. 2024).

At place 0 stands the corrupted run, at 1 the clean one; between them the blocks read the corrupted tokens' embeddings
moved towards the clean ones', under vectors moved alike. The corrupted tokens say where each position stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from steerlab.adapters import Adapter, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import Pair
from steerlab.models import LanguageModel, Site


def midpoints(steps: int) -> list[float]:
    """The middles of `steps` equal parts of the way; for 0 the corrupted run. Raises UsageError for steps < 0."""
    if steps < 0:
        raise UsageError(f"steps is {steps}; give 0 for the corrupted run's gradients, or 1 and more")
    return [(step + 0.5) / steps for step in range(steps)] or [0.0]


@contextmanager
def on_the_way(model: LanguageModel, pair: Pair, place: float, start: int = 0) -> Iterator[Adapter | None]:
    """The run at `place`, over the corrupted tokens from `start` on and under the adapter that is given.

    Raises UsageError where the runs' adapters cannot be mixed: both must be steering vectors of one scope, or none.
    """
    adapter = _between(pair.corrupted_adapter, pair.clean_adapter, place)
    if not place or torch.equal(pair.clean, pair.corrupted):
        yield adapter
        return
    gap = _embedded(model, pair.clean, start) - _embedded(model, pair.corrupted, start)
    with model.intervene({Site("resid_pre", 0): lambda x: x + place * gap}):
        yield adapter


def _between(corrupted: Adapter | None, clean: Adapter | None, place: float) -> Adapter | None:
    if corrupted is clean or not place:
        return corrupted
    ends = [(of, share) for of, share in ((corrupted, 1 - place), (clean, place)) if of is not None]
    mixed: SteeringVectors | None = None
    for of, share in ends:
        if not isinstance(of, SteeringVectors):
            raise UsageError("only steering vectors can be mixed between the runs; give steps=0, or vectors")
        mixed = of * share if mixed is None else mixed + of * share
    return mixed


def _embedded(model: LanguageModel, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """What block 0 reads."""
    site = Site("resid_pre", 0)
    with torch.no_grad():
        return model.cache(tokens, [site])[site][:, start:]
