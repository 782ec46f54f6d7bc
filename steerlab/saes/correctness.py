"""Which latents come with correct answers, and whether that is more than chance, length or the problem
(arXiv 2509.06608 §8 ranks latents by the difference of two shares, without a test or a control).

Per latent, the share of right and of wrong completions on which it fires, three times: as they are (`none`; Fisher's
exact test), within tenths of length (`length`) and within each problem (`problem`), both by Cochran, Mantel and
Haenszel: a long answer has more tokens to fire on, an easy problem is both answered rightly and worded its own way.
With label y and, in its stratum, c right ones of n, every difference is Σ f · (y − c/n) / Σ y · (y − c/n), whose
intervals resample problems (c/n held). `q` controls the false discovery rate (Benjamini & Hochberg 1995); `family_p` is
the share of within-stratum shuffles of the labels in which any latent stands out as much (Westfall & Young 1993): trust
it where a latent fires on few completions, of which the normal tail of the matched tests says too much.

`replication` finds latents in half of the problems and tests them in the other half, also when the labels they were
found with were shuffled; `probes` asks how well latents, or all the SAE reads, predict correctness on problems that
were not fitted. Correlation only: `saes/causal.py` intervenes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.rollouts.statistics import resampled_means
from steerlab.saes.activity import Activity

Matched = Literal["none", "length", "problem"]
MATCHED: tuple[Matched, ...] = ("none", "length", "problem")
BINS = 10  # of length
SHUFFLES = 1_000
NOTHING = 1e-6  # a spread below it is rounding: the latent fires always or never wherever labels differ
_BLOCK = 64  # shuffles at once


def latent_correctness(
    found: Activity, *, matched: tuple[Matched, ...] = MATCHED, shuffles: int = SHUFFLES, seed: int = 0
) -> pd.DataFrame:
    """Table `latent_correctness`: a row per latent that ever fires and way of matching, the most telling first.

    Raises UsageError where no latent fires, and for a way of matching that leaves nothing to compare.
    """
    alive = np.flatnonzero(found.fired.any(0))
    if not len(alive):
        raise UsageError("no latent fires on any completion; check that the SAE belongs to this site")
    frames = [_compared(found, way, alive, shuffles, seed) for way in matched]
    return tables.check(pd.concat(frames, ignore_index=True), "latent_correctness")


def strata_of(found: Activity, matched: Matched) -> Int[np.ndarray, " text"]:
    """Number of the stratum of each completion."""
    if matched == "none":
        return np.zeros(len(found.correct), dtype=np.int64)
    if matched == "problem":
        return np.unique(found.problem, return_inverse=True)[1]
    edges = np.quantile(found.length, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, found.length, side="left")


def comparable(found: Activity, matched: Matched) -> bool:
    """Whether some stratum has both right and wrong completions."""
    return bool(_weights(found.correct, strata_of(found, matched)).any())


def _compared(
    found: Activity, matched: Matched, latents: Int[np.ndarray, " latent"], shuffles: int, seed: int
) -> pd.DataFrame:
    """One way of matching."""
    fired, strata = found.fired[:, latents].astype(np.float32), strata_of(found, matched)
    weight = _weights(found.correct, strata)
    if not weight.any():
        raise UsageError(f"no {matched} has both right and wrong completions; answer with more samples")
    sums, spread = weight @ fired, _spread(fired, found.correct, strata)
    z = np.divide(sums, spread, out=np.zeros_like(sums), where=spread > NOTHING)
    p = 2 * stats.norm.sf(np.abs(z))
    table = _tables(fired, found.correct, strata)
    if matched == "none":
        p = _fisher(table[:, 0])
    shares = [fired[of].mean(0) for of in (found.correct, ~found.correct)]
    low, high = _interval(fired, found.correct, weight, found.problem, seed)
    centred = found.mean[:, latents] - found.mean[:, latents].mean(0)
    label = found.correct - found.correct.mean()
    size = np.sqrt(np.square(centred).sum(0) * np.square(label).sum())
    columns = {
        "latent": latents,
        "matched": matched,
        "share_correct": shares[0],
        "share_incorrect": shares[1],
        "difference": sums / (weight @ found.correct),
        "low": low,
        "high": high,
        "odds_ratio": _odds_ratio(table),
        "p": p,
        "q": stats.false_discovery_control(np.clip(p, 0, 1)),
        "family_p": _family_p(fired, found.correct, strata, np.abs(z), shuffles, seed),
        "correlation": np.divide(label @ centred, size, out=np.full(len(latents), np.nan), where=size > 0),
        "n_correct": int(found.correct.sum()),
        "n_incorrect": int((~found.correct).sum()),
        "n_problems": len(set(found.problem.tolist())),
    }
    made = pd.DataFrame(columns)
    return made.iloc[np.lexsort((-np.abs(made["difference"].to_numpy()), made["p"].to_numpy()))]


def _weights(correct: Bool[np.ndarray, " text"], strata: Int[np.ndarray, " text"]) -> Float[np.ndarray, " text"]:
    """y − c/n of each completion in its stratum: what a difference weighs it with."""
    share = np.bincount(strata, weights=correct) / np.maximum(np.bincount(strata), 1)
    return correct - share[strata]


def _spread(
    fired: Float[np.ndarray, "text latent"], correct: Bool[np.ndarray, " text"], strata: Int[np.ndarray, " text"]
) -> Float[np.ndarray, " latent"]:
    """Standard deviation of Σ f · (y − c/n) over shuffles of labels within strata (hypergeometric)."""
    n, c = np.bincount(strata), np.bincount(strata, weights=correct)
    own = _one_hot(strata)
    on = own @ fired
    several = n > 1
    factor = np.where(several, c * (n - c) / np.maximum(n * n * (n - 1.0), 1), 0.0)
    return np.sqrt(factor @ (on * (n[:, None] - on)))


def _one_hot(strata: Int[np.ndarray, " text"]) -> Float[np.ndarray, "stratum text"]:
    return (np.arange(strata.max() + 1)[:, None] == strata).astype(np.float32)


def _tables(
    fired: Float[np.ndarray, "text latent"], correct: Bool[np.ndarray, " text"], strata: Int[np.ndarray, " text"]
) -> Float[np.ndarray, "four stratum latent"]:
    """Counts of: right and fires, right and silent, wrong and fires, wrong and silent."""
    own = _one_hot(strata)
    of_right, of_wrong = own * correct, own * ~correct
    a, c = (part @ fired for part in (of_right, of_wrong))
    return np.stack([a, of_right.sum(1)[:, None] - a, c, of_wrong.sum(1)[:, None] - c])


def _odds_ratio(table: Float[np.ndarray, "four stratum latent"]) -> Float[np.ndarray, " latent"]:
    """Mantel and Haenszel's; of one stratum the plain one."""
    a, b, c, d = table
    n = np.maximum(table.sum(0), 1)
    up, down = (a * d / n).sum(0), (b * c / n).sum(0)
    return np.divide(up, down, out=np.full(up.shape, np.inf), where=down > 0)


