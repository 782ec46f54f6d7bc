"""The commands that put vectors of several runs together: do they add up (compose), do they work elsewhere (transfer)?

What they find goes into a folder and, where that has one, its report.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from steerlab.command_line.arguments import Layers, OtherWeights, Seed, TaskOptions, say, task_options
from steerlab.command_line.readouts import keep
from steerlab.command_line.terminal import console
from steerlab.errors import UsageError

if TYPE_CHECKING:
    from steerlab.adapters import SteeringVectors
    from steerlab.interp.transfer import Donor, Recipient
    from steerlab.models import LanguageModel
    from steerlab.rollouts import Evaluation
    from steerlab.runs import Run
    from steerlab.tasks import Task
    from steerlab.training import Experiment

Samples = Annotated[int, tyro.conf.arg(help="Completions of each problem under each set of vectors.")]
Limit = Annotated[int | None, tyro.conf.arg(help="Only the first so many problems of a split; default: as in the run.")]
Asked = Annotated[str, tyro.conf.arg(help="Default: the task of the run. See `steerlab tasks`.", metavar="NAME")]
Folder = Annotated[
    str, tyro.conf.arg(help="Folder for tables and figures; default: the run that is named first.", metavar="FOLDER")
]

Runs = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help="Runs whose vectors are put elsewhere.", metavar="RUN")
]
To = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="Where they are put: runs (their model, task and own vectors), or models; default: the donors' runs.",
        metavar="RUN_OR_MODEL",
    ),
]
TaskOfAll = Annotated[
    str, tyro.conf.arg(help="Of every recipient; default: a run's own, for a model the first donor's.", metavar="NAME")
]
How = Annotated[
    Literal["auto", "procrustes", "ridge"],
    tyro.conf.arg(help="auto: as they are where shapes are equal, else by Procrustes; or a linear map in any case."),
]
Texts = Annotated[
    str,
    tyro.conf.arg(
        help="A file with a text on every line, for the maps; default: the training problems of the first donor.",
        metavar="FILE",
    ),
]


def compose(
    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            help="Runs of one vector each, or the folder of a sweep (--layers each); runs of several vectors are what "
            "the pairs are compared with.",
            metavar="RUN_OR_SWEEP",
        ),
    ],
    layers: Layers = None,
    task: Asked = "",
    task_option: TaskOptions = (),
    samples: Samples = 4,
    limit: Limit = None,
    control: Annotated[int, tyro.conf.arg(help="Pairs of random directions to compare with; 0 for none.")] = 12,
    texts: Annotated[
        int, tyro.conf.arg(help="Answers of each vector on which its persistence is measured; 0 leaves it out.")
    ] = 4,
    seed: Seed = 0,
    dtype: Annotated[str, say("dtype")] = "auto",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Use vectors that were trained alone together: in pairs, greedily, all at once.

    Tables and figures go to --out; without it to DIR/sweep of the sweep that was named first.
    """
    from steerlab import readings
    from steerlab.command_line import show

    found = parts_of(runs, dtype, allow_other_weights)
    folder = place(found.home, out, found.model)
    vectors = found.vectors if layers is None else tuple(of.select(layers) for of in found.vectors)
    asked, evaluation = found.asked(task, task_option), evaluated(found.experiment, samples, limit, seed)
    found.model.tune()
    from steerlab.progress import Progress

    with Progress(console()) as progress:
        progress.stage(f"combining vectors of layers {', '.join(map(str, vectors[0].layers))}")
        told = readings.composition(
            found.model,
            asked,
            vectors,
            evaluation,
            together=found.together or None,
            control=control,
            texts=texts,
            seed=seed,
            done=progress.answered,
        )
    tables = told.tables
    show.composition(console(), tables["composition"], tables["composition_sets"], tables.get("composition_agreement"))
    return keep(told, folder)


def transfer(
    donors: Runs,
    to: To = (),
    task: TaskOfAll = "",
    task_option: TaskOptions = (),
    how: How = "auto",
    texts: Texts = "",
    samples: Samples = 8,
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Annotated[str, say("dtype")] = "auto",
    out: Folder = "",
) -> int:
    """Put vectors into other models and tasks, beside the recipients' own and random maps.

    Tables and figures go to --out; without it to the first donor's run.
    """
    from steerlab import readings
    from steerlab.command_line import show
    from steerlab.progress import Progress

    models: dict[str, LanguageModel] = {}
    giving, first, home = donors_of(donors, models, dtype)
    asked = named_task(task, task_option)
    taking = [recipient(target, to or donors, models, dtype, asked, first) for target in to or donors]
    lines = read_lines(texts) if texts else shared_texts(first.task)
    folder = place(home, out, giving[0].model)
    evaluation = evaluated(first, samples, limit, seed)
    for model in models.values():
        model.tune()
    with Progress(console()) as progress:
        progress.stage(f"{len(giving)} donors in {len(taking)} recipients")
        told = readings.transfer(giving, taking, evaluation, texts=lines, how=how, seed=seed, done=progress.answered)
    show.transfer(console(), told.tables["transfer"], told.tables.get("transfer_maps"))
    return keep(told, folder)


def donors_of(
    targets: tuple[str, ...], models: dict[str, LanguageModel], dtype: str
) -> tuple[list[Donor], Experiment, Run]:
    """The vectors of runs on their models, which are put into `models`; experiment and folder of the first."""
    from steerlab.command_line.subjects import subject
    from steerlab.interp.transfer import Donor

    if not targets:
        raise UsageError("no run to take vectors from; name at least one")
    found, first = [], None
    for target in targets:
        about = subject(target, dtype=dtype)
        first = first or about
        model = models.setdefault(about.model.name, about.model)
        found.append(Donor(short(target, targets), model, (about.vectors,)))
    assert first is not None  # there was a target
    if first.run is None or first.experiment is None:
        raise UsageError(f"{targets[0]} is no training run; name the folder of one first")
    return found, first.experiment, first.run


