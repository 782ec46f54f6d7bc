"""What the commands about an SAE's latents show on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from steerlab.plots.house import readable


def correctness(console: Console, found: Mapping[str, pd.DataFrame], n: int = 12) -> None:
    """The most telling latents as they are matched last, and whether they are found again."""
    table = found["latent_correctness"]
    way = str(table["matched"].iloc[-1])
    part = table.loc[table["matched"] == way]
    few = part.iloc[0]
    title = f"latents and right answers ({few['n_correct']} right, {few['n_incorrect']} wrong; matched: {way})"
    shown = Table(box=None, pad_edge=False, title=title)
    for name in ("latent", "right", "wrong", "difference", "95 % over problems", "q", "family-wise p"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in part.head(n).to_dict("records"):
        shown.add_row(
            str(row["latent"]), f"{row['share_correct']:.1%}", f"{row['share_incorrect']:.1%}",
            f"{row['difference']:+.3f}", f"{row['low']:+.3f} to {row['high']:+.3f}", f"{row['q']:.2g}",
            f"{row['family_p']:.3f}",
        )  # fmt: skip
    console.print(shown)
    for row in found["latent_replication"].to_dict("records") if "latent_replication" in found else ():
        told = f"found again in the other half of the problems: {row['replicated']:.0%} of {row['n_latents']}"
        console.print(f"{told} (labels {row['labels']})", highlight=False, soft_wrap=True)
    for row in found["correctness_probes"].to_dict("records") if "correctness_probes" in found else ():
        told = f"probe of {row['features']}: AUROC {row['auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        console.print(told, highlight=False, soft_wrap=True)


def effects(console: Console, table: pd.DataFrame, n: int = 12) -> None:
    """The latents that change most, beside what a random direction does to them."""
    mine = table.loc[table["sender"] == "trained"]
    beside = table.loc[table["sender"] == "random"].set_index("latent")["change"]
    order = np.argsort(-np.abs(mine["change"].to_numpy()), kind="stable")[:n]
    shown = Table(box=None, pad_edge=False, title="change of mean activations on answers")
    for name in ("latent", "change", "95 % over texts", "random", "fires on", "then", "cosine"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in mine.iloc[order].to_dict("records"):
        span = "" if row["low"] != row["low"] else f"{row['low']:+.3f} to {row['high']:+.3f}"
        control = f"{beside[row['latent']]:+.3f}" if row["latent"] in beside.index else ""
        cosine = "" if row["cosine"] != row["cosine"] else f"{row['cosine']:+.2f}"
        shown.add_row(
            str(row["latent"]), f"{row['change']:+.3f}", span, control, f"{row['base_rate']:.1%}", f"{row['rate']:.1%}",
            cosine,
        )  # fmt: skip
    console.print(shown)


def causal(console: Console, table: pd.DataFrame) -> None:
    """A row per condition."""
    first = table.iloc[0]
    shown = Table(box=None, pad_edge=False, title=f"{first['n_latents']} latents, {first['how']}: {first['metric']}")
    for name in ("condition", "value", "95 % interval", "change", "95 % interval"):
        shown.add_column(name, justify="left" if name == "condition" else "right", no_wrap=True)
    for row in table.to_dict("records"):
        shown.add_row(
            row["condition"], f"{row['value']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", f"{row['change']:+.3f}",
            f"{row['change_low']:+.3f} to {row['change_high']:+.3f}",
        )  # fmt: skip
    console.print(shown)


def cards(console: Console, found: Mapping[str, pd.DataFrame]) -> None:
    """Of each latent the tokens it writes towards, and its strongest context with the peak in brackets."""
    contexts = found["latent_contexts"]
    for latent in dict.fromkeys(contexts["latent"]):
        part = contexts.loc[(contexts["latent"] == latent) & (contexts["rank"] == 0)]
        shown = "".join(
            f"[{readable(token)}]" if peak else readable(token)
            for token, peak in zip(part["token"], part["peak"], strict=True)
        )
        raises = ""
        if "latent_tokens" in found:
            lens = found["latent_tokens"]
            top = lens.loc[(lens["latent"] == latent) & (lens["end"] == "top"), "token"].head(6)
            raises = f" raises {', '.join(readable(str(token)) for token in top)};"
        console.print(f"latent {latent}:{raises} …{shown}…", markup=False, highlight=False, soft_wrap=True)
