"""Readings of vectors on texts: each a few tables and figures, to be kept in a run's folder and told in its report.

A reading takes a model, vectors and texts, and decides nothing else: which texts is the caller's business (`own_texts`:
what the steered model answers to held-out problems of its task). The work is `interp`'s, the figures are `plots`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp import geometry as measuring
from steerlab.interp import persistence as following
from steerlab.interp import token_effects as effects
from steerlab.interp.languages import languages as read_languages
from steerlab.interp.residual_lens import residual_lens
from steerlab.interp.texts import Text, contrasts, sampled
from steerlab.models import LanguageModel
from steerlab.plots import geometry as plot_geometry
from steerlab.plots import languages as plot_languages
from steerlab.plots import persistence as plot_persistence
from steerlab.plots import residual_lens as plot_lens
from steerlab.plots import token_effects as plot_effects
from steerlab.rollouts import Evaluation, Policy
from steerlab.runs import Run
from steerlab.tasks import Task


@dataclass(frozen=True)
class Reading:
    """tables, figures: by the names under which they are kept."""

    tables: dict[str, pd.DataFrame]
    figures: dict[str, go.Figure]

    def save(self, run: Run) -> tuple[Path, ...]:
        """Put everything into a run's folder. Returns where."""
        made = [run.save_table(name, table) for name, table in self.tables.items()]
        return (*made, *(run.save_figure(name, figure) for name, figure in self.figures.items()))


def own_texts(
    model: LanguageModel, vectors: SteeringVectors, task: Task, evaluation: Evaluation, n: int, seed: int = 0
) -> list[Text]:
    """What the steered model answers to the first `n` problems of `evaluation`'s split, one sample each, as it is
    evaluated there. Raises UsageError for n < 1."""
    if n < 1:
        raise UsageError(f"problems is {n}; a reading needs at least 1")
    problems = evaluation.problems(task)[:n]
    return sampled(Policy(model, vectors), task, problems, evaluation.sampling, seed=seed)


def stream(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    *,
    layers: Sequence[int] | None = None,
    k: int = 10,
    watch: Sequence[int] = (),
    scales: Sequence[float] = (-1.0,),
    seed: int = 0,
) -> Reading:
    """What every layer would say next, under the base, the vectors, their multiples `scales` and a random direction of
    equal length, on the same tokens. layers: None for all. watch: ids of tokens to follow."""
    found = residual_lens(model, texts, contrasts(vectors, scales, seed), layers=layers, k=k, watch=watch)
    context = [model.tokenizer.decode([token]) for token in texts[0].tokens]
    figures = {
        f"residual_lens_{condition}": plot_lens.residual_lens(found.tokens, condition, context=context)
        for condition in ("base", "steered")
    }
    figures |= {f"lens_{name.removesuffix('_nats')}": plot_lens.lens_spread(found.spread, name) for name in SPREADS}
    if watch:
        figures["lens_watched"] = plot_lens.lens_watched(found.watched)
    tables = {"residual_lens": found.tokens, "lens_spread": found.spread}
    return Reading(tables | ({"lens_watched": found.watched} if watch else {}), figures)


SPREADS = ("kl_nats", "entropy_nats")


def tokens(model: LanguageModel, vectors: SteeringVectors, texts: Sequence[Text], *, k: int = 10) -> Reading:
    """Which tokens the vectors make likelier and less likely, and where in the answer."""
    found = effects.token_effects(model, texts, vectors, k=k)
    return Reading(
        {"token_effects": found.positions, "raised_tokens": found.tokens},
        {
            "token_effects": plot_effects.token_effects(found.positions),
            "raised_tokens": plot_effects.raised_tokens(found.tokens, min(k, 8)),
        },
    )


def persistence(model: LanguageModel, vectors: SteeringVectors, texts: Sequence[Text], *, seed: int = 0) -> Reading:
    """How long each layer's effect lives, and what it turns into, beside a random direction of equal length."""
    table = following.persistence(model, vectors, texts, seed=seed).table
    shown = {name: plot_persistence.persistence(table, name) for name in ("diff_vector", "diff_diff", "length")}
    return Reading({"persistence": table}, {f"persistence_{name}": figure for name, figure in shown.items()})


def languages(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    *,
    classes: pd.DataFrame | None = None,
    draws: int = 4,
    seed: int = 0,
) -> Reading:
    """What each layer's vector does to tokens of other languages, beside random directions of equal length. classes:
    as in `interp.languages`. The figure of gaps is absent where the vocabulary has no English, or nothing else."""
    found = read_languages(model, vectors, texts, classes=classes, draws=draws, seed=seed)
    figures = {f"languages_{name}": plot_languages.languages(found.table, name) for name in ("cosine", "logprob")}
    if len(found.gaps):
        figures["language_gaps"] = plot_languages.language_gaps(found.gaps)
    kept = {"vocabulary_classes": found.classes, "languages": found.table, "language_gaps": found.gaps}
    return Reading(kept, figures)


def geometry(model: LanguageModel, vectors: SteeringVectors, texts: Sequence[Text], *, seed: int = 0) -> Reading:
    """Lengths, angles, spectrum and stable rank of the vectors, and how long they are beside the stream on texts."""
    norms, cosines = measuring.norms(vectors), measuring.cosine_matrix(vectors)
    singular_values, dose = (
        measuring.singular_values(vectors),
        measuring.relative_dose(model, vectors, texts, seed=seed),
    )
    return Reading(
        {
            "norms": norms,
            "cosines": cosines,
            "singular_values": singular_values,
            "stable_rank": measuring.stable_rank(vectors),
            "relative_dose": dose,
        },
        {
            "norms": plot_geometry.norms(norms),
            "cosines": plot_geometry.cosines(cosines),
            "singular_values": plot_geometry.singular_values(singular_values),
            "relative_dose": plot_geometry.relative_dose(dose),
        },
    )


def cosines_between(sets: Mapping[str, SteeringVectors], *, seed: int = 0) -> Reading:
    """Whether sets of vectors (runs, seeds) point the same way at each layer, beside random directions."""
    table = measuring.cosines_between(sets, seed=seed)
    return Reading({"cosines_between": table}, {"cosines_between": plot_geometry.cosines_between(table)})
