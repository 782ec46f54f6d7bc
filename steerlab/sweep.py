"""A sweep over layers: one steering vector per layer, each trained by itself, and how far each of them gets.

    DIR/layer-07-seed0/…     one run folder per layer and seed, complete with its own report
    DIR/all-layers-seed0/    the same with vectors at every layer at once, if asked for
    DIR/sweep/               the sweep: tables `layers` and `scores` (what they are compared with), figures/layers.html

Runs are trained at one pace where that pays (see `training/lockstep.py`) and evaluated in one decode batch; the base
model answers once for all of them. Runs that are done are skipped and the others go on from their own checkpoints, so
`resume`, or the same call again, finishes a sweep that was stopped. A run that fails keeps no other from its end: it is
left out, its scores in `layers` are empty, and `resume` tries it again. A layer reaches no more than its learning rate
lets it (`analyses/bias_only/layer_and_rate.py`: later layers want larger ones), hence `lr` for both ends.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from steerlab import tables
from steerlab.adapters import Steering
from steerlab.adapters.steering import check_layers
from steerlab.cluster import connected, on_cluster
from steerlab.compare import pooled_completions
from steerlab.errors import RunFailed, UsageError
from steerlab.execute import (
    begin,
    dtype_of,
    finish,
    lay_out,
    same_machine,
    save_adapter,
)
from steerlab.held_out import answer, check
from steerlab.models import LanguageModel, load
from steerlab.plots import layers as plot_layers
from steerlab.plots import scores as plot_scores
from steerlab.progress import Reporter, Silent
from steerlab.rollouts import Policy, summarise
from steerlab.runs import CostLedger, Run
from steerlab.training import Experiment, Trainer
from steerlab.training.lockstep import fit_together, joined

HOME = "sweep"
ALL_LAYERS = "all_layers"


@dataclass(frozen=True)
class Sweep:
    """experiment: what the runs have in common. layers, seeds: one run of each of them together. all_layers: per seed
    also a run with vectors at every layer. lr: of the first and the last layer of the model, geometric in between;
    None: the experiment's."""

    experiment: Experiment
    layers: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    all_layers: bool = False
    lr: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.experiment.adapter, Steering):
            kind = type(self.experiment.adapter).__name__
            raise UsageError(f"a sweep over layers trains one steering vector each, not {kind}; leave out the adapter")
        for name, values in (("layers", self.layers), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"{name} {list(values)} of a sweep must be at least one, each once")
        if self.lr is not None and min(self.lr) <= 0:
            raise UsageError(f"learning rates {self.lr} must be positive")

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        n_layers: int,
        layers: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        all_layers: bool = False,
        lr: tuple[float, float] | None = None,
    ) -> Sweep:
        """For a model of so many layers, every one of them unless `layers` says which; seeds None: the experiment's."""
        wanted = tuple(range(n_layers)) if layers is None else tuple(layers)
        check_layers(wanted, n_layers)
        return cls(experiment, wanted, (experiment.seed,) if seeds is None else tuple(seeds), all_layers, lr)

    def experiments(self, n_layers: int) -> dict[str, Experiment]:
        """The runs by the names of their folders, for a model of so many layers."""
        made = {}
        for seed in self.seeds:
            for layer in self.layers:
                made[name_of(layer, seed)] = self._at((layer,), seed, self._rate(layer, n_layers))
            if self.all_layers:
                made[name_of(None, seed)] = self._at(None, seed, self.experiment.updater.lr)
        return made

    def _at(self, layers: tuple[int, ...] | None, seed: int, lr: float) -> Experiment:
        adapter, updater = self.experiment.adapter, self.experiment.updater
        assert isinstance(adapter, Steering)
        return replace(
            self.experiment, adapter=replace(adapter, layers=layers), updater=replace(updater, lr=lr), seed=seed
        )

    def _rate(self, layer: int, n_layers: int) -> float:
        if self.lr is None:
            return self.experiment.updater.lr
        first, last = self.lr
        return first * (last / first) ** (layer / max(1, n_layers - 1))


def name_of(layer: int | None, seed: int) -> str:
    """Folder of a run; None stands for all layers."""
    return f"all-layers-seed{seed}" if layer is None else f"layer-{layer:02d}-seed{seed}"


def sweep_layers(
    experiment: Experiment,
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    all_layers: bool = False,
    lr: tuple[float, float] | None = None,
    model: LanguageModel | None = None,
    reporter: Reporter | None = None,
    ray: str | None = None,
) -> Run:
    """Train one vector at each of `layers` (None: every layer) under each of `seeds` (None: the experiment's) below
    `folder`. Returns the sweep's own folder; its table `layers` has the scores by layer.

    The layers that the experiment's own adapter names are not regarded. ray: a cluster that does the runs, one task per
    group of runs that are trained together (see `cluster.py`); `auto`, `local` or HOST:PORT. Raises UsageError for bad
    input before anything is written, RunFailed if no run gets to its end.
    """
    alone()
    reporter = reporter or Silent()
    Sweep(experiment, (0,), lr=lr)  # an adapter that cannot be swept is refused before a model is loaded
    reporter.stage(f"loading {experiment.model}")
    model = model or load(experiment.model, dtype=experiment.dtype)
    sweep = Sweep.of(experiment, model.n_layers, layers, seeds, all_layers, lr)
    return carry_out(sweep, folder, model, reporter, ray)