def _fisher(table: Float[np.ndarray, "four latent"]) -> Float[np.ndarray, " latent"]:
    """Two-sided, each distinct table once."""
    distinct, of = np.unique(table.astype(np.int64), axis=1, return_inverse=True)
    known = [float(stats.fisher_exact([[a, b], [c, d]])[1]) for a, b, c, d in distinct.T.tolist()]  # type: ignore[arg-type]
    return np.array(known)[of.reshape(-1)]


def _interval(
    fired: Float[np.ndarray, "text latent"],
    correct: Bool[np.ndarray, " text"],
    weight: Float[np.ndarray, " text"],
    problem: Int[np.ndarray, " text"],
    seed: int,
) -> tuple[Float[np.ndarray, " latent"], Float[np.ndarray, " latent"]]:
    """Of the difference, over resampled problems; missing for a single one."""
    own = _one_hot(np.unique(problem, return_inverse=True)[1])
    if len(own) < 2:
        missing = np.full(fired.shape[1], np.nan)
        return missing, missing
    sums = np.column_stack([(own * weight) @ fired, own @ (weight * correct)])
    means = resampled_means(sums, seed=seed)
    draws = means[:, :-1] / np.where(means[:, -1:] > 0, means[:, -1:], np.nan)
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    return low.clip(-1, 1), high.clip(-1, 1)


