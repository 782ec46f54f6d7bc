"""The commands that set vectors beside what is cheap: directions without training, other lengths, their side effects.

What they find goes into the run's folder and its report.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from steerlab.command_line.arguments import (
    Exactly,
    Folder,
    Layers,
    ModelOf,
    OtherWeights,
    RunOrVectors,
    Samples,
    Seed,
    TaskOptions,
    say,
)
from steerlab.command_line.readouts import keep, place
from steerlab.command_line.terminal import console
from steerlab.errors import UsageError

if TYPE_CHECKING:
    from steerlab.adapters import SteeringVectors
    from steerlab.command_line.subjects import Subject
    from steerlab.interp.contrast import Contrast
    from steerlab.rollouts import Evaluation
    from steerlab.tasks import Task

Method = Literal["mean_difference", "pca", "linear_probe"]
Beside = Annotated[
    tuple[Method, ...],
    tyro.conf.arg(help="Also directions from the base model's right and wrong train answers, at the vectors' lengths."),
]
Problems = Annotated[int, tyro.conf.arg(help="Held-out problems that are answered.")]
TaskName = Annotated[str, tyro.conf.arg(help="What is answered; default: the task of the run.", metavar="NAME")]


def directions(
    run: RunOrVectors,
    kept: Annotated[bool, tyro.conf.arg(help="Read the run's own held-out base answers, not new train ones.")] = False,
    position: Annotated[
        Literal["last", "mean"], tyro.conf.arg(help="The answer's last token, or the mean over its tokens.")
    ] = "last",
    task: TaskName = "",
    problems: Annotated[int, tyro.conf.arg(help="Train problems that the base model answers.")] = 64,
    samples: Samples = 4,
    layers: Layers = None,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Find what separates right from wrong answers without training, beside the vectors."""
    from steerlab import readings
    from steerlab.command_line import show
    from steerlab.command_line.subjects import subject
    from steerlab.interp.contrast import of_completions

    about = subject(run, model, dtype, allow_other_weights)
    folder, vectors = place(about, out), about.of_layers(layers)
    if not kept:
        found = contrast_of(about, asked_task(about, task), problems, samples, seed)
    elif about.run is None:
        raise UsageError("a file of vectors has no answers of its own; leave out --kept")
    else:
        found = of_completions(about.model, asked_task(about, task), about.run.table("completions"))
    reading, made = readings.directions(about.model, found, vectors.layers, position=position, seed=seed)
    show.directions(console(), reading.tables["directions"], made, vectors)
    return keep(reading, folder)


