"""Claim (2509.06608 §6): the last layer's vector substitutes tokens. Giving the base model the one token that it raises
most, as the first of the answer, has about 75 % of its gain; the vector at that one position has most of it.

The bank's last-layer vectors, three seeds pooled, sampled and greedy; controls: another token, a random direction.
Residual test: vectors of the last and the penultimate layer trained anew with the token given. Refuted if the interval
of the share lies below 0.5; open if the vector's own gain is not above 0, for then there is nothing to share.

    uv run python analyses/small_vectors/last_layer.py --out runs/small_vectors
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import tyro
from bank import SIZES, Bank, Options, keep, trained

from steerlab import readings
from steerlab.interp.substitution import raised_first, substitution
from steerlab.interp.token_effects import token_effects
from steerlab.plots.substitution import substitution as plot
from steerlab.plots.token_effects import raised_tokens
from steerlab.progress import Progress
from steerlab.recipes import rloo
from steerlab.sweep import sweep_layers


def main(options: Options) -> pd.DataFrame:
    """Prints both tests. Returns the table of the substitution."""
    bank = trained(options)
    last = bank.layers[-1]
    sets = [bank.vectors(last, seed) for seed in bank.seeds]
    texts = readings.own_texts(bank.model, sets[0], bank.task, bank.evaluation, 32)
    effects = token_effects(bank.model, texts, sets[0])
    token, other = raised_first(effects)
    table = substitution(bank.model, bank.task, sets, bank.evaluation, token, other)
    figures = {"substitution": plot(table), "raised_tokens": raised_tokens(effects.tokens)}
    tables = {"substitution": table, "raised_tokens": effects.tokens, "token_effects": effects.positions}
    residual = retrained(options, bank, token)
    keep(options, "last_layer", readings.Reading(tables | {"layers": residual}, figures))
    print(table.drop(columns=["other", "n_problems"]).to_string(index=False, float_format="%.3f"))
    print(f"trained anew with “{token}” given:")
    print(residual[["layer", "seed", "value", "low", "high"]].to_string(index=False, float_format="%.3f"))
    return table


def retrained(options: Options, bank: Bank, token: str) -> pd.DataFrame:
    """The `layers` table of the last two layers' vectors, trained on the task with `token` given."""
    size = SIZES[options.scale]
    experiment = rloo(
        bank.task.opened(token), options.model, steps=size.steps, prompts=size.prompts, samples=size.samples
    )
    experiment = replace(experiment, evaluation=replace(bank.evaluation, greedy=False, shots=0))
    with Progress() as progress:
        home = sweep_layers(
            replace(experiment, updater=replace(experiment.updater, lr=size.lr[1])),
            options.out / "given_token",
            layers=bank.layers[-2:],
            seeds=bank.seeds,
            reporter=progress,
        )
    base = home.table("scores").query("condition == 'base'")
    print(base[["condition", "metric", "value", "low", "high"]].to_string(index=False, float_format="%.3f"))
    return home.table("layers").query("metric.str.startswith('avg@')")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
