"""Composition: do vectors that were trained alone add up when they are used together? (arXiv 2509.06608 App. D)

Of every pair of layers, both vectors at once and unscaled (i = j: the vector by itself); what the pair gains over the
better of the two, and that gain as a share of what vectors trained together gain over it,

    rel[i,j] = (acc_ij − max(acc_i, acc_j)) / (acc_all − max(acc_i, acc_j)),

missing where the denominator is within its noise of 0. max(acc_i, acc_j) is the larger of two noisy numbers, so gains
err on the low side. Beside it pairs of random directions of the same lengths, the sum of all vectors, and a greedy
choice: the layer that raises the score most is added until none does, chosen on one split and told on the other.

`agreement` asks whether persistence (2509.06608 §5) or distance says which pairs get along. Pairs that share a layer
are not independent evidence, so intervals resample layers and p permutes them (Mantel 1967). Left out: scales, triples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.answers import RESAMPLES, Scores, Seeds, described, scored
from steerlab.models import LanguageModel
from steerlab.rollouts import Evaluation
from steerlab.rollouts.evaluate import Done
from steerlab.rollouts.statistics import paired_difference, share_of_gain
from steerlab.tasks import Task

PREDICTORS = ("diff_vector", "diff_diff", "distance")
OUTCOMES = ("value", "gain", "relative")
FEWEST_LAYERS = 5  # with fewer, hardly any resample of layers says something else than all of them
Pair = tuple[int, int]


@dataclass(frozen=True)
class Composition:
    """pairs: table `composition`. sets: table `composition_sets`."""

    pairs: pd.DataFrame
    sets: pd.DataFrame


@dataclass(frozen=True)
class _Asking:
    """What every score is asked of."""

    model: LanguageModel
    task: Task
    vectors: tuple[SteeringVectors, ...]
    evaluation: Evaluation
    done: Done | None

    @property
    def layers(self) -> tuple[int, ...]:
        return self.vectors[0].layers

    def at(self, layers: Sequence[int]) -> Seeds:
        """The vectors of some layers, of every seed; no layers: the base model, once."""
        return [of.select(layers) for of in self.vectors] if layers else [None]

    def scores(self, sets: dict[str, Seeds], evaluation: Evaluation | None = None) -> dict[str, Scores]:
        return scored(self.model, self.task, sets, evaluation or self.evaluation, self.done)


def composition(
    model: LanguageModel,
    task: Task,
    vectors: SteeringVectors | Sequence[SteeringVectors],
    evaluation: Evaluation,
    *,
    together: SteeringVectors | Sequence[SteeringVectors] | None = None,
    selection: Evaluation | None = None,
    control: int = 12,
    seed: int = 0,
    done: Done | None = None,
) -> Composition:
    """All pairs of `vectors`, a set of vectors each of which was trained alone (or one such set per training seed).

    together: vectors trained at all layers at once, for `relative`; one set, or one per seed. selection: where greedy
    chooses; by default the other split. control: how many pairs of random directions. done: hears of progress.

    Raises UsageError for less than two layers, seeds with vectors at unequal layers, or a selection on the problems
    that results are told of.
    """
    asking = _Asking(model, task, _seeds(vectors), evaluation, done)
    chosen_on = selection or replace(evaluation, split="train" if evaluation.split == "test" else "test")
    if chosen_on.split == evaluation.split:
        raise UsageError(f"greedy would choose and be told on the {evaluation.split} split; give selection the other")
    if together is not None:
        together = _as_tuple(together)
        if len(together) not in (1, len(asking.vectors)):
            raise UsageError(f"{len(together)} sets trained together, {len(asking.vectors)} seeds; give equally many")
    every = list(combinations(asking.layers, 2))
    drawn = np.random.default_rng(seed).permutation(len(every))[:control]
    singles = [(layer, layer) for layer in asking.layers]
    random = replace(asking, vectors=_randomised(asking.vectors, seed))
    wanted = {"trained": sorted([*singles, *every])}
    if len(drawn):
        pairs = [every[n] for n in drawn]
        wanted["random"] = sorted([*((layer, layer) for layer in {of for pair in pairs for of in pair}), *pairs])
    sets: dict[str, Seeds] = {"base": [None], "sum": asking.at(asking.layers), "random sum": random.at(asking.layers)}
    if together is not None:
        sets["together"] = together
    for condition, pairs in wanted.items():
        of = asking if condition == "trained" else random
        sets |= {_name(condition, pair): of.at(sorted(set(pair))) for pair in pairs}
    scores = asking.scores(sets)
    rows = [
        row
        for condition, pairs in wanted.items()
        for row in _pair_rows(condition, pairs, scores, asking, scores.get("together"))
    ]
    others = _set_rows(asking, scores, () if together is None else together[0].layers)
    path = _greedy(asking, chosen_on)
    return Composition(
        tables.check(pd.DataFrame(rows), "composition"),
        tables.check(pd.DataFrame([*others, *_greedy_rows(asking, path, chosen_on)]), "composition_sets"),
    )


def _as_tuple(given: SteeringVectors | Sequence[SteeringVectors]) -> tuple[SteeringVectors, ...]:
    return (given,) if isinstance(given, SteeringVectors) else tuple(given)


def _seeds(vectors: SteeringVectors | Sequence[SteeringVectors]) -> tuple[SteeringVectors, ...]:
    found = _as_tuple(vectors)
    if not found or len(found[0].layers) < 2:
        raise UsageError("there is nothing to combine; give vectors of at least two layers, each trained alone")
    for number, other in enumerate(found):
        if other.layers != found[0].layers:
            raise UsageError(
                f"seed number {number} has vectors at layers {list(other.layers)}, the first at "
                f"{list(found[0].layers)}; give the same layers of every seed"
            )
    return found


def _randomised(vectors: Sequence[SteeringVectors], seed: int) -> tuple[SteeringVectors, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(of.randomise(generator) for of in vectors)


def _name(condition: str, pair: Pair) -> str:
    return f"{condition} {pair[0]} {pair[1]}"


def _pair_rows(
    condition: str, pairs: Sequence[Pair], scores: dict[str, Scores], asking: _Asking, ceiling: Scores | None
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    missing = float("nan")
    for i, j in pairs:
        score = scores[_name(condition, (i, j))]
        row: dict[str, object] = {"condition": condition, "layer_i": i, "layer_j": j}
        row |= described(score, asking.evaluation)
        gain, share = (0.0, 0.0, 0.0), (missing, missing, missing)
        why = "a single vector" if i == j else "no vectors that were trained together"
        if i != j:
            singles = [scores[_name(condition, (layer, layer))] for layer in (i, j)]
            better = max(singles, key=np.mean)
            found = paired_difference(score, better, resamples=RESAMPLES)
            gain = (found.value, found.low, found.high)
            if ceiling is not None:
                part = share_of_gain(score, singles, ceiling, resamples=RESAMPLES)
                share, why = (part.value, part.low, part.high), part.why
        row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
        row |= dict(zip(("relative", "relative_low", "relative_high"), share, strict=True)) | {"why": why}
        rows.append(row)
    return rows


def _set_rows(asking: _Asking, scores: dict[str, Scores], together: Sequence[int]) -> list[dict[str, object]]:
    which = {"base": (), "sum": asking.layers, "random sum": asking.layers, "together": together}
    return [_set_row(name, layers, asking.evaluation, scores[name]) for name, layers in which.items() if name in scores]


def _set_row(condition: str, layers: Sequence[int], evaluation: Evaluation, score: Scores) -> dict[str, object]:
    named = {"condition": condition, "layers": " ".join(map(str, layers)), "n_vectors": len(layers)}
    return {**named, "split": evaluation.split, **described(score, evaluation)}


def _greedy(asking: _Asking, selection: Evaluation) -> list[tuple[tuple[int, ...], Scores]]:
    """Layers chosen so far and their scores on `selection`, from the base model on; each scores above the one before.
    Seeds choose together; of equals the lowest layer."""
    path: list[tuple[tuple[int, ...], Scores]] = [((), asking.scores({"base": [None]}, selection)["base"])]
    while len(path[-1][0]) < len(asking.layers):
        chosen, before = path[-1]
        tried = {_grown(chosen, layer): layer for layer in asking.layers if layer not in chosen}
        scores = asking.scores({name: asking.at([*chosen, layer]) for name, layer in tried.items()}, selection)
        best = max(scores, key=lambda name: scores[name].mean())
        if scores[best].mean() <= before.mean():
            break
        path.append(((*chosen, tried[best]), scores[best]))
    return path


def _grown(chosen: Sequence[int], layer: int) -> str:
    """How progress calls a step of greedy."""
    return " ".join(str(of) for of in ("greedy", *chosen, layer))


def _greedy_rows(
    asking: _Asking, path: Sequence[tuple[tuple[int, ...], Scores]], selection: Evaluation
) -> list[dict[str, object]]:
    """Every step of the path on the split where it was chosen, and on the one where it was not."""
    names = [_grown(layers[:-1], layers[-1]) if layers else "base" for layers, _ in path]
    held_out = asking.scores({name: asking.at(layers) for name, (layers, _) in zip(names, path, strict=True)})
    rows = [_set_row("greedy", layers, selection, score) for layers, score in path]
    return rows + [
        _set_row("greedy", layers, asking.evaluation, held_out[name])
        for name, (layers, _) in zip(names, path, strict=True)
    ]


def agreement(pairs: pd.DataFrame, followed: pd.DataFrame, *, seed: int = 0, resamples: int = 2_000) -> pd.DataFrame:
    """Table `composition_agreement` from a table `composition` and a table `persistence` of the same vectors (of
    several seeds: concatenated, their mean is used). Intervals need five layers. Raises UsageError for less than three
    layers in common."""
    tables.check(pairs, "composition")
    tables.check(followed, "persistence")
    trained = pairs.loc[(pairs["condition"] == "trained") & (pairs["layer_i"] < pairs["layer_j"])]
    effect = followed.loc[followed["condition"] == "trained"]
    layers = sorted({*trained["layer_i"], *trained["layer_j"]} & set(effect["source"]))
    if len(layers) < 3:
        raise UsageError("pairs and persistence have less than three layers in common; follow the same vectors")
    place = {layer: n for n, layer in enumerate(layers)}
    distance = np.abs(np.subtract.outer(np.array(layers), np.array(layers))).astype(float)
    predictors = {"distance": distance}
    for quantity in PREDICTORS[:2]:
        means = effect.loc[effect["quantity"] == quantity].groupby(["source", "layer"])["value"].mean()
        predictors[quantity] = _matrix(means.to_dict(), place)
    rows = []
    for outcome in OUTCOMES:
        known = trained.set_index(["layer_i", "layer_j"])[outcome].to_dict()
        upper = _matrix(known, place)
        both = np.where(np.isnan(upper), upper.T, upper)
        for name in PREDICTORS:
            rows.append({"predictor": name, "outcome": outcome} | _related(predictors[name], both, seed, resamples))
    return tables.check(pd.DataFrame(rows), "composition_agreement")


def _matrix(values: dict, place: dict[int, int]) -> np.ndarray:
    """Values of pairs i < j above the diagonal, missing elsewhere."""
    made = np.full((len(place), len(place)), np.nan)
    for (i, j), value in values.items():
        if i < j and i in place and j in place:
            made[place[i], place[j]] = value
    return made


def _related(predictor: np.ndarray, outcome: np.ndarray, seed: int, resamples: int) -> dict[str, object]:
    """predictor: read above the diagonal. outcome: symmetric."""
    n, generator = len(outcome), np.random.default_rng(seed)
    row, column = np.triu_indices(n, 1)
    r = _pearson(predictor[row, column], outcome[row, column])
    known = int(np.isfinite(predictor[row, column] + outcome[row, column]).sum())
    if np.isnan(r):
        return {"r": r, "low": r, "high": r, "p": r, "n_pairs": known}
    resampled, permuted = np.empty(resamples), np.empty(resamples)
    for n_draw in range(resamples):
        drawn = np.sort(generator.integers(n, size=n))
        i, j = drawn[row], drawn[column]
        apart = i < j
        resampled[n_draw] = _pearson(predictor[i[apart], j[apart]], outcome[i[apart], j[apart]])
        order = generator.permutation(n)
        permuted[n_draw] = _pearson(predictor[row, column], outcome[order[row], order[column]])
    low, high = np.nanquantile(resampled, [0.025, 0.975]) if n >= FEWEST_LAYERS else (np.nan, np.nan)
    as_large = (np.abs(permuted) >= abs(r) - 1e-12).sum()
    return {"r": r, "low": float(low), "high": float(high), "p": (1 + as_large) / (1 + resamples), "n_pairs": known}


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r where both are known; missing with less than three such pairs, or where one is constant."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or np.ptp(x) < 1e-12 or np.ptp(y) < 1e-12:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
