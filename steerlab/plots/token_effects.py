"""Figures of `interp.token_effects`: which tokens a vector raises and lowers on average, and how its effect falls over
the answer."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.plots.house import COLOURS, HOUSE, MONO, band, figure, label, readable

_PLACES = {"first": "first generated position", "rest": "every later position"}
LONGEST = 64  # generated positions that are drawn


def raised_tokens(df: pd.DataFrame, k: int = 8) -> go.Figure:
    """The k tokens raised and lowered most by their mean Δp, with 95 % intervals over texts: the first generated
    position on the left, later ones on the right."""
    tables.check(df, "raised_tokens")
    places = [place for place in _PLACES if place in set(df["where"])]
    made = make_subplots(rows=1, cols=len(places), subplot_titles=[_PLACES[p] for p in places], horizontal_spacing=0.2)
    made.update_layout(
        template=HOUSE, height=120 + 44 * k, title_text="Mean change of the next token's probability", showlegend=False
    )
    for column, place in enumerate(places, start=1):
        part = df.loc[(df["where"] == place) & (df["rank"] < k)].sort_values("delta")
        part = part.drop_duplicates("token_id")
        names = unique_names(part["token"], part["token_id"])
        made.add_bar(
            x=part["delta"],
            y=names,
            orientation="h",
            marker_color=[COLOURS[0] if delta > 0 else COLOURS[1] for delta in part["delta"]],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": part["high"] - part["delta"],
                "arrayminus": part["delta"] - part["low"],
                "thickness": 1.2,
                "width": 2,
            },
            hovertemplate="%{y}<br>Δp %{x:+.4f}<extra></extra>",
            row=1,
            col=column,
        )
        made.update_xaxes(title_text="Δp", tickformat="+.2f", row=1, col=column)
        made.update_yaxes(type="category", tickfont={"family": MONO, "size": 11}, row=1, col=column)
    return made


def unique_names(tokens: Iterable[str], ids: Iterable[int]) -> list[str]:
    """Tokens as they are shown, with their ids where two look the same."""
    shown = [label(readable(token), limit=14) for token in tokens]
    return [f"{n} ({i})" if shown.count(n) > 1 else n for n, i in zip(shown, ids, strict=True)]


def token_effects(df: pd.DataFrame) -> go.Figure:
    """Δp of the most raised token by generated position: mean over texts, band from lower to upper quartile; and the
    share of positions where it was the base model's own favourite."""
    tables.check(df, "token_effects")
    near = df.loc[df["generated"] < LONGEST]
    by_position = near.groupby("generated")
    low, high = (by_position["raised_delta"].quantile(q) for q in (0.25, 0.75))
    mean = by_position["raised_delta"].mean()
    own = by_position["raised_was_base_argmax"].mean()
    made = figure("Largest raise by position in the answer", height=400)
    made.add_scatter(**band(mean.index, low, high, COLOURS[0]))
    made.add_scatter(
        x=mean.index,
        y=mean,
        name="Δp of the most raised token (mean; band: quartiles of texts)",
        mode="lines+markers",
        line={"color": COLOURS[0], "width": 2.2},
        marker={"size": 5},
        hovertemplate="position %{x}<br>Δp %{y:.3f}<extra></extra>",
    )
    made.add_scatter(
        x=own.index,
        y=own,
        name="share where the base would have said it anyway",
        mode="lines",
        line={"color": COLOURS[3], "width": 1.6, "dash": "dot"},
        hovertemplate="position %{x}<br>%{y:.0%}<extra></extra>",
    )
    made.update_xaxes(title_text="generated position (0 is the first)")
    return made.update_yaxes(title_text="Δp, share", range=[-0.02, 1.02])
