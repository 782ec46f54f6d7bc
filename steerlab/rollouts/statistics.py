"""What a table of right and wrong answers says: avg@k, pass@k, and how far either may be off.

Unbiased pass@k: Chen et al. 2021 (arXiv 2107.03374), eq. 1. Intervals are percentile bootstraps (Efron & Tibshirani
1993) with the *problem* as the unit, since samples of one problem are not independent evidence about the task. With
several seeds the design is crossed (every seed answers the same problems), so both axes are resampled on their own
(Owen 2007, "pigeonhole bootstrap"): drawing problems anew inside each seed would pretend that a hard problem is
hard for one seed only. The pigeonhole bootstrap errs on the wide side; with fewer than about five seeds no bootstrap
can see the spread between seeds well, which is why `n_seeds` stands beside every interval.

Left out: bias-corrected intervals, tests of significance, corrections for many comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from steerlab import tables
from steerlab.errors import UsageError

_BLOCK_DRAWS = 4_000_000  # resample weights held at once: 32 MB, however many problems there are


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval, all in the unit of the scores."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def avg_at_k(correct: Bool[np.ndarray, "*axes samples"], k: int | None = None) -> Float[np.ndarray, "*axes"]:
    """Share of each problem's first k samples (default: all of them) that are correct."""
    k = _checked_k("avg", correct.shape[-1], k)
    return correct[..., :k].mean(axis=-1)


def pass_at_k(correct: Bool[np.ndarray, "*axes samples"], k: int | None = None) -> Float[np.ndarray, "*axes"]:
    """Chance, per problem, that at least one of k samples is correct, estimated without bias from all n ≥ k of them.

    For c correct of n it is 1 − C(n−c, k) / C(n, k) = 1 − ∏ (1 − k/i) over i = n−c+1 … n; the product is summed
    in logarithms, so large n neither overflows nor cancels.
    """
    n = correct.shape[-1]
    k = _checked_k("pass", n, k)
    ratios = np.minimum(k / np.arange(n, 0, -1, dtype=np.float64), 1.0)
    with np.errstate(divide="ignore"):  # log(1 − 1) = −inf: fewer than k wrong samples, success is certain
        log_miss = np.concatenate([[0.0], np.cumsum(np.log1p(-ratios))])
    return -np.expm1(log_miss)[correct.sum(axis=-1)]


