"""Claim (2509.06608 §4): a vector at almost any single layer learns the task; and, by an independent report (core.md
§5.1: rank correlation 0.917), how well is foretold by the energy of the reward's gradient before training.

The bank's isolated vectors, three seeds each, beside the base model, vectors at all layers, and the base model given
the token that the last layer's vectors raise most. Refuted if fewer than half of the layers lie above the base model's
interval; the second part, if the interval of the rank correlation includes 0.

    uv run python analyses/small_vectors/layer_curve.py --out runs/small_vectors
"""

from __future__ import annotations

import pandas as pd
import tyro
from bank import Options, keep, trained

from steerlab import readings
from steerlab.held_out import answer
from steerlab.interp.gradient_energy import gradient_energy, rank_correlation
from steerlab.interp.substitution import raised_first
from steerlab.interp.token_effects import token_effects
from steerlab.plots.gradient_energy import gradient_energy as plot_energy
from steerlab.plots.layers import layers as plot_layers
from steerlab.rollouts import Condition

SAMPLES = 8


def main(options: Options) -> pd.DataFrame:
    """Prints score and energy by layer, and the correlation of the two. Returns the first."""
    bank = trained(options)
    layers, scores = bank.home.table("layers"), bank.home.table("scores")
    texts = readings.own_texts(bank.model, bank.vectors(bank.layers[-1], bank.seeds[0]), bank.task, bank.evaluation, 32)
    token, _ = raised_first(token_effects(bank.model, texts, bank.vectors(bank.layers[-1], bank.seeds[0]), k=1))
    opened = Condition(None, bank.task.opened(token), bank.evaluation.sampling, bank.evaluation.samples)
    _, given = answer(bank.model, bank.task, bank.evaluation, {f"base, given “{token}”": opened})
    compared = pd.concat([scores, given], ignore_index=True)
    problems = bank.task.problems("train")[: 3 if options.scale == "tiny" else None]
    energy = gradient_energy(bank.model, bank.task, problems, layers=bank.layers, samples=SAMPLES)
    of_layer = layers.loc[layers["metric"].str.startswith("avg@")].groupby("layer")["value"]
    table = energy.assign(
        score=of_layer.mean().loc[energy["layer"]].to_numpy(),
        least=of_layer.min().loc[energy["layer"]].to_numpy(),
        most=of_layer.max().loc[energy["layer"]].to_numpy(),
    )
    figures = {"layers": plot_layers(layers, compared), "gradient_energy": plot_energy(energy, layers)}
    keep(
        options,
        "layer_curve",
        readings.Reading({"layers": layers, "scores": compared, "gradient_energy": energy}, figures),
    )
    print(table.to_string(index=False, float_format="%.4g"))
    shown = compared.loc[compared["metric"].str.startswith("avg@"), ["condition", "metric", "value", "low", "high"]]
    print(shown.to_string(index=False, float_format="%.3f"))
    if len(table) >= 4:
        print(
            "rank correlation of score and energy:",
            rank_correlation(table["score"].to_numpy(), table["energy"].to_numpy()),
        )
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
