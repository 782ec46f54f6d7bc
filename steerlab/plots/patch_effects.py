"""Figures of `interp.patch_effects`: at how many positions a part matters how much, and what it does to groups of
words beside tokens that are about as likely."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURS, HOUSE, MUTED, figure, label, words

SMALLEST = 1e-9  # nats: what is drawn of smaller ones, and of 0, which a logarithm does not have
POINTS = 200  # of each curve
PANELS = 4


def patch_effects(df: pd.DataFrame) -> go.Figure:
    """Per patch, the share of positions whose KL(reference ‖ patched) is at least so large; dotted for a random
    direction. Raises UsageError for no rows."""
    tables.check(df, "patch_effects")
    _refuse_empty(df)
    layer = int(df["layer"].iloc[0])
    made = figure(
        f"How much parts of block {layer + 1} do with the vector of layer {layer}, position by position", height=430
    )
    patches = list(dict.fromkeys(df["patch"]))
    for sender, patch in dict.fromkeys(zip(df["sender"], df["patch"], strict=True)):
        trained, name = sender == "trained", label(words(str(patch)))
        values = df.loc[(df["sender"] == sender) & (df["patch"] == patch), "kl_nats"].to_numpy()
        shares = np.linspace(0, 1, min(POINTS, len(values) + 1))
        made.add_scatter(
            x=np.quantile(values.clip(SMALLEST), 1 - shares),
            y=shares,
            mode="lines",
            line={
                "color": COLOURS[patches.index(patch) % len(COLOURS)],
                "width": 2.2 if trained else 1.2,
                "dash": "solid" if trained else "dot",
            },
            name=f"{name} (mean {float(values.mean()):.2g})",
            legendgroup=name,
            showlegend=trained,
            hovertemplate=f"KL ≥ %{{x:.2g}} nats at %{{y:.0%}} of positions<extra>{name}, {sender}</extra>",
        )
    made.update_layout(margin_t=100)
    made.update_xaxes(title_text="KL(reference ‖ patched) of the next token (nats)", type="log", dtick=1)
    made.update_xaxes(exponentformat="power")
    return made.update_yaxes(title_text="share of positions with at least that", tickformat=".0%", range=[-0.02, 1.02])


def patch_groups(df: pd.DataFrame) -> go.Figure:
    """Per patch (the four that move most mass) and group of words: Δp of the group with its 95 % interval over texts,
    over the grey middle 95 % of the shuffled control, whose mean is a tick; a cross for a random direction. Raises
    UsageError for no rows."""
    tables.check(df, "patch_groups")
    _refuse_empty(df)
    df, random = df.loc[df["sender"] == "trained"], df.loc[df["sender"] == "random"]
    moved = {patch: np.abs(part["mass"].to_numpy()).sum() for patch, part in df.groupby("patch", sort=False)}
    chosen = set(sorted(moved, key=lambda patch: -moved[patch])[:PANELS])
    panels = [patch for patch in moved if patch in chosen]
    order = list(dict.fromkeys(df["word_group"]))
    sizes = df.drop_duplicates("word_group").set_index("word_group")["n_tokens"]
    made = make_subplots(
        rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.03,
        subplot_titles=[label(words(str(patch))) for patch in panels],
    )  # fmt: skip
    for column, patch in enumerate(panels, start=1):
        part = df.loc[df["patch"] == patch]
        known = part.dropna(subset=["control"])
        at = [order.index(name) for name in known["word_group"]]
        made.add_bar(**_control(known, at), showlegend=column == 1, row=1, col=column)
        made.add_scatter(**_mean(known, at), row=1, col=column)
        made.add_scatter(**_masses(part, order), showlegend=column == 1, row=1, col=column)
        other = random.loc[random["patch"] == patch]
        if len(other):
            made.add_scatter(**_random(other, order), showlegend=column == 1, row=1, col=column)
        made.update_xaxes(title_text="Δp per position", tickformat="+.2~%", nticks=3, tickangle=0, row=1, col=column)
    made.add_vline(x=0, line={"color": MUTED, "width": 1, "dash": "dot"})
    layer = int(df["layer"].iloc[0])
    title = f"What parts of block {layer + 1} do to groups of words: to the right, the part raises them"
    made.update_layout(
        template=HOUSE, height=190 + 34 * len(order), title_text=title, margin={"t": 124}, barmode="overlay"
    )
    made.update_layout(legend={"yref": "container", "y": 0.93, "yanchor": "top"})
    made.update_yaxes(
        tickvals=list(range(len(order))),
        ticktext=[f"{label(words(str(name)))} ({sizes[name]})" for name in order],
        range=[len(order) - 0.5, -0.5],
    )
    return made.update_yaxes(title_text="group (tokens)", row=1, col=1)


def _refuse_empty(df: pd.DataFrame) -> None:
    if df.loc[df["sender"] == "trained"].empty:
        raise UsageError("the table is empty; patch at least one text")


def _random(part: pd.DataFrame, order: list[str]) -> dict[str, object]:
    return {
        "x": part["mass"], "y": [order.index(name) for name in part["word_group"]], "mode": "markers",
        "marker": {"symbol": "x-thin", "size": 7, "line": {"width": 1.6, "color": COLOURS[3]}},
        "name": "of a random direction", "legendgroup": "random",
        "hovertemplate": "random direction %{x:+.2g}<extra></extra>",
    }  # fmt: skip


def _control(known: pd.DataFrame, at: list[int]) -> dict[str, object]:
    return {
        "base": known["control_low"], "x": known["control_high"] - known["control_low"], "y": at, "orientation": "h",
        "width": 0.5, "marker": {"color": "#c9ced6"}, "name": "tokens about as likely, 95 % of draws",
        "legendgroup": "control", "hoverinfo": "skip",
    }  # fmt: skip


def _mean(known: pd.DataFrame, at: list[int]) -> dict[str, object]:
    return {
        "x": known["control"], "y": at, "mode": "markers", "showlegend": False, "legendgroup": "control",
        "marker": {"symbol": "line-ns", "size": 12, "line": {"width": 1.6, "color": MUTED}},
        "hovertemplate": "control %{x:+.2g}<extra></extra>",
    }  # fmt: skip


def _masses(part: pd.DataFrame, order: list[str]) -> dict[str, object]:
    told = [
        f"{label(words(str(row['word_group'])))}: {row['mass']:+.2g} [{row['low']:+.2g}, {row['high']:+.2g}]"
        + (
            ""
            if row["p"] != row["p"]
            else f"<br>control {row['control']:+.2g}, p {row['p']:.3f}"
            f"<br>{row['raised_share']:.0%} of its tokens rise, of the control's {row['control_raised_share']:.0%}, "
            f"p {row['raised_p']:.3f}"
        )
        for row in part.to_dict("records")
    ]
    return {
        "x": part["mass"], "y": [order.index(name) for name in part["word_group"]], "mode": "markers",
        "marker": {"color": COLOURS[0], "size": 8}, "name": "the group, 95 % interval over texts",
        "legendgroup": "group", "customdata": told, "hovertemplate": "%{customdata}<extra></extra>",
        "error_x": {
            "array": part["high"] - part["mass"], "arrayminus": part["mass"] - part["low"],
            "thickness": 1.4, "width": 3,
        },
    }  # fmt: skip
