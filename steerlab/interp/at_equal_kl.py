"""Vectors at equal distance from the base: the multiple at which each has a given KL on neutral text, and its score.

Vectors of unequal strength cannot be compared at scale 1, nor at equal length. `scale_at_kl` finds the multiple at
which a set has a given KL(steered ‖ base), in nats per token on neutral text (see `side_effects`); `at_equal_kl`
scores several sets there. Left out: targets in the other divergence, scales by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.neutral import Neutral
from steerlab.interp.side_effects import Done, answered, base_states, of_text, over_texts
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.rollouts import Condition, Evaluation, summarise
from steerlab.rollouts.statistics import Interval, gain
from steerlab.tasks import Task

HIGHEST = 32.0
TOLERANCE = 0.02
NOTHING = Interval(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class AtEqualKL:
    """table: `at_equal_kl`. completions: what was answered, a set being called as `name_at_kl` says, or base."""

    table: pd.DataFrame
    completions: pd.DataFrame


@dataclass(frozen=True)
class Found:
    """scale: the multiple. kl: KL(steered ‖ base) there, in nats per token, with its interval over texts."""

    scale: float
    kl: Interval


def scale_at_kl(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    target_nats: float,
    *,
    tolerance: float = TOLERANCE,
    highest: float = HIGHEST,
) -> Found:
    """The least scale found at which the vectors' KL(steered ‖ base) on `texts` is within `tolerance` (relative) of
    `target_nats`: doubled until it is passed, then bisected, guessing on a line between the logarithms of both.

    KL rises with the scale as long as it is small; where it does not, this is one of several such scales. Raises
    UsageError for a target that is not positive, zero vectors, or a target beyond what scale `highest` reaches.
    """
    base = base_states(model, texts)
    return _scale_at(model, vectors, texts, base, target_nats, tolerance, highest)


def at_equal_kl(
    model: LanguageModel,
    sets: Mapping[str, SteeringVectors],
    neutral: Neutral,
    task: Task,
    evaluation: Evaluation,
    *,
    targets_nats: Sequence[float] = (),
    tolerance: float = TOLERANCE,
    highest: float = HIGHEST,
    done: Done | None = None,
) -> AtEqualKL:
    """Table `at_equal_kl`: every set at the scale where it has each target KL on neutral text, scored on `task` beside
    the base model, all in one decode batch. targets_nats: none for the KL that the first set has as it is.

    A set that cannot reach a target has missing numbers there. Raises UsageError for no set, zero vectors or a target
    that is not positive.
    """
    if not sets or "base" in sets:
        raise UsageError("no vectors to compare; give at least one set, and none that is called base")
    base = base_states(model, neutral.texts)
    targets = list(targets_nats) or [float(_kl(model, next(iter(sets.values())), neutral.texts, base).mean())]
    found: dict[tuple[str, float], Found | None] = {}
    for target in targets:
        for name, vectors in sets.items():
            try:
                found[name, target] = _scale_at(model, vectors, neutral.texts, base, target, tolerance, highest)
            except OutOfReach:
                found[name, target] = None
    asked = {"base": Condition(None, task, evaluation.sampling, evaluation.samples)}
    for (name, target), where in found.items():
        if where is not None:
            asked[name_at_kl(name, target)] = evaluation.steered(task, sets[name] * where.scale)
    completions = answered(model, task, evaluation, asked, done)
    heat = evaluation.sampling.temperature
    scores = summarise(completions, model=model.name, temperature=heat, metrics=("avg@k",)).set_index("condition")
    rows: list[dict[str, object]] = [
        _equal_row(("base", 0.0), Found(0.0, Interval(0.0, 0.0, 0.0)), "base", scores, None)
    ]
    for cell, where in found.items():
        name = name_at_kl(*cell)
        over_base = None if where is None else gain(completions, condition=name)
        rows.append(_equal_row(cell, where, name, scores, over_base))
    return AtEqualKL(tables.check(pd.DataFrame(rows), "at_equal_kl"), completions)


def name_at_kl(condition: str, target_nats: float) -> str:
    """What the completions of a set at the scale of a target are called."""
    return f"{condition} at {target_nats:.6g} nats"


class OutOfReach(UsageError):
    """A KL that a set of vectors does not have at any scale that was tried."""


def _equal_row(
    cell: tuple[str, float], where: Found | None, name: str, scores: pd.DataFrame, over_base: Interval | None
) -> dict[str, object]:
    kl, more = (NOTHING if where is None else where.kl), over_base or NOTHING
    score = scores.loc[name if where is not None else "base"]
    row = {"condition": cell[0], "target_nats": cell[1], "scale": float("nan") if where is None else where.scale}
    row |= {"kl_nats": kl.value, "kl_low": kl.low, "kl_high": kl.high, "metric": score["metric"]}
    row |= {name: float("nan") if where is None else float(score[name]) for name in ("value", "low", "high")}
    row |= {"gain": more.value, "gain_low": more.low, "gain_high": more.high}
    return {**row, "n_problems": int(score["n_problems"]), "n_samples": int(score["n_samples"])}


def _kl(
    model: LanguageModel, vectors: SteeringVectors, texts: Sequence[Text], base: Sequence[Tensor]
) -> Float[np.ndarray, " text"]:
    """KL(steered ‖ base) by text, nats per token."""
    pairs = zip(texts, base, strict=True)
    return np.array([of_text(model, (vectors,), text, own)[0, 1] for text, own in pairs])


def _scale_at(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    base: Sequence[Tensor],
    target: float,
    tolerance: float,
    highest: float,
) -> Found:
    """See `scale_at_kl`."""
    if not target > 0 or not 0 < tolerance < 1:
        raise UsageError(f"a KL of {target} nats to within {tolerance:g} cannot be met; both must be above 0")
    if not any(bool(vector.any()) for vector in vectors.vectors.values()):
        raise UsageError("zero vectors have no KL at any scale; train first, or leave them out")
    low, below, scale = 0.0, 0.0, 1.0
    high, above = float("inf"), float("inf")
    for _ in range(64):
        by_text = _kl(model, vectors * scale, texts, base)
        kl = float(by_text.mean())
        if abs(kl / target - 1) <= tolerance:
            return Found(scale, over_texts(by_text))
        if kl > target:
            high, above = scale, kl
        elif scale >= highest:
            raise OutOfReach(
                f"at scale {scale:g} the vectors have a KL of {kl:.3g} nats, below {target:g}; ask for less"
            )
        else:
            low, below = scale, kl
        scale = _next_scale(low, below, high, above, target, highest)
    raise OutOfReach(f"no scale has a KL within {tolerance:g} of {target:g} nats; allow a larger tolerance")


def _next_scale(low: float, below: float, high: float, above: float, target: float, highest: float) -> float:
    """Where to look next: twice as far while the target is not passed, then inside the bracket, on the line through its
    ends in logarithms (KL ∝ scale² near zero), but never within a tenth of an end."""
    if high == float("inf"):
        return min(2 * low, highest)
    if low == 0 or below == 0:
        return high * max(0.1, min(0.9, (target / above) ** 0.5))
    share = np.log(target / below) / np.log(above / below)
    return float(low * (high / low) ** max(0.1, min(0.9, share)))
