"""What is cheap beside what was trained: mean-difference, PCA and probe vectors at one layer.

Claim: the RL vector beats mean-difference, PCA and probe vectors made from the base model's right and wrong answers to
train problems, at its own length, at the best of several scales of each, and at equal KL from the base on neutral text.
Refuted where the paired 95 % interval of RL − another set, over problems and seeds, reaches 0 or below in one of the
three comparisons. The best scale is chosen on the problems on which it is scored, which favours all sets alike. A
random direction of equal length is the control, and held-out AUROC beside shuffled labels says whether the cheap
directions separate anything at all.

    uv run python analyses/small_vectors/directions.py --out runs/small_vectors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import bank
import numpy as np
import pandas as pd
import torch
import tyro

from steerlab.adapters import SteeringVectors
from steerlab.interp.at_equal_kl import at_equal_kl, name_at_kl
from steerlab.interp.contrast import of_answers
from steerlab.interp.directions import at_norms_of
from steerlab.interp.directions import directions as made_from
from steerlab.interp.magnitudes import BASE, magnitudes, name_at
from steerlab.interp.neutral import Neutral, neutral
from steerlab.plots.magnitudes import magnitudes as drawn
from steerlab.readings import Reading
from steerlab.rollouts.statistics import paired_difference
from steerlab.runs import Run


@dataclass(frozen=True)
class Options(bank.Options):
    """layer: whose vectors are compared; None: of the bank's layers the one with the best mean score over seeds."""

    layer: int | None = None


@dataclass(frozen=True)
class Seed:
    """What one seed gives. correct: share of right answers, a row per set and scale, a column per problem. at_kl: the
    same where sets are equally far from the base. magnitudes, equal: the tables of these names."""

    correct: pd.DataFrame
    at_kl: pd.DataFrame
    magnitudes: pd.DataFrame
    equal: pd.DataFrame


