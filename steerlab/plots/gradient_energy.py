"""Figure of `interp.gradient_energy`: where a vector could raise the reward most, beside what was reached there."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.plots.house import COLOURS, band, condition_colour, figure


def gradient_energy(df: pd.DataFrame, layers: pd.DataFrame | None = None, metric: str = "avg") -> go.Figure:
    """Energy by layer with its 95 % interval. layers: a table of that name, whose scores are drawn on an axis of their
    own (mean over seeds)."""
    tables.check(df, "gradient_energy")
    made = figure("Gradient energy at initialisation, by layer", height=430)
    made.add_scatter(**band(df["layer"], df["low"], df["high"], COLOURS[1]))
    made.add_scatter(
        x=df["layer"],
        y=df["energy"],
        name="gradient energy (95 % interval over problems)",
        mode="lines+markers",
        line={"color": COLOURS[1], "width": 2.2},
        marker={"size": 6},
        hovertemplate="layer %{x}<br>%{y:.3g}<extra></extra>",
    )
    if layers is not None:
        drawn = tables.check(layers, "layers").dropna(subset=["value"])
        drawn = drawn.loc[drawn["metric"].str.startswith(f"{metric}@")]
        mean = drawn.groupby("layer")["value"].mean()
        made.add_scatter(
            x=mean.index,
            y=mean,
            name="score of the vector trained there (right axis)",
            mode="lines+markers",
            line={"color": condition_colour("steered"), "width": 2.2, "dash": "dot"},
            marker={"size": 7, "symbol": "diamond"},
            yaxis="y2",
            hovertemplate="layer %{x}<br>%{y:.1%}<extra></extra>",
        )
        made.update_layout(
            yaxis2={
                "overlaying": "y", "side": "right", "tickformat": ".0%", "rangemode": "tozero", "showgrid": False,
                "tickmode": "auto", "title_text": "score (share of problems)",
            }
        )  # fmt: skip
    made.update_xaxes(title_text="layer (0-based decoder block)")
    return made.update_yaxes(title_text="‖∂J/∂s‖² (reward² / activation units²)", selector={"side": None})
