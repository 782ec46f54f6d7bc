"""Figure of a `steering_at_place` table: what one vector reaches, by the place inside a block at which it acts."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.plots.house import COLOURS, band, condition_colour, figure, label, words

READERS = {
    "resid_pre": "attention, MLP, later blocks",
    "attn_in": "attention (before its norm)",
    "ln1": "attention only",
    "attn_out": "MLP, later blocks",
    "mlp_in": "MLP (before its norm)",
    "ln2": "MLP only",
    "resid_post": "later blocks",
}


def steering_at_place(df: pd.DataFrame, compared: pd.DataFrame | None = None) -> go.Figure:
    """Score by place with its 95 % interval, a colour per layer, small rings from the lowest to the highest seed;
    below each place, who reads the vector. compared: a `scores` table whose conditions become level bands."""
    tables.check(df, "steering_at_place")
    several = df.groupby("site")["rate"].nunique().to_dict()
    frame = df.assign(place=[_place(r, several[r["site"]] > 1) for r in df.to_dict("records")])
    places = list(dict.fromkeys([*frame.loc[frame["condition"] == "trained", "place"], *frame["place"]]))
    layers = sorted(set(frame["layer"]))
    made = figure("Score by the place of the only vector", height=470).update_layout(margin={"t": 110, "b": 96})
    ends = [-0.5, len(places) - 0.5]
    for record in [] if compared is None else tables.check(compared, "scores").to_dict("records"):
        if str(record["metric"]).startswith("avg@"):
            name, colour = str(record["condition"]), condition_colour(str(record["condition"]))
            made.add_scatter(**band(ends, [record["low"]] * 2, [record["high"]] * 2, colour))
            made.add_scatter(
                x=ends, y=[record["value"]] * 2, mode="lines", name=label(words(name)), line={"color": colour},
                hovertemplate=f"{label(words(name))} %{{y:.1%}}<extra></extra>",
            )  # fmt: skip
    for number, layer in enumerate(layers):
        part = frame.loc[frame["layer"] == layer]
        x = [places.index(place) + 0.22 * (number - (len(layers) - 1) / 2) for place in part["place"]]
        colour = COLOURS[number % len(COLOURS)]
        made.add_scatter(
            x=x,
            y=part["value"],
            name=f"layer {layer}",
            mode="markers",
            marker={"size": 10, "color": colour},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.8, "width": 5,
                "array": part["high"] - part["value"], "arrayminus": part["value"] - part["low"],
            },
            customdata=part[["n_seeds", "lr", "dose", "difference", "difference_low", "difference_high"]],
            hovertemplate="%{y:.1%} (%{customdata[0]} seeds, lr %{customdata[1]:.2g})<br>length %{customdata[2]:.2f} "
            "of what it is added to<br>minus resid_post %{customdata[3]:+.1%} "
            "[%{customdata[4]:+.1%}, %{customdata[5]:+.1%}]<extra></extra>",
        )  # fmt: skip
        made.add_scatter(
            x=[*x, *x], y=[*part["least"], *part["most"]], mode="markers", hoverinfo="skip", showlegend=False,
            marker={"size": 6, "symbol": "circle-open", "color": colour},
        )  # fmt: skip
    made.update_xaxes(tickvals=list(range(len(places))), ticktext=places, range=ends, showgrid=False)
    kinds = ", ".join(sorted(set(df["metric"])))
    return made.update_yaxes(title_text=label(f"{kinds} (share of problems)"), tickformat=".0%", rangemode="tozero")


def _place(record: dict[str, object], several: bool) -> str:
    """A place as the axis names it: the site, its rate where there are several, and who reads it or what it is for."""
    site = str(record["site"])
    trained = record["condition"] == "trained"
    second = READERS.get(site, "") if trained else words(str(record["condition"]))
    rate = f", {record['rate']} rate" if several else ""
    return f"{label(site)}{rate}<br>{label(second)}"
