"""Readings of vectors, on texts and by what they score: tables and figures, for a run's folder and its report.

A reading takes a model, vectors and texts, and decides nothing else: which texts is the caller's business (`own_texts`:
what the steered model answers to held-out problems of its task). The work is `interp`'s, the figures are `plots`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from steerlab.adapters import LoRAWeights, SteeringVectors, TunedLens
from steerlab.errors import UsageError
from steerlab.interp import adaptive as interp_adaptive
from steerlab.interp import at_equal_kl as equal
from steerlab.interp import composition as combining
from steerlab.interp import directions as contrasting
from steerlab.interp import geometry as measuring
from steerlab.interp import magnitudes as scaling
from steerlab.interp import persistence as following
from steerlab.interp import side_effects as beside_the_task
from steerlab.interp import token_effects as effects
from steerlab.interp import transfer as moving
from steerlab.interp.contrast import Contrast, Position
from steerlab.interp.languages import languages as read_languages
from steerlab.interp.neutral import Neutral
from steerlab.interp.residual_lens import residual_lens
from steerlab.interp.substitution import raised_first
from steerlab.interp.substitution import substitution as interp_substitution
from steerlab.interp.texts import Conditions, Text, contrasts, sampled
from steerlab.models import LanguageModel
from steerlab.plots import adaptive as plot_adaptive
from steerlab.plots import at_equal_kl as plot_equal
from steerlab.plots import composition as plot_composition
from steerlab.plots import directions as plot_directions
from steerlab.plots import geometry as plot_geometry
from steerlab.plots import languages as plot_languages
from steerlab.plots import magnitudes as plot_magnitudes
from steerlab.plots import persistence as plot_persistence
from steerlab.plots import residual_lens as plot_lens
from steerlab.plots import side_effects as plot_side_effects
from steerlab.plots import substitution as plot_substitution
from steerlab.plots import token_effects as plot_effects
from steerlab.plots import transfer as plot_transfer
from steerlab.readings.latents import latent_cards as latent_cards
from steerlab.readings.latents import latent_correctness as latent_correctness
from steerlab.readings.latents import latent_effects as latent_effects
from steerlab.readings.latents import latents_causal as latents_causal
from steerlab.readings.paths import activation_patching as activation_patching
from steerlab.readings.paths import attention as attention
from steerlab.readings.paths import attribution as attribution
from steerlab.readings.paths import edges as edges
from steerlab.readings.paths import patch_effects as patch_effects
from steerlab.readings.paths import patching as patching
from steerlab.readings.paths import path_patching as path_patching
from steerlab.readings.reading import Reading
from steerlab.rollouts import Evaluation, Policy
from steerlab.rollouts.evaluate import Done
from steerlab.tasks import Task, segments


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
    translators: TunedLens | None = None,
) -> Reading:
    """What every layer would say next, under the base, the vectors, their multiples `scales` and a random direction of
    equal length, on the same tokens. layers: None for all. watch: ids of tokens to follow. translators: a tuned lens in
    place of the plain one."""
    found = residual_lens(
        model, texts, contrasts(vectors, scales, seed), layers=layers, k=k, watch=watch, translators=translators
    )
    figures = {
        f"residual_lens_{condition}": plot_lens.residual_lens(found.tokens, condition)
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


def substitution(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    task: Task,
    evaluation: Evaluation,
    token: str = "",
    *,
    seed: int = 0,
) -> Reading:
    """Whether the base model given the token that the vectors raise first (or `token`) does as well as with them; the
    control is the token that they lower most there."""
    raised, lowered = raised_first(effects.token_effects(model, texts, vectors, k=1))
    table = interp_substitution(model, task, vectors, evaluation, token or raised, lowered, seed=seed)
    return Reading({"substitution": table}, {"substitution": plot_substitution.substitution(table)})


def adaptive(
    model: LanguageModel, weights: LoRAWeights, task: Task, evaluation: Evaluation, n: int, *, seed: int = 0
) -> Reading:
    """How strong a rank-1 adapter's vector is at each token of what the adapted model answers to `n` problems."""
    if n < 1:
        raise UsageError(f"problems is {n}; a reading needs at least 1")
    asked = evaluation.problems(task)[:n]
    texts = sampled(Policy(model, weights), task, asked, evaluation.sampling, seed=seed)
    parts = [segments(task.prompt(problem), model.tokenizer) for problem in asked]
    table = interp_adaptive.adaptive(model, weights, texts, parts)
    found = interp_adaptive.shares(table, seed=seed)
    figures = {"adaptive": plot_adaptive.adaptive(table), "adaptive_shares": plot_adaptive.adaptive_shares(found)}
    return Reading({"adaptive": table, "adaptive_shares": found}, figures)


def persistence(model: LanguageModel, vectors: SteeringVectors, texts: Sequence[Text], *, seed: int = 0) -> Reading:
    """How long each layer's effect lives, and what it turns into, beside a random direction of equal length."""
    table = following.persistence(model, vectors, texts, seed=seed).table
    shown = {name: plot_persistence.persistence(table, name) for name in ("diff_vector", "diff_diff", "length")}
    return Reading({"persistence": table}, {f"persistence_{name}": figure for name, figure in shown.items()})


