"""Figure of `interp.activation_patching`: what each place brings back, heads or positions by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURBAR, DIVERGING, HOUSE, label


def activation_patching(df: pd.DataFrame) -> go.Figure:
    """Layer by row; head by column, or where sites are patched whole, position; a panel per kind of site. The colour is
    the change of the metric from the corrupted run. Whole sites at all positions: a line per kind, with intervals.

    Raises UsageError for an empty table, or heads at single positions, which want a table of one position."""
    tables.check(df, "activation_patching")
    if df.empty:
        raise UsageError("the table is empty; patch at least one place")
    if max(df["head"]) < 0 and max(df["position"]) < 0:
        return _profile(df)
    axis = "head" if max(df["head"]) >= 0 else "position"
    if axis == "head" and len(set(df["position"])) > 1:
        raise UsageError("the table has heads at several positions; select one position")
    kinds = [str(kind) for kind in dict.fromkeys(df["kind"])]
    moved = df.assign(moved=df["value"] - df["corrupted"])
    largest = float(np.abs(moved["moved"].to_numpy()).max() or 1.0)
    made = make_subplots(rows=1, cols=len(kinds), shared_yaxes=True, subplot_titles=[label(kind) for kind in kinds])
    height = max(380, 110 + 15 * len(set(df["layer"])))
    made.update_layout(template=HOUSE, title_text=_title(df), height=height, margin_t=84)
    for column, kind in enumerate(kinds, start=1):
        part = moved.loc[moved["kind"] == kind]
        grid = part.pivot_table(index="layer", columns=axis, values="moved")
        recovered = part.pivot_table(index="layer", columns=axis, values="recovered", dropna=False).reindex_like(grid)
        made.add_heatmap(
            z=grid.to_numpy(),
            x=[str(of) for of in grid.columns],
            y=[str(of) for of in grid.index],
            customdata=recovered.to_numpy(),
            colorscale=DIVERGING,
            zmin=-largest,
            zmax=largest,
            showscale=column == len(kinds),
            colorbar={**COLOURBAR, "title_text": "change of the metric"},
            hovertemplate=f"layer %{{y}}, {axis} %{{x}}<br>%{{z:+.3f}}, recovered %{{customdata:.2f}}<extra></extra>",
            row=1,
            col=column,
        )
        made.update_xaxes(title_text=axis, type="category", showgrid=False, row=1, col=column)
    made.update_yaxes(type="category", showgrid=False)
    return made.update_yaxes(title_text="layer (0-based)", row=1, col=1)


def _title(df: pd.DataFrame) -> str:
    clean, corrupted = float(df["clean"].iloc[0]), float(df["corrupted"].iloc[0])
    return f"What one place of the clean run brings back (corrupted {corrupted:.2f}, clean {clean:.2f})"


def _profile(df: pd.DataFrame) -> go.Figure:
    """By layer: the share of the whole change, or where the runs hardly differ the change itself."""
    known = bool(np.isfinite(df["recovered"].to_numpy()).all())
    made = go.Figure().update_layout(template=HOUSE, title_text=_title(df), height=400)
    for kind, part in df.groupby("kind", sort=False):
        y = part["recovered"] if known else part["value"] - part["corrupted"]
        ends = {"array": part["recovered_high"] - y, "arrayminus": y - part["recovered_low"]} if known else {}
        made.add_scatter(
            x=part["layer"],
            y=y,
            name=label(str(kind)),
            mode="lines+markers",
            error_y={"type": "data", "thickness": 1.2, "width": 3, **ends} if known else None,
            hovertemplate=f"{label(str(kind))} %{{x}}: %{{y:+.3f}}<extra></extra>",
        )
    made.add_hline(y=0, line={"color": "#6b7280", "width": 1})
    made.update_xaxes(title_text="layer (0-based)")
    return made.update_yaxes(title_text="share of the change brought back" if known else "change of the metric")
