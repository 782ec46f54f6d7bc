"""Figure of a `lens_fit` table: distance of what each layer says from what the model says, plain lens and tuned."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.plots.house import band, figure

COLOURS = {"plain": "#6b7280", "tuned": "#0072b2"}
NAMES = {"plain": "plain logit lens", "tuned": "tuned lens"}


def lens_fit(df: pd.DataFrame) -> go.Figure:
    """Mean KL by layer, one line per lens, with its 95 % interval over texts."""
    tables.check(df, "lens_fit")
    made = figure("How far each layer is from the model's own output", height=430)
    for lens, part in df.groupby("lens", sort=False):
        part = part.sort_values("layer")
        colour = COLOURS[str(lens)]
        if bool(part["low"].notna().all()):
            made.add_scatter(**band(part["layer"], part["low"], part["high"], colour))
        made.add_scatter(
            x=part["layer"],
            y=part["kl_nats"],
            name=NAMES[str(lens)],
            mode="lines+markers",
            line={"color": colour, "width": 2.4},
            marker={"size": 6},
            customdata=part[["low", "high"]].to_numpy(),
            hovertemplate="layer %{x}<br>%{y:.3f} nats [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
        )
    made.update_xaxes(title_text="layer (0-based decoder block)")
    return made.update_yaxes(title_text="KL from the model's output (nats)", rangemode="tozero")
