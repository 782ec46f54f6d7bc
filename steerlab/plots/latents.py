"""Figures of latents: what vectors do to them, which come with correct answers, what editing them does."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots.house import COLOURS, CONDITION_COLOURS, band, figure, label

WAYS = {
    "none": "as they are (Fisher's exact test)",
    "length": "answers of like length compared",
    "problem": "answers to the same problem compared",
}
SMALLEST_P = 1e-30


def latent_correctness(df: pd.DataFrame, matched: str = "problem", n: int = 15) -> go.Figure:
    """Shares of right and of wrong completions on which the `n` most telling latents fire. Raises UsageError for a
    table without that way of matching."""
    part = _of(df, matched).head(n)
    names = [str(latent) for latent in part["latent"]]
    made = figure(f"Latents that tell right from wrong answers: {WAYS[matched]}", height=430)
    for column, name, colour in (
        ("share_correct", "right completions", COLOURS[0]),
        ("share_incorrect", "wrong completions", COLOURS[1]),
    ):
        made.add_bar(
            x=names,
            y=part[column],
            name=name,
            marker_color=colour,
            customdata=part[["difference", "low", "high", "q", "family_p"]].to_numpy(),
            hovertemplate=f"latent %{{x}}: fires on %{{y:.1%}} of {name}<br>difference %{{customdata[0]:+.3f}} "
            "[%{customdata[1]:+.3f}, %{customdata[2]:+.3f}], q %{customdata[3]:.3g}, family-wise p %{customdata[4]:.3g}"
            "<extra></extra>",
        )
    made.update_layout(barmode="group")
    made.update_xaxes(title_text="latent, the most telling first", type="category")
    return made.update_yaxes(title_text="share on which it fires", tickformat=".0%", rangemode="tozero")


def latent_volcano(df: pd.DataFrame, matched: str = "problem") -> go.Figure:
    """Every latent: difference of the two shares against its p, those that the false discovery rate lets through in
    colour. Raises UsageError for a table without that way of matching."""
    part = _of(df, matched)
    made = figure(f"All latents: {WAYS[matched]}", height=430)
    found = part["q"].to_numpy() < 0.05
    for name, rows, colour in (("q < 0.05", found, COLOURS[1]), ("others", ~found, "#9aa5b1")):
        some = part.loc[rows]
        made.add_scatter(
            x=some["difference"],
            y=-np.log10(np.clip(some["p"].to_numpy(), SMALLEST_P, 1)),
            mode="markers",
            name=f"{name} ({len(some)})",
            marker={"size": 6, "color": colour, "opacity": 0.75},
            customdata=some[["latent", "share_correct", "share_incorrect", "q"]].to_numpy(),
            hovertemplate="latent %{customdata[0]:.0f}: right %{customdata[1]:.1%}, wrong %{customdata[2]:.1%}<br>"
            "difference %{x:+.3f}, q %{customdata[3]:.3g}<extra></extra>",
        )
    made.update_layout(showlegend=True)
    made.update_xaxes(title_text="share of right − share of wrong completions on which it fires")
    return made.update_yaxes(title_text="−log₁₀ p", rangemode="tozero")


def latent_effects(df: pd.DataFrame) -> go.Figure:
    """The encoder's response to the vector against what happens to each latent; where the vector is elsewhere, the
    activation before against after. A random direction beside it. Raises UsageError for an empty table."""
    tables.check(df, "latent_effects")
    if df.empty:
        raise UsageError("the table is empty; read at least one vector")
    direct = bool(np.isfinite(df["response"].to_numpy()).all())
    made = figure("What the vector does to each latent", height=460)
    for sender, colour in (("random", CONDITION_COLOURS["random"]), ("trained", CONDITION_COLOURS["steered"])):
        part = df.loc[df["sender"] == sender]
        if part.empty:
            continue
        made.add_scatter(
            x=part["response"] if direct else part["base"],
            y=part["change"],
            mode="markers",
            name=label(sender),
            marker={"size": 5, "color": colour, "opacity": 0.6},
            customdata=part[["latent", "cosine", "low", "high", "base_rate", "rate"]].to_numpy(),
            hovertemplate="latent %{customdata[0]:.0f}: change %{y:+.3f} [%{customdata[2]:+.3f}, %{customdata[3]:+.3f}]"
            "<br>cosine %{customdata[1]:.3f}, fires on %{customdata[4]:.2%}, then %{customdata[5]:.2%}<extra></extra>",
        )
    x = "the encoder's linear response to the vector" if direct else "mean activation without the vector"
    made.update_xaxes(title_text=x)
    return made.update_yaxes(title_text="change of the mean activation on answers")


def decomposition(df: pd.DataFrame) -> go.Figure:
    """What is left of the vector by the number of directions that it is made of, beside random directions."""
    tables.check(df, "decomposition")
    made = figure("The vector as a sum of few directions of the SAE", height=400)
    drawn = df.loc[df["sender"].str.startswith("random")]
    if len(drawn):
        by_n = drawn.pivot_table(index="n", columns="sender", values="error")
        ends = by_n.min(axis=1).tolist(), by_n.max(axis=1).tolist()
        made.add_scatter(**band(by_n.index.tolist(), *ends, CONDITION_COLOURS["random"]))
        made.add_scatter(
            x=by_n.index,
            y=by_n.mean(axis=1),
            name=f"random directions ({by_n.shape[1]}; mean and range)",
            line={"color": CONDITION_COLOURS["random"], "dash": "dot"},
        )
    mine = df.loc[df["sender"] == "trained"]
    made.add_scatter(
        x=mine["n"],
        y=mine["error"],
        name="vector",
        mode="lines+markers",
        line={"color": CONDITION_COLOURS["steered"]},
        customdata=mine[["latent", "weight"]].to_numpy(),
        hovertemplate="%{x}: latent %{customdata[0]:.0f} × %{customdata[1]:.3f}, left %{y:.1%}<extra></extra>",
    )
    made.update_xaxes(title_text="directions")
    return made.update_yaxes(title_text="squared length that is left", tickformat=".0%", range=[0, 1.02])


def latents_causal(df: pd.DataFrame) -> go.Figure:
    """Answers as they are, with latents edited, and with others edited that fire about as often; with intervals."""
    tables.check(df, "latents_causal")
    first = df.iloc[0]
    made = figure(f"Answers with {first['n_latents']} latents edited ({label(str(first['how']))})", height=400)
    colours = [{"as it is": COLOURS[6], "edited": COLOURS[0]}.get(str(of), COLOURS[3]) for of in df["condition"]]
    made.add_bar(
        x=[label(str(of)) for of in df["condition"]],
        y=df["value"],
        marker_color=colours,
        error_y={
            "type": "data",
            "array": df["high"] - df["value"],
            "arrayminus": df["value"] - df["low"],
            "thickness": 1.4,
        },
        customdata=df[["change", "change_low", "change_high"]].to_numpy(),
        hovertemplate="%{x}: %{y:.1%}<br>change %{customdata[0]:+.3f} [%{customdata[1]:+.3f}, %{customdata[2]:+.3f}]"
        "<extra></extra>",
        showlegend=False,
    )
    return made.update_yaxes(title_text=label(str(first["metric"])), tickformat=".0%", rangemode="tozero")


def _of(df: pd.DataFrame, matched: str) -> pd.DataFrame:
    tables.check(df, "latent_correctness")
    part = df.loc[df["matched"] == matched]
    if part.empty:
        raise UsageError(
            f"the table has no latents matched by {matched}; it has {', '.join(dict.fromkeys(df['matched']))}"
        )
    return part
