"""Claim: seeds find the same direction at each layer.

Cosines between the vectors of every two seeds at the same layer, of vectors trained alone and of sets trained at all
layers together. Supported at a layer if every pair of seeds lies above the middle 95 % of the cosines of random
directions; refuted there if one does not (by chance one pair in forty lies above). A seed whose vector is still zero
has no direction and is in no pair.

    uv run python analyses/small_vectors/geometry.py --out runs/small_vectors
"""

from __future__ import annotations

import bank
import pandas as pd
import tyro

from steerlab import readings
from steerlab.runs import Run


def main(options: bank.Options) -> pd.DataFrame:
    """A row per way of training and layer; tables, figures and the doses of one seed go to `OUT/geometry-WAY`."""
    made = bank.trained(options, exact=True)
    problems = 2 if options.scale == "tiny" else 8
    parts = []
    for way in ("alone", "together"):
        sets = {
            f"seed {seed}": made.isolated(seed) if way == "alone" else made.vectors(None, seed) for seed in made.seeds
        }
        between, first = readings.cosines_between(sets), sets[f"seed {made.seeds[0]}"]
        texts = readings.own_texts(made.model, first, made.task, made.evaluation, problems)
        facts = {"model": options.model, "weights_sha256": made.model.weights_sha256}
        run = Run.create(options.out / f"geometry-{way}", kind="analysis", status="done", **facts)
        for found in (between, readings.geometry(made.model, first, texts)):
            found.save(run)
        parts.append(told(between.tables["cosines_between"]).assign(trained=way))
    table = pd.concat(parts, ignore_index=True)
    print(table.to_string(index=False, float_format="%.3f"))
    return table


def told(cosines: pd.DataFrame) -> pd.DataFrame:
    """Lowest, mean and highest cosine over the pairs of seeds, by layer, with the verdict."""
    table = cosines.groupby("layer").agg(
        lowest=("cosine", "min"),
        mean=("cosine", "mean"),
        highest=("cosine", "max"),
        random_high=("high_random", "max"),
        pairs=("cosine", "count"),
    )
    verdict = (table["lowest"] > table["random_high"]).map({True: "supported", False: "refuted"})
    return table.assign(verdict=verdict.where(table["pairs"] > 0, "no direction")).reset_index()


if __name__ == "__main__":
    main(tyro.cli(bank.Options, description=__doc__))
