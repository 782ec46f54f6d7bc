"""What the commands that follow a vector's effect through the model show on a terminal."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steerlab.command_line.show import grid
from steerlab.plots.house import readable, words


def patching(console: Console, table: pd.DataFrame) -> None:
    """A row per patch: its score and the share of the vector's effect that is kept, beside a random direction's."""
    first = table.iloc[0]
    title = f"{first['metric']} when part of block {first['layer'] + 1} does not see the vector; kept: of its effect"
    turned = table.rename(columns={"patch": "row", "sender": "condition"})

    def told(row: dict[Hashable, Any]) -> str:
        kept = "" if row["kept"] != row["kept"] else f", kept {row['kept']:.2f}"
        return f"{row['value']:.3f} ({row['low']:.3f}–{row['high']:.3f}){kept}"

    grid(console, turned, "row", title, told)


def patch_effects(console: Console, positions: pd.DataFrame, tokens: pd.DataFrame, groups: pd.DataFrame) -> None:
    """Per patch the KL and the token that the part raises most; then what goes to groups of words."""
    random = {
        str(name): part["kl_nats"].to_numpy().mean() for name, part in _sent(positions, "random").groupby("patch")
    }
    positions, tokens, groups = (_sent(table, "trained") for table in (positions, tokens, groups))
    most = tokens.loc[(tokens["end"] == "raised") & (tokens["rank"] == 0)].set_index("patch")
    shown = Table(box=None, pad_edge=False, title="what the part does with the vector, token by token")
    for name in ("patch", "mean KL (nats)", "random", "largest", "raises most", "mean Δp"):
        shown.add_column(name, justify="left" if name in ("patch", "raises most") else "right", no_wrap=True)
    for patch, part in positions.groupby("patch", sort=False):
        kl, row = part["kl_nats"].to_numpy(), most.loc[str(patch)]
        token = Text(readable(str(row["token"])))
        control = f"{random[str(patch)]:.3g}" if random else ""
        shown.add_row(words(str(patch)), f"{kl.mean():.3g}", control, f"{kl.max():.3g}", token, f"{row['delta']:+.2g}")
    console.print(shown)

    title = "Δp of groups of words per position, and how many of their tokens rise, beside tokens about as likely"
    by_group = Table(box=None, pad_edge=False, title=title)
    for name in ("patch", "group", "Δp", "p", "rise", "those beside", "p"):
        by_group.add_column(name, justify="left" if name in ("patch", "group") else "right", no_wrap=True)
    before = ""
    for row in groups.to_dict("records"):
        patch = words(str(row["patch"]))
        beside = (f"{row['p']:.3f}", f"{row['control_raised_share']:.0%}", f"{row['raised_p']:.3f}")
        p, others, raised_p = ("", "", "") if row["p"] != row["p"] else beside
        cells = (Text(words(str(row["word_group"]))), f"{row['mass']:+.2g}", p, f"{row['raised_share']:.0%}", others)
        by_group.add_row(patch if patch != before else "", *cells, raised_p)
        before = patch
    console.print(by_group)


def _sent(table: pd.DataFrame, sender: str) -> pd.DataFrame:
    return table.loc[table["sender"] == sender]


def attention(console: Console, table: pd.DataFrame, frozen: pd.DataFrame, n: int = 10) -> None:
    """The heads that look elsewhere most, beside what a random direction does to them; then what freezing leaves."""
    by_head = table.pivot_table(index=["layer", "head"], columns="sender", values="value").reset_index()
    interval = table.loc[table["sender"] == "trained"].set_index(["layer", "head"])
    shown = Table(box=None, pad_edge=False, title="total variation between a head's patterns with and without")
    for name in ("layer", "head", "trained", "95 % over texts", "random"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in by_head.sort_values("trained", ascending=False).head(n).to_dict("records"):
        ends = interval.loc[(row["layer"], row["head"])]
        random = f"{row['random']:.3f}" if "random" in row else ""
        span = "" if ends["low"] != ends["low"] else f"{ends['low']:.3f} to {ends['high']:.3f}"
        shown.add_row(str(row["layer"]), str(row["head"]), f"{row['trained']:.3f}", span, random)
    console.print(shown)
    for row in frozen.loc[frozen["patch"] == "frozen_attention"].to_dict("records"):
        told = f"patterns held at the base's: {_kept(row)} of the effect on {row['metric']} is left ({row['sender']})"
        console.print(told, highlight=False, soft_wrap=True)


def attribution(console: Console, table: pd.DataFrame, n: int = 12) -> None:
    """The parts that add most, over all positions and at the first, beside what they add for a random direction."""
    keys = ["kind", "layer", "head"]
    shown = Table(box=None, pad_edge=False, title="logits added to the next token, over the base's likeliest other")
    for name in ("part", "all positions", "95 % over texts", "first", "random"):
        shown.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    every = table.loc[(table["generated"] == -1) & (table["sender"] == "trained")]
    first = table.loc[(table["generated"] == 0) & (table["sender"] == "trained")].set_index(keys)["value"]
    random = table.loc[(table["generated"] == -1) & (table["sender"] == "random")].set_index(keys)["value"]
    total = every.loc[every["kind"] == "total"]
    parts = every.loc[every["kind"] != "total"]
    order = parts["value"].abs().sort_values(ascending=False).index[:n]
    for row in pd.concat([total, parts.loc[order]]).to_dict("records"):
        key = (row["kind"], row["layer"], row["head"])
        place = "" if row["layer"] < 0 else f" {row['layer']}"
        name = f"{words(str(row['kind']))}{place}" + (f".{row['head']}" if row["head"] >= 0 else "")
        span = "" if row["low"] != row["low"] else f"{row['low']:+.3f} to {row['high']:+.3f}"
        control = f"{random[key]:+.3f}" if key in random.index else ""
        shown.add_row(name, f"{row['value']:+.3f}", span, f"{first[key]:+.3f}", control)
    console.print(shown)


def activation_patching(console: Console, table: pd.DataFrame, n: int = 10) -> None:
    """The places that bring back most, and what is lost with those that stand in the way."""
    first = table.iloc[0]
    title = f"put into the base run ({first['corrupted']:+.2f} logits; steered {first['clean']:+.2f})"
    shown = Table(box=None, pad_edge=False, title=title)
    for name in ("place", "change", "recovered", "95 % over texts"):
        shown.add_column(name, justify="left" if name == "place" else "right", no_wrap=True)
    for kind, part in table.groupby("kind", sort=False):
        for row in _largest(part, (part["value"] - part["corrupted"]).to_numpy(), n):
            head = f".{row['head']}" if row["head"] >= 0 else ""
            shown.add_row(f"{kind} {row['layer']}{head}", *_change(row))
    console.print(shown)


def path_patching(console: Console, table: pd.DataFrame, n: int = 15) -> None:
    """The receivers to which the sender says most."""
    first = table.iloc[0]
    title = f"what {first['sender']} says ({first['corrupted']:+.2f} logits without, steered {first['clean']:+.2f})"
    shown = Table(box=None, pad_edge=False, title=title)
    for name in ("receiver", "change", "recovered", "95 % over texts"):
        shown.add_column(name, justify="left" if name == "receiver" else "right", no_wrap=True)
    for row in _largest(table, (table["value"] - table["corrupted"]).to_numpy(), n):
        head = f".{row['receiver_head']}" if row["receiver_head"] >= 0 else ""
        at = "" if row["receiver"] == "logits" else f" {row['receiver_layer']}{head}"
        shown.add_row(f"{row['receiver']}{at}", *_change(row))
    console.print(shown)
    console.print(f"parts of the change that do not add up: {table.attrs['unexplained']:.1g} of it", highlight=False)


def _largest(table: pd.DataFrame, by: np.ndarray, n: int) -> list[dict[Hashable, Any]]:
    """The `n` rows whose value is largest, whatever its sign."""
    return table.iloc[np.argsort(-np.abs(by), kind="stable")[:n]].to_dict("records")


def _change(row: dict[Hashable, Any]) -> tuple[str, str, str]:
    """Change of the metric; share of the whole, with its interval."""
    moved = f"{row['value'] - row['corrupted']:+.3f}"
    if row["recovered"] != row["recovered"]:
        return moved, "", ""
    return moved, f"{row['recovered']:+.3f}", f"{row['recovered_low']:+.3f} to {row['recovered_high']:+.3f}"


def edges(console: Console, links: pd.DataFrame, table: pd.DataFrame, n: int = 15) -> None:
    """The strongest links that are drawn, and what the edges leave open."""
    shown = Table(box=None, pad_edge=False, title="strongest links, logits to first order")
    for name in ("from", "to", "effect"):
        shown.add_column(name, justify="right" if name == "effect" else "left", no_wrap=True)
    for row in _largest(links, links["effect"].to_numpy(), n):
        shown.add_row(row["source"], row["target"], f"{row['effect']:+.3f}")
    console.print(shown)
    open_part = table.attrs["unexplained"]
    console.print(
        f"{len(links)} of {len(table):,} edges drawn; {open_part:.0%} of the change is not what starts add up to",
        highlight=False,
    )


def agreement(console: Console, table: pd.DataFrame) -> None:
    """How near the estimates are to exact patching."""
    shown = Table(box=None, pad_edge=False, title="estimated beside exactly patched edges")
    for name in ("gradients", "rank correlation", "error", "slope", "edges"):
        shown.add_column(name, justify="left" if name == "gradients" else "right", no_wrap=True)
    for row in table.to_dict("records"):
        rank = f"{row['spearman']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        shown.add_row(row["estimate"], rank, f"{row['error']:.0%}", f"{row['bias']:.2f}", str(row["n"]))
    console.print(shown)


def _kept(row: dict[Hashable, Any]) -> str:
    if row["kept"] != row["kept"]:
        return "an unknown share (it is within its noise of 0)"
    return f"{row['kept']:.2f} ({row['kept_low']:.2f} to {row['kept_high']:.2f})"
