"""Figure of `interp.persistence`: one number per pair of layers, source by row, trained beside a random direction."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError, unknown
from steerlab.plots.house import COLOURBAR, DIVERGING, HOUSE, SEQUENTIAL

TITLES = {
    "diff_vector": "cos(Δ at layer l, vector of layer l)",
    "diff_diff": "cos(Δ of a token, mean Δ of its text)",
    "mean_vector": "cos(mean Δ at layer l, vector of layer l)",
    "length": "length of Δ, as a share of the vector's own",
}


def persistence(df: pd.DataFrame, quantity: str = "diff_diff") -> go.Figure:
    """Source layer by row, layer at which it is looked for by column; one panel per condition. Lengths are drawn as
    shares of what the source wrote. Raises UsageError for an unknown quantity or an empty table."""
    tables.check(df, "persistence")
    if quantity not in TITLES:
        raise unknown("quantity", quantity, tuple(TITLES))
    part = df.loc[df["quantity"] == quantity]
    if part.empty:
        raise UsageError("the table is empty; follow at least one vector")
    conditions = list(dict.fromkeys(part["condition"]))
    made = make_subplots(
        rows=1, cols=len(conditions), subplot_titles=conditions, shared_yaxes=True, horizontal_spacing=0.06
    )
    made.update_layout(template=HOUSE, height=470, title_text=TITLES[quantity])
    signed = quantity != "length"
    for column, condition in enumerate(conditions, start=1):
        grid = part.loc[part["condition"] == condition].pivot_table(
            index="source", columns="layer", values="value", dropna=False
        )
        values = grid.to_numpy()
        if not signed:
            own = np.array([grid.loc[source, source] for source in grid.index])
            values = values / own[:, None]
        made.add_heatmap(
            z=values,
            x=list(grid.columns),
            y=list(grid.index),
            colorscale=DIVERGING if signed else SEQUENTIAL,
            zmin=-1 if signed else 0,
            zmax=1 if signed else None,
            showscale=column == len(conditions),
            colorbar={**COLOURBAR, "title_text": "cosine" if signed else "share"},
            hovertemplate="source %{y} → layer %{x}<br>%{z:.3f}<extra></extra>",
            row=1,
            col=column,
        )
        made.update_xaxes(title_text="layer", showgrid=False, row=1, col=column)
    made.update_yaxes(title_text="source layer", showgrid=False, autorange="reversed", row=1, col=1)
    return made.update_yaxes(showgrid=False, autorange="reversed")
