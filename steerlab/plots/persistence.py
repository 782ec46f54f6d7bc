"""Figure of `interp.persistence`: one number per pair of layers, source by row, trained beside a random direction."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError, unknown
from steerlab.plots.house import COLOURBAR, DIVERGING, HOUSE

TITLES = {
    "diff_vector": "cos(Δ at layer l, vector of layer l)",
    "diff_diff": "cos(Δ of a token, mean Δ of its text)",
    "mean_vector": "cos(mean Δ at layer l, vector of layer l)",
    "length": "length of Δ over the vector's own, as a power of 2",
}


def persistence(df: pd.DataFrame, quantity: str = "diff_diff") -> go.Figure:
    """Source layer by row, layer at which it is looked for by column; one panel per condition. Lengths are drawn as
    powers of 2 of what the source wrote. Raises UsageError for an unknown quantity or an empty table."""
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
    grids = [_grid(part.loc[part["condition"] == condition], quantity) for condition in conditions]
    widest = max(np.nanmax(np.abs(grid.to_numpy())) for grid in grids) if quantity == "length" else 1.0
    for column, grid in enumerate(grids, start=1):
        made.add_heatmap(
            z=grid.to_numpy(),
            x=list(grid.columns),
            y=list(grid.index),
            colorscale=DIVERGING,
            zmin=-widest,
            zmax=widest,
            showscale=column == len(conditions),
            colorbar={**COLOURBAR, "title_text": "log2" if quantity == "length" else "cosine"},
            hovertemplate="source %{y} → layer %{x}<br>%{z:.3f}<extra></extra>",
            row=1,
            col=column,
        )
        made.update_xaxes(title_text="layer", showgrid=False, row=1, col=column)
    made.update_yaxes(title_text="source layer", showgrid=False, autorange="reversed", row=1, col=1)
    return made.update_yaxes(showgrid=False, autorange="reversed")


def _grid(part: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Source by row, layer by column; a length as the binary logarithm of its share of what the source wrote."""
    grid = part.pivot_table(index="source", columns="layer", values="value", dropna=False)
    if quantity != "length":
        return grid
    own = np.array([grid.loc[source, source] for source in grid.index])
    return pd.DataFrame(np.log2(grid.to_numpy() / own[:, None]), index=grid.index, columns=grid.columns)
