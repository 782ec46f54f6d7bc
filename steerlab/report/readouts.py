"""What a run's page says of its readings: stream lens, token effects, persistence, composition, transfer; absent if not
made."""

from __future__ import annotations

import pandas as pd

from steerlab.plots import adaptive as adaptive_plots
from steerlab.plots import composition as composition_plots
from steerlab.plots import geometry as geometry_plots
from steerlab.plots import languages as language_plots
from steerlab.plots import persistence as persistence_plots
from steerlab.plots import residual_lens as lens_plots
from steerlab.plots import substitution as substitution_plots
from steerlab.plots import token_effects as effect_plots
from steerlab.plots import transfer as transfer_plots
from steerlab.plots.house import readable
from steerlab.report.page import Section, Table
from steerlab.runs import Run


def reading_sections(run: Run) -> list[Section]:
    """The sections whose tables the run has."""
    names, found = set(run.tables()), []
    if {"residual_lens", "lens_spread"} <= names:
        found.append(stream_section(run.table("residual_lens"), run.table("lens_spread")))
    if {"token_effects", "raised_tokens"} <= names:
        found.append(effects_section(run.table("token_effects"), run.table("raised_tokens")))
    if "substitution" in names:
        found.append(substitution_section(run.table("substitution")))
    if "persistence" in names:
        found.append(persistence_section(run.table("persistence")))
    if {"languages", "language_gaps"} <= names:
        found.append(languages_section(run.table("languages"), run.table("language_gaps")))
    if "cosines_between" in names:
        found.append(cosines_section(run.table("cosines_between")))
    if {"adaptive", "adaptive_shares"} <= names:
        found.append(adaptive_section(run.table("adaptive"), run.table("adaptive_shares")))
    if {"composition", "composition_sets"} <= names:
        told = run.table("composition_agreement") if "composition_agreement" in names else None
        found.append(composition_section(run.table("composition"), run.table("composition_sets"), told))
    if "transfer" in names:
        maps = run.table("transfer_maps") if "transfer_maps" in names else None
        found.append(transfer_section(run.table("transfer"), maps))
    return found


def adaptive_section(table: pd.DataFrame, shares: pd.DataFrame) -> Section:
    """At which tokens a vector of token-wise strength acts."""
    known = shares.loc[shares["token_share"] > 0]
    ratio = known["magnitude_share"] / known["token_share"]
    by_segment = ratio.groupby(known["segment"]).mean().sort_values(ascending=False)
    told = ", ".join(f"{segment} {value:.2f}" for segment, value in by_segment.items())
    significant = sum(p < 0.05 for p in shares["p"])
    text = (
        f"Share of the strength over share of the tokens, mean over {shares['layer'].nunique()} layers and "
        f"{shares['n_texts'].iloc[0]} texts: {told} (1 would be no preference). Of {len(shares)} pairs of layer and "
        f"segment, {significant} differ from what circular shifts within the texts give at p < 0.05; 5 % would "
        "by chance. The first token of each text is left out."
    )
    figures = (adaptive_plots.adaptive(table), adaptive_plots.adaptive_shares(shares))
    return Section("Token-wise strength", text, figures=figures)


def stream_section(lens: pd.DataFrame, spread: pd.DataFrame) -> Section:
    """What each layer would say: base and steered on the same tokens."""
    half = spread["layer"] == spread["layer"].max() // 2
    middle = spread.loc[half].groupby("condition", observed=True)["kl_nats"].mean()
    told = ", ".join(f"{value:.2f} nats ({condition})" for condition, value in middle.items())
    tuned = "lens" in spread.columns and "tuned" in set(spread["lens"])
    behind = "to what a tuned lens makes of every block's output" if tuned else "after every block"
    return Section(
        "Logit lens of the residual stream",
        f"The model's own final norm and unembedding, applied {behind} at every position of the same tokens. "
        f"Distance of the middle layer {spread['layer'].max() // 2} from the final answer, mean over "
        f"{spread['text'].nunique()} texts: {told}. The random direction has the vectors' lengths and is the control.",
        figures=(
            lens_plots.lens_spread(spread),
            *(lens_plots.residual_lens(lens, condition) for condition in ("base", "steered")),
        ),
    )