def resume(
    folder: str | Path,
    *,
    model: LanguageModel | None = None,
    reporter: Reporter | None = None,
    ray: str | None = None,
) -> Run:
    """Go on with the sweep in `folder`, in its own dtype and threads. A finished one is returned as it is."""
    alone()
    home, reporter = Run.open(Path(folder) / HOME), reporter or Silent()
    if home.manifest["status"] == "done":
        return home
    torch.set_num_threads(home.manifest["threads"])
    sweep: Sweep = home.experiment
    reporter.stage(f"loading {sweep.experiment.model}")
    return carry_out(sweep, folder, model or load(sweep.experiment.model, dtype=dtype_of(home)), reporter, ray)


def alone() -> None:
    """A sweep has one process. Raises UsageError under a launcher of several."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("a sweep over layers does not run under torchrun; start it as one process")


def carry_out(sweep: Sweep, folder: str | Path, model: LanguageModel, reporter: Reporter, ray: str | None) -> Run:
    """The sweep from wherever it stands to its end."""
    experiments = sweep.experiments(model.n_layers)
    first = next(iter(experiments.values()))
    first.adapter.init(model)
    check(first, model)
    with connected(ray):  # an address without a cluster is refused before anything is written
        return _carried_out(sweep, experiments, folder, model, reporter, ray)


def _carried_out(
    sweep: Sweep,
    experiments: Mapping[str, Experiment],
    folder: str | Path,
    model: LanguageModel,
    reporter: Reporter,
    ray: str | None,
) -> Run:
    home = begin(sweep.experiment, Path(folder) / HOME, model, sweep)
    if home.manifest["status"] == "done":
        return home
    same_machine(home, model)
    runs = lay_out(experiments, folder, model)
    compared = baselines(home, sweep, model, reporter)
    groups = [{name: experiments[name] for name in names} for names in joined(experiments)]
    if ray is not None:
        work = functools.partial(train_group, compared=compared, reporter=Silent())
        on_cluster(ray, work, groups, folder, reporter)
    for number, group in enumerate(groups if ray is None else ()):
        reporter.stage(f"{', '.join(group)} ({number + 1} of {len(groups)})")
        train_group(group, folder, model, compared, reporter)
    return conclude(home, sweep, {name: Run.open(run.folder) for name, run in runs.items()}, reporter)


def baselines(home: Run, sweep: Sweep, model: LanguageModel, reporter: Reporter) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Completions and scores of what every layer is compared with; asked once and kept in the sweep's folder."""
    experiment = sweep.experiment
    conditions = experiment.answers.baselines(experiment.task)
    if not conditions:
        return tables.empty("completions"), tables.empty("scores")
    if not {"completions", "scores"} <= set(home.tables()):
        reporter.stage(f"evaluating {', '.join(conditions)}")
        start = time.perf_counter()
        completions, scores = answer(model, experiment.task, experiment.answers, conditions, reporter)
        home.save_table("completions", completions)
        home.save_table("scores", scores)
        home.update(baselines_s=time.perf_counter() - start)
    scores = home.table("scores")
    return home.table("completions"), scores.loc[scores["condition"] != ALL_LAYERS]


def train_group(
    experiments: Mapping[str, Experiment],
    folder: str | Path,
    model: LanguageModel,
    compared: tuple[pd.DataFrame, pd.DataFrame],
    reporter: Reporter,
) -> None:
    """Train, evaluate and finish runs that `joined` has put together; those that are done are left alone. A run that
    cannot be trained or evaluated ends as "failed".

    compared: completions and scores of the baselines, which every run shows beside its own.
    """
    trainers: dict[str, Trainer] = {}
    for name, experiment in experiments.items():
        run = Run.open(Path(folder) / name)
        if run.manifest["status"] != "done":
            adapter = experiment.adapter.init(model, torch.Generator().manual_seed(experiment.seed))
            run.manifest.pop("failure", None)
            run.update(status="training")
            trainers[name] = Trainer(experiment, Policy(model, adapter), run, on_notice=reporter.notice)
    for name, failure in zip(list(trainers), fit_together(list(trainers.values()), reporter.step), strict=True):
        if failure is not None:
            give_up(trainers.pop(name), failure)
    for trainer in trainers.values():
        save_adapter(trainer.run, model, trainer.experiment, trainer.adapter)
        trainer.run.update(status="evaluating")
    evaluate_group(trainers, model, compared, reporter)


