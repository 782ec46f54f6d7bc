"""Attribution patching: activation patching of all places at once, to first order (Nanda 2023).

The metric with a value taken from the clean run is estimated as corrupted + (clean − corrupted) · ∂metric/∂value, with
the gradient at the corrupted run (`steps=0`) or its mean at several places on the way to the clean one (integrated
gradients; see `interp/edge_attribution.py`). `interp/agreement.py` measures how far that is from exact patching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from steerlab.interp.activation_patching import Metric, Pair, Place, Work, check_places, table_of
from steerlab.interp.integrated import midpoints, on_the_way
from steerlab.models import LanguageModel, Site


def attribution_patching(
    model: LanguageModel, pair: Pair, places: Sequence[Place], metric: Metric, *, steps: int = 0
) -> pd.DataFrame:
    """Table `activation_patching`, every value an estimate. Raises UsageError as `activation_patching` does, for
    steps < 0, and for runs that cannot be mixed."""
    check_places(model, pair, places)
    work, sites = Work(model, pair), sorted({Site(place.kind, place.layer) for place in places})
    with torch.no_grad():
        clean_end, clean = work.run(pair.clean, pair.clean_adapter, sites)
        corrupted_end, corrupted = work.run(pair.corrupted, pair.corrupted_adapter, sites)
    ends = metric(clean_end), metric(corrupted_end)
    slopes = [torch.zeros_like(clean[site]) for site in sites]
    for place in midpoints(steps):
        for slope, more in zip(slopes, _gradients(model, work, sites, metric, place), strict=True):
            slope += more / max(steps, 1)
    changes = {site: slope * (clean[site] - corrupted[site]) for site, slope in zip(sites, slopes, strict=True)}
    found = []
    for place in places:
        change = changes[Site(place.kind, place.layer)][:, work.position(place), work.part(place)]
        found.append(ends[1] + change.flatten(1).sum(1))
    return table_of(places, found, *ends)


def _gradients(
    model: LanguageModel, work: Work, sites: Sequence[Site], metric: Metric, place: float
) -> tuple[Tensor, ...]:
    """Of the metric by the values at `sites`, at one place on the way."""
    added: dict[Site, Tensor] = {}

    def watching(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            added[site] = torch.zeros_like(x).requires_grad_()
            return x + added[site]

        return edit

    with torch.enable_grad(), on_the_way(model, work.pair, place, work.start) as adapter:
        with model.intervene({site: watching(site) for site in sites}):
            end, _ = work.run(work.pair.corrupted, adapter, ())
        return torch.autograd.grad(metric(end).sum(), [added[site] for site in sites])
