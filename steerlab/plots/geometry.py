"""Figures of `interp.geometry`: norms per layer, cosines between layers, singular values."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.plots.house import COLOURBAR, COLOURS, DIVERGING, figure, label


def norms(df: pd.DataFrame) -> go.Figure:
    """Bar per layer, one colour per site kind; from a `norms` table."""
    tables.check(df, "norms")
    made = figure("Length of the vector at each layer", height=320)
    for index, (site, part) in enumerate(df.groupby("site", sort=True, observed=True)):
        made.add_bar(
            x=part["layer"],
            y=part["norm"],
            name=label(str(site)),
            marker_color=COLOURS[index % len(COLOURS)],
            hovertemplate="layer %{x}<br>‖s‖ = %{y:.4g}<extra>" + label(str(site)) + "</extra>",
        )
    made.update_layout(barmode="group", bargap=0.25, showlegend=len(set(df["site"])) > 1)
    few = len(set(df["layer"])) <= 12
    made.update_xaxes(title_text="layer (0-based block)", dtick=1 if few else None, nticks=16, tickangle=0)
    return made.update_yaxes(title_text="‖s‖ (activation units)", rangemode="tozero")


def cosines(df: pd.DataFrame) -> go.Figure:
    """Heat-map of cosines between layers, on the one scale −1 … 1; from a `cosines` table. Blank: a zero vector."""
    tables.check(df, "cosines")
    several = len({*df["site_i"], *df["site_j"]}) > 1
    frame = df.assign(**{axis: _places(df, axis, several=several) for axis in ("i", "j")})
    order = list(dict.fromkeys(frame["i"]))
    matrix = frame.set_index(["i", "j"])["cosine"].reindex(pd.MultiIndex.from_product([order, order]))
    made = figure("Cosine between the vectors of two layers", height=520)
    made.add_heatmap(
        z=matrix.to_numpy(dtype=float).reshape(len(order), len(order)),
        x=order,
        y=order,
        zmin=-1,
        zmax=1,
        colorscale=DIVERGING,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate="layers %{y} and %{x}<br>cosine %{z:.3f}<extra></extra>",
        colorbar={**COLOURBAR, "title_text": "cosine", "tickvals": [-1, -0.5, 0, 0.5, 1]},
    )
    step = max(1, round(len(order) / 10))
    made.update_xaxes(
        title_text="layer", type="category", tickvals=order[::step], showgrid=False, constrain="domain", tickangle=0
    )
    return made.update_yaxes(
        title_text="layer",
        type="category",
        tickvals=order[::step],
        showgrid=False,
        autorange="reversed",
        scaleanchor="x",
        constrain="domain",
    )


def singular_values(df: pd.DataFrame) -> go.Figure:
    """Spectrum of the stacked vectors, one line per site kind; from a `singular_values` table."""
    tables.check(df, "singular_values")
    made = figure("Singular values of the stacked vectors", height=300)
    for site, part in df.groupby("site", sort=True, observed=True):
        made.add_scatter(
            x=part["index"] + 1,
            y=part["singular_value"],
            name=label(str(site)),
            mode="lines+markers",
            hovertemplate="σ%{x} = %{y:.4g}<extra>" + label(str(site)) + "</extra>",
        )
    made.update_layout(showlegend=len(set(df["site"])) > 1)
    made.update_xaxes(title_text="index of the singular value")
    return made.update_yaxes(title_text="σ (activation units)", rangemode="tozero")


def _places(df: pd.DataFrame, axis: str, *, several: bool) -> list[str]:
    pairs = zip(df[f"site_{axis}"], df[f"layer_{axis}"], strict=True)
    return [f"{label(site)}.{layer}" if several else str(layer) for site, layer in pairs]