def give_up(trainer: Trainer, failure: RunFailed) -> None:
    """Say in a run's manifest that it failed, why, and what it has cost."""
    trainer.run.update(status="failed", failure=str(failure), cost=trainer.ledger.to_dict())


def evaluate_group(
    trainers: Mapping[str, Trainer],
    model: LanguageModel,
    compared: tuple[pd.DataFrame, pd.DataFrame],
    reporter: Reporter,
) -> None:
    """Evaluate runs of one task in one decode batch, and finish them; where that fails, each by itself."""
    if not trainers:
        return
    first, start = next(iter(trainers.values())), time.perf_counter()
    task, evaluation = first.experiment.task, first.experiment.answers
    conditions = {name: evaluation.steered(task, trainer.adapter) for name, trainer in trainers.items()}
    try:
        answers = answer(model, task, evaluation, conditions, reporter)
    except RunFailed as failure:
        if len(trainers) == 1:
            give_up(first, failure)
        for name, trainer in trainers.items() if len(trainers) > 1 else ():
            evaluate_group({name: trainer}, model, compared, reporter)
        return
    each = (time.perf_counter() - start) / len(trainers)
    for name, trainer in trainers.items():
        trainer.ledger.add(evaluate_s=each)
        completions, scores = (_with(before, of, name) for before, of in zip(compared, answers, strict=True))
        trainer.run.save_table("completions", completions)
        trainer.run.save_table("scores", scores)
        trainer.run.save_figure("scores", plot_scores.scores(scores))
        finish(trainer.run, model, trainer.adapter, trainer.ledger, Silent())


def _with(before: pd.DataFrame, answers: pd.DataFrame, name: str) -> pd.DataFrame:
    """The baselines' rows and those of one run, whose condition is called steered like that of any run."""
    mine = answers[answers["condition"] == name].assign(condition="steered")
    return pd.concat([before, mine], ignore_index=True) if len(before) else mine.reset_index(drop=True)


def conclude(home: Run, sweep: Sweep, runs: Mapping[str, Run], reporter: Reporter) -> Run:
    """Tables `layers` and `scores`, the figure and the cost of all runs; says which failed. Raises the first failure as
    RunFailed if no layer's run got to its end.
    """
    failed = {name: run.manifest["failure"] for name, run in runs.items() if run.manifest["status"] == "failed"}
    if all(name_of(layer, seed) in failed for layer in sweep.layers for seed in sweep.seeds):
        raise RunFailed(next(iter(failed.values())))
    for name, why in failed.items():
        reporter.notice(f"{name} failed and is left out: {why}")
    found = by_layer(sweep, runs)
    home.save_table("layers", found)
    compared = with_all_layers(home, [runs[name_of(None, seed)] for seed in sweep.seeds if sweep.all_layers])
    home.save_table("scores", compared)
    home.save_figure("layers", plot_layers.layers(found.dropna(subset="value"), compared))
    costs = [run.manifest["cost"] for run in runs.values()]
    total = CostLedger(evaluate_s=home.manifest.get("baselines_s", 0.0))
    for cost in costs:
        total.add(**cost)
    total.peak_memory_bytes = max(cost["peak_memory_bytes"] for cost in costs)
    home.update(cost=total.to_dict(), status="failed" if failed else "done")
    return home


def with_all_layers(home: Run, runs: Sequence[Run]) -> pd.DataFrame:
    """Scores of the baselines, and of vectors at every layer at once: those of `runs` that got to their end, pooled."""
    scores = home.table("scores") if "scores" in home.tables() else tables.empty("scores")
    compared = scores.loc[scores["condition"] != ALL_LAYERS]
    there = [run for run in runs if run.manifest["status"] == "done"]
    if not there:
        return compared
    pooled = pooled_completions(there)
    heat = float(pooled["temperature"].iloc[0])
    whole = summarise(pooled.assign(condition=ALL_LAYERS), model=str(home.manifest["model"]), temperature=heat)
    return pd.concat([compared, whole], ignore_index=True) if len(compared) else whole


def by_layer(sweep: Sweep, runs: Mapping[str, Run]) -> pd.DataFrame:
    """A `layers` table: what each layer's vector scores under each seed; of no problem, and empty, where it failed."""
    columns = [column.name for column in tables.SCHEMAS["layers"]]
    places = {(layer, seed): runs[name_of(layer, seed)] for seed in sweep.seeds for layer in sweep.layers}
    scores = {place: run.table("scores") for place, run in places.items() if run.manifest["status"] == "done"}
    steered = {place: table[table["condition"] == "steered"] for place, table in scores.items()}
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "n_problems": 0, "n_samples": 0}
    empty = next(iter(steered.values())).assign(**nothing)
    parts = [steered.get(place, empty).assign(layer=place[0], seed=place[1])[columns] for place in places]
    return tables.check(pd.concat(parts, ignore_index=True), "layers")