def main(options: Options) -> pd.DataFrame:
    """Compares at every seed of the bank and prints RL − each other set in the three comparisons."""
    tiny = options.scale == "tiny"
    subject = bank.trained(options, exact=True)
    layer = best_layer(subject) if options.layer is None else options.layer
    prose = neutral(subject.model, "", limit=2 if tiny else 14, n_tokens=16 if tiny else 128, least=16)
    if not tiny:
        subject.model.tune()
    cheap, separation = directions_at(subject, layer, tiny)
    scales = (0.0, 1.0, 2.0) if tiny else (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    trained = {seed: subject.vectors(layer, seed) for seed in subject.seeds}
    moved = {seed: vectors for seed, vectors in trained.items() if any(v.any() for v in vectors.vectors.values())}
    if left_out := sorted(set(trained) - set(moved)):
        print(f"seeds {left_out} have a zero vector (no group gave a signal) and are left out")
    seeds = [one_seed(subject, vectors, cheap, seed, scales, prose) for seed, vectors in moved.items()]
    table = compared(seeds, [*(name for name in cheap), "random"]).assign(layer=layer)
    found = pooled([seed.magnitudes for seed in seeds], ["condition", "scale"])
    equal = pd.concat([seed.equal.assign(seed=number) for number, seed in zip(moved, seeds, strict=True)])
    run = Run.create(options.out / "directions", kind="analysis", status="done", layer=layer)
    tables = {"comparison": table, "directions": separation, "magnitudes": found, "at_equal_kl": equal}
    Reading(tables, {"magnitudes": drawn(found)}).save(run)
    print(separation.to_string(index=False, float_format="%.3f"))
    print(table.to_string(index=False, float_format="%.3f"))
    return table


def best_layer(subject: bank.Bank) -> int:
    """Of the bank's layers, the one with the highest avg@k, mean over seeds."""
    scores = subject.home.table("layers").query("metric.str.startswith('avg@')")
    return int(scores.groupby("layer")["value"].mean().idxmax())


def directions_at(subject: bank.Bank, layer: int, tiny: bool) -> tuple[dict[str, SteeringVectors], pd.DataFrame]:
    """The cheap vectors from the base model's answers to all train problems, and how well they separate."""
    asked = replace(subject.evaluation, split="train", samples=8, limit=None)
    if tiny:  # right answers are rare
        asked = replace(asked, samples=32, limit=20, sampling=replace(asked.sampling, max_new_tokens=8))
    contrast = of_answers(subject.model, subject.task, asked)
    found = made_from(subject.model, contrast, (layer,), shuffles=1 if tiny else 10)
    return found.vectors, found.table


def one_seed(
    subject: bank.Bank,
    vectors: SteeringVectors,
    cheap: Mapping[str, SteeringVectors],
    seed: int,
    scales: tuple[float, ...],
    prose: Neutral,
) -> Seed:
    """All sets at the lengths of this seed's vector, at all scales and at its KL."""
    beside = {name: at_norms_of(one, vectors) for name, one in cheap.items()}
    model, task, evaluation = subject.model, subject.task, replace(subject.evaluation, seed=1_000 + seed)
    evaluation = replace(evaluation, samples=min(2, evaluation.samples))
    found = magnitudes(model, task, vectors, evaluation, scales, beside=beside, seed=seed)
    random = vectors.randomise(torch.Generator().manual_seed(seed))
    equal = at_equal_kl(model, {"trained": vectors, **beside, "random": random}, prose, task, evaluation)
    return Seed(by_problem(found.completions), by_problem(equal.completions), found.table, equal.table)


def by_problem(completions: pd.DataFrame) -> pd.DataFrame:
    """Share of right answers, conditions × problems."""
    return completions.pivot_table(index="condition", columns="problem", values="correct", aggfunc="mean")


def compared(seeds: list[Seed], others: list[str]) -> pd.DataFrame:
    """RL − each other set, paired over problems and seeds: at equal length, each at its best scale (the same for all
    seeds), and at the KL of the RL vector; missing where a set does not reach it under every seed."""
    mean = pooled([seed.magnitudes for seed in seeds], ["condition", "scale"])
    best = {str(name): float(part.loc[part["value"].idxmax(), "scale"]) for name, part in mean.groupby("condition")}
    rows: list[dict[str, object]] = []
    for name in others:
        pair = ("trained", name)
        for comparison, scales in (("equal length", (1.0, 1.0)), ("best scale", (best["trained"], best[name]))):
            sides = [
                [seed.correct.loc[name_at(one, scale) if scale else BASE] for seed in seeds]
                for one, scale in zip(pair, scales, strict=True)
            ]
            at = "× {:g} and × {:g}".format(*scales)
            rows.append({"other": name, "comparison": comparison, "at": at, **difference(sides)})
        targets = [float(seed.equal["target_nats"].max()) for seed in seeds]
        called = [[name_at_kl(one, target) for target in targets] for one in pair]
        there = all(it in seed.at_kl.index for it, seed in zip(called[1], seeds, strict=True))
        sides = [[seed.at_kl.loc[it] for it, seed in zip(side, seeds, strict=True)] for side in called if there]
        at = f"{np.mean(targets):.3g} nats per token, mean over seeds"
        rows.append({"other": name, "comparison": "equal KL", "at": at, **difference(sides)})
    return pd.DataFrame(rows)


def difference(sides: list[list[pd.Series]]) -> dict[str, float]:
    """Ours − theirs over seeds × problems, with its interval; missing where there is nothing to compare."""
    if not sides:
        return dict.fromkeys(("value", "low", "high"), float("nan"))
    ours, theirs = (np.stack([scores.to_numpy() for scores in side]) for side in sides)
    told = paired_difference(ours, theirs)
    return {"value": told.value, "low": told.low, "high": told.high}


def pooled(parts: list[pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    """Means over seeds, from the least to the greatest end of their intervals."""
    return pd.concat(parts).groupby(keys, as_index=False, sort=False).agg(
        metric=("metric", "first"), value=("value", "mean"), low=("low", "min"), high=("high", "max"),
        n_problems=("n_problems", "first"), n_samples=("n_samples", "first"),
    )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
