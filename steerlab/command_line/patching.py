"""The commands that follow a vector's effect through the model: patches of the next block, attention, attribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import tyro

from steerlab.command_line.arguments import (
    Exactly,
    Folder,
    Layers,
    ModelOf,
    OtherWeights,
    Problems,
    Prompts,
    RunOrVectors,
    Samples,
    Seed,
    TaskOf,
)
from steerlab.command_line.readouts import keep, names_of, place
from steerlab.command_line.terminal import console
from steerlab.errors import UsageError

Kind = Literal["head", "q", "k", "v", "neurons"]


def patch(
    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(help="A run or a file of vectors; several training seeds are pooled.", metavar="RUN [RUN …]"),
    ] = (),
    kind: Annotated[Kind, tyro.conf.arg(help="What is skipped and steered one by one.")] = "head",
    layer: Annotated[
        int | None, tyro.conf.arg(help="The vector that is followed, by its block; default: the only one there is.")
    ] = None,
    metric: Annotated[
        Literal["logit_diff", "kl", "accuracy"],
        tyro.conf.arg(help="On the steered model's answers, or by what the patched model answers itself."),
    ] = "kl",
    reaches: Annotated[
        Literal["all", "residual", "mlp"], tyro.conf.arg(help="Who sees an attention that was patched.")
    ] = "all",
    groups: Annotated[int, tyro.conf.arg(help="Of neurons, with --kind neurons.")] = 8,
    task: TaskOf = "",
    problems: Problems = 32,
    samples: Samples = 4,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Patch the block behind a vector: which heads, projections or neurons carry its effect.

    Tables and figures of several runs go to --out; without it to the first's folder.
    """
    from steerlab import readings
    from steerlab.command_line import show_paths
    from steerlab.command_line.subjects import asked_about, subject, vectors_of
    from steerlab.interp.patched import sweep
    from steerlab.interp.patching import patched_answers, patched_texts
    from steerlab.progress import Progress

    if not runs:
        raise UsageError("nothing to patch; give a run folder or a file of vectors, or several training seeds")
    names_of(runs)
    about = subject(runs[0], model, dtype, allow_other_weights)
    others = [vectors_of(run, about.model, allow_other_weights) for run in runs[1:]]
    seeds = [of if layer is None else of.select([layer]) for of in (about.vectors, *others)]
    folder = place(about, out)
    asked, evaluation = asked_about(about, task)
    patches = [of.seen_by(reaches) for of in sweep(about.model, kind, groups=groups)]
    with Progress(console()) as progress:
        progress.stage(f"{len(patches)} patches of block {seeds[0].layers[0] + 1}")
        if metric == "accuracy":
            about.model.tune()
            shorter = replace(evaluation, limit=problems, samples=samples)
            table = patched_answers(about.model, asked, seeds, patches, shorter, done=progress.answered)
        else:
            texts = [readings.own_texts(about.model, of, asked, evaluation, problems, seed) for of in seeds]
            name = "kl_nats" if metric == "kl" else "logit_diff"
            table = patched_texts(about.model, seeds, texts, patches, metrics=[name], seed=seed)
    show_paths.patching(console(), table)
    return keep(readings.patching(table), folder)


def patch_effects(
    run: RunOrVectors,
    patches: Annotated[
        tuple[str, ...], tyro.conf.arg(help="E.g. skip_mlp, 'skip_head(3)', 'steer_v(0)'.", metavar="PATCH [PATCH …]")
    ] = ("skip_attention", "skip_mlp", "skip_layer"),
    layer: Annotated[
        int | None, tyro.conf.arg(help="The vector that is followed, by its block; default: the only one there is.")
    ] = None,
    groups: Annotated[int, tyro.conf.arg(help="Of neurons, for 'skip_neurons(0)' and its like.")] = 8,
    words: Annotated[
        str, tyro.conf.arg(help="Your own groups: a JSON file of lists of words by name.", metavar="FILE")
    ] = "",
    k: Annotated[int, tyro.conf.arg(help="Tokens at either end.")] = 10,
    draws: Annotated[int, tyro.conf.arg(help="Shuffles of the groups, the control.")] = 1_000,
    task: TaskOf = "",
    problems: Problems = 32,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show which tokens and groups of words the parts of the block behind a vector raise, and where."""
    from steerlab import readings
    from steerlab.command_line import show_paths
    from steerlab.command_line.subjects import subject, texts_about
    from steerlab.interp.patched import named
    from steerlab.interp.words import read_words

    chosen = [named(name, groups=groups) for name in patches]
    own = read_words(words) if words else None
    about = subject(run, model, dtype, allow_other_weights)
    folder = place(about, out)
    vectors = about.of_layers(None if layer is None else [layer])
    texts = texts_about(about, (), task, problems, seed)
    found = readings.patch_effects(about.model, vectors, texts, chosen, words=own, k=k, draws=draws, seed=seed)
    show_paths.patch_effects(console(), *found.tables.values())
    return keep(found, folder)


def attention(
    run: RunOrVectors,
    layers: Layers = None,
    task: TaskOf = "",
    problems: Problems = 16,
    prompt: Prompts = (),
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show which heads look elsewhere because of the vectors, and whether that matters."""
    from steerlab import readings
    from steerlab.command_line import show_paths
    from steerlab.command_line.subjects import subject, texts_about

    about = subject(run, model, dtype, allow_other_weights)
    folder = place(about, out)
    texts = texts_about(about, prompt, task, problems, seed)
    vectors = about.of_layers(layers)
    found = readings.attention(about.model, vectors, texts, seed=seed)
    show_paths.attention(console(), found.tables["attention"], found.tables["frozen_attention"])
    return keep(found, folder)


def attribution(
    run: RunOrVectors,
    layers: Layers = None,
    task: TaskOf = "",
    problems: Problems = 16,
    prompt: Prompts = (),
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show through which heads and MLPs the vectors' effect reaches the logits directly."""
    from steerlab import readings
    from steerlab.command_line import show_paths
    from steerlab.command_line.subjects import subject, texts_about

    about = subject(run, model, dtype, allow_other_weights)
    folder = place(about, out)
    texts = texts_about(about, prompt, task, problems, seed)
    vectors = about.of_layers(layers)
    found = readings.attribution(about.model, vectors, texts, seed=seed)
    show_paths.attribution(console(), found.tables["attribution"])
    return keep(found, folder)
