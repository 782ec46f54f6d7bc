"""Persistence Δ^{i→l}: what the vector of layer i has become by layer l (arXiv 2509.06608 §5).

Δ_t^{i→l} = h_t^l with the vector of layer i alone − h_t^l without it, on the same tokens. Of each pair of layers, means
over texts with their intervals: `diff_vector` = mean_t cos(Δ_t, s_l) (does it turn into what layer l's own vector is?),
`diff_diff` = mean_t cos(Δ_t, mean_t' Δ_t') (is it one direction at all tokens?), `mean_vector` = cos(mean_t Δ_t, s_l)
and `length` = mean_t ‖Δ_t‖. A random direction of the same length as s_i goes the same way as a control.

The steered pass begins at block i + 1 from what the base wrote there: below, nothing differs. Differences of bf16
states are noisy: read a model in fp32. Left out: vectors at other sites than `resid_post`, effects through one path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.states import check_texts, states_under
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.rollouts.statistics import bootstrap_interval

QUANTITIES = ("diff_vector", "diff_diff", "mean_vector", "length")
Cell = tuple[str, int, int]  # condition, source, layer


@dataclass(frozen=True)
class Persistence:
    """table: `persistence`. effects: by source layer, mean over all tokens of what reaches the output, Δ^{i→L−1}."""

    table: pd.DataFrame
    effects: dict[int, Float[Tensor, " d_model"]]


@torch.no_grad()
def persistence(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text] | Mapping[int, Sequence[Text]],
    *,
    control: bool = True,
    seed: int = 0,
) -> Persistence:
    """Of every layer that has a vector, on shared `texts` or (the paper's protocol) on those of its own, by layer.

    Zero vectors, which change nothing, are left out and listed in `table.attrs["zero"]`. Raises UsageError for vectors
    at other sites, for no vector that is not zero, or a layer without texts.
    """
    sources = sources_of(model, vectors)
    own = texts if isinstance(texts, Mapping) else dict.fromkeys(sources, texts)
    if missing := sorted(set(sources) - set(own)):
        raise UsageError(f"no texts for the vectors of layers {missing}; give some, or the same texts for all")
    for part in own.values():
        check_texts(model, part)
    tried = {"trained": vectors.select(sources)}
    if control:
        tried["random"] = tried["trained"].randomise(torch.Generator().manual_seed(seed))
    found: dict[Cell, list[list[float]]] = {}
    totals = {source: torch.zeros(model.d_model, dtype=torch.float64) for source in sources}
    counts = dict.fromkeys(sources, 0)
    shared = not isinstance(texts, Mapping)
    for group in [sources] if shared else [(source,) for source in sources]:
        for text in own[group[0]]:
            base = states_under(model, None, text, range(min(group), model.n_layers))
            for condition, chosen in tried.items():
                for source in group:
                    changes = _changes(model, chosen.select([source]), source, text, base)
                    for layer, change in changes.items():
                        cell = found.setdefault((condition, source, layer), [])
                        cell.append(_said(change, vectors.vectors.get(Site("resid_post", layer))))
                    if condition == "trained":
                        totals[source] += changes[model.n_layers - 1].double().sum(0).cpu()
                        counts[source] += len(text.tokens)
    table = tables.check(
        pd.DataFrame([row for cell, said in found.items() for row in _rows(cell, said)]), "persistence"
    )
    table.attrs["zero"] = [str(site) for site, vector in vectors.vectors.items() if not vector.any()]
    return Persistence(table, {source: total / counts[source] for source, total in totals.items()})


def sources_of(model: LanguageModel, vectors: SteeringVectors) -> tuple[int, ...]:
    """Layers whose vectors can be followed. Raises UsageError for vectors at other sites, or none that is not zero."""
    vectors.check(model)
    other = [str(site) for site in vectors.sites if site.kind != "resid_post"]
    if other:
        raise UsageError(
            f"what is followed are resid_post vectors, and {', '.join(other)} is not one; select the others"
        )
    sources = tuple(site.layer for site, vector in vectors.vectors.items() if vector.any())
    if not sources:
        raise UsageError("every vector is zero, so there is nothing to follow; train first")
    return sources


def _changes(
    model: LanguageModel, single: SteeringVectors, source: int, text: Text, base: Mapping[int, Tensor]
) -> dict[int, Float[Tensor, "pos d_model"]]:
    """Δ^{source→l} at every l from the source on, in at least fp32."""
    exact = torch.promote_types(model.dtype, torch.float32)
    steered = states_under(model, single, text, range(source, model.n_layers), block=source + 1, written=base[source])
    return {layer: states.to(exact) - base[layer].to(exact) for layer, states in steered.items()}


def _said(change: Float[Tensor, "pos d_model"], own: Tensor | None) -> list[float]:
    """The four quantities of one text, in order; missing where a direction is needed and there is none."""
    moved = change[change.any(-1)]  # outside its scope a vector changes nothing
    length = float(moved.norm(dim=-1).mean()) if len(moved) else float("nan")
    mean = moved.mean(0) if len(moved) else change[0] * float("nan")
    with_own = own is not None and bool(own.any())
    s = own.detach().to(moved) if own is not None and with_own else mean * float("nan")
    to = torch.nn.functional.cosine_similarity
    return [
        float(to(moved, s, dim=-1).mean()),
        float(to(moved, mean, dim=-1).mean()),
        float(to(mean, s, dim=-1)),
        length,
    ]


def _rows(cell: Cell, said: Sequence[Sequence[float]]) -> list[dict[str, object]]:
    condition, source, layer = cell
    rows: list[dict[str, object]] = []
    for quantity, values in zip(QUANTITIES, np.array(said).T, strict=True):
        known = values[np.isfinite(values)]
        if len(known):
            # A length has no bound; where all are equal they are so by algebra (the vector itself, at its own layer).
            bounds = (float(known.min()), float(known.max())) if quantity == "length" else (-1.0, 1.0)
            interval = bootstrap_interval(known, bounds=bounds, resamples=2_000)
            value, low, high = interval.value, interval.low, interval.high
        else:
            value = low = high = float("nan")
        rows.append(
            {"condition": condition, "source": source, "layer": layer, "quantity": quantity}
            | {"value": value, "low": low, "high": high, "n_texts": len(known)}
        )
    return rows
