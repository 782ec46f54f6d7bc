"""Figure of `interp.patching`: what is left of a vector's effect, patch by patch, beside the lines."""

from __future__ import annotations

import math
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURS, HOUSE, band, label, words

Quantity = Literal["value", "kept"]
LINES = {
    "no_patch": "#111827",
    "skip_attention": COLOURS[1],
    "skip_mlp": COLOURS[2],
    "skip_layer": COLOURS[3],
    "base": "#6b7280",
}
TITLES = {
    "kl_nats": "KL(unpatched ‖ patched), nats per token",
    "logit_diff": "logit of the text's token − of the base's likeliest other",
}
_PARTS = {"head": "head", "q": "head", "k": "group of heads", "v": "group of heads", "neurons": "group of neurons"}


def patching(df: pd.DataFrame, sender: str = "trained", quantity: Quantity = "value") -> go.Figure:
    """A panel per family of patches (skip, steer) against head or group, with 95 % intervals; the lines with bands.

    quantity: what was measured, or the share of the vector's effect that is kept, whose intervals are those of
    differences on the same problems. Of one metric and layer. Raises UsageError for several, a sender that is not
    there, an empty table, or nothing kept of an effect that is within its noise of 0.
    """
    tables.check(df, "patching")
    df = df.loc[df["sender"] == sender]
    if quantity == "kept":
        df = df.assign(value=df["kept"], low=df["kept_low"], high=df["kept_high"]).dropna(subset=["value"])
    if df.empty:
        raise UsageError(f"the table is empty for {quantity} of sender {sender}; patch at least one vector")
    for column in ("metric", "layer"):
        if len(set(df[column])) > 1:
            raise UsageError(f"the figure shows one {column}, the table has several; select one")
    metric, layer = str(df["metric"].iloc[0]), int(df["layer"].iloc[0])
    families = [str(name) for name in dict.fromkeys(df["family"]) if name != "line"]
    lines = df.loc[df["family"] == "line"]
    n = max(1, len(families))
    titles = [label(words(name)) for name in families]
    made = make_subplots(rows=1, cols=n, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    title = f"What the vector of layer {layer} does when part of block {layer + 1} does not see it"
    made.update_layout(template=HOUSE, height=470, title_text=title, margin_t=130, legend_y=1.13)
    for column in range(1, n + 1):
        part = df.loc[df["family"] == families[column - 1]] if families else df.iloc[:0]
        last = int(part["part"].max()) if len(part) else 1
        _lines(made, lines, [-0.5, last + 0.5], column)
        if len(part):
            _points(made, part, column)
            what = _PARTS.get(families[column - 1].partition("_")[2], "part")
            tick = math.ceil((last + 1) / 16)
            made.update_xaxes(title_text=what, dtick=tick, range=[-0.5, last + 0.5], row=1, col=column)
    share = metric.startswith("avg@") and quantity == "value"
    name = label(f"{metric} (share of problems)" if share else TITLES.get(metric, metric))
    if quantity == "kept":
        name = label(f"share of the effect on {words(metric)} that is kept")
    made.update_yaxes(title_text=name, row=1, col=1)
    return made.update_yaxes(tickformat=".0%", rangemode="tozero") if share else made


def _lines(made: go.Figure, lines: pd.DataFrame, ends: list[float], column: int) -> None:
    for record in lines.to_dict("records"):
        colour = LINES.get(record["patch"], COLOURS[4])
        pale = band(ends, [record["low"]] * 2, [record["high"]] * 2, colour) | {"fillcolor": _pale(colour)}
        made.add_scatter(**pale, row=1, col=column)
        made.add_scatter(
            x=ends,
            y=[record["value"]] * 2,
            name=label(words(record["patch"])),
            legendgroup=record["patch"],
            showlegend=column == 1,
            mode="lines",
            line={"color": colour, "width": 1.8, "dash": "dash"},
            hovertemplate=f"{label(words(record['patch']))} %{{y:.3f}}<br>kept {record['kept']:.2f} "
            f"[{record['kept_low']:.2f}, {record['kept_high']:.2f}]<extra></extra>",
            row=1,
            col=column,
        )


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.08)"


def _points(made: go.Figure, part: pd.DataFrame, column: int) -> None:
    made.add_scatter(
        x=part["part"],
        y=part["value"],
        mode="markers",
        marker={"size": 8, "color": COLOURS[0]},
        error_y={
            "type": "data",
            "array": part["high"] - part["value"],
            "arrayminus": part["value"] - part["low"],
            "thickness": 1.4,
            "width": 4,
        },
        showlegend=False,
        customdata=list(zip(part["patch"], part["kept"], part["kept_low"], part["kept_high"], strict=True)),
        hovertemplate="%{customdata[0]}: %{y:.3f}<br>kept %{customdata[1]:.2f} [%{customdata[2]:.2f}, "
        "%{customdata[3]:.2f}]<extra></extra>",
        row=1,
        col=column,
    )
