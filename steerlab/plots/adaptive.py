"""Figures of `interp.adaptive`: the strength of the vector at every token, and where most of it goes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURBAR, COLOURS, DIVERGING, INK, figure, label, readable

LONGEST = 96  # tokens that are drawn


def adaptive(df: pd.DataFrame, text: int = 0) -> go.Figure:
    """λ by layer (rows, each divided by its largest) and token of one text, on a scale that shows small values too;
    vertical lines where the segment changes. Raises UsageError for a text that the table does not have."""
    tables.check(df, "adaptive")
    part = df.loc[(df["text"] == text) & (df["position"] > 0) & (df["position"] <= LONGEST)]
    if part.empty:
        raise UsageError(f"the table has no text {text}; it has {sorted(set(df['text']))}")
    grid = part.pivot_table(index="layer", columns="position", values="scale")
    values = grid.to_numpy()
    largest = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(float).tiny)
    own = part.drop_duplicates("position").sort_values("position")
    names = [f"{p}  {label(readable(t), limit=10)}" for p, t in zip(own["position"], own["token"], strict=True)]
    made = figure("Strength of the vector by token (row by row)", height=310 + 24 * len(grid))
    made.add_heatmap(
        z=np.arcsinh(10 * values / largest) / np.arcsinh(10),
        x=names,
        y=[str(layer) for layer in grid.index],
        customdata=values,
        zmin=-1,
        zmax=1,
        colorscale=DIVERGING,
        colorbar={
            **COLOURBAR, "title_text": "λ / row's largest",
            "tickvals": [float(np.arcsinh(10 * v) / np.arcsinh(10)) for v in (-1, 0, 1)],
            "ticktext": ["−1", "0", "1"],
        },
        hovertemplate="layer %{y}, token %{x}<br>λ %{customdata:.3f}<extra></extra>",
    )  # fmt: skip
    for first, last, segment in runs(own["segment"].tolist()):
        wide = last - first >= 5
        made.add_vline(x=last + 0.5, line={"color": INK, "width": 1})
        made.add_annotation(
            x=(first + last) / 2, y=1, yref="paper", yanchor="bottom", text=label(segment), showarrow=False,
            textangle=0 if wide else -35, font={"size": 11}, xanchor="center" if wide else "left",
        )  # fmt: skip
    made.update_layout(margin={"t": 110})
    made.update_xaxes(title_text="position and token", type="category", tickangle=-60, showgrid=False)
    return made.update_yaxes(title_text="layer", type="category", showgrid=False)


def adaptive_shares(df: pd.DataFrame) -> go.Figure:
    """Share of Σ|λ| over the share of the tokens, by segment: one dot per layer with its interval; the line at 1 is
    what a strength that disregards segments would have. Filled dots differ from it (p < 0.05)."""
    tables.check(df, "adaptive_shares")
    made = figure("Where the strength goes: share of Σ|λ| over share of tokens", height=400)
    layers = sorted(set(df["layer"]))
    names = list(dict.fromkeys(df["segment"]))
    for number, layer in enumerate(layers):
        part = df.loc[(df["layer"] == layer) & (df["token_share"] > 0)]
        ratio, low, high = (part[name] / part["token_share"] for name in ("magnitude_share", "low", "high"))
        shift = 0.0 if len(layers) < 2 else 0.5 * (number / (len(layers) - 1) - 0.5)
        colour = COLOURS[number % len(COLOURS)]
        made.add_scatter(
            x=[names.index(segment) + shift for segment in part["segment"]],
            y=ratio,
            name=f"layer {layer}",
            mode="markers",
            marker={
                "size": 9, "color": [colour if p < 0.05 else "#ffffff" for p in part["p"]],
                "line": {"color": colour, "width": 1.6},
            },
            error_y={"type": "data", "symmetric": False, "array": high - ratio, "arrayminus": ratio - low, "width": 3},
            customdata=part["p"],
            hovertemplate="%{y:.2f}, p = %{customdata:.3f}<extra></extra>",
        )  # fmt: skip
    made.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"})
    made.update_xaxes(tickvals=list(range(len(names))), ticktext=[label(name) for name in names], title_text="segment")
    return made.update_yaxes(title_text="share of Σ|λ| / share of tokens", rangemode="tozero")


def runs(names: list[str]) -> Iterator[tuple[int, int, str]]:
    """First place, last place and name of every stretch of equal names."""
    first = 0
    for place in range(1, len(names) + 1):
        if place == len(names) or names[place] != names[first]:
            yield first, place - 1, names[first]
            first = place
