"""Claim: vectors below the last layer push down tokens of other languages, as 2509.06608 (§5) reads of sixteen tokens.

Here of the whole vocabulary: change of log-probability, mean over tokens of other languages and scripts minus mean over
English ones, of each layer's vector trained alone, on the answers of the set trained at all layers. Supported for a
seed if the gap, mean over the layers below the last, is below 0 and below that of every random direction of equal
length, and the last layer's gap is not as low. Refuted otherwise. The model is trained on English text mostly, so few
of its tokens are another language's: counts stand beside the numbers.

    uv run python analyses/small_vectors/languages.py --out runs/small_vectors
"""

from __future__ import annotations

from dataclasses import dataclass

import bank
import pandas as pd
import tyro

from steerlab import readings
from steerlab.interp.vocabulary import vocabulary_classes
from steerlab.runs import Run

COLUMNS = ["seed", "layers", "trained", "low", "high", "low_draws", "high_draws", "n_english", "n_other", "verdict"]


@dataclass(frozen=True)
class Options(bank.Options):
    """problems: whose answers are read. draws: random directions beside each vector."""

    problems: int = 8
    draws: int = 4


def main(options: Options) -> pd.DataFrame:
    """A row per seed and group of layers; the tables and figures of every seed go to `OUT/languages-SEED`."""
    made, tiny = bank.trained(options, exact=True), options.scale == "tiny"
    classes = vocabulary_classes(made.model.tokenizer, made.model.d_vocab)
    problems, draws = (2, 1) if tiny else (options.problems, options.draws)
    rows = []
    for seed in made.seeds:
        vectors = made.isolated(seed)
        if not any(vectors.norms().values()):
            print(f"seed {seed}: no step had a signal, so there are no vectors to read")
            continue
        texts = readings.own_texts(made.model, made.vectors(None, seed), made.task, made.evaluation, problems, seed)
        found = readings.languages(made.model, vectors, texts, classes=classes, draws=draws, seed=seed)
        facts = {"model": options.model, "weights_sha256": made.model.weights_sha256}
        run = Run.create(options.out / f"languages-{seed}", kind="analysis", status="done", **facts)
        found.save(run)
        rows += told(found.tables["language_gaps"], seed, made.model.n_layers - 1)
    table = pd.DataFrame(rows, columns=COLUMNS)
    none = "no gap: the vocabulary has no English tokens, or none of another language"
    print(table.to_string(index=False, float_format="%.4f") if rows else none)
    return table


def told(gaps: pd.DataFrame, seed: int, last: int) -> list[dict[str, object]]:
    """The mean over all layers below the last, and the last layer; none where there is no gap."""
    part = gaps.loc[gaps["readout"] == "logprob"]
    below, own = part.loc[part["to_layer"] < last], part.loc[part["from_layer"] == last].set_index("condition")
    first, highest = below["from_layer"].min(), below["to_layer"].max()
    whole = below.loc[(below["from_layer"] == first) & (below["to_layer"] == highest)].set_index("condition")
    rows = []
    for name, of in (("below", whole), ("last", own)):
        if of.empty:
            continue
        trained, random = of.loc["trained"], of.loc["random"]
        special = trained["high"] < 0 and trained["value"] < random["low_draws"]
        more = own.empty or trained["value"] < own.loc["trained", "value"]
        rows.append(
            {"seed": seed, "layers": f"{trained['from_layer']}-{trained['to_layer']}", "trained": trained["value"]}
            | {end: trained[end] for end in ("low", "high", "n_english", "n_other")}
            | {end: random[end] for end in ("low_draws", "high_draws")}
            | {"verdict": "control" if name == "last" else "supported" if special and more else "refuted"}
        )
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