def bootstrap_interval(
    scores: Float[np.ndarray, " problems"] | Float[np.ndarray, "seeds problems"],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Mean score with its percentile interval over problems, or over seeds × problems (crossed) when given two axes.

    A score that is the same everywhere (all correct, say) gives a bootstrap without width, which claims too much. Then
    at most a share p = 1 − (α/2)^(1/n) of all problems scores otherwise (Clopper–Pearson with none of n observed,
    n the number of problems), each anywhere within `bounds`: the interval is widened by that. At 0 and at 1 this *is*
    the Clopper–Pearson interval.

    Raises UsageError when there is nothing to average or a score is not a number.
    """
    grid = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    n_seeds, n_problems = grid.shape
    if grid.size == 0:
        raise UsageError("no scores to average; evaluate at least one problem")
    if not np.isfinite(grid).all():
        raise UsageError("a score is not a finite number; drop or repair the problem before averaging")
    value, tail = float(grid.mean()), (1 - level) / 2
    if np.ptp(grid) == 0:
        unseen = 1 - tail ** (1 / n_problems)
        return Interval(value, value - unseen * (value - bounds[0]), value + unseen * (bounds[1] - value))

    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK_DRAWS // n_problems)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        by_problem = generator.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size=size)
        by_seed = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=size)
        means[start : start + size] = np.einsum("rs,rs->r", by_seed, by_problem @ grid.T) / grid.size
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def resampled_means(
    scores: Float[np.ndarray, "units columns"], *, seed: int = 0, resamples: int = 1_000
) -> Float[np.ndarray, "resamples columns"]:
    """Means of bootstrap resamples of the units, each resample the same units in every column: for intervals of many
    means of many units, and of what is computed from several of them.

    Raises UsageError when there is nothing to average.
    """
    n = len(scores)
    if not scores.size:
        raise UsageError("no scores to average; give at least one unit")
    generator, means = np.random.default_rng(seed), []
    block = max(1, _BLOCK_DRAWS // n)
    for start in range(0, resamples, block):
        drawn = generator.integers(n, size=(min(block, resamples - start), n))
        weights = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(scores.dtype)
        means.append(weights @ scores / n)
    return np.concatenate(means)


def paired_difference(
    scores: Float[np.ndarray, "*axes"],
    baseline: Float[np.ndarray, "*base_axes"],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Mean of scores − baseline on the same problems in the same order; the pairing removes what makes a problem hard.

    Both are (problems) or (seeds, problems), as in `bootstrap_interval`. Either side may have one seed only; it is
    then compared with every seed of the other.
    """
    ours, theirs = np.atleast_2d(scores), np.atleast_2d(baseline)
    if ours.shape[1] != theirs.shape[1]:
        raise UsageError(
            f"{ours.shape[1]} and {theirs.shape[1]} problems cannot be paired; compare conditions on the same problems"
        )
    if ours.shape[0] != theirs.shape[0] and 1 not in (ours.shape[0], theirs.shape[0]):
        raise UsageError(
            f"{ours.shape[0]} and {theirs.shape[0]} seeds cannot be paired; evaluate both with the same seeds, or one"
        )
    return bootstrap_interval(ours - theirs, seed=seed, level=level, resamples=resamples, bounds=(-1.0, 1.0))


@dataclass(frozen=True)
class Share:
    """A share of a gain with the ends of its interval, 1 where all of it is reached. Missing (NaN), and `why` says so,
    where the gain to be shared is within its noise of 0."""

    value: float
    low: float
    high: float
    why: str = ""


def crossed_means(
    scores: Float[np.ndarray, "condition seeds problems"], *, seed: int = 0, resamples: int = 2_000
) -> Float[np.ndarray, "resample condition"]:
    """Means of several conditions under the same resamples of problems and of seeds (crossed), for intervals of what is
    no mean itself: a ratio, the larger of two."""
    _, n_seeds, n_problems = scores.shape
    generator = np.random.default_rng(seed)
    by_problem = generator.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size=resamples) / n_problems
    by_seed = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples) / n_seeds
    return np.stack([np.einsum("rs,rs->r", by_seed, by_problem @ grid.T) for grid in scores], axis=1)


def share_of_gain(
    score: Float[np.ndarray, "seeds problems"],
    floors: Sequence[Float[np.ndarray, "_ problems"]],
    ceiling: Float[np.ndarray, "_ problems"],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 2_000,
) -> Share:
    """(score − floor) / (ceiling − floor), all on the same problems; of several floors the highest.

    A quotient whose denominator may be 0 says nothing: the share is missing unless the interval of ceiling − floor is
    above 0. Resamples in which it is not are left out of the share's own interval.
    """
    grids = [np.atleast_2d(grid) for grid in (score, ceiling, *floors)]
    n_seeds = max(len(grid) for grid in grids)
    if {len(grid) for grid in grids} - {1, n_seeds}:
        raise UsageError("scores of unequally many seeds cannot be compared; give equally many of each, or one")
    stacked = np.stack([np.broadcast_to(grid, (n_seeds, grid.shape[1])) for grid in grids])
    means, draws = stacked.mean(axis=(1, 2)), crossed_means(stacked, seed=seed, resamples=resamples)
    best = int(means[2:].argmax())
    room = paired_difference(grids[1], grids[2 + best], seed=seed, level=level, resamples=resamples)
    if room.low <= 0:
        kind = "below 0" if room.high < 0 else "within its noise of 0"
        nothing = float("nan")
        said = f"the gain to be shared, {room.value:+.3f} ({room.low:+.3f} to {room.high:+.3f}), is {kind}"
        return Share(nothing, nothing, nothing, said)
    floor = draws[:, 2:].max(axis=1)
    gap = draws[:, 1] - floor
    shares = (draws[:, 0] - floor)[gap > 0] / gap[gap > 0]
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    value = (means[0] - means[2 + best]) / (means[1] - means[2 + best])
    return Share(float(value), float(low), float(high))


