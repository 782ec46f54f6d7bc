"""Runs side by side: a grid of experiments executed one after the other, and their scores in one table.

A cell that has been run is not run again, so a stopped study goes on where it was. Seeds of one cell are pooled with
a bootstrap over seeds × problems. With Ray every experiment is a task of its own (see `cluster.py`). Left out for now:
several models, tests of difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from steerlab.cluster import connected, on_cluster
from steerlab.errors import UsageError
from steerlab.execute import execute, lay_out
from steerlab.held_out import check
from steerlab.models import LanguageModel, load
from steerlab.progress import Reporter, Silent
from steerlab.rollouts import summarise
from steerlab.runs import Run
from steerlab.training import Experiment


def execute_all(
    experiments: Mapping[str, Experiment],
    folder: str | Path,
    *,
    model: LanguageModel | None = None,
    reporter: Reporter | None = None,
    share: tuple[int, int] = (0, 1),
    ray: str | None = None,
) -> dict[str, Run]:
    """Every experiment in a run folder of its name below `folder`; finished ones are only opened.

    `share=(k, n)` does every n-th of them from the k-th on and leaves the others to other processes. ray: a cluster
    that does them, `auto`, `local` or HOST:PORT; each worker loads the model that the experiments name.
    """
    mine = dict(list(experiments.items())[share[0] :: share[1]])
    if ray is None:
        return {name: execute(made, Path(folder) / name, model=model, reporter=reporter) for name, made in mine.items()}
    if not mine:
        return {}
    reporter, first = reporter or Silent(), next(iter(mine.values()))
    if {(e.model, e.dtype) for e in mine.values()} != {(first.model, first.dtype)}:
        raise UsageError("experiments of several models or dtypes cannot go to Ray together; make a call for each")
    reporter.stage(f"loading {first.model}")
    model = model or load(first.model, dtype=first.dtype)
    for experiment in mine.values():
        check(experiment, model)
    with connected(ray):
        runs = lay_out(mine, folder, model)
        on_cluster(ray, _execute_group, [{name: made} for name, made in mine.items()], folder, reporter)
    return {name: Run.open(run.folder) for name, run in runs.items()}


def _execute_group(experiments: Mapping[str, Experiment], folder: Path, model: LanguageModel) -> None:
    for name, experiment in experiments.items():
        execute(experiment, folder / name, model=model)


def pooled_completions(runs: Sequence[Run], condition: str = "steered") -> pd.DataFrame:
    """Completions of one condition of several runs of one cell, with the runs' training seeds as `seed`."""
    parts = []
    for run in runs:
        table = run.table("completions")
        parts.append(table[table["condition"] == condition].assign(seed=int(run.manifest["seed"])))
    return pd.concat(parts, ignore_index=True)


def scores(cells: Mapping[str, Sequence[Run]], condition: str = "steered") -> pd.DataFrame:
    """A `scores` table with a column `cell`: each cell's runs differ in their seed only and are pooled.

    The interval comes from resampling seeds and problems; with one seed, from problems.
    """
    frames = []
    for cell, runs in cells.items():
        found = pooled_completions(runs, condition)
        heat = float(found["temperature"].iloc[0])
        table = summarise(found, model=str(runs[0].manifest["model"]), temperature=heat)
        frames.append(table.assign(cell=cell))
    return pd.concat(frames, ignore_index=True)
