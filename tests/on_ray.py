"""Run by test_cluster.py in a process of its own: Ray starts threads and warns of things that are not ours.

python on_ray.py FOLDER MODEL DATA
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from steerlab import cluster, compare, execute, sweep
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, load
from steerlab.recipes import rloo
from steerlab.runs import Run
from steerlab.tasks import make
from steerlab.training import Experiment, Trainer


def dying_once(experiments: Mapping[str, Experiment], folder: Path, model: LanguageModel) -> None:
    """The worker of the run `b` is gone after its first step, the first time."""
    learn, flag = Trainer.learn, folder / "died"

    def learn_and_die(self: Trainer, *given: object) -> None:
        learn(self, *given)  # type: ignore[arg-type]
        with (folder / "steps").open("a") as file:
            file.write(f"{self.run.folder.name}{given[0]} ")
        if self.run.folder.name == "b" and not flag.exists():
            flag.touch()
            os._exit(1)

    Trainer.learn = learn_and_die  # type: ignore[method-assign]
    try:
        for name, made in experiments.items():
            execute.execute(made, folder / name, model=model)
    finally:
        Trainer.learn = learn  # type: ignore[method-assign]


def refusing(experiments: Mapping[str, Experiment], folder: Path, model: LanguageModel) -> None:
    raise UsageError("nothing fits")


def elsewhere(experiments: Mapping[str, Experiment], folder: Path, model: LanguageModel) -> None:
    """A run on a machine that does not see the driver's folder."""
    (folder / "where").write_text("")
    for name, made in experiments.items():
        execute.execute(made, folder / name, model=model)


class Heard(execute.Silent):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


def bytes_of(folder: Path, names: list[str]) -> list[str]:
    return [(folder / name / "vectors.safetensors").read_bytes().hex() for name in names]


def main(folder: Path, model: str, data: str) -> None:
    torch.set_num_threads(1)
    task = make(data, control="random_reward", train=20, test=3)
    sizes = {"steps": 2, "prompts": 2, "samples": 3, "max_new_tokens": 4}
    made = rloo(task, model, dtype="fp64", **sizes)  # type: ignore[arg-type]
    made = replace(made, evaluation=replace(made.evaluation, samples=2, shots=0))
    narrow = replace(made, source=replace(made.source, max_rows=12))  # type: ignore[type-var]
    said: dict[str, object] = {}

    names = [f"layer-{layer:02d}-seed0" for layer in range(4)]
    sweep.sweep_layers(narrow, folder / "sweep")
    heard = Heard()
    with cluster.connected("local") as ray:
        home = sweep.sweep_layers(narrow, folder / "sweep-ray", ray="local", reporter=heard)
        said["sweep"] = bytes_of(folder / "sweep", names) == bytes_of(folder / "sweep-ray", names)
        said["table"] = home.table("layers").equals(Run.open(folder / "sweep" / "sweep").table("layers"))
        said["stages"] = heard.stages

        grid = {name: replace(made, seed=seed) for seed, name in enumerate("ab")}
        compare.execute_all(grid, folder / "grid")
        compare.execute_all(grid, folder / "grid-ray", ray="local")
        said["grid"] = bytes_of(folder / "grid", [*"ab"]) == bytes_of(folder / "grid-ray", [*"ab"])

        here = load(model, dtype="fp64")
        execute.lay_out(grid, folder / "dying", here)
        cluster.on_cluster("local", dying_once, [{n: e} for n, e in grid.items()], folder / "dying", Heard())
        said["dying"] = bytes_of(folder / "grid", [*"ab"]) == bytes_of(folder / "dying", [*"ab"])
        said["died"] = (folder / "dying" / "died").exists()
        said["steps"] = sorted((folder / "dying" / "steps").read_text().split())

        execute.lay_out({"a": made}, folder / "far", here)
        unseen = cluster._task(
            elsewhere, {"a": made}, str(folder / "unseen"), {"a": Run.open(folder / "far" / "a").manifest}
        )
        said["elsewhere"] = sorted(unseen[1])
        said["nothing_written"] = not (folder / "unseen").exists()
        try:
            cluster.on_cluster("local", refusing, [{"a": made}], folder / "far", Heard())
        except UsageError as error:
            said["refused"] = str(error)
        try:
            cluster.enough(ray, 1000)
        except UsageError as error:
            said["enough"] = str(error)
    sys.stdout.write(f"\n{json.dumps(said)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
