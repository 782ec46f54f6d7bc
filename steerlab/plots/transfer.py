"""Figure of `interp.transfer`: donors by row, recipients by column, the controls beside what was transferred."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.errors import UsageError, unknown
from steerlab.plots.house import COLOURBAR, DIVERGING, GRID, HOUSE, SEQUENTIAL, label

TITLES = {
    "normalised": "Score, 0 as the recipient without vectors and 1 as with its own",
    "value": "Score of a donor's vectors in a recipient",
}
CONTROLS = ("random map", "random direction")
_NAME = 26


def transfer(df: pd.DataFrame, quantity: str = "normalised") -> go.Figure:
    """A panel for what was transferred and one per control. Scores have rows for the recipient without vectors (base)
    and with its own; cells that are missing are left grey. Raises UsageError for an unknown quantity or no donor."""
    tables.check(df, "transfer")
    if quantity not in TITLES:
        raise unknown("quantity", quantity, tuple(TITLES))
    given = df.loc[~df["map"].isin(["base", "own"])]
    if given.empty:
        raise UsageError("the table has no donor; transfer at least one set of vectors")
    donors, recipients = (list(dict.fromkeys(given[name])) for name in ("donor", "recipient"))
    panels = {"transferred": given.loc[~given["map"].isin(CONTROLS)]}
    panels |= {name: given.loc[given["map"] == name] for name in CONTROLS}
    signed = quantity == "normalised"
    known = df[quantity].dropna().abs().tolist()
    largest = max([1.0, *known]) if signed else max(known) or 1.0
    rows = donors if signed else ["base", *donors, "own"]
    made = make_subplots(
        rows=1, cols=len(panels), subplot_titles=list(panels), shared_yaxes=True, horizontal_spacing=0.04
    )
    made.update_layout(template=HOUSE, height=260 + 40 * len(rows), title_text=TITLES[quantity], margin_t=84)
    made.update_layout(plot_bgcolor=GRID)
    shown = {name: label(str(name), limit=_NAME) for name in (*rows, *recipients)}
    for column, part in enumerate(panels.values(), start=1):
        grid = np.full((len(rows), len(recipients)), np.nan)
        words = np.full(grid.shape, "", dtype=object)
        ends = df.loc[df["map"].isin(["base", "own"])]
        for record in (*part.to_dict("records"), *(() if signed else ends.to_dict("records"))):
            name = record["map"] if record["map"] in ("base", "own") else record["donor"]
            at = rows.index(name), recipients.index(record["recipient"])
            grid[at], low, high = record[quantity], *_ends(record, quantity)
            if not np.isnan(grid[at]):
                words[at] = f"{grid[at]:.2f}<br>{low:.2f} – {high:.2f}"
        made.add_heatmap(
            z=grid,
            x=[shown[name] for name in recipients],
            y=[shown[name] for name in rows],
            colorscale=DIVERGING if signed else SEQUENTIAL,
            zmin=-largest if signed else 0,
            zmax=largest,
            text=words,
            texttemplate="%{text}",
            textfont={"size": 11},
            showscale=column == len(panels),
            colorbar={**COLOURBAR, "title_text": "share of own gain" if signed else "share of problems"},
            hovertemplate="%{y} → %{x}<br>%{z:.3f}<extra></extra>",
            row=1,
            col=column,
        )
        made.update_xaxes(title_text="recipient", showgrid=False, row=1, col=column)
    made.update_yaxes(title_text="donor", row=1, col=1)
    return made.update_yaxes(showgrid=False, autorange="reversed")


def _ends(record: dict, quantity: str) -> tuple[float, float]:
    """The interval of a quantity."""
    names = ("low", "high") if quantity == "value" else ("normalised_low", "normalised_high")
    return float(record[names[0]]), float(record[names[1]])