def magnitudes(
    run: RunOrVectors,
    scales: Annotated[
        tuple[float, ...], tyro.conf.arg(help="Factors of the vectors; 0 is the base model, -1 the reverse.")
    ] = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    beside: Beside = (),
    task: TaskName = "",
    problems: Problems = 32,
    samples: Samples = 4,
    layers: Layers = None,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Annotated[str, say("dtype")] = "auto",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Score multiples of the vectors, and of a random direction, in one decode batch."""
    from steerlab import readings
    from steerlab.command_line import show
    from steerlab.command_line.subjects import subject
    from steerlab.progress import Progress

    about = subject(run, model, dtype, allow_other_weights)
    folder, vectors, asked = place(about, out), about.of_layers(layers), asked_task(about, task)
    others = baselines(about, vectors, beside, asked, seed)
    evaluation = evaluation_of(about, problems, samples)
    with Progress(console()) as progress:
        progress.stage(f"answering at {len(scales)} scales")
        about.model.tune()
        reading = readings.magnitudes(
            about.model, asked, vectors, evaluation, scales, beside=others, seed=seed, done=progress.answered
        )
    show.magnitudes(console(), reading.tables["magnitudes"])
    return keep(reading, folder)


def side_effects(
    run: RunOrVectors,
    equal_kl: Annotated[
        bool, tyro.conf.arg(help="Also scores at the scales where all are as far from the base as the vectors.")
    ] = False,
    scales: Annotated[tuple[float, ...], tyro.conf.arg(help="Further factors of the vectors.")] = (-1.0, 2.0),
    beside: Beside = (),
    text: Annotated[
        str, tyro.conf.arg(help="A neutral text file; default: WikiText-2 in $STEERLAB_DATA, else own prose.")
    ] = "",
    texts: Annotated[int, tyro.conf.arg(help="Passages of neutral text, of up to 128 tokens.")] = 16,
    other_task: Annotated[
        str, tyro.conf.arg(help="A task the vectors were not trained on, to be scored too.", metavar="NAME")
    ] = "",
    other_option: TaskOptions = (),
    task: TaskName = "",
    problems: Problems = 32,
    samples: Samples = 4,
    layers: Layers = None,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Measure what vectors do to neutral text and to another task, also at equal KL."""
    from steerlab import readings
    from steerlab.command_line import show
    from steerlab.command_line.arguments import task_options
    from steerlab.command_line.subjects import subject
    from steerlab.interp.neutral import neutral
    from steerlab.interp.texts import contrasts
    from steerlab.progress import Progress
    from steerlab.tasks import make

    if other_option and not other_task:
        raise UsageError("--other-option needs --other-task")
    other = make(other_task, **task_options(other_option)) if other_task else None
    about = subject(run, model, dtype, allow_other_weights)
    folder, vectors = place(about, out), about.of_layers(layers)
    prose = neutral(about.model, text or None, limit=texts)
    asked = asked_task(about, task) if equal_kl or beside else None
    others = {} if asked is None else baselines(about, vectors, beside, asked, seed)
    evaluation = evaluation_of(about, problems, samples)
    conditions = contrasts(vectors, scales, seed) | dict(others)
    with Progress(console()) as progress:
        progress.stage(f"reading {len(prose.texts)} passages of {prose.name} under {len(conditions)} conditions")
        found = readings.side_effects(
            about.model, conditions, prose, task=other, evaluation=evaluation, seed=seed, done=progress.answered
        )
        if equal_kl and asked is not None:
            progress.stage("looking for the scales of equal KL")
            random = conditions["random"]
            sets = {"trained": vectors, "random": random, **others}
            equal = readings.at_equal_kl(about.model, sets, prose, asked, evaluation, done=progress.answered)
            found = readings.Reading(found.tables | equal.tables, found.figures | equal.figures)
    show.side_effects(console(), found.tables["side_effects"])
    if equal_kl:
        show.at_equal_kl(console(), found.tables["at_equal_kl"])
    return keep(found, folder)


def asked_task(about: Subject, name: str) -> Task:
    """The named task, or the run's own. Raises UsageError where there is neither."""
    from steerlab.tasks import make

    if name:
        return make(name)
    if about.experiment is None:
        raise UsageError("no task to answer; add --task NAME")
    return about.experiment.task


def evaluation_of(about: Subject, problems: int, samples: int) -> Evaluation:
    """As the run was evaluated, with so many problems and samples."""
    from steerlab.rollouts import Evaluation

    before = Evaluation() if about.experiment is None else about.experiment.answers
    return replace(before, limit=problems, samples=samples)


def contrast_of(about: Subject, task: Task, problems: int, samples: int, seed: int) -> Contrast:
    """Right and wrong answers of the base model to train problems, which no held-out score is made of."""
    from steerlab.interp.contrast import of_answers

    evaluation = replace(evaluation_of(about, problems, samples), split="train")
    about.model.tune()
    return of_answers(about.model, task, replace(evaluation, seed=evaluation.seed + seed))


def baselines(
    about: Subject, vectors: SteeringVectors, methods: tuple[Method, ...], task: Task, seed: int
) -> dict[str, SteeringVectors]:
    """Directions by some methods at the layers and lengths of `vectors`."""
    from steerlab.interp.directions import at_norms_of
    from steerlab.interp.directions import directions as made

    if not methods:
        return {}
    if other := sorted({site.kind for site in vectors.sites} - {"resid_post"}):
        raise UsageError(f"directions are read at resid_post, the vectors are at {', '.join(other)}; omit --beside")
    contrast = contrast_of(about, task, 64, 4, seed)
    found = made(about.model, contrast, vectors.layers, methods=methods, scope=vectors.scope, shuffles=1, seed=seed)
    return {name: at_norms_of(one, vectors) for name, one in found.vectors.items()}
