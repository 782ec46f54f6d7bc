"""Results on a terminal: scores with their intervals, and readings as short tables.

Everything a model wrote is shown as text, never as markup or control codes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steerlab.adapters import SteeringVectors
from steerlab.models import Site
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


def lens_fit(console: Console, found: pd.DataFrame) -> None:
    """KL of every layer's lens from the model's output on held-out texts, plain and tuned, with 95 % intervals."""
    shown = Table(box=None, pad_edge=False, title="KL from the model's own output (nats), held-out texts")
    for name in ("layer", "plain", "95 % interval", "tuned", "95 % interval", "gain", "95 % interval"):
        shown.add_column(name, justify="right", no_wrap=True)
    by_lens = {str(lens): part.sort_values("layer").to_dict("records") for lens, part in found.groupby("lens")}
    for plain, tuned in zip(by_lens["plain"], by_lens["tuned"], strict=True):
        ends = ((plain, "kl_nats", ""), (tuned, "kl_nats", ""), (tuned, "gain_nats", "gain_"))
        told = [(f"{row[name]:.3f}", f"{row[of + 'low']:.3f}–{row[of + 'high']:.3f}") for row, name, of in ends]
        shown.add_row(str(plain["layer"]), *(cell for pair in told for cell in pair))
    console.print(shown)


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


def substitution(console: Console, table: pd.DataFrame) -> None:
    """What stands in for the vectors: its score and its share of their gain, with 95 % intervals."""
    token, other = (visible(str(table[name].iloc[0])) for name in ("token", "other"))
    shown = Table(box=None, pad_edge=False, title=f"base given “{token}” (appended) or “{other}” (appended other)")
    shown.add_column("temperature", justify="right")
    shown.add_column("condition")
    for name in ("score", "95 % interval", "share of the gain", "its interval"):
        shown.add_column(name, justify="right")
    for row in table.to_dict("records"):
        known = row["share"] == row["share"]
        share = (f"{row['share']:.2f}", f"{row['share_low']:.2f}–{row['share_high']:.2f}") if known else ("—", "—")
        score = (f"{row['value']:.3f}", f"{row['low']:.3f}–{row['high']:.3f}")
        shown.add_row(f"{row['temperature']:g}", Text(words(str(row["condition"]))), *score, *share)
    console.print(shown)


def adaptive(console: Console, table: pd.DataFrame) -> None:
    """By segment: its share of the tokens, and by layer what of the strength it has."""
    shown = Table(box=None, pad_edge=False, title="share of the strength Σ|λ| (* p < 0.05), by layer")
    shown.add_column("segment")
    shown.add_column("of the tokens", justify="right")
    layers = sorted(set(table["layer"]))
    chosen = layers if len(layers) <= 8 else [layers[round(i * (len(layers) - 1) / 7)] for i in range(8)]
    for layer in chosen:
        shown.add_column(str(layer), justify="right")
    cells = table.set_index(["segment", "layer"])
    for segment in dict.fromkeys(table["segment"]):
        found = [cells.loc[(segment, layer)] for layer in chosen]
        told = [f"{row['magnitude_share']:.1%}{'*' if row['p'] < 0.05 else ' '}" for row in found]
        shown.add_row(Text(str(segment)), f"{found[0]['token_share']:.1%}", *told)
    console.print(shown)


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


def composition(console: Console, pairs: pd.DataFrame, sets: pd.DataFrame, agreement: pd.DataFrame | None) -> None:
    """Sets of vectors with their scores, the pairs that gain and lose most, and what goes with a pair's gain."""
    shown = Table(box=None, pad_edge=False, title="vectors that were trained alone, used together")
    for name in ("condition", "layers", "split", str(sets["metric"].iloc[0]), "95 % interval"):
        shown.add_column(name, justify="left" if name in ("condition", "layers", "split") else "right")
    for row in sets.to_dict("records"):
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        shown.add_row(row["condition"], named(row["layers"]), row["split"], f"{row['value']:.3f}", interval)
    console.print(shown)
    off = pairs.loc[pairs["layer_i"] < pairs["layer_j"]]
    ordered = off.loc[off["condition"] == "trained"].sort_values("gain", ascending=False, kind="stable")
    ends = pd.concat([ordered.head(3), ordered.tail(3)]).drop_duplicates(["layer_i", "layer_j"])
    shown = Table(box=None, pad_edge=False, title="pairs that gain most and least over the better of the two")
    for name in ("layers", "value", "gain", "95 % interval", "relative"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in ends.to_dict("records"):
        known = row["relative"] == row["relative"]
        interval = f"{row['gain_low']:+.3f} to {row['gain_high']:+.3f}"
        told = (
            f"{row['value']:.3f}",
            f"{row['gain']:+.3f}",
            interval,
            f"{row['relative']:.2f}" if known else "missing",
        )
        shown.add_row(f"{row['layer_i']} and {row['layer_j']}", *told)
    console.print(shown)
    means = ", ".join(f"{words(str(name))} {part['gain'].mean():+.3f}" for name, part in off.groupby("condition"))
    console.print(f"mean gain of a pair: {means}", highlight=False, soft_wrap=True)
    for row in () if agreement is None else agreement.dropna(subset="r").to_dict("records"):
        text = f"r of {row['predictor']} with a pair's {row['outcome']}: {row['r']:+.2f}"
        known = row["low"] == row["low"]
        text += f" ({row['low']:+.2f} to {row['high']:+.2f})" if known else " (too few layers for an interval)"
        text += f", p {row['p']:.3f}"
        console.print(text, highlight=False, soft_wrap=True)


def named(layers: str) -> str:
    """Layers in few characters: all of them, or how many they are."""
    found = layers.split()
    return layers or "none" if len(found) <= 12 else f"{found[0]} … {found[-1]} ({len(found)})"


def transfer(console: Console, table: pd.DataFrame, maps: pd.DataFrame | None) -> None:
    """A row per donor, recipient and map, with the controls; why normalised scores are missing, each reason once."""
    shown = Table(box=None, pad_edge=False)
    for name in ("recipient", "donor", "map", str(table["metric"].iloc[0]), "95 % interval", "normalised"):
        shown.add_column(name, justify="left" if name in ("recipient", "donor", "map") else "right")
    for row in table.to_dict("records"):
        known = row["normalised"] == row["normalised"]
        share = f"{row['normalised']:.2f} ({row['normalised_low']:.2f} to {row['normalised_high']:.2f})"
        names = (Text(clean(str(row[name]))) for name in ("recipient", "donor", "map"))
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        shown.add_row(*names, f"{row['value']:.3f}", interval, share if known else "missing")
    console.print(shown)
    for recipient, why in table.loc[table["why"] != "", ["recipient", "why"]].drop_duplicates().itertuples(index=False):
        console.print(Text(f"missing for {clean(str(recipient))}: {why}"), soft_wrap=True)
    if maps is not None:
        told = f"{maps['r2'].min():.2f} to {maps['r2'].max():.2f} over {len(maps)} layers"
        console.print(f"held-out R² of the maps: {told}", highlight=False, soft_wrap=True)


def directions(
    console: Console, table: pd.DataFrame, made: Mapping[str, SteeringVectors], vectors: SteeringVectors
) -> None:
    """Of each method and layer: how well it separates held-out texts, and its cosine with the vector of that layer."""
    first = table.iloc[0]
    shown = Table(
        box=None,
        pad_edge=False,
        title=f"held-out AUROC of {first['n_positive']} right and {first['n_negative']} wrong texts",
    )
    names = ("layer", "method", "AUROC (95 %)", "shuffled", "accuracy", "length", "cos with own")
    for name in names:
        shown.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in table.sort_values("layer", kind="stable").to_dict("records"):
        site = Site("resid_post", int(row["layer"]))
        own, other = made[row["method"]].vectors[site].detach().double(), vectors.vectors.get(site)
        cosine = float("nan") if other is None else float(torch.cosine_similarity(own, other.detach().to(own), dim=0))
        shown.add_row(
            str(row["layer"]),
            words(str(row["method"])),
            f"{row['auroc']:.2f} ({row['low']:.2f}–{row['high']:.2f})",
            *(f"{row[name]:.2f}" for name in ("shuffled", "accuracy")),
            f"{row['norm']:.3g}",
            f"{cosine:+.3f}",
        )
    console.print(shown)


def magnitudes(console: Console, table: pd.DataFrame) -> None:
    """A row per scale, a column per set of vectors: avg@k with its 95 % interval."""
    first = table.iloc[0]
    title = f"{first['metric']} with 95 % intervals, {first['n_problems']} problems"
    grid(console, table, "scale", title, lambda row: f"{row['value']:.3f} ({row['low']:.3f}–{row['high']:.3f})")


def side_effects(console: Console, table: pd.DataFrame) -> None:
    """A row per condition, a column per quantity, with 95 % intervals."""
    title = f"on {' and '.join(dict.fromkeys(table['measured_on'].astype(str)))}; KL in nats per token"
    turned = table.rename(columns={"condition": "row", "quantity": "condition"})
    grid(console, turned, "row", title, lambda row: f"{row['value']:.3g} ({row['low']:.3g}–{row['high']:.3g})")


def at_equal_kl(console: Console, table: pd.DataFrame) -> None:
    """A row per set and target: its scale there, its score, and what it gains over the base."""
    shown = Table(box=None, pad_edge=False, title="scores where the sets are equally far from the base on neutral text")
    for name in ("condition", "KL (nats)", "scale", "metric", "value", "gain over base", "95 % interval"):
        shown.add_column(name, justify="left" if name in ("condition", "metric") else "right", no_wrap=True)
    for row in table.to_dict("records"):
        missing = row["scale"] != row["scale"]
        shown.add_row(
            words(str(row["condition"])),
            f"{row['target_nats']:.3g}",
            "out of reach" if missing else f"{row['scale']:.3g}",
            str(row["metric"]),
            "" if missing else f"{row['value']:.3f}",
            *(("", "") if row["gain"] != row["gain"] else _gained(row)),
        )
    console.print(shown)


def _gained(row: Mapping[Hashable, Any]) -> tuple[str, str]:
    return f"{row['gain']:+.3f}", f"{row['gain_low']:+.3f} to {row['gain_high']:+.3f}"


def grid(
    console: Console, table: pd.DataFrame, index: str, title: str, told: Callable[[dict[Hashable, Any]], str]
) -> None:
    """A column per condition, a row per value of `index`."""
    shown = Table(box=None, pad_edge=False, title=title)
    conditions = list(dict.fromkeys(table["condition"]))
    shown.add_column("" if index == "row" else index, justify="right" if index == "scale" else "left", no_wrap=True)
    for condition in conditions:
        shown.add_column(words(str(condition)), justify="right")
    cells = {(row[index], row["condition"]): told(row) for row in table.to_dict("records")}
    for at in dict.fromkeys(table[index]):
        name = f"{at:g}" if index == "scale" else words(str(at))
        shown.add_row(name, *(cells.get((at, condition), "") for condition in conditions))
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