def summarise(
    completions: pd.DataFrame,
    *,
    model: str,
    temperature: float | Mapping[str, float],
    metrics: tuple[str, ...] = ("avg@k", "pass@k"),
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> pd.DataFrame:
    """The `scores` table of a `completions` table: a row per task, split, condition and metric.

    A metric is `avg@8`, `pass@4` …; a literal `k` stands for the number of samples there are. `temperature` is one
    number or one per condition. Every row uses the same resamples, so equal tables give equal rows.

    Raises UsageError for an unknown metric, k above the number of samples, or problems sampled unequally often.
    """
    rows: list[dict[str, object]] = []
    for keys, part in completions.groupby(["task", "split", "condition"], sort=False, observed=True):
        task, split, condition = cast("tuple[str, str, str]", keys)
        correct, _ = _grid(part, condition)
        n_seeds, n_problems, n_samples = correct.shape
        heat = temperature[condition] if isinstance(temperature, Mapping) else temperature
        for metric in metrics:
            name, scores = _score(metric, correct)
            interval = bootstrap_interval(scores, seed=seed, level=level, resamples=resamples)
            rows.append(
                {"model": model, "task": task, "split": split, "condition": condition, "temperature": float(heat)}
                | {"metric": name, "value": interval.value, "low": interval.low, "high": interval.high}
                | {"n_problems": n_problems, "n_samples": n_samples, "n_seeds": n_seeds}
            )
    if not rows:
        raise UsageError("no completions to summarise; evaluate at least one problem")
    frame = pd.DataFrame(rows)
    tables.check(frame, "scores")
    return frame


def gain(
    completions: pd.DataFrame,
    *,
    condition: str = "steered",
    baseline: str = "base",
    metric: str = "avg@k",
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """How much `condition` scores above `baseline` on the same problems (one task and split), paired, with interval.

    For avg@k the two may have different numbers of samples; for pass@k the k must be the same.
    """
    ours, scores, problems = problem_scores(completions, condition, metric)
    theirs, base_scores, base_problems = problem_scores(completions, baseline, metric)
    if ours != theirs and metric.startswith("pass@"):
        raise UsageError(f"{ours} and {theirs} cannot be compared; name one k that both conditions have samples for")
    if problems != base_problems:
        raise UsageError(
            f"{condition!r} and {baseline!r} were evaluated on different problems; evaluate both on the same"
        )
    return paired_difference(scores, base_scores, seed=seed, level=level, resamples=resamples)


def problem_scores(
    completions: pd.DataFrame, condition: str, metric: str = "avg@k"
) -> tuple[str, Float[np.ndarray, "seeds problems"], list[object]]:
    """One condition's metric with its k spelled out, its score per seed and problem, and the problems in that order."""
    parts = {str(name): part for name, part in completions.groupby("condition", observed=True)}
    if condition not in parts:
        raise UsageError(f"no completions of condition {condition!r}; the table has {', '.join(parts) or 'none'}")
    correct, problems = _grid(parts[condition], condition)
    return *_score(metric, correct), problems


def _grid(completions: pd.DataFrame, condition: str) -> tuple[Bool[np.ndarray, "seeds problems samples"], list[object]]:
    """Correctness of one condition as a full grid, and the problems in its order."""
    ordered = completions.sort_values(["seed", "problem", "sample"], kind="stable")
    problems = sorted(set(ordered["problem"]))
    n_seeds, n_samples = len(set(ordered["seed"])), len(set(ordered["sample"]))
    shape = (n_seeds, len(problems), n_samples)
    if len(ordered) != np.prod(shape) or ordered.duplicated(["seed", "problem", "sample"]).any():
        raise UsageError(
            f"{len(ordered)} completions of condition {condition!r} are not {shape[0]} seeds × {shape[1]} problems × "
            f"{shape[2]} samples; evaluate every problem equally often, one task and split at a time"
        )
    return ordered["correct"].to_numpy(dtype=bool).reshape(shape), problems


def _score(
    metric: str, correct: Bool[np.ndarray, "seeds problems samples"]
) -> tuple[str, Float[np.ndarray, "seeds problems"]]:
    """The metric with its k spelled out, and its score per seed and problem."""
    kind, _, text = metric.partition("@")
    if kind not in ("avg", "pass") or not (text == "k" or text.isdecimal()):
        raise UsageError(f"unknown metric {metric!r}; use avg@k or pass@k, with k a number or the letter k")
    k = correct.shape[-1] if text == "k" else int(text)
    return f"{kind}@{k}", (avg_at_k if kind == "avg" else pass_at_k)(correct, k)


def _checked_k(kind: str, n_samples: int, k: int | None) -> int:
    k = n_samples if k is None else k
    if not 1 <= k <= n_samples:
        raise UsageError(f"{kind}@{k} needs 1 ≤ k ≤ {n_samples}, the samples per problem; draw more samples or lower k")
    return k
