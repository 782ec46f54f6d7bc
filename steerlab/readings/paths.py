"""Readings of the paths that carry a vector's effect."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from steerlab.adapters import SteeringVectors
from steerlab.interp import activation_patching as places
from steerlab.interp import attention as heads
from steerlab.interp import attribution as parts
from steerlab.interp import path_patching as paths
from steerlab.interp.agreement import agreement, drawn, exact_edges
from steerlab.interp.decisions import Decisions
from steerlab.interp.edge_attribution import edge_attribution
from steerlab.interp.patch_effects import patch_effects as read_patch_effects
from steerlab.interp.patched import Patch
from steerlab.interp.path_graph import path_graph
from steerlab.interp.texts import Text
from steerlab.interp.words import Words
from steerlab.models import LanguageModel
from steerlab.plots import activation_patching as plot_places
from steerlab.plots import attention as plot_attention
from steerlab.plots import attribution as plot_attribution
from steerlab.plots import patch_effects as plot_patch_effects
from steerlab.plots import patching as plot_patching
from steerlab.plots import path_graph as plot_graph
from steerlab.plots import path_patching as plot_paths
from steerlab.readings.reading import Reading


def patching(table: pd.DataFrame) -> Reading:
    """A table of `interp.patching`, named after its metric; figures of its values by sender, and of what is kept where
    that is known."""
    name = f"patching_{str(table['metric'].iloc[0]).partition('@')[0]}"
    figures = {}
    for sender in dict.fromkeys(table["sender"]):
        mine = name if sender == "trained" else f"{name}_{sender}"
        figures[mine] = plot_patching.patching(table, sender)
        if table.loc[table["sender"] == sender, "kept"].notna().any():
            figures[f"{mine}_kept"] = plot_patching.patching(table, sender, "kept")
    return Reading({name: table}, figures)


def patch_effects(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    patches: Sequence[Patch],
    *,
    words: Words | None = None,
    k: int = 10,
    draws: int = 1_000,
    seed: int = 0,
) -> Reading:
    """Which tokens, and which groups of words, the part that each patch is about raises and lowers, and where."""
    found = read_patch_effects(model, vectors, texts, patches, words=words, k=k, draws=draws, seed=seed)
    return Reading(
        {"patch_effects": found.positions, "patch_tokens": found.tokens, "patch_groups": found.groups},
        {
            "patch_effects": plot_patch_effects.patch_effects(found.positions),
            "patch_groups": plot_patch_effects.patch_groups(found.groups),
        },
    )


def attention(model: LanguageModel, vectors: SteeringVectors, texts: Sequence[Text], *, seed: int = 0) -> Reading:
    """Which heads look elsewhere because of the vectors, and what is left of the effect where none does."""
    table = heads.attention(model, vectors, texts, seed=seed)
    frozen = heads.frozen_attention(model, vectors, texts, seed=seed)
    return Reading({"attention": table, "frozen_attention": frozen}, {"attention": plot_attention.attention(table)})


def attribution(model: LanguageModel, vectors: SteeringVectors, texts: Sequence[Text], *, seed: int = 0) -> Reading:
    """Through which heads and MLPs the vectors' effect reaches the logits directly. The figure of heads is absent for
    vectors of the last layer."""
    table = parts.attribution(model, vectors, texts, seed=seed)
    figures = {"attribution": plot_attribution.attribution(table)}
    if vectors.first_block < model.n_layers:
        figures["attribution_heads"] = plot_attribution.attribution_heads(table)
    return Reading({"attribution": table}, figures)


def activation_patching(
    model: LanguageModel, found: Decisions, kinds: Sequence[str] = ("z", "attn_out", "mlp_out")
) -> Reading:
    """What each place of the steered run brings back of the vectors' decisions when it is put into the base run. Heads
    of `z`, and of q, k and v; other sites whole."""
    by_head = {"q", "k", "v", "z"}
    index = [
        place
        for kind in kinds
        for place in (
            places.heads(model, kind)
            if kind in by_head
            else [places.Place(kind, layer) for layer in range(model.n_layers)]
        )
    ]
    table = places.activation_patching(model, found.pair, index, found.metric)
    figures = {
        f"activation_patching_{name}": plot_places.activation_patching(part)
        for name, part in (("heads", table.loc[table["head"] >= 0]), ("blocks", table.loc[table["head"] < 0]))
        if len(part)
    }
    return Reading({"activation_patching": table, "decisions": found.table(model)}, figures)


def path_patching(
    model: LanguageModel, found: Decisions, sender: paths.Sender, *, through: paths.Through = "direct"
) -> Reading:
    """What one sender of the steered run says to all that hear it, in the vectors' decisions."""
    heard_by = paths.receivers(model, sender)
    table = paths.path_patching(model, found.pair, sender, heard_by, found.metric, through=through)
    return Reading(
        {"path_patching": table, "decisions": found.table(model)}, {"path_patching": plot_paths.path_patching(table)}
    )


def edges(
    model: LanguageModel,
    found: Decisions,
    *,
    steps: int = 5,
    links: int = 60,
    check: int = 60,
    name: str = "paths",
    seed: int = 0,
) -> Reading:
    """All edges to first order, the strongest paths as a figure and as a graph for circuit-tracer's viewer, and what
    `check` edges, patched exactly, say of the estimate (0: none)."""
    table = edge_attribution(model, found.pair, found.metric, steps=steps, seed=seed)
    graph = path_graph(model, table, n_links=links)
    tables = {"edges": table, "path_nodes": graph.nodes, "path_links": graph.links, "decisions": found.table(model)}
    if check:
        exact = exact_edges(model, found.pair, drawn(table, check, seed), found.metric)
        plain = edge_attribution(model, found.pair, found.metric, steps=0, seed=seed)
        tables |= {"exact_edges": exact}
        tables |= {"agreement": agreement(exact, {f"{steps} steps": table, "at the base run": plain}, seed=seed)}
    return Reading(
        tables,
        {"path_graph": plot_graph.path_graph(graph.nodes, graph.links)},
        {name: graph.as_json(name, model.name)},
    )
