"""Figures of sparse autoencoders: how training goes, and how good they are on tokens that were held out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlab import tables
from steerlab.plots.house import COLOURS, HOUSE, figure, label

_PANELS = (
    ("loss", "loss", ".4g"),
    ("explained_variance", "explained<br>variance", ".1%"),
    ("l0", "latents per<br>token (L0)", ".1f"),
    ("dead_share", "dead<br>latents", ".1%"),
)
_BARS = (
    ("explained_variance", "variance explained by the SAE"),
    ("pca_explained_variance", "by the principal components"),
    ("loss_recovered", "loss recovered when spliced in"),
    ("dead_share", "latents that never fire"),
)


def sae_training(df: pd.DataFrame) -> go.Figure:
    """Loss, explained variance, L0 and the share of dead latents, one panel each, by tokens trained on."""
    tables.check(df, "sae_training")
    made = make_subplots(rows=len(_PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.04)
    made.update_layout(template=HOUSE, height=640, title_text="Training a sparse autoencoder", showlegend=False)
    df = df.sort_values("step")
    for row, (column, name, shown) in enumerate(_PANELS, start=1):
        made.add_scatter(
            x=df["tokens"],
            y=df[column],
            mode="lines",
            line={"color": COLOURS[row - 1], "width": 2.2},
            hovertemplate=f"%{{x:,}} tokens<br>{name.replace('<br>', ' ')} %{{y:{shown}}}<extra></extra>",
            row=row,
            col=1,
        )
        percent = ".0%" if shown.endswith("%") else None
        made.update_yaxes(title_text=name, tickformat=percent, rangemode="tozero", row=row, col=1)
    return made.update_xaxes(title_text="tokens", row=len(_PANELS), col=1)


def sae_quality(df: pd.DataFrame) -> go.Figure:
    """Shares on held-out tokens as bars, one group per SAE; see `tables`."""
    tables.check(df, "sae_quality")
    made = figure("How good the sparse autoencoder is on held-out tokens", height=430)
    names = [
        label(f"{row['architecture']} {row['site']}, {row['d_sae']:,} latents, L0 {row['l0']:.1f}")
        for row in df.to_dict("records")
    ]
    for (column, name), colour in zip(_BARS, COLOURS, strict=False):
        made.add_bar(
            x=names,
            y=df[column],
            name=name,
            marker={"color": colour},
            hovertemplate=f"{name}: %{{y:.1%}}<extra></extra>",
        )
    made.update_layout(barmode="group")
    return made.update_yaxes(title_text="share", tickformat=".0%")
