"""Figure of `interp.logit_lens`: the tokens each layer's vector points to, one row per layer, coloured by score."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURBAR, DIVERGING, MONO, SEQUENTIAL, figure, label, readable

_SCORE = {"dot": "W<sub>U</sub> s (logit)", "cosine": "cosine", "softmax": "softmax(W<sub>U</sub> s)"}


def logit_lens(df: pd.DataFrame, readout: str = "cosine", end: str = "top", k: int = 8) -> go.Figure:
    """Heat-map of layer × rank with the tokens written in the cells; spaces are shown as ␣. From a `logit_lens` table.

    Raises UsageError if the table has no rows of this readout and end.
    """
    tables.check(df, "logit_lens")
    part = df.loc[(df["readout"] == readout) & (df["end"] == end) & (df["rank"] < k)]
    if part.empty:
        zero = df.attrs.get("zero", [])
        why = "all vectors are zero" if zero else "choose a readout and end that were computed"
        raise UsageError(f"the logit lens has no {readout} scores at the {end} end; {why}")
    several = len(set(part["site"])) > 1
    rows = sorted(set(zip(part["site"], part["layer"], strict=True)))
    places = [f"{label(str(site))}.{layer}" if several else str(layer) for site, layer in rows]
    ordered = [part.loc[(part["site"] == site) & (part["layer"] == layer)].sort_values("rank") for site, layer in rows]
    texts = [[readable(token) for token in group["token"]] for group in ordered]
    full = [
        [f"{label(text)}  (token {i})" for text, i in zip(row, group["token_id"], strict=True)]
        for row, group in zip(texts, ordered, strict=True)
    ]
    made = figure(f"Tokens at the {end} of each layer's vector, by {readout}", height=96 + 25 * len(rows))
    made.add_heatmap(
        z=[group["score"].tolist() for group in ordered],
        x=[str(rank + 1) for rank in range(max(len(row) for row in texts))],
        y=places,
        text=[[label(text, limit=11) for text in row] for row in texts],
        customdata=full,
        texttemplate="%{text}",
        textfont={"family": MONO, "size": 11.5, "color": "#111827"},
        hovertemplate="layer %{y}, rank %{x}<br>%{customdata}<br>score %{z:.4g}<extra></extra>",
        xgap=2,
        ygap=2,
        colorbar={**COLOURBAR, "title_text": _SCORE.get(readout, readout)},
        **_scale(part.loc[:, "score"], readout),
    )
    made.update_xaxes(title_text="rank", type="category", showgrid=False, showline=False, ticks="", side="top")
    made.update_yaxes(
        title_text="layer", type="category", showgrid=False, showline=False, ticks="", autorange="reversed", dtick=1
    )
    return made.update_layout(margin={"t": 88, "b": 16})


def _scale(scores: pd.Series, readout: str) -> dict[str, object]:
    """Light colours under dark text: from the weakest to the strongest for one sign, around zero otherwise."""
    low, high = float(scores.min()), float(scores.max())
    if readout == "softmax" or low >= 0:
        return {"colorscale": SEQUENTIAL, "zmin": low, "zmax": high}
    if high <= 0:
        return {
            "colorscale": [(1 - place, colour) for place, colour in reversed(SEQUENTIAL)],
            "zmin": low,
            "zmax": high,
        }
    reach = max(-low, high)
    return {"colorscale": DIVERGING, "zmin": -reach, "zmax": reach}
