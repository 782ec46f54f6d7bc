"""The commands that read vectors: what they point to, what layers would say, which tokens rise, how long they act.

What they find goes into the run's folder and its report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    Seed,
    TaskOf,
)
from steerlab.command_line.terminal import console, tell
from steerlab.errors import UsageError

if TYPE_CHECKING:
    from steerlab.command_line.subjects import Subject
    from steerlab.readings import Reading
    from steerlab.runs import Run


def lens(
    run: RunOrVectors,
    stream: Annotated[bool, tyro.conf.arg(help="Read what every layer would say on texts, not the vectors.")] = False,
    k: Annotated[int, tyro.conf.arg(help="Tokens at each end of the vocabulary; with --stream: likeliest ones.")] = 6,
    readout: Annotated[Literal["cosine", "dot", "softmax"], tyro.conf.arg(help="How tokens are scored.")] = "cosine",
    layers: Layers = None,
    task: TaskOf = "",
    problems: Problems = 8,
    prompt: Prompts = (),
    watch: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(help="With --stream: a token to follow through the layers, may be repeated.", metavar="TOKEN"),
    ] = (),
    tuned: Annotated[
        str,
        tyro.conf.arg(help="With --stream: a tuned lens, or a run that trained one.", metavar="FOLDER"),
    ] = "",
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Annotated[
        str, tyro.conf.arg(help="A .csv or .parquet file for the table; with --stream: a folder.", metavar="PATH")
    ] = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show the tokens that each vector points to (logit lens), or what every layer would say."""
    from steerlab.command_line import show
    from steerlab.command_line.subjects import ids_of, lens_of, subject, texts_about
    from steerlab.interp.logit_lens import logit_lens
    from steerlab.runs import atomic_path

    if not stream and out and Path(out).suffix not in (".csv", ".parquet"):
        raise UsageError(f"{out} is no table; name a .csv or .parquet file")
    if not stream and (watch or prompt or tuned):
        raise UsageError("--watch, --prompt and --tuned read texts; add --stream")
    about = subject(run, model, dtype, allow_other_weights)
    if stream:
        from steerlab import readings

        folder, watched = place(about, out), ids_of(about, watch)
        translators = lens_of(tuned, about.model, allow_other_weights) if tuned else None
        texts = texts_about(about, prompt, task, problems, seed)
        found = readings.stream(
            about.model, about.vectors, texts, layers=layers, k=k, watch=watched, seed=seed, translators=translators
        )
        show.spread(console(), found.tables["lens_spread"])
        return keep(found, folder)
    vectors = about.of_layers(layers)
    table = logit_lens(vectors, about.model.unembedding.weight, about.model.tokenizer, k, (readout,))
    show.lens(console(), table, vectors)
    if out:
        with atomic_path(out) as path:
            (table.to_csv if path.suffix == ".csv" else table.to_parquet)(path, index=False)
        tell(f"wrote {out}")
    return 0


