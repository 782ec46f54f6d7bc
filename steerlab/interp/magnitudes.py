"""Magnitudes: the score of vectors at several multiples of what was trained, beside a random direction of equal length.

Is the trained length the best one, does the reverse harm, and does any direction of that length do the same? All
conditions at all scales answer the same problems in one decode batch, each row with its own vectors. (The authors of
arXiv 2509.06608 have such a sweep, unpublished.) Left out: separate scales by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import LanguageModel
from steerlab.rollouts import Condition, Evaluation, evaluate, summarise
from steerlab.tasks import Task

SCALES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
BASE = "base"


@dataclass(frozen=True)
class Magnitudes:
    """table: `magnitudes`. completions: what was answered, a condition being called as `name_at` says, or base."""

    table: pd.DataFrame
    completions: pd.DataFrame


def magnitudes(
    model: LanguageModel,
    task: Task,
    vectors: SteeringVectors,
    evaluation: Evaluation,
    scales: Sequence[float] = SCALES,
    *,
    beside: Mapping[str, SteeringVectors] | None = None,
    seed: int = 0,
    done: Callable[[str, int], None] | None = None,
) -> Magnitudes:
    """avg@k of trained vectors, of a random direction of their lengths and of the sets `beside`, by scale. Scale 0 is
    the base model, asked once and given under every condition.

    Raises UsageError for no scale, one twice or not finite, zero vectors, or a name of `beside` that is taken.
    """
    if not scales or len(set(scales)) < len(scales) or not all(map(math.isfinite, scales)):
        raise UsageError(f"scales {list(scales)} must be finite numbers, at least one, each once")
    sets = {"trained": vectors, "random": vectors.randomise(torch.Generator().manual_seed(seed))}
    if taken := set(beside or {}) & {BASE, *sets}:
        raise UsageError(f"{', '.join(sorted(taken))} is a condition already; give the vectors another name")
    sets |= dict(beside or {})
    for name, found in sets.items():
        if not any(bool(vector.any()) for vector in found.vectors.values()):
            raise UsageError(f"the {name} vectors are all zero, so every scale of them is the base; train first")
    ordered = sorted(float(scale) for scale in scales)
    asked = {BASE: Condition(None, task, evaluation.sampling, evaluation.samples)} if 0.0 in ordered else {}
    for name, found in sets.items():
        for scale in ordered:
            if scale != 0:
                asked[name_at(name, scale)] = evaluation.steered(task, found * scale)
    completions = evaluate(
        model,
        evaluation.problems(task),
        asked,
        split=evaluation.split,
        seed=evaluation.seed,
        max_rows=evaluation.max_rows,
        done=done,
    )
    heat = evaluation.sampling.temperature
    scores = summarise(completions, model=model.name, temperature=heat, metrics=("avg@k",)).set_index("condition")
    columns = ["metric", "value", "low", "high", "n_problems", "n_samples"]
    rows = [
        {"condition": name, "scale": scale} | scores.loc[name_at(name, scale) if scale else BASE, columns].to_dict()
        for name in sets
        for scale in ordered
    ]
    return Magnitudes(tables.check(pd.DataFrame(rows), "magnitudes"), completions)


def name_at(condition: str, scale: float) -> str:
    """What the completions of a condition at a scale other than 0 are called."""
    return f"{condition} × {scale:g}"
