"""Figure of `interp.side_effects`: what each condition does to neutral text and to another task."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import HOUSE, condition_colour, label, words

TITLES = {
    "perplexity": ("perplexity", "perplexity per token"),
    "kl_steered_base": ("KL(steered ‖ base)", "nats per token"),
    "kl_base_steered": ("KL(base ‖ steered)", "nats per token"),
}


def side_effects(df: pd.DataFrame) -> go.Figure:
    """A row per condition, a panel per quantity, 95 % intervals as bars; the dotted line is the base model.

    Raises UsageError for an empty table.
    """
    tables.check(df, "side_effects")
    if df.empty:
        raise UsageError("the table is empty; measure at least one condition")
    quantities = [str(name) for name in dict.fromkeys(df["quantity"])]
    names = [str(name) for name in dict.fromkeys(df["condition"])]
    titles = [TITLES.get(name, (f"{name} on another task", ""))[0] for name in quantities]
    made = make_subplots(
        rows=1,
        cols=len(quantities),
        subplot_titles=[label(t) for t in titles],
        shared_yaxes=True,
        horizontal_spacing=0.05,
    )
    on = ", ".join(dict.fromkeys(df.loc[df["quantity"].isin(TITLES), "measured_on"].astype(str)))
    made.update_layout(template=HOUSE, height=150 + 34 * len(names), showlegend=False)
    made.update_layout(title_text=label(f"Side effects, on neutral text ({on}) with 95 % intervals"), margin_t=84)
    for column, quantity in enumerate(quantities, start=1):
        part = df.loc[df["quantity"] == quantity]
        rows = [names.index(str(name)) for name in part["condition"]]
        share = quantity not in TITLES
        made.add_scatter(
            x=part["value"],
            y=rows,
            mode="markers",
            marker={"size": 9, "color": [condition_colour(str(name)) for name in part["condition"]]},
            error_x={
                "type": "data",
                "array": part["high"] - part["value"],
                "arrayminus": part["value"] - part["low"],
                "thickness": 1.8,
                "width": 4,
                "color": "#9aa3ad",
            },
            customdata=list(zip(map(label, map(str, part["condition"])), part["low"], part["high"], strict=True)),
            hovertemplate="%{customdata[0]}<br>%{x:.4g} [%{customdata[1]:.4g}, %{customdata[2]:.4g}]<extra></extra>",
            row=1,
            col=column,
        )
        base = part.loc[part["condition"] == "base", "value"]
        if len(base):
            made.add_scatter(
                x=[float(base.iloc[0])] * 2,
                y=[-0.6, len(names) - 0.4],
                mode="lines",
                line={"color": "#6b7280", "width": 1, "dash": "dot"},
                hoverinfo="skip",
                row=1,
                col=column,
            )
        unit = "share of problems" if share else TITLES[quantity][1]
        kind = "log" if quantity == "perplexity" else "linear"  # strong vectors multiply it
        made.update_xaxes(title_text=unit, tickformat=".0%" if share else "", nticks=5, row=1, col=column)
        made.update_xaxes(type=kind, rangemode="tozero", row=1, col=column)
    made.update_yaxes(showgrid=False, ticks="", range=[len(names) - 0.4, -0.6])
    return made.update_yaxes(tickvals=list(range(len(names))), ticktext=[label(words(n), limit=28) for n in names])
