"""Figure of `interp.path_graph`: from vectors and embeddings at the bottom to the logits at the top."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURS, HOUSE, INK, label

SHAPES = {
    "embedding": ("square", "#6b7280"),
    "vector": ("star", COLOURS[4]),
    "heads": ("circle", COLOURS[0]),
    "mlp": ("diamond", COLOURS[2]),
    "logits": ("square", INK),
}
SIGNS = {"raises the metric": COLOURS[0], "lowers it": COLOURS[1]}
_BESIDE = {"vector": "middle left", "logits": "top center"}  # where names stand
WIDEST = 9.0  # px


def path_graph(nodes: pd.DataFrame, links: pd.DataFrame) -> go.Figure:
    """Layer upwards; heads by group, MLPs beside them. A link is as wide as its effect. Raises UsageError for an empty
    graph."""
    tables.check(nodes, "path_nodes")
    tables.check(links, "path_links")
    if links.empty:
        raise UsageError("the graph has no links; give more of them to `path_graph`")
    places = _places(nodes)
    made = go.Figure()
    largest = float(np.abs(links["effect"].to_numpy()).max())
    for n, (name, colour) in enumerate(SIGNS.items()):
        part = links.loc[links["effect"] >= 0] if n == 0 else links.loc[links["effect"] < 0]
        for first, link in enumerate(part.sort_values("effect", key=abs, ascending=False).to_dict("records")):
            size = abs(link["effect"]) / largest
            (x0, y0), (x1, y1) = places[link["source"]], places[link["target"]]
            made.add_scatter(
                x=[x0, (x0 + x1) / 2 - (0.14 * abs(y1 - y0) ** 0.5 if x0 == x1 else 0.0), x1],  # an arc in a column
                y=[y0, (y0 + y1) / 2, y1],
                mode="lines",
                line={"width": 0.6 + WIDEST * size, "color": colour, "shape": "spline"},
                opacity=0.25 + 0.6 * size,
                name=name,
                legendgroup=name,
                showlegend=not first,
                text=[f"{label(link['source'])} → {label(link['target'])}: {link['effect']:+.3f}"] * 3,
                hovertemplate="%{text}<extra></extra>",
            )
    for kind in SHAPES:
        part = nodes.loc[nodes["kind"] == kind]
        if len(part):
            _dots(made, part, places, kind)
    title = "The strongest paths to the logits (edges to first order)"
    height = min(1_100, max(420, 150 + 26 * len({y for _, y in places.values()})))
    made.update_layout(template=HOUSE, title_text=title, height=height, legend_y=1.06, margin_t=100)
    made.update_xaxes(
        visible=False, range=[min(x for x, _ in places.values()) - 0.7, 0.8 + max(x for x, _ in places.values())]
    )
    ticks = {
        int(y): str(int(y))
        for kind, (_, y) in zip(nodes["kind"], places.values(), strict=True)
        if kind not in ("embedding", "logits")
    }
    return made.update_yaxes(title_text="layer (0-based)", tickvals=list(ticks), ticktext=list(ticks.values()))


def _places(nodes: pd.DataFrame) -> Mapping[str, tuple[float, float]]:
    """x, y of each node, in their order: heads at their group, MLPs right of them and half a layer higher."""
    groups = max(max(nodes["head"]) + 1, 1)
    middle = (groups - 1) / 2
    x = {"embedding": middle, "vector": -1.0, "mlp": float(groups), "logits": middle}
    higher = {"mlp": 0.35, "vector": 0.5, "logits": 0.2}
    return {
        node["node"]: (x.get(node["kind"], float(node["head"])), node["layer"] + higher.get(node["kind"], 0.0))
        for node in nodes.to_dict("records")
    }


def _dots(made: go.Figure, part: pd.DataFrame, places: Mapping[str, tuple[float, float]], kind: str) -> None:
    symbol, colour = SHAPES[kind]
    made.add_scatter(
        x=[places[node][0] for node in part["node"]],
        y=[places[node][1] for node in part["node"]],
        mode="markers+text",
        marker={"size": 11, "symbol": symbol, "color": colour, "line": {"width": 1, "color": "#ffffff"}},
        text=[label(str(node)) for node in part["node"]],
        textposition=_BESIDE.get(kind, "middle right"),
        textfont={"size": 11},
        customdata=part[["said", "heard"]].to_numpy(),
        hovertemplate="%{text}<br>says %{customdata[0]:.3f}, hears %{customdata[1]:.3f}<extra></extra>",
        showlegend=False,
    )
