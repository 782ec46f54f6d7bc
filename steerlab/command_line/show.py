"""Results on a terminal: scores with their intervals, and the lens as a table.

Everything a model wrote is shown as text, never as markup or control codes.
"""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steerlab.adapters import SteeringVectors
from steerlab.plots.house import words
from steerlab.rollouts.statistics import gain


def scores(console: Console, found: pd.DataFrame, completions: pd.DataFrame) -> None:
    """A row per condition and metric with the 95 % interval, then what steering gained, paired over problems."""
    table = Table(box=None, pad_edge=False)
    for name in ("condition", "metric", "value", "95 % interval", "problems", "samples", "seeds"):
        table.add_column(name, justify="left" if name in ("condition", "metric") else "right", no_wrap=True)
    for row in found.drop_duplicates(["condition", "metric"]).to_dict("records"):
        if row["metric"] == "pass@1":  # the same as avg@1
            continue
        table.add_row(
            words(str(row["condition"])),
            str(row["metric"]),
            f"{row['value']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            *(str(row[name]) for name in ("n_problems", "n_samples", "n_seeds")),
        )
    console.print(table)
    if {"base", "steered"} <= set(completions["condition"]):
        paired = gain(completions)
        console.print(
            f"gain of steered over base: {paired.value:+.3f} ({paired.low:+.3f} to {paired.high:+.3f}, same problems)",
            highlight=False,
            soft_wrap=True,
        )


def layers(console: Console, found: pd.DataFrame, compared: pd.DataFrame) -> None:
    """avg@k of every layer's own vector with its 95 % interval, then of what it is compared with."""
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "seed", "metric", "value", "95 % interval", "problems", "samples"):
        table.add_column(name, justify="left" if name in ("layer", "metric") else "right", no_wrap=True)
    sampled = found.assign(condition=found["layer"].astype(str), seed=found["seed"].astype(str))
    for row in pd.concat([compared.assign(seed=""), sampled]).to_dict("records"):
        if str(row["metric"]).startswith("avg@"):
            failed = row["value"] != row["value"]  # a run without a score
            interval = "" if failed else f"{row['low']:.3f} to {row['high']:.3f}"
            value = "failed" if failed else f"{row['value']:.3f}"
            sizes = (str(row[name]) for name in ("n_problems", "n_samples"))
            table.add_row(words(str(row["condition"])), str(row["seed"]), row["metric"], value, interval, *sizes)
    console.print(table)


def lens(console: Console, table: pd.DataFrame, vectors: SteeringVectors) -> None:
    """One row per layer: length of its vector, the tokens it points to and away from."""
    shown = Table(pad_edge=False)
    shown.add_column("layer", justify="right")
    shown.add_column("length", justify="right")
    shown.add_column("points to")
    shown.add_column("points away from")
    ordered = table.sort_values("rank", kind="stable")
    for site, vector in vectors.vectors.items():
        here = (ordered["site"] == site.kind) & (ordered["layer"] == site.layer)
        ends = [ordered.loc[here & (ordered["end"] == end), "token"] for end in ("top", "bottom")]
        told = [Text("  ".join(visible(token) for token in tokens) or "(zero vector)") for tokens in ends]
        shown.add_row(str(site.layer), f"{float(vector.detach().norm()):.3g}", *told)
    console.print(shown)


def visible(token: str) -> str:
    """A token with its spaces and control characters to be seen."""
    return "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in token)


def clean(text: str) -> str:
    """Text without control characters other than new lines and tabs: a completion must not drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
