"""What a page says of an SAE's latents: what vectors do to them, which tell right from wrong answers, what edits do."""

from __future__ import annotations

import pandas as pd

from steerlab.plots import latents as plots
from steerlab.plots.house import readable
from steerlab.report.page import Section, Table
from steerlab.report.tokens import coloured
from steerlab.runs import Run

_ENDS = ("top", "bottom")
SHOWN = 3  # contexts of each latent


def latent_sections(run: Run) -> list[Section]:
    """The sections whose tables the run has."""
    names, found = set(run.tables()), []
    if "latent_effects" in names:
        parts = run.table("decomposition") if "decomposition" in names else None
        found.append(effects_section(run.table("latent_effects"), parts))
    if "latent_correctness" in names:
        again = run.table("latent_replication") if "latent_replication" in names else None
        probes = run.table("correctness_probes") if "correctness_probes" in names else None
        found.append(correctness_section(run.table("latent_correctness"), again, probes))
    if "latent_contexts" in names:
        lens = run.table("latent_tokens") if "latent_tokens" in names else None
        found.append(cards_section(run.table("latent_contexts"), lens))
    if "latents_causal" in names:
        found.append(causal_section(run.table("latents_causal")))
    return found


def effects_section(table: pd.DataFrame, parts: pd.DataFrame | None) -> Section:
    """What the vectors do to each latent."""
    sizes = {
        str(sender): float(part["change"].abs().to_numpy().sum())
        for sender, part in table.groupby("sender", sort=False)
    }
    mine = table.loc[table["sender"] == "trained"]
    most = mine.iloc[int(mine["change"].abs().to_numpy().argmax())].to_dict()
    beside = f" (a random direction of equal length: {sizes['random']:.2f})" if "random" in sizes else ""
    text = (
        f"On {most['n_texts']} answers the vectors change the mean activations of the {len(mine):,} latents by "
        f"{sizes['trained']:.2f} in all{beside}; latent {most['latent']} changes most, by {most['change']:+.3f} "
        f"({most['low']:+.3f} – {most['high']:+.3f}, texts resampled)."
    )
    figures = [plots.latent_effects(table)]
    if parts is not None:
        last = parts.loc[(parts["sender"] == "trained")].iloc[-1].to_dict()
        drawn = parts.loc[(parts["sender"] != "trained") & (parts["n"] == last["n"]), "error"].to_numpy()
        control = f", of random directions {drawn.mean():.0%}" if len(drawn) else ""
        text += f" {last['n']} directions of the SAE leave {last['error']:.0%} of the vector's squared length{control}."
        figures.append(plots.decomposition(parts))
    return Section("What the vectors do to latents", text, figures=tuple(figures))


def correctness_section(table: pd.DataFrame, again: pd.DataFrame | None, probes: pd.DataFrame | None) -> Section:
    """Which latents come with right answers, and whether that holds."""
    ways = [str(way) for way in dict.fromkeys(table["matched"])]
    counts = ", ".join(
        f"{int((table.loc[table['matched'] == way, 'q'].to_numpy() < 0.05).sum())} {plots.WAYS[way]}" for way in ways
    )
    first = table.iloc[0]
    text = (
        f"{first['n_correct']} right and {first['n_incorrect']} wrong completions of {first['n_problems']} problems. "
        f"Of {len(table) // len(ways):,} latents that fire, with a false discovery rate of 5 % differ: {counts}."
    )
    if again is not None:
        shares = again.set_index("labels")["replicated"]
        text += (
            f" Of the {again['n_latents'].iloc[0]} that stand out most in half of the problems, "
            f"{shares['as they are']:.0%} do so in the other half; of those sought with shuffled labels "
            f"{shares['shuffled']:.0%}."
        )
    if probes is not None:
        told = ", ".join(
            f"{row['features']} {row['auroc']:.2f} ({row['low']:.2f} – {row['high']:.2f})"
            for row in probes.to_dict("records")
        )
        text += f" How well a probe predicts which answers to unseen problems are right (AUROC, 0.5 is chance): {told}."
    way = ways[-1]
    figures = (plots.latent_correctness(table, way), plots.latent_volcano(table, way))
    note = "Firing with right answers is no cause of them: steerlab sae causal edits latents while the model answers."
    rows = table.loc[table["matched"] == way].head(25).to_dict("records")
    folded = Table(
        ("latent", "right", "wrong", "difference", "95 % interval", "odds ratio", "q", "family-wise p"),
        tuple(
            (
                str(row["latent"]), f"{row['share_correct']:.1%}", f"{row['share_incorrect']:.1%}",
                f"{row['difference']:+.3f}", f"{row['low']:+.3f} – {row['high']:+.3f}", f"{row['odds_ratio']:.2f}",
                f"{row['q']:.3g}", f"{row['family_p']:.3f}",
            )
            for row in rows
        ),
        frozenset(range(8)),
    )  # fmt: skip
    return Section(
        "Latents and correct answers",
        text,
        figures=figures,
        folded=(("The 25 most telling latents", folded),),
        note=note,
    )


def causal_section(table: pd.DataFrame) -> Section:
    """What editing latents does to answers."""
    rows = table.set_index("condition")
    edited = rows.loc["edited"].to_dict()
    beyond = ""
    if edited["beyond_random"] == edited["beyond_random"]:
        beyond = (
            f"; beside the same edit of latents that fire about as often {edited['beyond_random']:+.3f} "
            f"({edited['beyond_low']:+.3f} – {edited['beyond_high']:+.3f})"
        )
    text = (
        f"With {edited['n_latents']} latents edited ({edited['how']}) while the model answers {edited['n_problems']} "
        f"problems, {edited['metric']} is {edited['value']:.3f}, a change of {edited['change']:+.3f} "
        f"({edited['change_low']:+.3f} – {edited['change_high']:+.3f}, same problems){beyond}."
    )
    return Section("Answers with latents edited", text, figures=(plots.latents_causal(table),))


def cards_section(contexts: pd.DataFrame, lens: pd.DataFrame | None) -> Section:
    """Latents one by one: where they fire most, coloured, and the tokens that they write towards."""
    latents = [int(of) for of in dict.fromkeys(contexts["latent"])]
    passages = []
    for _, part in contexts.loc[contexts["rank"] < SHOWN].groupby(["latent", "rank"], sort=False):
        first, values = part.iloc[0], part["activation"].to_numpy()
        says = [f"latent {first['latent']}: {value:.2f}" for value in values]
        title = f"latent {first['latent']}, context {first['rank'] + 1}, text {first['text']}"
        passages.append(coloured(title, part["token"].tolist(), values.tolist(), says, top=float(values.max())))
    folded = () if lens is None else (("Tokens that they write towards", _lens(lens)),)
    text = (
        f"Where {len(latents)} latents fire most on the texts read, each text once; the colour is the activation as a "
        "share of the context's own largest."
    )
    return Section("Latents one by one", text, passages=tuple(passages), folded=folded)


def _lens(lens: pd.DataFrame) -> Table:
    rows = [
        (str(latent), *(", ".join(readable(str(of)) for of in part.loc[part["end"] == end, "token"]) for end in _ENDS))
        for latent, part in lens.groupby("latent", sort=False)
    ]
    return Table(("latent", "raises", "lowers"), tuple(rows), frozenset({0}))
