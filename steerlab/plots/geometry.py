"""Figures of `interp.geometry`: norms and doses per layer, cosines between layers and between runs, singular values."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURBAR, COLOURS, DIVERGING, MUTED, band, figure, label


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


def cosines_between(df: pd.DataFrame) -> go.Figure:
    """Line per pair of runs and site kind over the layers, beside the range of random directions; from a
    `cosines_between` table. Gaps: a zero vector. Raises UsageError for an empty table."""
    tables.check(df, "cosines_between")
    if df.empty:
        raise UsageError("the table is empty; compare at least two runs")
    made = figure("Cosine between two runs' vectors of the same layer", height=390)
    several = len(set(df["site"])) > 1
    for site, part in df.groupby("site", sort=True, observed=True):
        null = part.drop_duplicates("layer").sort_values("layer")
        made.add_scatter(
            **band(null["layer"], null["low_random"], null["high_random"], MUTED)
            | {"showlegend": True, "name": "95 % of random directions" + (f", {label(str(site))}" if several else "")},
        )
    for index, (key, part) in enumerate(df.groupby(["run_i", "run_j", "site"], sort=False, observed=True)):
        i, j, site = (label(str(name), limit=24) for name in key)  # type: ignore[union-attr]
        rows, name = part.sort_values("layer"), f"{i} · {j}" + (f", {site}" if several else "")
        made.add_scatter(
            x=rows["layer"],
            y=rows["cosine"],
            name=name,
            mode="lines+markers",
            marker={"color": COLOURS[index % len(COLOURS)], "size": 5},
            hovertemplate="layer %{x}<br>cosine %{y:.3f}<extra>" + name + "</extra>",
        )
    made.add_hline(y=0, line={"color": MUTED, "width": 1, "dash": "dot"})
    made.update_layout(showlegend=True, legend={"y": -0.22, "yanchor": "top"})
    made.update_xaxes(title_text="layer (0-based block)", nticks=16)
    return made.update_yaxes(title_text="cosine", range=[min(-0.3, df["cosine"].min() - 0.05), 1.03])


def relative_dose(df: pd.DataFrame) -> go.Figure:
    """Line per site kind over the layers with the 95 % interval over texts; from a `relative_dose` table."""
    tables.check(df, "relative_dose")
    made = figure("Length of the vector over that of the stream it is added to", height=320)
    for index, (site, part) in enumerate(df.groupby("site", sort=True, observed=True)):
        rows, colour = part.sort_values("layer"), COLOURS[index % len(COLOURS)]
        known = rows.dropna(subset=["low", "high"])
        made.add_scatter(**band(known["layer"], known["low"], known["high"], colour))
        made.add_scatter(
            x=rows["layer"],
            y=rows["value"],
            name=label(str(site)),
            mode="lines+markers",
            marker={"color": colour, "size": 5},
            customdata=rows[["norm", "stream"]],
            hovertemplate="layer %{x}<br>%{y:.4g} = %{customdata[0]:.4g} / %{customdata[1]:.4g}<extra></extra>",
        )
    made.update_layout(showlegend=len(set(df["site"])) > 1)
    made.update_xaxes(title_text="layer (0-based block)", nticks=16)
    return made.update_yaxes(title_text="‖s‖ / mean ‖h‖ (share)", rangemode="tozero")


def _places(df: pd.DataFrame, axis: str, *, several: bool) -> list[str]:
    pairs = zip(df[f"site_{axis}"], df[f"layer_{axis}"], strict=True)
    return [f"{label(site)}.{layer}" if several else str(layer) for site, layer in pairs]
