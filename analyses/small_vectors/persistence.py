"""Claim (2509.06608 §5): a vector's effect keeps one direction up to the output (Diff-Diff high, above 0.3 by a third
party's note) and does not turn into the later layers' own vectors (Diff-Vector low).

The bank's isolated vectors in the paper's protocol (each on texts that the model steered by it has written), three
seeds, beside random directions of equal length. Diff-Diff alone is no evidence: a random direction also keeps one
direction. Refuted if the trained vectors' mean Diff-Diff at the last layer is below 0.3 or not above that of random
ones; the second part, if the mean Diff-Vector off the diagonal is above 0.3.

    uv run python analyses/small_vectors/persistence.py --out runs/small_vectors
"""

from __future__ import annotations

import pandas as pd
import tyro
from bank import Options, keep, trained
from scipy import stats

from steerlab import readings
from steerlab.interp.persistence import persistence
from steerlab.plots.persistence import persistence as plot
from steerlab.rollouts.statistics import bootstrap_interval

QUANTITIES = ("diff_diff", "diff_vector")


def main(options: Options) -> pd.DataFrame:
    """Prints both quantities, trained and random, and how they fall with distance. Returns the first."""
    bank = trained(options, exact=True)
    n_texts = 2 if options.scale == "tiny" else 8
    parts = []
    for seed in bank.seeds:
        texts = {
            layer: readings.own_texts(bank.model, bank.vectors(layer, seed), bank.task, bank.evaluation, n_texts)
            for layer in bank.layers
        }
        parts.append(persistence(bank.model, bank.isolated(seed), texts, seed=seed).table.assign(seed=seed))
    table = pd.concat(parts, ignore_index=True)
    first = table.loc[table["seed"] == bank.seeds[0]]
    keep(
        options,
        "persistence",
        readings.Reading({"persistence": table}, {f"persistence_{q}": plot(first, q) for q in QUANTITIES}),
    )
    found = pd.DataFrame(list(summarised(table, bank.layers)))
    print(found.to_string(index=False, float_format="%.3f"))
    return found


def summarised(table: pd.DataFrame, layers: tuple[int, ...]) -> list[dict[str, object]]:
    """Means over pairs of layers that have a vector, interval over sources; and Spearman's ρ with their distance."""
    rows = []
    apart = table.loc[(table["source"] < table["layer"]) & table["layer"].isin(layers)]
    for quantity in QUANTITIES:
        for condition in ("trained", "random"):
            part = apart.loc[(apart["quantity"] == quantity) & (apart["condition"] == condition)]
            at_end = part.loc[part["layer"] == part["layer"].max()]
            for where, chosen in (("last layer", at_end), ("all pairs", part)):
                interval = bootstrap_interval(chosen.groupby("source")["value"].mean().to_numpy(), bounds=(-1.0, 1.0))
                far = (
                    stats.spearmanr(chosen["value"], chosen["layer"] - chosen["source"]).statistic
                    if len(chosen) > 2
                    else float("nan")
                )
                rows.append(
                    {"quantity": quantity, "condition": condition, "at": where}
                    | {"value": interval.value, "low": interval.low, "high": interval.high, "rho_distance": far}
                )
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
