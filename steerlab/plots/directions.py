"""Figure of `interp.directions`: how well each method's direction separates held-out texts, by layer, and how long it
is."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURS, HOUSE, band, label, words

SHUFFLED = "#6b7280"
TICKED = 10  # layers, up to which each has a tick


def directions(df: pd.DataFrame) -> go.Figure:
    """Held-out AUROC by layer, a panel per method, with its 95 % interval over groups and, beside it, what shuffled
    labels give (mean, least to most). Raises UsageError for an empty table."""
    tables.check(df, "directions")
    if df.empty:
        raise UsageError("the table is empty; read at least one layer")
    methods = list(dict.fromkeys(df["method"]))
    titles = [label(words(str(method))) for method in methods]
    made = make_subplots(rows=1, cols=len(methods), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    made.update_layout(template=HOUSE, height=430, title_text="Do directions separate held-out texts?", margin_t=104)
    made.update_layout(legend_y=1.12)
    for column, method in enumerate(methods, start=1):
        part = df.loc[df["method"] == method].sort_values("layer")
        kinds = (
            ("shuffled labels (mean; band: least to most)", SHUFFLED, ("shuffled", "shuffled_low", "shuffled_high")),
            ("labels as they are (95 % interval)", COLOURS[0], ("auroc", "low", "high")),
        )
        for name, colour, (value, low, high) in kinds:
            made.add_scatter(**band(part["layer"], part[low], part[high], colour), row=1, col=column)
            made.add_scatter(
                x=part["layer"],
                y=part[value],
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour, "width": 2.2, "dash": "dot" if value == "shuffled" else "solid"},
                marker={"size": 6},
                error_y=_bar(part[value], part[low], part[high]) if len(part) == 1 else None,
                customdata=list(zip(part[low], part[high], part["accuracy"], part["norm"], strict=True)),
                hovertemplate="layer %{x}<br>AUROC %{y:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<br>accuracy "
                "%{customdata[2]:.0%}, length %{customdata[3]:.3g}<extra></extra>",
                row=1,
                col=column,
            )
        layers = sorted(set(part["layer"]))
        made.update_xaxes(title_text="layer (0-based)", row=1, col=column)
        if len(layers) <= TICKED:
            made.update_xaxes(tickvals=layers, row=1, col=column)
    made.update_yaxes(range=[-0.02, 1.02])
    return made.update_yaxes(title_text="held-out AUROC (share of pairs)", row=1, col=1)


def _bar(value: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, object]:
    """An interval for a single point, where a band has no width."""
    return {"type": "data", "array": high - value, "arrayminus": value - low, "thickness": 1.6, "width": 5}
