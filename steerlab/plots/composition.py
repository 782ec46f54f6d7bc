"""Figures of `interp.composition`: pairs of layers as a heat map beside random directions, and the path of greedy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError, unknown
from steerlab.plots.house import COLOURBAR, COLOURS, DIVERGING, GRID, HOUSE, INK, SEQUENTIAL, band, figure, label

TITLES = {
    "gain": "What a pair gains over the better of its two vectors (× where it gains all that is to be had)",
    "value": "Score of a pair of vectors (× where it gains all that is to be had)",
    "relative": "Gain of a pair, as a share of what vectors trained together gain",
}
CROSSED = 0.99
WORDED = 10  # layers, up to which every cell has its number
_SHORT = {"random": "random directions of equal lengths", "trained": "trained"}
_LEVELS = {
    "base": "base",
    "sum": "all vectors at once",
    "random sum": "all, random directions",
    "together": "trained together",
}


def composition(df: pd.DataFrame, quantity: str = "gain") -> go.Figure:
    """Layer i by row, layer j by column, a panel per condition. On the diagonal the score of the vector by itself, in
    per cent, as are the numbers in cells of few layers; × where `relative` is above 0.99; grey where there is nothing.
    Raises UsageError for an unknown quantity or an empty table."""
    tables.check(df, "composition")
    if quantity not in TITLES:
        raise unknown("quantity", quantity, tuple(TITLES))
    if df.empty:
        raise UsageError("the table is empty; combine at least two vectors")
    conditions = [str(name) for name in dict.fromkeys(df["condition"])]
    layers = sorted({*df["layer_i"], *df["layer_j"]})
    titles = [label(_SHORT.get(name, name)) for name in conditions]
    made = make_subplots(rows=1, cols=len(conditions), subplot_titles=titles, horizontal_spacing=0.08)
    made.update_layout(template=HOUSE, height=500, title_text=TITLES[quantity], margin_t=84, plot_bgcolor=GRID)
    shown = df.loc[(df["layer_i"] < df["layer_j"]) | (quantity == "value"), quantity].dropna().abs()
    signed, largest = quantity != "value", float(shown.max() or 1.0) if len(shown) else 1.0
    names = [str(layer) for layer in layers]
    for column, condition in enumerate(conditions, start=1):
        part = df.loc[df["condition"] == condition]
        grid, own = _grid(part, layers, quantity, signed)
        made.add_heatmap(
            z=grid,
            x=names,
            y=names,
            colorscale=DIVERGING if signed else SEQUENTIAL,
            zmin=-largest if signed else 0,
            zmax=largest,
            text=own,
            texttemplate="%{text}",
            textfont={"size": 10},
            showscale=column == len(conditions),
            colorbar={**COLOURBAR, "title_text": "share" if quantity == "relative" else "share of problems"},
            hovertemplate="layers %{y} and %{x}<br>%{z:.3f}<extra></extra>",
            row=1,
            col=column,
        )
        crossed = part.loc[(part["relative"] > CROSSED) & (part["layer_i"] < part["layer_j"])]
        made.add_scatter(
            x=[str(layer) for layer in crossed["layer_j"]],
            y=[str(layer) for layer in crossed["layer_i"]],
            mode="markers",
            marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": INK}},
            name=f"relative above {CROSSED}",
            showlegend=False,
            hoverinfo="skip",
            row=1,
            col=column,
        )
        made.update_xaxes(title_text="layer j", type="category", showgrid=False, row=1, col=column)
        made.update_yaxes(title_text="layer i" if column == 1 else "", type="category", row=1, col=column)
    ticks = {"categoryorder": "array", "categoryarray": names, "dtick": 1, "tickfont": {"size": 11}}
    made.update_xaxes(**ticks)
    return made.update_yaxes(**ticks, autorange="reversed", showgrid=False)


def _grid(part: pd.DataFrame, layers: list[int], quantity: str, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values above the diagonal, and the words: on the diagonal, and where there is room in every cell, per cent."""
    place = {layer: n for n, layer in enumerate(layers)}
    grid = np.full((len(layers), len(layers)), np.nan)
    words = np.full(grid.shape, "", dtype=object)
    for record in part.to_dict("records"):
        i, j = place[record["layer_i"]], place[record["layer_j"]]
        if i != j:
            grid[i, j] = value = record[quantity]
            if len(layers) <= WORDED and np.isfinite(value):
                words[i, j] = (f"{100 * value:+.0f}" if signed else f"{100 * value:.0f}").replace("-", "−")
        else:
            grid[i, i] = 0.0 if signed else record["value"]
            words[i, i] = f"{100 * record['value']:.0f}"
    return grid, words


def composition_sets(df: pd.DataFrame) -> go.Figure:
    """The path of greedy: score by number of vectors, where they were chosen and held out; levels to compare with."""
    tables.check(df, "composition_sets")
    path = df.loc[df["condition"] == "greedy"].sort_values("n_vectors", kind="stable")
    if path.empty:
        raise UsageError("the table has no path of greedy; combine at least two vectors")
    others = df.loc[df["condition"] != "greedy"]
    told = str(others["split"].iloc[0]) if len(others) else str(path["split"].iloc[-1])
    made = figure("Adding the layer whose vector raises the score most, until none does", height=430)
    for split, part in path.groupby("split", sort=False):
        held = split == told
        colour = COLOURS[0] if held else COLOURS[3]
        made.add_scatter(**band(part["n_vectors"], part["low"], part["high"], colour))
        made.add_scatter(
            x=part["n_vectors"],
            y=part["value"],
            name=label(f"greedy, {split} split ({'held out' if held else 'where layers are chosen'})"),
            mode="lines+markers",
            line={"color": colour, "width": 2.2, "dash": "solid" if held else "dash"},
            customdata=part["layers"],
            hovertemplate="layers %{customdata}<br>%{y:.1%}<extra></extra>",
        )
    ends = [-0.2, float(max(path["n_vectors"].max(), 1)) + 0.2]
    for number, record in enumerate(others.to_dict("records")):
        made.add_scatter(
            x=ends,
            y=[record["value"]] * 2,
            name=label(_LEVELS.get(record["condition"], str(record["condition"]))),
            mode="lines",
            line={"color": ("#6b7280", COLOURS[2], COLOURS[5], COLOURS[1])[number % 4], "width": 1.8, "dash": "dot"},
            hovertemplate=f"{label(str(record['condition']))} %{{y:.1%}} "
            f"[{record['low']:.1%}, {record['high']:.1%}]<extra></extra>",
        )
    made.update_layout(margin_t=110)
    steps = path.drop_duplicates("n_vectors")
    names = [f"{len(of.split())}: layer {of.split()[-1]}" if of else "none" for of in steps["layers"]]
    made.update_xaxes(
        title_text="vectors, and the layer added", tickvals=steps["n_vectors"], ticktext=names, range=ends
    )
    title = label(f"{path['metric'].iloc[0]} (share of problems)")
    return made.update_yaxes(title_text=title, tickformat=".0%", rangemode="tozero")
