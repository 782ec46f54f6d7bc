"""Figure of `interp.path_patching`: what a sender says to each receiver, by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURBAR, DIVERGING, HOUSE, label, words

TITLES = {"q": "queries", "k": "keys", "v": "values", "mlp": "MLP", "logits": "logits"}


def path_patching(df: pd.DataFrame) -> go.Figure:
    """Layer by row; a panel per kind of receiver, by head or group of heads; coloured by the change of the metric from
    the corrupted run. Of one sender. Raises UsageError for several, or an empty table."""
    tables.check(df, "path_patching")
    senders = set(zip(df["sender"], df["sender_layer"], df["sender_head"], strict=True))
    if len(senders) != 1:
        raise UsageError(f"the figure is of one sender, the table has {len(senders)}; select one")
    (sender,) = senders
    kinds = [kind for kind in TITLES if kind in set(df["receiver"])]
    moved = df.assign(moved=df["value"] - df["corrupted"])
    largest = float(np.abs(moved["moved"].to_numpy()).max() or 1.0)
    widths = [max(1, len(set(df.loc[df["receiver"] == kind, "receiver_head"]))) for kind in kinds]
    made = make_subplots(
        rows=1,
        cols=len(kinds),
        shared_yaxes=True,
        horizontal_spacing=0.02,
        column_widths=[max(width, 1.6) for width in widths],
        subplot_titles=[TITLES[kind] for kind in kinds],
    )
    rows = sorted(set(df["receiver_layer"]))
    told = (
        f"{words(str(sender[0]))}"
        + (f" {sender[1]}" if sender[1] >= 0 else "")
        + (f".{sender[2]}" if sender[2] >= 0 else "")
    )
    clean, corrupted = float(df["clean"].iloc[0]), float(df["corrupted"].iloc[0])
    title = f"What {label(told)} says to each receiver (corrupted {corrupted:.2f}, clean {clean:.2f})"
    made.update_layout(template=HOUSE, title_text=title, height=max(380, 120 + 17 * len(rows)), margin_t=84)
    for column, kind in enumerate(kinds, start=1):
        part = moved.loc[moved["receiver"] == kind]
        grid = part.pivot_table(index="receiver_layer", columns="receiver_head", values="moved").reindex(rows)
        made.add_heatmap(
            z=grid.to_numpy(),
            x=["" if of < 0 else str(of) for of in grid.columns],
            y=["logits" if of == max(rows) and "logits" in kinds else str(of) for of in rows],
            colorscale=DIVERGING,
            zmin=-largest,
            zmax=largest,
            showscale=column == len(kinds),
            colorbar={**COLOURBAR, "title_text": "change of the metric"},
            hovertemplate=f"{TITLES[kind]} %{{y}}.%{{x}}<br>%{{z:+.3f}}<extra></extra>",
            row=1,
            col=column,
        )
        made.update_xaxes(type="category", showgrid=False, row=1, col=column)
        if kind in ("q", "k", "v"):
            made.update_xaxes(title_text="head" if kind == "q" else "group", row=1, col=column)
    made.update_yaxes(type="category", showgrid=False)
    return made.update_yaxes(title_text="layer (0-based)", row=1, col=1)