def effects_section(positions: pd.DataFrame, means: pd.DataFrame) -> Section:
    """Which tokens are raised and lowered, and where."""
    first = positions.loc[positions["generated"] == 0, "raised_delta"].mean()
    rest = positions.loc[positions["generated"] > 0, "raised_delta"].mean()
    own = positions["raised_was_base_argmax"].mean()
    later = f", {rest:.3f} at later ones" if rest == rest else ""
    text = (
        f"On {positions['text'].nunique()} answers of the steered model, base and steered read on the same tokens: the "
        f"token raised most gains {first:.3f} of probability at the first generated position{later}; at {own:.0%} of "
        "positions it was what the base model would have said anyway."
    )
    rows = tuple(
        (
            str(row["where"]), str(row["end"]), readable(str(row["token"])), f"{row['delta']:+.4f}",
            f"{row['low']:+.4f} – {row['high']:+.4f}", str(row["n_texts"]),
        )
        for row in means.to_dict("records")
    )  # fmt: skip
    header = ("position", "end", "token", "mean Δp", "95 % interval", "texts")
    table = Table(header, rows, frozenset({3, 4, 5}), "The interval is over texts.")
    return Section(
        "Token effects",
        text,
        figures=(effect_plots.raised_tokens(means), effect_plots.token_effects(positions)),
        folded=(("All raised and lowered tokens", table),),
    )


def substitution_section(table: pd.DataFrame) -> Section:
    """Whether a token given to the base model does what the vectors do."""
    token, other = (readable(str(table[name].iloc[0])) for name in ("token", "other"))
    told = []
    for row in table.loc[table["condition"] == "appended"].to_dict("records"):
        heat = "greedily" if row["temperature"] == 0 else f"at temperature {row['temperature']:g}"
        share = f"{row['share']:.0%} ({row['share_low']:.0%} to {row['share_high']:.0%}) of the vectors' gain"
        known = share if row["share"] == row["share"] else "a share that is not defined, since the vectors gain nothing"
        gain = f"{row['gain']:+.3f} ({row['gain_low']:+.3f} to {row['gain_high']:+.3f})"
        told.append(f"{heat} it gains {gain}, {known}")
    text = (
        f"The base model was given “{token}” to begin its answers with, the token that the vectors raise most at the "
        f"first generated position: {'; '.join(told)}. Controls: “{other}”, the token lowered most there, and a random "
        f"direction of equal length. {table['n_problems'].iloc[0]} held-out problems, intervals of 95 % over them."
    )
    return Section("Token substitution", text, figures=(substitution_plots.substitution(table),))


def persistence_section(table: pd.DataFrame) -> Section:
    """How long each vector's effect lives."""
    last = table.loc[(table["layer"] == table["layer"].max()) & (table["source"] < table["layer"])]
    one = last.loc[last["quantity"] == "diff_diff"].groupby("condition", sort=False)["value"].mean()
    told = ", ".join(f"{value:.2f} ({condition})" for condition, value in one.items())
    text = (
        "Δ is what one layer's vector alone has become by a later layer, on the same tokens. At the last layer a "
        f"token's Δ has with the mean Δ of its text a cosine of {told or 'nothing'}, mean over the vectors below."
    )
    return Section(
        "Persistence",
        text,
        figures=tuple(persistence_plots.persistence(table, name) for name in ("diff_vector", "diff_diff", "length")),
    )


def composition_section(pairs: pd.DataFrame, sets: pd.DataFrame, agreement: pd.DataFrame | None) -> Section:
    """Whether vectors that were trained alone add up."""
    off = pairs.loc[pairs["layer_i"] < pairs["layer_j"]]
    told = []
    for condition, part in off.groupby("condition", sort=False):
        up, down = (part["gain_low"] > 0).sum(), (part["gain_high"] < 0).sum()
        told.append(f"of {len(part)} pairs ({condition}) {up} gain over the better of the two and {down} lose")
    known, all_known = off["relative"].notna().sum(), len(off)
    rows = tuple(
        (
            str(row["condition"]), str(row["layers"]) or "none", str(row["split"]),
            f"{row['value']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}",
        )
        for row in sets.to_dict("records")
    )  # fmt: skip
    header = ("condition", "layers", "split", str(sets["metric"].iloc[0]), "95 % interval")
    tables = [Table(header, rows, frozenset({3, 4}), "Greedy chooses on one split and is told on the other.")]
    if agreement is not None:
        rows = tuple(
            (
                str(row["predictor"]), str(row["outcome"]), f"{row['r']:.2f}",
                "too few layers" if row["low"] != row["low"] else f"{row['low']:.2f} – {row['high']:.2f}",
                f"{row['p']:.3f}", str(row["n_pairs"]),
            )
            for row in agreement.dropna(subset="r").to_dict("records")
        )  # fmt: skip
        header = ("predictor", "of pairs", "Pearson's r", "95 % interval", "p", "pairs")
        caption = "Interval: layers resampled. p: layers permuted. Not corrected for the number of rows."
        tables.append(Table(header, rows, frozenset({2, 3, 4, 5}), caption))
    drawn = [composition_plots.composition(pairs), composition_plots.composition(pairs, "value")]
    return Section(
        "Composition",
        f"Vectors that were trained alone, used together: {'; '.join(told)} (paired 95 % intervals, not corrected for "
        f"their number). The share of what vectors trained together gain is known for {known} of {all_known} pairs.",
        figures=(*drawn, composition_plots.composition_sets(sets)),
        tables=tuple(tables),
    )