@dataclass(frozen=True)
class Parts:
    """vectors: per training seed, all that were trained alone. together: sets of several layers, by seed. home: the
    sweep's own run, if one was named."""

    model: LanguageModel
    experiment: Experiment
    vectors: tuple[SteeringVectors, ...]
    together: tuple[SteeringVectors, ...]
    home: Run | None

    def asked(self, task: str, options: tuple[str, ...]) -> Task:
        return named_task(task, options) or self.experiment.task


def parts_of(targets: tuple[str, ...], dtype: str, allow_other_weights: bool) -> Parts:
    """The vectors of runs and sweeps, on one model. Raises UsageError for whatever cannot be combined."""
    from steerlab.adapters import SteeringVectors, formats
    from steerlab.command_line.subjects import subject
    from steerlab.execute import adapter_path

    runs, home = runs_of(targets)
    if not runs:
        raise UsageError("no run with trained vectors; name runs of one vector each, or a sweep (--layers each)")
    about = subject(str(runs[0].folder), dtype=dtype, allow_other_weights=allow_other_weights)
    alone: dict[int, SteeringVectors] = {}
    together: dict[int, SteeringVectors] = {}
    for run in runs:
        path = adapter_path(run)
        loaded = None if path is None else formats.load_adapter(path, about.model, allow_other_weights)
        if not isinstance(loaded, SteeringVectors):
            raise UsageError(f"{run.folder} has no steering vectors; leave it out, or finish it with steerlab resume")
        seed = int(run.manifest["seed"])
        if len(loaded.layers) > 1:
            together[seed] = loaded
        else:
            alone[seed] = alone[seed].merge(loaded) if seed in alone else loaded
    experiment = about.experiment
    if experiment is None or not alone:
        raise UsageError("no run of one vector; train some with: steerlab train rloo --layers each --task NAME")
    parts, whole = (tuple(found[seed] for seed in sorted(found)) for found in (alone, together))
    return Parts(about.model, experiment, parts, whole, home)


def runs_of(targets: tuple[str, ...]) -> tuple[list[Run], Run | None]:
    """The training runs that targets name, those of sweeps included, and the first sweep's own run."""
    from steerlab.command_line.order import is_sweep
    from steerlab.execute import adapter_path
    from steerlab.runs import Run, RunStore
    from steerlab.sweep import HOME

    runs: list[Run] = []
    home = None
    for target in targets:
        if is_sweep(target):
            home = home or Run.open(Path(target) / HOME)
            runs += [run for run in RunStore(target).runs() if run.folder.name != HOME and adapter_path(run)]
        else:
            runs.append(Run.open(target))
    return runs, home


def recipient(
    target: str,
    among: tuple[str, ...],
    models: dict[str, LanguageModel],
    dtype: str,
    task: Task | None,
    experiment: Experiment,
) -> Recipient:
    """A run with its own vectors and task, or a model with the task of `experiment`; `task` goes before both. Models
    that are in memory are not loaded again."""
    from steerlab.command_line.subjects import subject
    from steerlab.interp.transfer import Recipient

    is_run = (Path(target) / "manifest.json").exists()
    if not is_run and target in models:
        return Recipient(target, models[target], task or experiment.task)
    about = subject(target if is_run else "", "" if is_run else target, dtype)
    model = models.setdefault(about.model.name, about.model)
    own_task = experiment.task if about.experiment is None else about.experiment.task
    own = (about.vectors,) if is_run and (task is None or task == own_task) else ()
    return Recipient(short(target, among) if is_run else target, model, task or own_task, own)


def evaluated(experiment: Experiment, samples: int, limit: int | None, seed: int) -> Evaluation:
    """How the run was evaluated, with other numbers."""
    before = experiment.answers
    return replace(before, samples=samples, limit=limit or before.limit, seed=before.seed + seed)


def named_task(task: str, options: tuple[str, ...]) -> Task | None:
    """The task that was asked for by name; None if none was."""
    from steerlab.tasks import make

    if task:
        return make(task, **task_options(options))
    if options:
        raise UsageError("--task-option needs --task; the run's own task has its options already")
    return None


def shared_texts(task: Task) -> list[str]:
    """Training problems with their answers, as text that every model can read."""
    return [f"{problem.question} {problem.answer}" for problem in task.problems("train")]


def read_lines(path: str) -> list[str]:
    """The lines of a file that are not empty. Raises UsageError if it cannot be read as text."""
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as text ({error}); give a UTF-8 file with a text on every line") from None


def short(target: str, among: tuple[str, ...]) -> str:
    """The folder's name, or all of the path where two have the same name."""
    name = Path(target).resolve().name
    return name if [Path(other).resolve().name for other in among].count(name) == 1 else target


def place(run: Run | None, out: str, model: LanguageModel) -> Run:
    """`out`, a new folder, or else the run. Raises UsageError for neither."""
    from steerlab.runs import Run

    if out:
        facts: dict[str, Any] = {"model": model.name, "weights_sha256": model.weights_sha256}
        return Run.create(out, kind="reading", status="done", **facts)
    if run is None:
        raise UsageError("these runs have no folder in common; add --out FOLDER")
    return run
