"""What a run's page says of its vectors beside what is cheap: directions without training, lengths, side effects; each
absent if not made."""

from __future__ import annotations

import pandas as pd

from steerlab.plots import at_equal_kl as equal_plots
from steerlab.plots import directions as direction_plots
from steerlab.plots import magnitudes as magnitude_plots
from steerlab.plots import side_effects as side_effect_plots
from steerlab.plots.house import words
from steerlab.report.page import Section, Table
from steerlab.runs import Run


def comparison_sections(run: Run) -> list[Section]:
    """The sections whose tables the run has."""
    names, found = set(run.tables()), []
    if "directions" in names:
        found.append(directions_section(run.table("directions")))
    if "magnitudes" in names:
        found.append(magnitudes_section(run.table("magnitudes")))
    if "side_effects" in names:
        found.append(side_effects_section(run.table("side_effects")))
    if "at_equal_kl" in names:
        found.append(equal_kl_section(run.table("at_equal_kl")))
    return found


def directions_section(table: pd.DataFrame) -> Section:
    """What separates right from wrong without training."""
    best = table.loc[table["auroc"].idxmax()]
    text = (
        f"Directions made from {best['n_positive']} right and {best['n_negative']} wrong texts, nothing trained. The "
        f"best, {words(str(best['method']))} at layer {best['layer']}, puts {_share(best, 'auroc')} of held-out pairs "
        f"in the right order; with shuffled labels the same procedure gives {best['shuffled']:.2f}. (The best of "
        f"{len(table)} that were tried is a little too good.)"
    )
    rows = tuple(
        (
            words(str(row["method"])), str(row["layer"]), _share(row, "auroc"), f"{row['shuffled']:.2f}",
            f"{row['accuracy']:.0%}", f"{row['norm']:.3g}",
        )
        for row in table.to_dict("records")
    )  # fmt: skip
    header = ("method", "layer", "held-out AUROC", "shuffled labels", "held-out accuracy", "length")
    note = "Intervals (95 %) are over problems or pairs, none of which is on both sides; accuracy is over both classes."
    return Section(
        "Directions without training",
        text,
        figures=(direction_plots.directions(table),),
        folded=(("All methods and layers", Table(header, rows, frozenset({1, 2, 3, 4, 5}), note)),),
    )


def magnitudes_section(table: pd.DataFrame) -> Section:
    """Whether the trained length is the best one."""
    told = []
    for condition, part in table.groupby("condition", sort=False):
        best = part.loc[part["value"].idxmax()]
        told.append(f"{words(str(condition))} {_percent(best)} at × {best['scale']:g}")
    text = (
        f"{table['metric'].iloc[0]} on {table['n_problems'].iloc[0]} problems at {table['scale'].nunique()} scales of "
        f"each set, in one decode batch. Best: {', '.join(told)}. (The best of several is a little too good.) × 0 is "
        "the base model. The random direction has the vectors' lengths and is the control."
    )
    return Section("Scale of the vectors", text, figures=(magnitude_plots.magnitudes(table),))


def side_effects_section(table: pd.DataFrame) -> Section:
    """What the vectors do beside the task."""
    kl = table.loc[table["quantity"] == "kl_steered_base"].set_index("condition")
    told = ", ".join(
        f"{row['value']:.3g} nats per token ({words(str(name))})" for name, row in kl.iterrows() if name != "base"
    )
    first = table.iloc[0]
    text = (
        f"On {first['n']} passages of neutral text ({first['measured_on']}) KL(steered ‖ base) is "
        f"{told or 'not there'}. The random direction has the vectors' lengths and is the control."
    )
    rows = tuple(
        (
            words(str(row["condition"])), words(str(row["quantity"])), str(row["measured_on"]), f"{row['value']:.4g}",
            f"{row['low']:.4g} – {row['high']:.4g}", str(row["n"]),
        )
        for row in table.to_dict("records")
    )  # fmt: skip
    header = ("condition", "quantity", "measured on", "value", "95 % interval", "texts or problems")
    return Section(
        "Side effects",
        text,
        figures=(side_effect_plots.side_effects(table),),
        folded=(("All side effects", Table(header, rows, frozenset({3, 4, 5}), "KL in nats per token.")),),
    )


def equal_kl_section(table: pd.DataFrame) -> Section:
    """What the sets score where they are equally far from the base."""
    sets = table.loc[table["condition"] != "base"]
    reached = sets.dropna(subset=["gain"])
    told = "; ".join(
        f"{words(str(row['condition']))} × {row['scale']:.3g}: {100 * row['gain']:+.1f} points "
        f"({100 * row['gain_low']:+.1f} to {100 * row['gain_high']:+.1f}) at {row['target_nats']:.3g} nats"
        for row in reached.to_dict("records")
    )
    missing = sorted({words(str(name)) for name in sets.loc[sets["scale"].isna(), "condition"]})
    text = (
        "Every set at the multiple where it has the same KL(steered ‖ base) on neutral text, scored beside the base "
        f"on the same problems. Gain over the base with its 95 % interval: {told or 'none'}."
    )
    return Section(
        "Scores at equal distance from the base",
        text,
        figures=(equal_plots.at_equal_kl(table),),
        note=f"No scale was found for: {', '.join(missing)}." if missing else "",
    )


def _share(row: pd.Series | dict, name: str) -> str:
    return f"{row[name]:.2f} ({row['low']:.2f} – {row['high']:.2f})"


def _percent(row: pd.Series) -> str:
    return f"{row['value']:.1%} ({row['low']:.1%} – {row['high']:.1%})"
