"""Figures of `interp.attribution`: heads by layer as a heat map, and all parts by layer beside a random direction."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURBAR, COLOURS, DIVERGING, band, figure, label

KINDS = {"head": "attention (all heads)", "mlp": "MLP", "vector": "the vector itself", "norm": "scale of norms"}


def attribution_heads(df: pd.DataFrame, sender: str = "trained", generated: int = -1) -> go.Figure:
    """Layer by row, head by column: logits that each head adds directly. generated: a position, −1 for the mean.

    Raises UsageError where the table has no such rows."""
    part = _rows(df, sender, generated).query("kind == 'head'")
    if part.empty:
        raise UsageError("the table has no head above the vector; attribute a vector below the last layer")
    grid = part.pivot_table(index="layer", columns="head", values="value")
    largest = float(np.abs(grid.to_numpy()).max() or 1.0)
    made = figure("Logits that each head adds because of the vector", height=max(360, 90 + 15 * len(grid)))
    made.add_heatmap(
        z=grid.to_numpy(),
        x=[str(head) for head in grid.columns],
        y=[str(layer) for layer in grid.index],
        colorscale=DIVERGING,
        zmin=-largest,
        zmax=largest,
        colorbar={**COLOURBAR, "title_text": "logits"},
        hovertemplate="layer %{y}, head %{x}<br>%{z:+.4f}<extra></extra>",
    )
    made.update_xaxes(title_text="head", type="category", showgrid=False)
    return made.update_yaxes(title_text="layer (0-based)", type="category", showgrid=False)


def attribution(df: pd.DataFrame, sender: str = "trained", generated: int = -1) -> go.Figure:
    """What attention and MLP of each layer, the vectors and the norms' scales add, with 95 % intervals over texts for
    single parts. Raises UsageError where the table has no such rows."""
    part = _rows(df, sender, generated)
    total = part.loc[part["kind"] == "total"].iloc[0]
    made = figure(f"Through what the effect reaches the logits: {total['value']:+.2f} in all", height=430)
    for (kind, name), colour in zip(KINDS.items(), COLOURS, strict=False):
        of_kind = part.loc[part["kind"] == kind].sort_values("layer")
        if of_kind.empty:
            continue
        by_layer = of_kind.groupby("layer")["value"].sum()
        if kind == "mlp":
            made.add_scatter(**band(of_kind["layer"], of_kind["low"], of_kind["high"], colour))
        made.add_scatter(
            x=by_layer.index,
            y=by_layer,
            name=label(name),
            mode="lines+markers" if kind in ("head", "mlp") else "markers",
            line={"color": colour, "width": 2},
            marker={"size": 6 if kind in ("head", "mlp") else 9},
            hovertemplate=f"{name}, layer %{{x}}<br>%{{y:+.4f}} logits<extra></extra>",
        )
    made.add_hline(y=0, line={"color": "#c4cad3", "width": 1.2})
    made.update_xaxes(title_text="layer (0-based; behind the last: the final norm)")
    return made.update_yaxes(title_text="logits added")


def _rows(df: pd.DataFrame, sender: str, generated: int) -> pd.DataFrame:
    tables.check(df, "attribution")
    part = df.loc[(df["sender"] == sender) & (df["generated"] == generated)]
    if part.empty:
        raise UsageError(f"the table has no rows of sender {sender} at position {generated}; choose what it has")
    return part
