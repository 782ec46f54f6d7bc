"""What a run's page says of the paths that carry a vector's effect: patches, attention, attribution; each absent if not
made."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from steerlab.plots import attention as attention_plots
from steerlab.plots import attribution as attribution_plots
from steerlab.plots import patching as patching_plots
from steerlab.plots.house import words
from steerlab.report.circuits import circuit_sections
from steerlab.report.page import Section
from steerlab.report.patch_effects import patch_effects_section
from steerlab.runs import Run


def path_sections(run: Run) -> list[Section]:
    """The sections whose tables the run has."""
    names, found = set(run.tables()), []
    if "attribution" in names:
        found.append(attribution_section(run.table("attribution")))
    if {"attention", "frozen_attention"} <= names:
        found.append(attention_section(run.table("attention"), run.table("frozen_attention")))
    effects = ("patch_effects", "patch_tokens", "patch_groups")
    if set(effects) <= names:
        found.append(patch_effects_section(*(run.table(name) for name in effects)))
    patched = [name for name in sorted(names) if name.startswith("patching_")]
    return found + [patching_section(run.table(name)) for name in patched] + circuit_sections(run)


def attribution_section(table: pd.DataFrame) -> Section:
    """Through what the effect reaches the logits."""
    part = table.loc[(table["sender"] == "trained") & (table["generated"] == -1)]
    by_kind = part.groupby("kind")["value"].sum()
    told = ", ".join(
        f"{name} {by_kind[kind]:+.2f}" for kind, name in attribution_plots.KINDS.items() if kind in by_kind.index
    )
    text = (
        f"The vectors raise the logit of the next token, over the base model's likeliest other, by "
        f"{by_kind['total']:+.2f} on average over the answers' positions ({part['n_texts'].iloc[0]} texts). It arrives "
        f"directly through: {told}. The parts add up exactly."
    )
    figures = [attribution_plots.attribution(table)]
    if "head" in set(table["kind"]):
        figures.append(attribution_plots.attribution_heads(table))
    return Section("Direct logit attribution", text, figures=tuple(figures))


def attention_section(table: pd.DataFrame, frozen: pd.DataFrame) -> Section:
    """Whether heads look elsewhere, and whether that matters."""
    means = {sender: table.loc[table["sender"] == sender, "value"].to_numpy().mean() for sender in set(table["sender"])}
    beside = f" (a random direction of equal length: {means['random']:.3f})" if "random" in means else ""
    left = frozen.loc[(frozen["patch"] == "frozen_attention") & (frozen["sender"] == "trained")]
    told = ", ".join(f"{_kept(row)} of that on {words(str(row['metric']))}" for row in left.to_dict("records"))
    text = (
        f"Heads move {means['trained']:.3f} of their attention elsewhere because of the vectors, on average{beside}. "
        f"With all patterns held at the base model's, what is left of the effect is {told}."
    )
    return Section("Attention", text, figures=(attention_plots.attention(table),))


def patching_section(table: pd.DataFrame) -> Section:
    """Which parts of the next block carry a vector's effect."""
    first, trained = table.iloc[0], table.loc[table["sender"] == "trained"]
    lines = trained.loc[(trained["family"] == "line") & ~trained["patch"].isin(("no_patch", "base"))]
    told = ", ".join(f"{words(str(row['patch']))} {_kept(row)}" for row in lines.to_dict("records"))
    skipped = trained.loc[trained["family"].str.startswith("skip_")].dropna(subset=["kept"])
    most = "" if skipped.empty else f" Of single parts {_named(skipped.loc[skipped['kept'].idxmin()])} matters most."
    text = (
        f"Block {first['layer'] + 1} reads two streams, with and without the vector of layer {first['layer']}; what is "
        f"left of the effect on {first['metric']} (0 as the base model, 1 as unpatched) when one part does not see it: "
        f"{told}.{most} {first['n']} problems or texts, {first['n_seeds']} training seed(s)."
    )
    figures = []
    for sender in dict.fromkeys(str(name) for name in table["sender"]):
        known = table.loc[table["sender"] == sender, "kept"].notna().any()
        figures.append(patching_plots.patching(table, sender, "kept" if known else "value"))
    note = "The second figure is of a random direction of the same length." if len(figures) > 1 else ""
    return Section(
        f"Patching the next block, by {words(str(first['metric']))}", text, figures=tuple(figures), note=note
    )


def _kept(row: dict[Hashable, Any]) -> str:
    if row["kept"] != row["kept"]:
        return "undefined (the effect is within its noise of 0)"
    return f"{row['kept']:.2f} ({row['kept_low']:.2f} – {row['kept_high']:.2f})"


def _named(row: pd.Series) -> str:
    return f"{words(str(row['patch']))}, {_kept(row.to_dict())},"
