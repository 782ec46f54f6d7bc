"""Directions without reinforcement learning: what a contrast of texts says, to set beside what was trained.

Per layer one vector of each method, from one state per text (see `contrast`): `mean_difference` of the two classes;
`pca`, the first principal component (of the uncentred differences of pairs, since centring would take away what they
have in common; of centred states where there are no pairs); `linear_probe`, the weights of a logistic regression.
The authors of arXiv 2509.06608 have the first and a linear SVM as unpublished baselines. A vector is as long as the
class means are apart along it, so that the mean difference has its natural length; `at_norms_of` gives another set's.

Whether a direction separates the classes is told on held-out folds, no group (pair, problem) being on both sides,
beside the same procedure on shuffled labels. The regression is ridge-penalised and minimised by scipy's L-BFGS. Left
out: choice of the penalty, multi-class probes, directions at other sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize

from steerlab import tables
from steerlab.adapters import Scope, SteeringVectors
from steerlab.errors import UsageError, unknown
from steerlab.interp.contrast import Contrast, Position, class_states
from steerlab.models import LanguageModel, Site
from steerlab.rollouts.statistics import Interval, bootstrap_interval

Positive = Float[np.ndarray, "positive d_model"]
Negative = Float[np.ndarray, "negative d_model"]
Direction = Float[np.ndarray, " d_model"]
FOLDS = 5
EVERYWHERE = Scope.all()


def mean_difference(positive: Positive, negative: Negative, paired: bool = False) -> Direction:  # noqa: ARG001 - as the others
    """Mean of the positive states less that of the negative ones."""
    return positive.mean(0) - negative.mean(0)


def pca(positive: Positive, negative: Negative, paired: bool = False) -> Direction:
    """First principal component of the differences of pairs, or of all states about their mean; of length one, and
    pointing from the negative towards the positive class."""
    if paired:
        cloud = positive - negative
    else:
        cloud = np.concatenate([positive, negative])
        cloud = cloud - cloud.mean(0)
    if not cloud.any():
        return np.zeros(cloud.shape[1])
    if len(cloud) < cloud.shape[1]:
        found = np.linalg.eigh(cloud @ cloud.T).eigenvectors[:, -1] @ cloud
    else:
        found = np.linalg.eigh(cloud.T @ cloud).eigenvectors[:, -1]
    found = found / np.linalg.norm(found)
    return -found if found @ mean_difference(positive, negative) < 0 else found


def linear_probe(positive: Positive, negative: Negative, paired: bool = False, penalty: float = 1.0) -> Direction:  # noqa: ARG001
    """Weights of a logistic regression between the classes, of length one. It is fitted on standardised states, ½ ·
    `penalty` · ‖w‖² added to the summed loss with both classes weighing the same, and brought back to state space."""
    states = np.concatenate([positive, negative])
    is_positive = np.arange(len(states)) < len(positive)
    centre, spread = states.mean(0), states.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    z, sign = (states - centre) / spread, np.where(is_positive, 1.0, -1.0)
    weight = len(states) / 2 / np.where(is_positive, len(positive), len(negative))

    def loss(w: Direction) -> tuple[float, Direction]:
        margin = sign * (z @ w[:-1] + w[-1])
        slope = -sign * weight * np.exp(-np.logaddexp(0, margin))  # σ(−margin)
        value = weight @ np.logaddexp(0, -margin) + penalty / 2 * (w[:-1] @ w[:-1])
        return float(value), np.append(slope @ z + penalty * w[:-1], slope.sum())

    found = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B").x[:-1] / spread
    length = np.linalg.norm(found)
    return found / length if length > 0 else found


Method = Callable[[Positive, Negative, bool], Direction]
METHODS: dict[str, Method] = {"mean_difference": mean_difference, "pca": pca, "linear_probe": linear_probe}


@dataclass(frozen=True)
class Directions:
    """table: `directions`. vectors: one set per method."""

    table: pd.DataFrame
    vectors: dict[str, SteeringVectors]


def directions(
    model: LanguageModel,
    contrast: Contrast,
    layers: Sequence[int],
    *,
    methods: Sequence[str] = tuple(METHODS),
    position: Position = "last",
    scope: Scope = EVERYWHERE,
    shuffles: int = 5,
    seed: int = 0,
) -> Directions:
    """Vectors of every method at `layers` (site resid_post) for use at the tokens of `scope`, and how well each
    separates held-out texts. shuffles: of the labels, for the control.

    Raises UsageError for an unknown method or layer, fewer than two groups of either class, or classes that do not
    differ.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if not methods or not layers or shuffles < 1:
        raise UsageError("directions need at least one method, one layer and one shuffle of the labels")
    exact = torch.promote_types(model.dtype, torch.float32)
    states = class_states(model, contrast.texts, layers, position)
    n = len(contrast.positive)
    rows, found = [], {method: {} for method in methods}
    for layer, tensor in states.items():
        both = tensor.numpy()
        difference = mean_difference(both[:n], both[n:])
        for method in methods:
            vector = METHODS[method](both[:n], both[n:], contrast.paired)
            if method != "mean_difference":
                vector = vector * abs(vector @ difference)
            if not vector.any():
                raise UsageError(f"{method}: the two classes do not differ at layer {layer}; give other texts")
            found[method][Site("resid_post", layer)] = torch.from_numpy(vector).to(exact)
            rows.append(
                {"method": method, "layer": layer, "norm": float(np.linalg.norm(vector)), "n_positive": n}
                | {"n_negative": len(contrast.negative)}
                | _separation(METHODS[method], both, contrast, shuffles, seed)
            )
    table = tables.check(pd.DataFrame(rows), "directions")
    return Directions(table, {method: SteeringVectors(vectors, scope) for method, vectors in found.items()})


