"""Figure of `interp.magnitudes`: score by scale, trained vectors beside a random direction of equal length."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURS, band, figure, label, words

KNOWN = {"trained": "#0072b2", "random": "#6b7280"}
OTHERS = (COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[4], COLOURS[7])


def magnitudes(df: pd.DataFrame) -> go.Figure:
    """A line per condition with its 95 % interval as a band; scale 0, where they meet, is the base model.

    Raises UsageError for an empty table.
    """
    tables.check(df, "magnitudes")
    if df.empty:
        raise UsageError("the table is empty; try at least one scale")
    made = figure("Score by scale of the vectors", height=450).update_layout(margin_t=88)
    for condition, colour in set_colours(df["condition"]).items():
        part = df.loc[df["condition"] == condition].sort_values("scale")
        made.add_scatter(**band(part["scale"], part["low"], part["high"], colour))
        made.add_scatter(
            x=part["scale"],
            y=part["value"],
            name=label(meaning(condition)),
            mode="lines+markers",
            line={"color": colour, "width": 2.2, "dash": "dot" if condition == "random" else "solid"},
            marker={"size": 6},
            customdata=list(zip(part["low"], part["high"], strict=True)),
            hovertemplate=f"{label(words(condition))} × %{{x:g}}<br>%{{y:.1%}} [%{{customdata[0]:.1%}}, "
            "%{customdata[1]:.1%}]<extra></extra>",
        )
    made.add_vline(x=0, line={"color": "#c4cad3", "width": 1.2})
    made.update_xaxes(title_text="scale (factor of the vectors; 0 is the base model, 1 as they are)")
    metric = label(", ".join(sorted(set(df["metric"]))))
    return made.update_yaxes(title_text=f"{metric} (share of problems)", tickformat=".0%", rangemode="tozero")


def set_colours(conditions: Iterable[object]) -> dict[str, str]:
    """The colour of every set of vectors, in their order: trained blue, random grey, others in turn."""
    names = [str(name) for name in dict.fromkeys(conditions)]
    others = [name for name in names if name not in KNOWN]
    return {name: KNOWN.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in names}


def meaning(condition: str) -> str:
    """A set of vectors, for a legend."""
    return {"random": "random direction, equal length"}.get(condition, words(condition))
