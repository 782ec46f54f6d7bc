"""Figure of `interp.attention`: how far each head's pattern moves, beside a random direction of equal length."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURBAR, HOUSE, SEQUENTIAL

SENDERS = {"trained": "trained", "random": "random direction, equal length"}


def attention(df: pd.DataFrame) -> go.Figure:
    """Layer by row, head by column, a panel per sender: total variation between patterns with and without the vector.

    Raises UsageError for an empty table."""
    tables.check(df, "attention")
    if df.empty:
        raise UsageError("the table is empty; read at least one text")
    senders = [str(name) for name in dict.fromkeys(df["sender"])]
    titles = [SENDERS.get(name, name) for name in senders]
    made = make_subplots(rows=1, cols=len(senders), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    grids = [
        df.loc[df["sender"] == name].pivot_table(index="layer", columns="head", values="value") for name in senders
    ]
    height = max(360, 110 + 15 * len(grids[0]))
    title = "How far heads look elsewhere because of the vector"
    made.update_layout(template=HOUSE, title_text=title, height=height, margin_t=84)
    largest = float(df["value"].to_numpy().max())
    for column, grid in enumerate(grids, start=1):
        made.add_heatmap(
            z=grid.to_numpy(),
            x=[str(head) for head in grid.columns],
            y=[str(layer) for layer in grid.index],
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=largest or 1.0,
            showscale=column == len(grids),
            colorbar={**COLOURBAR, "title_text": "total variation"},
            hovertemplate="layer %{y}, head %{x}<br>%{z:.3f}<extra></extra>",
            row=1,
            col=column,
        )
        made.update_xaxes(title_text="head", type="category", showgrid=False, row=1, col=column)
    made.update_yaxes(type="category", showgrid=False)
    return made.update_yaxes(title_text="layer (0-based)", row=1, col=1)