def at_norms_of(vectors: SteeringVectors, other: SteeringVectors) -> SteeringVectors:
    """The directions of `vectors` with the lengths of `other` at the same sites. Raises UsageError for a zero vector
    among them, or a site that `other` lacks."""
    if missing := sorted(set(vectors.sites) - set(other.sites)):
        raise UsageError(f"no length for {', '.join(map(str, missing))}; select the layers that both sets have")
    norms = other.norms()
    unit = vectors.normalise().vectors
    return SteeringVectors({site: unit[site] * norms[site] for site in vectors.sites}, vectors.scope)


def _separation(
    method: Method, states: Float[np.ndarray, "text d_model"], contrast: Contrast, shuffles: int, seed: int
) -> dict[str, float]:
    """Held-out AUROC with its interval and accuracy, and the AUROC when labels are shuffled: mean, least and most."""
    groups = np.unique(contrast.groups, return_inverse=True)[1]
    label = np.arange(len(states)) < len(contrast.positive)
    generator = np.random.default_rng(seed)
    said = _held_out(method, states, label, groups, contrast.paired, seed)
    if said is None:
        raise UsageError("no fold has texts of both classes to hold out; give more pairs or problems of either class")
    auroc, accuracy = said
    control = []
    for _ in range(shuffles):
        if contrast.paired:  # which text of a pair is the positive one
            flipped = np.tile(generator.random(len(states) // 2) < 0.5, 2)
            order = np.where(flipped, np.roll(np.arange(len(states)), len(states) // 2), np.arange(len(states)))
        else:
            order = generator.permutation(len(states))
        shuffled = _held_out(method, states[order], label, groups[order], contrast.paired, seed)
        control += [] if shuffled is None else [shuffled[0].value]
    told = {"shuffled": np.mean, "shuffled_low": np.min, "shuffled_high": np.max}
    return {"auroc": auroc.value, "low": auroc.low, "high": auroc.high, "accuracy": accuracy} | {
        name: float(of(control)) if control else float("nan") for name, of in told.items()
    }


def _held_out(
    method: Method,
    states: Float[np.ndarray, "text d_model"],
    label: Bool[np.ndarray, " text"],
    groups: Int[np.ndarray, " text"],
    paired: bool,
    seed: int,
) -> tuple[Interval, float] | None:
    """AUROC within held-out folds, all pairs of texts counting the same, its interval over groups; and the mean over
    classes of the share of texts on the right side of the middle between the fitted class means. None where no fold
    can be held out with texts of both classes on either side."""
    n = int(groups.max()) + 1
    above, pairs = np.zeros((n, n)), np.zeros((n, n))
    right: dict[bool, list[float]] = {True: [], False: []}
    fold = _folds(label, groups, seed)
    for k in range(FOLDS):
        fit, out = fold[groups] != k, fold[groups] == k
        if not all((part & side).any() for part in (fit, out) for side in (label, ~label)):
            continue
        positive, negative = states[fit & label], states[fit & ~label]
        vector = method(positive, negative, paired)
        middle = vector @ (positive.mean(0) + negative.mean(0)) / 2
        ours, theirs = states[out & label] @ vector, states[out & ~label] @ vector
        won = (np.sign(ours[:, None] - theirs) + 1) / 2
        places = np.ix_(groups[out & label], groups[out & ~label])
        np.add.at(above, places, won)
        np.add.at(pairs, places, 1.0)
        right[True] += (ours > middle).tolist()
        right[False] += (theirs < middle).tolist()
    if not pairs.any():
        return None
    accuracy = float(np.mean([np.mean(side) for side in right.values()]))
    return _interval(above, pairs, seed), accuracy


def _folds(label: Bool[np.ndarray, " text"], groups: Int[np.ndarray, " text"], seed: int) -> Int[np.ndarray, " group"]:
    """Fold of every group, dealt out so that positive texts spread over all of them."""
    n = int(groups.max()) + 1
    share = np.bincount(groups, label, n) / np.bincount(groups, minlength=n)
    order = np.random.default_rng(seed).permutation(n)
    order = order[np.argsort(share[order], kind="stable")]
    fold = np.empty(n, dtype=np.int64)
    fold[order] = np.arange(n) % FOLDS
    return fold


def _interval(
    above: Float[np.ndarray, "group group"], pairs: Float[np.ndarray, "group group"], seed: int, resamples: int = 2_000
) -> Interval:
    """AUROC with its 95 % interval over groups; where all of them say the same, that of as many equal scores."""
    n = len(pairs)
    value = float(above.sum() / pairs.sum())
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    total = ((weights @ pairs) * weights).sum(1)
    drawn = ((weights @ above) * weights).sum(1)[total > 0] / total[total > 0]
    if np.ptp(drawn) == 0:
        return bootstrap_interval(np.full(min(int(pairs.any(0).sum()), int(pairs.any(1).sum())), value))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))
