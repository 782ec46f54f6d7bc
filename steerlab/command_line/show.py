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


def spread(console: Console, table: pd.DataFrame, rows: int = 10) -> None:
    """How far from the final answer some layers are, first to last: mean KL in nats, a column per condition."""
    by_layer = table.pivot_table(index="layer", columns="condition", values="kl_nats", observed=True, sort=False)
    shown = Table(box=None, pad_edge=False, title="KL from the model's own output (nats), mean over positions")
    shown.add_column("layer", justify="right")
    for condition in by_layer.columns:
        shown.add_column(words(str(condition)), justify="right")
    chosen = sorted({round(i * (len(by_layer) - 1) / max(1, rows - 1)) for i in range(rows)})
    for at in chosen:
        shown.add_row(str(by_layer.index[at]), *(f"{value:.3g}" for value in by_layer.iloc[at]))
    console.print(shown)


def raised(console: Console, means: pd.DataFrame, positions: pd.DataFrame) -> None:
    """Tokens raised and lowered most, with 95 % intervals over texts, and what the raised ones were to the base."""
    shown = Table(box=None, pad_edge=False, title="mean change of the next token's probability")
    for name in ("position", "raised", "by", "lowered", "by"):
        shown.add_column(name, justify="right" if name == "by" else "left", no_wrap=True)
    for where, part in means.groupby("where", sort=False):
        ends = [part.loc[part["end"] == end].sort_values("rank").to_dict("records") for end in ("raised", "lowered")]
        for up, down in zip(*ends, strict=True):
            told = [(Text(visible(str(row["token"]))), f"{row['delta']:+.4f}") for row in (up, down)]
            shown.add_row(str(where), *told[0], *told[1])
    console.print(shown)
    own, changed = positions["raised_was_base_argmax"].mean(), positions["argmax_changed"].mean()
    console.print(
        f"at {own:.0%} of {len(positions)} positions the token raised most was the base model's likeliest already; at "
        f"{changed:.0%} the likeliest token changed",
        highlight=False,
        soft_wrap=True,
    )


def persistence(console: Console, table: pd.DataFrame) -> None:
    """Of each layer's vector, trained and random: one direction at all tokens, and its length, at the last layer."""
    last = table.loc[table["layer"] == table["layer"].max()]
    shown = Table(box=None, pad_edge=False, title="at the last layer: cosine of a token's Δ with the mean, length of Δ")
    shown.add_column("source layer", justify="right")
    for condition in dict.fromkeys(last["condition"]):
        shown.add_column(f"{words(str(condition))}: cosine", justify="right")
        shown.add_column("length", justify="right")
    values = last.set_index(["source", "condition", "quantity"])["value"]
    for source in dict.fromkeys(last["source"]):
        found = []
        for condition in dict.fromkeys(last["condition"]):
            found += [f"{values[source, condition, name]:.3g}" for name in ("diff_diff", "length")]
        shown.add_row(str(source), *found)
    console.print(shown)


def languages(console: Console, gaps: pd.DataFrame, classes: pd.DataFrame) -> None:
    """Change of log-probability, non-English minus English, by source layers: trained, random, their difference."""
    sizes = classes.drop_duplicates("token_class").set_index("token_class")["n_tokens"]
    counted = ", ".join(f"{words(str(name))} {size}" for name, size in sizes.items())
    console.print(f"tokens: {counted}", highlight=False, soft_wrap=True)
    if gaps.empty:
        told = "no gap: the vocabulary has no English tokens, or none of another language"
        console.print(told, highlight=False, soft_wrap=True)
        return
    title = "change of log-probability (nats), mean of other languages' tokens − mean of English ones"
    shown = Table(box=None, pad_edge=False, title=title)
    for name in ("layers", "trained", "95 % over tokens", "random", "range over draws", "difference"):
        shown.add_column(name, justify="right", no_wrap=True)
    part = gaps.loc[gaps["readout"] == "logprob"]
    for (low, high), rows in part.groupby(["from_layer", "to_layer"], sort=False):
        of = {str(row["condition"]): row for row in rows.to_dict("records")}
        trained, random, apart = (of[name] for name in ("trained", "random", "trained − random"))
        shown.add_row(
            str(low) if low == high else f"{low}–{high}",
            f"{trained['value']:+.4f}",
            f"{trained['low']:+.4f} to {trained['high']:+.4f}",
            f"{random['value']:+.4f}",
            f"{random['low_draws']:+.4f} to {random['high_draws']:+.4f}",
            f"{apart['value']:+.4f}",
        )
    console.print(shown)


def geometry(console: Console, dose: pd.DataFrame, ranks: pd.DataFrame) -> None:
    """Of each layer: length of its vector, of the stream, their ratio with its 95 % interval; then the stable rank."""
    shown = Table(box=None, pad_edge=False, title="length of the vector, of the stream, and their ratio (dose)")
    for name in ("site", "layer", "‖s‖", "mean ‖h‖", "dose", "95 % over texts"):
        shown.add_column(name, justify="left" if name == "site" else "right", no_wrap=True)
    for row in dose.to_dict("records"):
        interval = f"{row['low']:.4f} to {row['high']:.4f}" if row["low"] == row["low"] else ""
        sizes = (f"{row['norm']:.3g}", f"{row['stream']:.4g}", f"{row['value']:.4f}", interval)
        shown.add_row(str(row["site"]), str(row["layer"]), *sizes)
    console.print(shown)
    for row in ranks.to_dict("records"):
        told = f"stable rank of the {row['n_vectors']} {row['site']} vectors: {row['stable_rank']:.2f}"
        console.print(told, highlight=False, soft_wrap=True)


def cosines_between(console: Console, table: pd.DataFrame) -> None:
    """Of each pair of runs: mean cosine over the layers, and at how many it lies above 95 % of random directions."""
    shown = Table(box=None, pad_edge=False, title="cosine between vectors of the same layer")
    for name in ("runs", "mean", "lowest", "highest", "random 95 %", "above"):
        shown.add_column(name, justify="left" if name == "runs" else "right", no_wrap=name != "runs")
    several = len(set(table["site"])) > 1
    for key, part in table.groupby(["run_i", "run_j", "site"], sort=False):
        i, j, site = (str(name) for name in key)  # type: ignore[union-attr]
        known, beyond = part["cosine"].dropna(), part["cosine"].gt(part["high_random"]).tolist().count(True)
        numbers = (f"{value:+.3f}" for value in (known.mean(), known.min(), known.max()))
        ends = (f"±{part['high_random'].max():.3f}", f"{beyond} of {len(known)}")
        shown.add_row(Text(f"{i} · {j}" + (f", {site}" if several else "")), *numbers, *ends)
    console.print(shown)