def _family_p(
    fired: Float[np.ndarray, "text latent"],
    correct: Bool[np.ndarray, " text"],
    strata: Int[np.ndarray, " text"],
    z: Float[np.ndarray, " latent"],
    shuffles: int,
    seed: int,
) -> Float[np.ndarray, " latent"]:
    """Share of shuffles (the labels as they are counted as one) whose largest |z| is at least a latent's own."""
    spread = _spread(fired, correct, strata)  # shuffles within strata leave it as it is
    varied = spread > NOTHING
    fired, spread = fired[:, varied], spread[varied]
    generator, largest = np.random.default_rng(seed), []
    for start in range(0, shuffles, _BLOCK):
        drawn = np.stack([shuffled(correct, strata, generator) for _ in range(min(_BLOCK, shuffles - start))])
        weights = np.stack([_weights(labels, strata) for labels in drawn]).astype(np.float32)
        largest.append(np.abs(weights @ fired / spread).max(1, initial=0.0))
    ranked = np.sort(np.concatenate(largest))
    beyond = len(ranked) - np.searchsorted(ranked, z - 1e-9, side="left")
    return (1 + beyond) / (1 + len(ranked))


def shuffled(
    correct: Bool[np.ndarray, " text"], strata: Int[np.ndarray, " text"], generator: np.random.Generator
) -> Bool[np.ndarray, " text"]:
    """The labels in a random order within each stratum."""
    order = np.lexsort((generator.random(len(correct)), strata))
    found = np.empty_like(correct)
    found[np.argsort(strata, kind="stable")] = correct[order]
    return found


