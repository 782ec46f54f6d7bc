"""Figures of `interp.residual_lens`: what each layer would say along a text, chosen tokens' ranks by layer, and how far
each layer is from the final answer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError, unknown
from steerlab.plots.house import COLOURBAR, MONO, SEQUENTIAL, band, condition_colour, figure, label, readable, words

TUNED = " (tuned lens)"
LONGEST = 16  # positions whose words can be read
BEFORE = 4  # of them in the prompt


def residual_lens(lens: pd.DataFrame, condition: str, text: int = 0, *, start: int | None = None) -> go.Figure:
    """The likeliest token after every layer (rows, the last on top) at some positions of one text, coloured by its
    probability; below stand the text's own tokens. start: the first position shown; None: just before the completion.
    Raises UsageError for a condition or a text that the table does not have, or an empty table.
    """
    tables.check(lens, "residual_lens")
    if condition not in set(lens["condition"]):
        raise unknown("condition", condition, sorted(set(lens["condition"])))
    part = lens.loc[(lens["condition"] == condition) & (lens["text"] == text) & (lens["rank"] == 0)]
    if part.empty:
        raise UsageError(f"the table has no text {text}; it has {sorted(set(lens['text']))}")
    place = part["position"]
    if start is None:
        start = int(min(place.loc[part["generated"] >= -BEFORE].min(), max(place.max() + 1 - LONGEST, place.min())))
    part = part.loc[(place >= start) & (place < start + LONGEST)]
    share = np.exp(part.pivot_table(index="layer", columns="position", values="logprob"))
    said = part.pivot_table(index="layer", columns="position", values="token", aggfunc="first")
    own = part.drop_duplicates("position").set_index("position")["context"]
    below = [f"{p}  {label(readable(own[p]), limit=9)}" for p in share.columns]
    made = figure(f"What each layer would say next, {words(condition)}{_lens(lens)}", height=140 + 22 * len(share))
    made.add_heatmap(
        z=share.to_numpy(),
        x=below,
        y=[str(layer) for layer in share.index],
        text=[[label(readable(word), limit=9) for word in row] for row in said.to_numpy()],
        texttemplate="%{text}",
        textfont={"family": MONO, "size": 10.5, "color": "#111827"},
        hovertemplate="layer %{y}, position %{x}<br>%{text}<br>probability %{z:.3g}<extra></extra>",
        xgap=1,
        ygap=1,
        zmin=0,
        zmax=1,
        colorscale=SEQUENTIAL,
        colorbar={**COLOURBAR, "title_text": "probability"},
    )
    made.update_xaxes(
        title_text="position and its token, whose successor is predicted",
        type="category",
        showgrid=False,
        showline=False,
        ticks="",
        tickangle=-60,
    )
    made.update_yaxes(title_text="layer", type="category", showgrid=False, showline=False, ticks="")
    return made


def lens_watched(watched: pd.DataFrame, generated: int | None = None) -> go.Figure:
    """Median rank of each watched token by layer, one colour per condition, one dash per token; band: quartiles over
    positions. generated: only at this position, counted from each text's first.
    """
    tables.check(watched, "lens_watched")
    if watched.empty:
        raise UsageError("no tokens were watched; name some when reading the lens")
    frame = watched
    if generated is not None:
        first = frame.groupby("text")["position"].transform("min")
        frame = frame.loc[frame["position"].sub(first).eq(generated)]
    made = figure(f"Rank of chosen tokens by layer{_lens(watched)}", height=430)
    dashes = ("solid", "dash", "dot", "dashdot")
    for number, (token_id, of_token) in enumerate(frame.groupby("token_id", sort=False)):
        name = label(readable(str(of_token["token"].iloc[0])), limit=14)
        for condition, part in of_token.assign(place=of_token["rank"].add(1)).groupby(
            "condition", observed=True, sort=False
        ):
            by_layer = part.groupby("layer")["place"]
            low, middle, high = (by_layer.quantile(q).add(1) for q in (0.25, 0.5, 0.75))
            colour = condition_colour(str(condition))
            made.add_scatter(**band(middle.index, low, high, colour))
            made.add_scatter(
                x=middle.index,
                y=middle,
                name=f"{name}, {label(words(str(condition)))}",
                mode="lines",
                line={"color": colour, "width": 2.2, "dash": dashes[number % len(dashes)]},
                hovertemplate=f"{name} (token {token_id})<br>layer %{{x}}<br>rank %{{y:.0f}}<extra></extra>",
            )
    made.update_xaxes(title_text="layer (0-based decoder block)")
    return made.update_yaxes(title_text="rank (1 is likeliest)", type="log", autorange="reversed")


def lens_spread(spread: pd.DataFrame, quantity: str = "kl_nats") -> go.Figure:
    """Mean distance from the final answer (or entropy) by layer, one line per condition; band: quartiles of texts."""
    tables.check(spread, "lens_spread")
    titles = {"kl_nats": "KL from the final answer (nats)", "entropy_nats": "entropy (nats)"}
    if quantity not in titles:
        raise unknown("quantity", quantity, tuple(titles))
    what = titles[quantity].split(" (")[0]
    made = figure(f"{what[0].upper()}{what[1:]} by layer{_lens(spread)}", height=400)
    for condition, part in spread.groupby("condition", observed=True, sort=False):
        by_text = part.pivot_table(index="layer", columns="text", values=quantity)
        colour = condition_colour(str(condition))
        made.add_scatter(**band(by_text.index, by_text.quantile(0.25, axis=1), by_text.quantile(0.75, axis=1), colour))
        made.add_scatter(
            x=by_text.index,
            y=by_text.mean(axis=1),
            name=label(words(str(condition))),
            mode="lines+markers",
            line={"color": colour, "width": 2.2},
            marker={"size": 5},
            hovertemplate="layer %{x}<br>%{y:.3f} nats<extra></extra>",
        )
    made.update_xaxes(title_text="layer (0-based decoder block)")
    return made.update_yaxes(title_text=titles[quantity], rangemode="tozero")


def _lens(table: pd.DataFrame) -> str:
    """Which lens a table was read through, where it is not the plain one."""
    return TUNED if "lens" in table.columns and "tuned" in set(table["lens"]) else ""
