"""Runs side by side: a grid of experiments executed one after the other, and their scores in one table.

A cell that has been run is not run again, so a stopped study goes on where it was. Seeds of one cell are pooled with
a bootstrap over seeds × problems. Left out for now: several models, tests of difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from steerlab.execute import Reporter, execute
from steerlab.models import LanguageModel
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
) -> dict[str, Run]:
    """Every experiment in a run folder of its name below `folder`; finished ones are only opened.

    `share=(k, n)` does every n-th of them from the k-th on and leaves the others to other processes.
    """
    mine = list(experiments.items())[share[0] :: share[1]]
    return {name: execute(made, Path(folder) / name, model=model, reporter=reporter) for name, made in mine}


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