def transfer_section(table: pd.DataFrame, maps: pd.DataFrame | None) -> Section:
    """What donors' vectors do in recipients."""
    rows = tuple(
        (
            str(row["donor"]) or "none", str(row["recipient"]), str(row["map"]), f"{row['value']:.3f}",
            f"{row['low']:.3f} – {row['high']:.3f}",
            f"missing: {row['why']}" if row["normalised"] != row["normalised"]
            else f"{row['normalised']:.2f} ({row['normalised_low']:.2f} – {row['normalised_high']:.2f})",
        )
        for row in table.to_dict("records")
    )  # fmt: skip
    header = ("donor", "recipient", "map", str(table["metric"].iloc[0]), "95 % interval", "normalised (95 % interval)")
    quantities = ("value", "normalised") if len(table["normalised"].dropna()) else ("value",)
    text = (
        "The normalised score is 0 where the recipient scores as without vectors and 1 where it scores as with its own."
    )
    if maps is not None:
        text += (
            f" Between unlike models vectors went through {', '.join(dict.fromkeys(maps['method']))} maps, which "
            f"predict {maps['r2'].min():.0%} to {maps['r2'].max():.0%} of the recipient's variance on held-out texts."
        )
    return Section(
        "Transfer",
        text,
        figures=tuple(transfer_plots.transfer(table, name) for name in quantities),
        folded=(("All cells", Table(header, rows, frozenset({3, 4, 5}))),),
    )


def languages_section(table: pd.DataFrame, gaps: pd.DataFrame) -> Section:
    """What the vectors do to tokens of other languages: the widest average below the last layer, and the last layer."""
    text = (
        "Every token of the vocabulary is in one class by script and word frequency; each layer's vector is added "
        "alone. Intervals over tokens say how well a mean is known; whether it is special is for the random directions "
        "of equal length to say. "
    )
    figures = (language_plots.languages(table, "logprob"), language_plots.languages(table, "cosine"))
    if gaps.empty:
        return Section(
            "Languages", text + "The vocabulary has no English tokens, or none of another language.", figures=figures
        )
    part = gaps.loc[gaps["readout"] == "logprob"]
    widest = part.assign(width=part["to_layer"] - part["from_layer"]).sort_values("width", kind="stable").iloc[-1]
    last = part["to_layer"].max()
    spans = dict.fromkeys([(widest["from_layer"], widest["to_layer"]), (last, last)])
    text += " ".join(_gap_told(part, int(low), int(high)) for low, high in spans)
    return Section("Languages", text, figures=(language_plots.language_gaps(gaps), *figures))


def _gap_told(gaps: pd.DataFrame, low: int, high: int) -> str:
    """The gap of one group of source layers in words."""
    rows = gaps.loc[(gaps["from_layer"] == low) & (gaps["to_layer"] == high)].set_index("condition")
    trained, random = rows.loc["trained"], rows.loc["random"]
    where = f"layer {low}" if low == high else f"layers {low}–{high} (mean)"
    inside = random["low_draws"] <= trained["value"] <= random["high_draws"]
    return (
        f"The log-probability of the {trained['n_other']} tokens of other languages changes by {trained['value']:+.4f} "
        f"nats more than that of the {trained['n_english']} English ones with the vectors of {where} (95 % interval "
        f"over tokens {trained['low']:+.4f} to {trained['high']:+.4f}), and by {random['low_draws']:+.4f} to "
        f"{random['high_draws']:+.4f} with {random['n_draws']} random directions: {'inside' if inside else 'outside'} "
        "their range."
    )


def cosines_section(table: pd.DataFrame) -> Section:
    """Whether runs found the same directions."""
    known = table.dropna(subset=["cosine"])
    above = known["cosine"].gt(known["high_random"]).tolist().count(True)
    runs = ", ".join(dict.fromkeys([*table["run_i"], *table["run_j"]]))
    text = (
        f"Vectors of the same layer in two runs ({runs}): at {above} of {len(known)} places their cosine lies above "
        f"the middle 95 % of random directions (up to {table['high_random'].max():.3f})"
    )
    text += f"; mean cosine {known['cosine'].mean():+.3f}." if len(known) else "."
    return Section("Cosines between runs", text, figures=(geometry_plots.cosines_between(table),))
