"""Figure of `interp.at_equal_kl`: score against distance from the base model on neutral text."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import figure, label, words
from steerlab.plots.magnitudes import meaning, set_colours


def at_equal_kl(df: pd.DataFrame) -> go.Figure:
    """Score by KL(steered ‖ base) on neutral text, a colour per set of vectors, 95 % intervals as bars; the dotted line
    is the base model. Sets that do not reach a target are not drawn there. Raises UsageError for an empty table."""
    tables.check(df, "at_equal_kl")
    sets = df.loc[df["condition"] != "base"]
    if sets.empty:
        raise UsageError("the table is empty; compare at least one set of vectors")
    made = figure("Score at equal distance from the base model", height=450).update_layout(margin_t=88)
    colours = set_colours(sets["condition"])
    for place, (condition, colour) in enumerate(colours.items()):
        part = sets.loc[sets["condition"] == condition].dropna(subset=["kl_nats"]).sort_values("target_nats")
        # points of one target would hide each other: they stand side by side, a few percent apart
        beside = 1.04 ** (place - (len(colours) - 1) / 2)
        made.add_scatter(
            x=part["target_nats"] * beside,
            y=part["value"],
            name=label(meaning(condition)),
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "dot" if condition == "random" else "solid"},
            marker={"size": 9},
            error_y={
                "type": "data",
                "array": part["high"] - part["value"],
                "arrayminus": part["value"] - part["low"],
                "thickness": 1.8,
                "width": 4,
            },
            customdata=list(zip(part["scale"], part["kl_nats"], part["low"], part["high"], strict=True)),
            hovertemplate=f"{label(words(condition))} × %{{customdata[0]:.3g}}, %{{customdata[1]:.3g}} nats<br>"
            "%{y:.1%} [%{customdata[2]:.1%}, %{customdata[3]:.1%}]<extra></extra>",
        )
    base = df.loc[df["condition"] == "base", "value"]
    if len(base):
        made.add_hline(
            y=float(base.iloc[0]),
            line={"color": "#6b7280", "width": 1.4, "dash": "dot"},
            annotation={"text": "base", "font": {"size": 12, "color": "#5b6673"}},
            annotation_position="bottom right",
        )
    ticks = sorted(set(sets["target_nats"]))
    made.update_xaxes(title_text="KL(steered ‖ base) on neutral text (nats per token)", type="log")
    made.update_xaxes(tickvals=ticks, ticktext=[f"{tick:.3g}" for tick in ticks])
    metric = label(", ".join(sorted(set(df["metric"]))))
    return made.update_yaxes(title_text=f"{metric} (share of problems)", tickformat=".0%", rangemode="tozero")
