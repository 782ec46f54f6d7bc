"""Readings of an SAE's latents: what vectors do to them, which come with correct answers, what editing them does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steerlab.adapters import SteeringVectors
from steerlab.interp.contrast import Contrast
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.plots import latents as plots
from steerlab.readings.reading import Reading
from steerlab.rollouts import Evaluation
from steerlab.rollouts.evaluate import Done
from steerlab.saes import correctness as telling
from steerlab.saes import effects as effecting
from steerlab.saes.activity import activity
from steerlab.saes.causal import How
from steerlab.saes.causal import latents_causal as edit_latents
from steerlab.saes.contexts import latent_contexts, latent_tokens
from steerlab.saes.load import Sae
from steerlab.tasks import Task


def latent_effects(
    model: LanguageModel, sae: Sae, vectors: SteeringVectors, texts: Sequence[Text], *, n: int = 32, seed: int = 0
) -> Reading:
    """What the vectors do to each latent; and if one is at the SAE's own site, which of the SAE's directions it is made
    of."""
    table = effecting.latent_effects(model, sae, vectors, texts, seed=seed)
    found = Reading({"latent_effects": table}, {"latent_effects": plots.latent_effects(table)})
    if sae.site not in vectors.vectors:
        return found
    most = min(n, sae.d_sae, sae.width)
    parts = effecting.decomposition(sae, vectors.vectors[sae.site].detach(), n=most, seed=seed)
    return found.with_(Reading({"decomposition": parts}, {"decomposition": plots.decomposition(parts)}))


def latent_cards(
    model: LanguageModel,
    sae: Sae,
    texts: Sequence[Text],
    latents: Sequence[int],
    vectors: SteeringVectors | None = None,
) -> Reading:
    """Where some latents fire most on `texts`, and which tokens they write towards; for the report."""
    tables = {"latent_contexts": latent_contexts(model, sae, texts, latents, vectors)}
    if sae.site is not None and sae.site.kind.startswith("resid"):
        tables["latent_tokens"] = latent_tokens(model, sae, latents)
    return Reading(tables, {})


def latent_correctness(
    model: LanguageModel,
    sae: Sae,
    completions: Contrast,
    vectors: SteeringVectors | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Reading:
    """Which latents come with right answers, by every way of matching that leaves something to compare; whether those
    found in half of the problems are found in the other half; how well they predict."""
    found = activity(model, sae, completions, vectors)
    ways: list[telling.Matched] = [way for way in telling.MATCHED if telling.comparable(found, way)]
    table = telling.latent_correctness(found, matched=tuple(ways), seed=seed)
    tables = {"latent_correctness": table}
    problems = len(np.unique(found.problem))
    if problems >= max(4, folds):
        tables["latent_replication"] = telling.replication(found, matched=ways[-1], seed=seed)
        tables["correctness_probes"] = telling.probes(found, folds=folds, seed=seed)
    figures = {
        "latent_correctness": plots.latent_correctness(table, ways[-1]),
        "latent_volcano": plots.latent_volcano(table, ways[-1]),
    }
    return Reading(tables, figures)


def latents_causal(
    model: LanguageModel,
    task: Task,
    sae: Sae,
    latents: Sequence[int],
    texts: Sequence[Text],
    evaluation: Evaluation,
    *,
    how: How = "zero",
    value: float = 0.0,
    vectors: SteeringVectors | None = None,
    draws: int = 3,
    seed: int = 0,
    done: Done | None = None,
) -> Reading:
    """Answers with some latents edited, beside others that fire about as often on `texts`."""
    rate = effecting.firing_rates(model, sae, texts, vectors)
    table = edit_latents(
        model, task, sae, latents, rate, evaluation,
        how=how, value=value, adapter=vectors, draws=draws, seed=seed, done=done,
    )  # fmt: skip
    return Reading({"latents_causal": table}, {"latents_causal": plots.latents_causal(table)})