def replication(
    found: Activity, *, n: int = 20, matched: Matched = "problem", splits: int = 20, seed: int = 0
) -> pd.DataFrame:
    """Table `latent_replication`: of the `n` latents that stand out most in half of the problems, the share that in the
    other half differ with the same sign and p < 0.05; with the labels as they are and, in the half where latents are
    sought, shuffled within strata. Mean and range over `splits` halvings of the problems (they overlap: no interval)
    but those with a half that is all right or all wrong.

    Raises UsageError for fewer than four problems, n < 1, or if no halving is left.
    """
    problems = np.unique(found.problem)
    if len(problems) < 4 or n < 1 or splits < 1:
        raise UsageError(f"{len(problems)} problems, {n} latents, {splits} halvings; give at least 4, 1 and 1")
    generator, shares = np.random.default_rng(seed), {"as they are": [], "shuffled": []}
    for _ in range(splits):
        mine = np.isin(found.problem, generator.permutation(problems)[: len(problems) // 2])
        if any(len(set(found.correct[of].tolist())) < 2 for of in (mine, ~mine)):
            continue
        first, second = (found.select(np.flatnonzero(of)) for of in (mine, ~mine))
        mixed = first.with_labels(shuffled(first.correct, strata_of(first, matched), generator))
        z = _z(second, matched)
        for labels, half in (("as they are", first), ("shuffled", mixed)):
            sought = _z(half, matched)
            top = np.argsort(-np.abs(sought), kind="stable")[:n]
            again = (np.sign(sought[top]) == np.sign(z[top])) & (2 * stats.norm.sf(np.abs(z[top])) < 0.05)
            shares[labels].append(float(again.mean()))
    if not shares["shuffled"]:
        raise UsageError("every half of the problems is all right or all wrong; answer more problems")
    rows = [
        {"labels": labels, "n_latents": min(n, found.fired.shape[1]), "replicated": float(np.mean(of))}
        | {"least": min(of), "most": max(of), "n_splits": len(of), "matched": matched, "n_problems": len(problems)}
        for labels, of in shares.items()
    ]
    return tables.check(pd.DataFrame(rows), "latent_replication")


def _z(found: Activity, matched: Matched) -> Float[np.ndarray, " latent"]:
    """How far each latent's difference is from 0, in standard deviations of shuffled labels."""
    fired, strata = found.fired.astype(np.float32), strata_of(found, matched)
    spread = _spread(fired, found.correct, strata)
    sums = _weights(found.correct, strata) @ fired
    return np.divide(sums, spread, out=np.zeros_like(sums), where=spread > NOTHING)


def probes(found: Activity, *, folds: int = 5, penalty: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """Table `correctness_probes`: how well a logistic regression tells right from wrong completions of problems that it
    was not fitted on (AUROC, 0.5 is chance): of latents (sparse, L1), of all that the SAE reads (dense, L2), of length
    alone, and of latents with shuffled labels. penalty: C of scikit-learn.

    Raises UsageError for fewer problems than folds, or if scikit-learn is not installed.
    """
    n_problems = len(np.unique(found.problem))
    if n_problems < folds or folds < 2:
        raise UsageError(f"{n_problems} problems cannot make {folds} folds; answer more problems, or give fewer folds")
    generator = np.random.default_rng(seed)
    mixed = shuffled(found.correct, strata_of(found, "none"), generator)
    asked = {
        "latents": (found.mean, found.correct, 1.0),
        "dense": (found.dense, found.correct, 0.0),
        "length": (found.length[:, None].astype(np.float32), found.correct, 0.0),
        "latents, labels shuffled": (found.mean, mixed, 1.0),
    }
    rows = [
        {"features": name, **_probe(found, x, labels, l1_ratio, folds, penalty, seed)}
        for name, (x, labels, l1_ratio) in asked.items()
    ]
    return tables.check(pd.DataFrame(rows), "correctness_probes")


def _probe(
    found: Activity,
    x: Float[np.ndarray, "text feature"],
    labels: Bool[np.ndarray, " text"],
    l1_ratio: float,
    folds: int,
    penalty: float,
    seed: int,
) -> dict[str, Any]:
    learn = _scikit()
    used, scores = [], np.full(len(labels), np.nan)
    splitter = learn["GroupKFold"](n_splits=folds, shuffle=True, random_state=seed)
    for fit, test in splitter.split(x, labels, found.problem):
        if len(set(labels[fit].tolist())) < 2:
            continue
        probe = learn["LogisticRegression"](
            C=penalty, l1_ratio=l1_ratio, solver="liblinear" if l1_ratio in (0.0, 1.0) else "saga", random_state=seed
        )
        model = learn["make_pipeline"](learn["StandardScaler"](), probe).fit(x[fit], labels[fit])
        scores[test] = stats.rankdata(model.decision_function(x[test])) / len(test)  # folds have scales of their own
        used.append(int((model[-1].coef_ != 0).sum()))
    known = np.isfinite(scores)
    value = auroc(scores[known], labels[known])
    draws = list(_resampled(scores[known], labels[known], found.problem[known], seed))
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"auroc": value, "low": low, "high": high, "n_used": float(np.mean(used)), "n_features": x.shape[1]} | {
        "n_texts": int(known.sum())
    }


def _resampled(
    scores: Float[np.ndarray, " text"], labels: Bool[np.ndarray, " text"], problem: Int[np.ndarray, " text"], seed: int
) -> Iterator[float]:
    """AUROC of resampled problems."""
    members = [np.flatnonzero(problem == of) for of in np.unique(problem)]
    generator = np.random.default_rng(seed)
    for _ in range(500):
        of = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        yield auroc(scores[of], labels[of])


def auroc(scores: Float[np.ndarray, " text"], labels: Bool[np.ndarray, " text"]) -> float:
    """Chance that a right completion scores above a wrong one, ties counted half; missing without both."""
    n, m = int(labels.sum()), int((~labels).sum())
    if not n or not m:
        return float("nan")
    return float((stats.rankdata(scores)[labels].sum() - n * (n + 1) / 2) / (n * m))


def _scikit() -> Mapping[str, Any]:
    """What is used of scikit-learn. Raises UsageError if it is not installed."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise UsageError("scikit-learn is not installed; pip install steerlab[saes]") from error
    return {
        "LogisticRegression": LogisticRegression,
        "GroupKFold": GroupKFold,
        "make_pipeline": make_pipeline,
        "StandardScaler": StandardScaler,
    }