def composition(
    model: LanguageModel,
    task: Task,
    vectors: Sequence[SteeringVectors],
    evaluation: Evaluation,
    *,
    together: Sequence[SteeringVectors] | None = None,
    control: int = 12,
    texts: int = 0,
    seed: int = 0,
    done: Done | None = None,
) -> Reading:
    """What vectors that were trained alone, one set per training seed, do in pairs, all at once, and chosen greedily;
    see `interp.composition`. texts: answers of each vector on which its persistence is measured, to be compared with;
    0 for none. Persistence needs three layers or more."""
    found = combining.composition(
        model, task, vectors, evaluation, together=together, control=control, seed=seed, done=done
    )
    tables = {"composition": found.pairs, "composition_sets": found.sets}
    shown = ("gain", "value", "relative") if len(found.pairs["relative"].dropna()) else ("gain", "value")
    figures = {f"composition_{name}": plot_composition.composition(found.pairs, name) for name in shown}
    figures["composition_sets"] = plot_composition.composition_sets(found.sets)
    if texts and len(vectors[0].layers) > 2:
        followed = [_followed(model, of, task, evaluation, texts, seed) for of in vectors]
        tables["composition_agreement"] = combining.agreement(found.pairs, pd.concat(followed), seed=seed)
    return Reading(tables, figures)


def _followed(
    model: LanguageModel, vectors: SteeringVectors, task: Task, evaluation: Evaluation, n: int, seed: int
) -> pd.DataFrame:
    """Persistence of each vector on answers of the model that it steers."""
    own = {layer: own_texts(model, vectors.select([layer]), task, evaluation, n, seed) for layer in vectors.layers}
    return following.persistence(model, vectors, own, control=False, seed=seed).table


def transfer(
    donors: Sequence[moving.Donor],
    recipients: Sequence[moving.Recipient],
    evaluation: Evaluation,
    *,
    texts: Sequence[str] = (),
    how: moving.How = "auto",
    seed: int = 0,
    done: Done | None = None,
) -> Reading:
    """What donors' vectors do in recipients, beside random maps and directions; see `interp.transfer`."""
    found = moving.transfer(donors, recipients, evaluation, texts=texts, how=how, seed=seed, done=done)
    tables = {"transfer": found.table} | ({"transfer_maps": found.maps} if len(found.maps) else {})
    quantities = ("value", "normalised") if len(found.table["normalised"].dropna()) else ("value",)
    return Reading(tables, {f"transfer_{name}": plot_transfer.transfer(found.table, name) for name in quantities})


def directions(
    model: LanguageModel, contrast: Contrast, layers: Sequence[int], *, position: Position = "last", seed: int = 0
) -> tuple[Reading, dict[str, SteeringVectors]]:
    """What separates the texts of a contrast without any training, by layer and method; and those vectors."""
    found = contrasting.directions(model, contrast, layers, position=position, seed=seed)
    return Reading({"directions": found.table}, {"directions": plot_directions.directions(found.table)}), found.vectors


def magnitudes(
    model: LanguageModel,
    task: Task,
    vectors: SteeringVectors,
    evaluation: Evaluation,
    scales: Sequence[float] = scaling.SCALES,
    *,
    beside: Mapping[str, SteeringVectors] | None = None,
    seed: int = 0,
    done: Done | None = None,
) -> Reading:
    """The score at several multiples of the vectors, beside a random direction of equal length and `beside`."""
    table = scaling.magnitudes(model, task, vectors, evaluation, scales, beside=beside, seed=seed, done=done).table
    return Reading({"magnitudes": table}, {"magnitudes": plot_magnitudes.magnitudes(table)})


def side_effects(
    model: LanguageModel,
    conditions: Conditions,
    neutral: Neutral,
    *,
    task: Task | None = None,
    evaluation: Evaluation | None = None,
    seed: int = 0,
    done: Done | None = None,
) -> Reading:
    """What each condition does to neutral text, and to `task`, for which nothing was trained."""
    table = beside_the_task.side_effects(
        model, conditions, neutral, task=task, evaluation=evaluation, seed=seed, done=done
    )
    return Reading({"side_effects": table}, {"side_effects": plot_side_effects.side_effects(table)})


def at_equal_kl(
    model: LanguageModel,
    sets: Mapping[str, SteeringVectors],
    neutral: Neutral,
    task: Task,
    evaluation: Evaluation,
    *,
    targets_nats: Sequence[float] = (),
    done: Done | None = None,
) -> Reading:
    """The score of every set where it is as far from the base as the others on neutral text."""
    table = equal.at_equal_kl(model, sets, neutral, task, evaluation, targets_nats=targets_nats, done=done).table
    return Reading({"at_equal_kl": table}, {"at_equal_kl": plot_equal.at_equal_kl(table)})


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
