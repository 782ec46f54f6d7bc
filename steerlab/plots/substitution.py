"""Figure of `interp.substitution`: what each stand-in for the vector scores, and which share of its gain that is."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.plots.house import COLOURS, HOUSE, label, readable

ORDER = ("base", "appended_other", "random", "later_positions", "first_position", "appended", "steered")


def substitution(df: pd.DataFrame) -> go.Figure:
    """Scores with 95 % intervals, one panel per temperature; beside each, its share of the vector's gain."""
    tables.check(df, "substitution")
    token, other = (label(readable(str(df[name].iloc[0])), limit=12) for name in ("token", "other"))
    names = {
        "base": "base",
        "appended_other": f"base, given “{other}”",
        "random": "random direction",
        "later_positions": "vector at later positions only",
        "first_position": "vector at the first position only",
        "appended": f"base, given “{token}”",
        "steered": "vector at all tokens",
    }
    heats = list(dict.fromkeys(df["temperature"]))
    titles = ["greedy" if heat == 0 else f"temperature {heat:g}" for heat in heats]
    made = make_subplots(rows=1, cols=len(heats), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05)
    made.update_layout(template=HOUSE, height=390, title_text="The vector, and what might stand in for it")
    for column, heat in enumerate(heats, start=1):
        part = df.loc[df["temperature"] == heat].set_index("condition").reindex(ORDER)
        shares = [
            ""
            if share != share or name in ("base", "steered")
            else f"  {share:.0%} of the gain ({low:.0%} to {high:.0%})"
            for name, share, low, high in zip(ORDER, part["share"], part["share_low"], part["share_high"], strict=True)
        ]
        made.add_bar(
            x=part["value"],
            y=[names[name] for name in ORDER],
            orientation="h",
            marker_color=[COLOURS[0] if name == "steered" else COLOURS[5] for name in ORDER],
            error_x={
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                "array": part["high"] - part["value"], "arrayminus": part["value"] - part["low"],
            },
            hovertemplate="%{y}<br>%{x:.3f}<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )  # fmt: skip
        made.add_scatter(
            x=part["high"],
            y=[names[name] for name in ORDER],
            mode="text",
            text=shares,
            textposition="middle right",
            textfont={"size": 11},
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=column,
        )
        made.update_xaxes(
            title_text=f"score ({df['metric'].loc[df['temperature'] == heat].iloc[0]})", row=1, col=column
        )
        made.update_xaxes(range=[0, 1.35 * max(0.2, df["high"].to_numpy().max())], row=1, col=column)
    return made
