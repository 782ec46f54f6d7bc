"""Figures of a training run: reward or loss per step, and the share of groups that say which answer was better."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.plots.house import COLOURS, HOUSE, band, label

_MOVING_SPAN = 10


def learning_curve(df: pd.DataFrame) -> go.Figure:
    """Reward per step with its moving mean, and below it the share of groups with a signal; from a `curve` table.

    With a column `run`, one colour per run; with a column `seed` too, the line is the mean over that run's seeds and
    the band goes from the lowest to the highest seed.
    """
    tables.check(df, "curve")
    signal = "signal_share" in df.columns and bool(df["signal_share"].notna().any())
    made = make_subplots(
        rows=2 if signal else 1, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.7, 0.3][: 1 + signal]
    )
    made.update_layout(template=HOUSE, height=470 if signal else 340, title_text="Reward while training")
    frame = df if "run" in df.columns else df.assign(run="this run")
    runs = [(name, frame.loc[frame["run"] == name]) for name in dict.fromkeys(frame["run"])]
    for index, (name, part) in enumerate(runs):
        shown, colour = label(str(name)), COLOURS[index % len(COLOURS)]
        n_seeds = len(set(part["seed"])) if "seed" in part.columns else 1
        if n_seeds > 1:
            _several_seeds(made, part, f"{shown} (mean of {n_seeds} seeds; band: lowest to highest)", colour)
        else:
            _one_seed(made, part.sort_values("step"), shown if len(runs) > 1 else "", colour)
        if signal:
            _signal(made, part, shown, colour)
    made.update_yaxes(title_text="reward", row=1, col=1)
    if signal:
        made.update_yaxes(
            title_text="groups with<br>a signal", tickformat=".0%", range=[-0.03, 1.03], dtick=0.5, row=2, col=1
        )
    return made.update_xaxes(title_text="step (updates)", row=1 + signal, col=1)


def loss_curve(df: pd.DataFrame) -> go.Figure:
    """Loss per step with its moving mean; from a `curve` table of a run without rewards."""
    tables.check(df, "curve")
    made = make_subplots(rows=1, cols=1)
    made.update_layout(template=HOUSE, height=340, title_text="Loss while training")
    _one_seed(made, df.sort_values("step"), "", COLOURS[0], "loss")
    made.update_yaxes(title_text="loss", rangemode="tozero")
    return made.update_xaxes(title_text="step (updates)")


def _one_seed(made: go.Figure, part: pd.DataFrame, name: str, colour: str, what: str = "reward") -> None:
    given = f"{what}_ema" in part.columns and bool(part[f"{what}_ema"].notna().any())
    moving = part[f"{what}_ema"] if given else part[what].ewm(span=_MOVING_SPAN).mean()
    prefix = f"{name}: " if name else ""
    made.add_scatter(
        x=part["step"],
        y=part[what],
        name=f"{prefix}mean of the step",
        mode="markers",
        marker={"color": colour, "size": 5, "opacity": 0.35},
        hovertemplate=f"step %{{x}}<br>{what} %{{y:.3f}}<extra></extra>",
        row=1,
        col=1,
    )
    made.add_scatter(
        x=part["step"],
        y=moving,
        name=f"{prefix}moving mean",
        mode="lines",
        line={"color": colour, "width": 2.4},
        hovertemplate="step %{x}<br>moving mean %{y:.3f}<extra></extra>",
        row=1,
        col=1,
    )


def _several_seeds(made: go.Figure, part: pd.DataFrame, name: str, colour: str) -> None:
    wide = part.pivot_table(index="step", columns="seed", values="reward").ewm(span=_MOVING_SPAN).mean()
    low, high, steps = wide.min(axis=1), wide.max(axis=1), wide.index
    made.add_scatter(**band(steps, low, high, colour), row=1, col=1)
    made.add_scatter(
        x=steps,
        y=wide.mean(axis=1),
        name=name,
        mode="lines",
        line={"color": colour, "width": 2.4},
        customdata=list(zip(low, high, strict=True)),
        hovertemplate="step %{x}<br>mean %{y:.3f}, seeds %{customdata[0]:.3f} … %{customdata[1]:.3f}<extra></extra>",
        row=1,
        col=1,
    )


def _signal(made: go.Figure, part: pd.DataFrame, name: str, colour: str) -> None:
    share = part.groupby("step", as_index=False).agg(share=("signal_share", "mean"))
    made.add_scatter(
        x=share["step"],
        y=share["share"],
        mode="lines",
        line={"color": colour, "width": 1.6, "shape": "hv"},
        hovertemplate="step %{x}<br>%{y:.0%} of groups with a signal<extra>" + name + "</extra>",
        showlegend=False,
        row=2,
        col=1,
    )
