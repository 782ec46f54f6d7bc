"""Figure of a `layers` table: what one steering vector reaches, by the layer at which it acts."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.plots.house import COLOURS, band, condition_colour, figure, label, words


def layers(df: pd.DataFrame, compared: pd.DataFrame | None = None, metric: str = "avg") -> go.Figure:
    """Score by layer, with the 95 % interval as a band; several seeds: their mean, the band from lowest to highest.

    compared: a `scores` table whose conditions (base, greedy, …, all layers at once) become level lines. metric: the
    kind that is drawn, avg or pass; of the conditions that have it.
    """
    tables.check(df, "layers")
    drawn = df.loc[df["metric"].str.startswith(f"{metric}@")].dropna(subset=["value"])  # a failed run has no value
    seeds = sorted(set(drawn["seed"]))
    frame = drawn.groupby("layer", as_index=False).agg(
        value=("value", "mean"), low=("low", "min"), high=("high", "max"), least=("value", "min"), most=("value", "max")
    )
    low, high = (frame["low"], frame["high"]) if len(seeds) < 2 else (frame["least"], frame["most"])
    made = figure("Score by layer of the only vector", height=470).update_layout(margin_t=110)
    meaning = "95 % interval" if len(seeds) < 2 else f"mean of {len(seeds)} seeds; band: lowest to highest"
    colour = condition_colour("steered")
    made.add_scatter(**band(frame["layer"], low, high, colour))
    made.add_scatter(
        x=frame["layer"],
        y=frame["value"],
        name=label(f"one vector ({meaning})"),
        mode="lines+markers",
        line={"color": colour, "width": 2.4},
        marker={"size": 7},
        customdata=list(zip(low, high, strict=True)),
        hovertemplate="layer %{x}<br>%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>",
    )
    if compared is not None:
        _levels(
            made,
            tables.check(compared, "scores"),
            metric,
            [float(frame["layer"].min()) - 0.3, float(frame["layer"].max()) + 0.3],
        )
    made.update_xaxes(title_text="layer (0-based decoder block)", dtick=1 if len(frame) < 16 else None)
    kinds = ", ".join(sorted(set(drawn["metric"])))
    return made.update_yaxes(title_text=label(f"{kinds} (share of problems)"), tickformat=".0%", rangemode="tozero")


def _levels(made: go.Figure, compared: pd.DataFrame, metric: str, ends: list[float]) -> None:
    """A level line per condition; base and all layers stand out."""
    rows = compared.loc[compared["metric"].str.startswith(f"{metric}@")]
    for record in rows.drop_duplicates("condition").to_dict("records"):
        name = str(record["condition"])
        interval = f"{record['value']:.1%} [{record['low']:.1%}, {record['high']:.1%}]"
        made.add_scatter(
            x=ends,
            y=[record["value"]] * 2,
            name=label(words(name)),
            mode="lines",
            line={
                "color": COLOURS[1] if name == "all_layers" else condition_colour(name),
                "width": 1.8,
                "dash": "solid" if name in ("base", "all_layers") else "dot",
            },
            hovertemplate=f"{label(words(name))} {interval}<extra></extra>",
        )
