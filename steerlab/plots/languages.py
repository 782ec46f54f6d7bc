"""Figures of `interp.languages`: each class of tokens by row, trained beside random; the gap of each layer's vector."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError, unknown
from steerlab.plots.house import COLOURS, HOUSE, MUTED, band, label, words

AXES = {
    "cosine": "mean cosine of output effect and unembedding row",
    "logprob": "mean change of log-probability (nats)",
}


def languages(df: pd.DataFrame, readout: str = "logprob") -> go.Figure:
    """Mean over the tokens of each class with its 95 % interval over tokens, a colour per group of source layers;
    beside it the random directions, their mean and range over draws.

    Raises UsageError for an unknown readout or no rows.
    """
    tables.check(df, "languages")
    part = _of(df, readout)
    spans = _groups(part)
    order = list(dict.fromkeys(part["token_class"]))
    sizes = part.drop_duplicates("token_class").set_index("token_class")["n_tokens"]
    made = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=("trained, 95 % interval over tokens", "random directions, range over draws"),
    )  # fmt: skip
    for index, span in enumerate(spans):
        rows = part.loc[(part["from_layer"] == span[0]) & (part["to_layer"] == span[1])]
        shift = 0.6 * ((index + 0.5) / len(spans) - 0.5)
        for column, condition in enumerate(("trained", "random"), start=1):
            found = rows.loc[rows["condition"] == condition].groupby("token_class", sort=False, observed=True)
            by_class = found.agg(value=("value", "mean"), low=("value", "min"), high=("value", "max"))
            if condition == "trained":
                by_class[["low", "high"]] = found[["low", "high"]].first()
            made.add_scatter(
                x=by_class["value"],
                y=[order.index(name) + shift for name in by_class.index],
                error_x={
                    "array": (by_class["high"] - by_class["value"]).fillna(0),
                    "arrayminus": (by_class["value"] - by_class["low"]).fillna(0),
                    "thickness": 1.2,
                    "width": 0,
                },
                mode="markers",
                marker={"color": COLOURS[index % len(COLOURS)], "size": 6},
                name=_name(span),
                legendgroup=str(index),
                showlegend=column == 1,
                customdata=[label(words(str(name))) for name in by_class.index],
                hovertemplate="%{customdata}: %{x:.4g}<extra>" + f"{condition}, {_name(span)}</extra>",
                row=1,
                col=column,
            )
    title = "What each vector alone does to classes of tokens, mean over source layers"
    made.update_layout(template=HOUSE, height=170 + 30 * len(order), title_text=title, margin={"t": 104})
    made.update_layout(legend={"yref": "container", "y": 0.93, "yanchor": "top"})
    made.add_vline(x=0, line={"color": MUTED, "width": 1, "dash": "dot"})
    made.update_yaxes(
        tickvals=list(range(len(order))),
        ticktext=[f"{label(words(str(name)))} ({sizes[name]})" for name in order],
        range=[len(order) - 0.5, -0.5],
    )
    made.update_yaxes(title_text="class of tokens (how many)", row=1, col=1)
    return made.update_xaxes(title_text=AXES[readout], nticks=6, matches="x")


def language_gaps(df: pd.DataFrame) -> go.Figure:
    """Non-English minus English by source layer: trained with its interval (over tokens), random with its range over
    draws; a panel per readout. Raises UsageError for no rows."""
    tables.check(df, "language_gaps")
    if df.empty:
        raise UsageError("no gaps to draw: the vocabulary has no English tokens, or none of another language")
    made = make_subplots(rows=1, cols=2, horizontal_spacing=0.12, subplot_titles=("output effect", "log-probability"))
    single = df.loc[df["from_layer"] == df["to_layer"]]
    for column, readout in enumerate(AXES, start=1):
        for condition, colour, ends in (
            ("random", COLOURS[6], ("low_draws", "high_draws")),
            ("trained", COLOURS[0], ("low", "high")),
        ):
            rows = single.loc[(single["readout"] == readout) & (single["condition"] == condition)]
            rows = rows.sort_values("from_layer")
            known = rows.dropna(subset=list(ends))
            low, high = (known[end] for end in ends)
            made.add_scatter(**band(known["from_layer"], low, high, colour), row=1, col=column)
            made.add_scatter(
                x=rows["from_layer"],
                y=rows["value"],
                mode="lines+markers",
                marker={"color": colour, "size": 5},
                name="random: mean and range over draws"
                if condition == "random"
                else "trained: 95 % interval over tokens",
                legendgroup=condition,
                showlegend=column == 1,
                hovertemplate=f"{condition}, layer %{{x}}<br>gap %{{y:.4g}}<extra></extra>",
                row=1,
                col=column,
            )
        made.update_xaxes(title_text="layer of the vector, added alone", row=1, col=column)
    made.add_hline(y=0, line={"color": MUTED, "width": 1, "dash": "dot"})
    made.update_yaxes(title_text="gap in mean cosine", row=1, col=1)
    made.update_yaxes(title_text="gap in mean Δ log-probability (nats)", row=1, col=2)
    title = "Tokens of other languages minus English ones: below 0, other languages are pushed down more"
    made.update_layout(template=HOUSE, height=390, title_text=title, margin={"t": 104})
    return made.update_layout(legend={"yref": "container", "y": 0.89, "yanchor": "top"})


def _of(df: pd.DataFrame, readout: str) -> pd.DataFrame:
    if readout not in AXES:
        raise unknown("readout", readout, tuple(AXES))
    part = df.loc[df["readout"] == readout]
    if part.empty:
        raise UsageError("the table is empty; read at least one vector")
    return part


def _groups(df: pd.DataFrame) -> list[tuple[int, int]]:
    """Averages over several source layers, and the single layers in none of them, low to high."""
    spans = sorted(set(zip(df["from_layer"].tolist(), df["to_layer"].tolist(), strict=True)))
    several = [span for span in spans if span[0] < span[1]]
    return [s for s in spans if s in several or not any(low <= s[0] <= high for low, high in several)]


def _name(span: tuple[int, int]) -> str:
    return f"layer {span[0]}" if span[0] == span[1] else f"layers {span[0]}–{span[1]}"
