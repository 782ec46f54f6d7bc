"""`steerlab sae score`, `latents` and `causal`: an SAE's latents beside vectors and beside answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from steerlab.command_line.arguments import (
    RUN_OR_NOTHING,
    Exactly,
    Folder,
    Layers,
    ModelOf,
    OtherWeights,
    Problems,
    RunOrVectors,
    Samples,
    Seed,
    TaskOf,
)
from steerlab.command_line.readouts import keep, place
from steerlab.command_line.terminal import console
from steerlab.errors import UsageError

if TYPE_CHECKING:
    from steerlab.command_line.subjects import Subject
    from steerlab.saes.load import Sae

SaeOf = Annotated[str, tyro.conf.arg(help="Folder of an SAE of sae-lens, or a release of it with --sae-id.")]
SaeId = Annotated[str, tyro.conf.arg(help="Of the release.")]
SiteOf = Annotated[str, tyro.conf.arg(help="Where the SAE belongs, if it does not say.", metavar="SITE")]


def score(
    run: Annotated[str, tyro.conf.Positional, RUN_OR_NOTHING] = "",
    sae: SaeOf = "",
    sae_id: SaeId = "",
    site: SiteOf = "",
    layers: Layers = None,
    task: TaskOf = "",
    problems: Problems = 100,
    samples: Samples = 8,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show which latents come with right answers, matched for length and problem, found again on others.

    The answers are the steered model's, or without a run the base model's.
    """
    from steerlab import readings
    from steerlab.command_line import show_latents
    from steerlab.command_line.subjects import asked_about, subject
    from steerlab.interp.contrast import of_completions
    from steerlab.progress import Progress
    from steerlab.rollouts import Condition, evaluate

    about = subject(run, model, dtype, allow_other_weights)
    found = _sae(about, sae, sae_id, site, allow_other_weights)
    vectors = None if about.adapter is None else about.of_layers(layers)
    folder = place(about, out)
    asked, evaluation = asked_about(about, task)
    evaluation = replace(evaluation, limit=problems, samples=samples)
    with Progress(console()) as progress:
        progress.stage(f"answering {problems} problems {samples} times")
        about.model.tune()
        conditions = {"answers": Condition(vectors, asked, evaluation.sampling, samples)}
        chosen = evaluation.problems(asked)
        answers = evaluate(about.model, chosen, conditions, split=evaluation.split, seed=seed, done=progress.answered)
    completions = of_completions(about.model, asked, answers, "answers")
    reading = readings.latent_correctness(about.model, found, completions, vectors, seed=seed)
    show_latents.correctness(console(), reading.tables)
    return keep(reading, folder)


def latents(
    run: RunOrVectors,
    sae: SaeOf = "",
    sae_id: SaeId = "",
    site: SiteOf = "",
    look: Annotated[
        tuple[int, ...], tyro.conf.arg(help="Latents to look at one by one; default: the 5 that change most.")
    ] = (),
    layers: Layers = None,
    task: TaskOf = "",
    problems: Problems = 16,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show what the vectors do to each latent, where those that change most fire, and what they write."""
    from steerlab import readings
    from steerlab.command_line import show_latents
    from steerlab.command_line.subjects import subject, texts_about

    about = subject(run, model, dtype, allow_other_weights)
    found = _sae(about, sae, sae_id, site, allow_other_weights)
    folder = place(about, out)
    texts = texts_about(about, (), task, problems, seed)
    vectors = about.of_layers(layers)
    reading = readings.latent_effects(about.model, found, vectors, texts, seed=seed)
    table = reading.tables["latent_effects"]
    show_latents.effects(console(), table)
    mine = table.loc[table["sender"] == "trained"]
    most = mine.iloc[np.argsort(-np.abs(mine["change"].to_numpy()), kind="stable")[:5]]
    chosen = look or tuple(int(of) for of in most["latent"])
    cards = readings.latent_cards(about.model, found, texts, chosen, vectors)
    show_latents.cards(console(), cards.tables)
    return keep(reading.with_(cards), folder)


def causal(
    run: Annotated[str, tyro.conf.Positional, RUN_OR_NOTHING] = "",
    sae: SaeOf = "",
    sae_id: SaeId = "",
    site: SiteOf = "",
    latents: Annotated[
        tuple[int, ...], tyro.conf.arg(help="To edit; default: those that `sae score` found, the first 10.")
    ] = (),
    how: Annotated[
        Literal["zero", "clamp", "add"], tyro.conf.arg(help="What is done to them at every token.")
    ] = "zero",
    value: Annotated[float, tyro.conf.arg(help="To clamp to, or to add.")] = 0.0,
    draws: Annotated[int, tyro.conf.arg(help="Sets of other latents that fire about as often.")] = 3,
    layers: Layers = None,
    task: TaskOf = "",
    problems: Problems = 100,
    samples: Samples = 4,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Edit latents while the model answers: does accuracy change more than for others that fire as often?"""
    from steerlab import readings
    from steerlab.command_line import show_latents
    from steerlab.command_line.subjects import asked_about, subject
    from steerlab.interp.texts import sampled
    from steerlab.progress import Progress
    from steerlab.rollouts import Policy

    about = subject(run, model, dtype, allow_other_weights)
    found = _sae(about, sae, sae_id, site, allow_other_weights)
    vectors = None if about.adapter is None else about.of_layers(layers)
    folder = place(about, out)
    if not latents:
        if "latent_correctness" not in folder.tables():
            raise UsageError("no latents to edit; give --latents, or find some first with: steerlab sae score")
        table = folder.table("latent_correctness")
        last = table.loc[table["matched"] == table["matched"].iloc[-1]]
        latents = tuple(int(of) for of in last["latent"].head(10))
    asked, evaluation = asked_about(about, task)
    shorter = replace(evaluation, limit=problems, samples=samples)
    texts = sampled(Policy(about.model, vectors), asked, shorter.problems(asked)[:32], evaluation.sampling, seed=seed)
    with Progress(console()) as progress:
        progress.stage(f"answering with {len(latents)} latents edited")
        reading = readings.latents_causal(
            about.model, asked, found, latents, texts, shorter,
            how=how, value=value, vectors=vectors, draws=draws, seed=seed, done=progress.answered,
        )  # fmt: skip
    show_latents.causal(console(), reading.tables["latents_causal"])
    return keep(reading, folder)


def _sae(about: Subject, source: str, sae_id: str, site: str, allow_other_weights: bool) -> Sae:
    """The SAE that is asked for. Raises UsageError for none."""
    from steerlab.models import Site
    from steerlab.saes.load import load

    if not source:
        raise UsageError("no SAE to read with; add --sae FOLDER (steerlab sae train leaves one in FOLDER/training/sae)")
    where = Site.parse(site) if site else None
    return load(source, about.model, sae_id=sae_id, site=where, allow_other_weights=allow_other_weights)