def tokens(
    run: RunOrVectors,
    k: Annotated[int, tyro.conf.arg(help="Tokens at either end.")] = 10,
    append: Annotated[
        bool, tyro.conf.arg(help="Also give the base model the most raised first token instead of the vectors.")
    ] = False,
    token: Annotated[str, tyro.conf.arg(help="With --append: give it this text instead.", metavar="TEXT")] = "",
    task: TaskOf = "",
    problems: Problems = 32,
    layers: Layers = None,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show which next tokens the vectors make likelier and less likely: the first, and later ones."""
    from steerlab import readings
    from steerlab.command_line import show
    from steerlab.command_line.subjects import asked_about, subject, texts_about

    if token and not append:
        raise UsageError("--token is what the base model is given instead of the vectors; add --append")
    about = subject(run, model, dtype, allow_other_weights)
    folder = place(about, out)
    texts = texts_about(about, (), task, problems, seed)
    vectors = about.of_layers(layers)
    found = readings.tokens(about.model, vectors, texts, k=k)
    show.raised(console(), found.tables["raised_tokens"], found.tables["token_effects"])
    if append:
        asked, evaluation = asked_about(about, task)
        found = found.with_(readings.substitution(about.model, vectors, texts, asked, evaluation, token, seed=seed))
        show.substitution(console(), found.tables["substitution"])
    return keep(found, folder)


def persistence(
    run: RunOrVectors,
    task: TaskOf = "",
    problems: Problems = 8,
    prompt: Prompts = (),
    layers: Layers = None,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Follow the effect of each layer's vector through the layers above, and see how long it lives."""
    from steerlab import readings
    from steerlab.command_line import show
    from steerlab.command_line.subjects import subject, texts_about

    about = subject(run, model, dtype, allow_other_weights)
    folder = place(about, out)
    texts = texts_about(about, prompt, task, problems, seed)
    vectors = about.of_layers(layers)
    found = readings.persistence(about.model, vectors, texts, seed=seed)
    show.persistence(console(), found.tables["persistence"])
    return keep(found, folder)


def adaptive(
    run: RunOrVectors,
    task: TaskOf = "",
    problems: Problems = 16,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show at which tokens a vector of token-wise strength acts (`train --adapter adaptive`)."""
    from steerlab import readings
    from steerlab.adapters import LoRAWeights
    from steerlab.command_line import show
    from steerlab.command_line.subjects import asked_about, subject

    about = subject(run, model, dtype, allow_other_weights)
    if not isinstance(about.adapter, LoRAWeights):
        raise UsageError(f"{run} has vectors of one strength; train with --adapter adaptive for one by token")
    folder = place(about, out)
    found = readings.adaptive(about.model, about.adapter, *asked_about(about, task), problems, seed=seed)
    show.adaptive(console(), found.tables["adaptive_shares"])
    return keep(found, folder)


def place(about: Subject, out: str) -> Run:
    """The folder that a reading goes to: the subject's run, or `out`, a new one. Raises UsageError for neither."""
    from steerlab.runs import Run

    if out:
        facts = {"model": about.model.name, "weights_sha256": about.model.weights_sha256}
        return Run.create(out, kind="reading", status="done", **facts)
    if about.run is None:
        raise UsageError("a file of vectors has no folder of its own; add --out FOLDER")
    return about.run


def keep(found: Reading, run: Run) -> int:
    """Into the folder, and into the report of a run that has one."""
    from steerlab.execute import write_report

    written: Sequence[object] = found.save(run)
    if run.path("report.html").exists():
        written = (write_report(run),)
    for path in written:
        tell(f"wrote {path}")
    return 0


def languages(
    run: RunOrVectors,
    draws: Annotated[int, tyro.conf.arg(help="Random directions beside each vector.")] = 4,
    task: TaskOf = "",
    problems: Problems = 4,
    prompt: Prompts = (),
    layers: Layers = None,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show what each layer's vector does to other languages and scripts, beside random directions."""
    from steerlab import readings
    from steerlab.command_line import show
    from steerlab.command_line.subjects import subject, texts_about

    about = subject(run, model, dtype, allow_other_weights)
    folder = place(about, out)
    texts = texts_about(about, prompt, task, problems, seed)
    vectors = about.of_layers(layers)
    found = readings.languages(about.model, vectors, texts, draws=draws, seed=seed)
    show.languages(console(), found.tables["language_gaps"], found.tables["languages"])
    return keep(found, folder)


def geometry(
    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(help="A run or a file of vectors; several to compare their directions.", metavar="RUN [RUN …]"),
    ] = (),
    task: TaskOf = "",
    problems: Problems = 8,
    prompt: Prompts = (),
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show lengths, angles and dose of a run's vectors, and whether several runs point the same way.

    The dose is a vector's length over that of the stream on texts. Several runs' cosines go to the first's folder.
    """
    from steerlab import readings
    from steerlab.command_line import show
    from steerlab.command_line.subjects import subject, texts_about, vectors_of

    if not runs:
        raise UsageError("nothing to measure; give a run folder or a file of vectors, or several")
    names = names_of(runs)
    about = subject(runs[0], model, dtype, allow_other_weights)
    folder = place(about, out)
    if len(runs) == 1:
        texts = texts_about(about, prompt, task, problems, seed)
        found = readings.geometry(about.model, about.vectors, texts, seed=seed)
        show.geometry(console(), found.tables["relative_dose"], found.tables["stable_rank"])
        return keep(found, folder)
    if task or prompt:
        raise UsageError("--task and --prompt are for the dose of one run's vectors; name one run, or leave them out")
    others = [vectors_of(run, about.model, allow_other_weights) for run in runs[1:]]
    found = readings.cosines_between(dict(zip(names, (about.vectors, *others), strict=True)), seed=seed)
    show.cosines_between(console(), found.tables["cosines_between"])
    return keep(found, folder)


def names_of(runs: Sequence[str]) -> tuple[str, ...]:
    """What runs are called beside each other: their folders' names, or where two are the same their whole paths.

    Raises UsageError for a run that is named twice.
    """
    short = [Path(run).resolve().name for run in runs]
    names = short if len(set(short)) == len(runs) else [str(Path(run)) for run in runs]
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise UsageError("a run is named twice, and points where it points; name different ones")
    return tuple(names)
