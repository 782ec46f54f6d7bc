"""The vectors that every script of this folder reads: one trained alone at each of some layers, and sets at all layers.

Trained once by whichever script comes first (a stopped bank goes on), all on the quickstart's sums: `DIR/bank` is what
`steerlab train rloo --task chain_sum --layers each all` leaves behind. At `small` the layers' learning rates rise
from the first to the last as in 2509.06608, whose authors tuned them by layer; the ends are from a pilot (seed 0, the
rewards of training: at 0.1 layer 0 loses, layer 15 gains most).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from steerlab.adapters import SteeringVectors, formats
from steerlab.execute import dtype_of
from steerlab.models import LanguageModel, load
from steerlab.progress import Progress
from steerlab.readings import Reading
from steerlab.recipes import rloo
from steerlab.rollouts import Evaluation
from steerlab.runs import Run
from steerlab.sweep import name_of, sweep_layers
from steerlab.tasks import Task, make

Scale = Literal["tiny", "small"]


@dataclass(frozen=True)
class Size:
    """steps, prompts, samples: of each training. lr: of the first and the last layer. limit: held-out problems, and
    answers: completions of each."""

    layers: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    prompts: int
    samples: int
    lr: tuple[float, float]
    limit: int | None
    answers: int


SIZES: dict[Scale, Size] = {
    "tiny": Size((0, 1), (0, 1), steps=1, prompts=2, samples=4, lr=(0.1, 0.1), limit=3, answers=1),
    "small": Size(
        (0, 4, 8, 12, 15, 18, 21, 24, 28, 29),
        (0, 1, 2),
        steps=20,
        prompts=8,
        samples=8,
        lr=(0.03, 0.3),
        limit=None,
        answers=4,
    ),
}


@dataclass(frozen=True)
class Options:
    """out: where the bank is, or will be, and what the script writes. scale: `tiny` is for tests. bank_layers: a bank
    of these layers only, for a script that needs no others; None: all layers of the scale."""

    out: Path
    scale: Scale = "small"
    model: str = "smollm2-135m"
    bank_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Bank:
    """home: the sweep's own run, with the tables `layers` and `scores`. evaluation: how its vectors were scored."""

    model: LanguageModel
    task: Task
    evaluation: Evaluation
    folder: Path
    home: Run
    layers: tuple[int, ...]
    seeds: tuple[int, ...]

    def run(self, layer: int | None, seed: int) -> Run:
        """The run that trained `layer` alone; None: all layers."""
        return Run.open(self.folder / name_of(layer, seed))

    def vectors(self, layer: int | None, seed: int) -> SteeringVectors:
        """The vector trained alone at `layer`; None: the set trained at all layers."""
        return formats.load(self.run(layer, seed).vectors_path, self.model)

    def isolated(self, seed: int) -> SteeringVectors:
        """All vectors of one seed that were trained alone, as one set."""
        first, *others = (self.vectors(layer, seed) for layer in self.layers)
        for other in others:
            first = first.merge(other)
        return first


def trained(options: Options, *, exact: bool = False) -> Bank:
    """The bank below `options.out`, trained as far as it is not yet, and its model: as it was trained, or in fp32 for
    differences of states (`exact`)."""
    size, folder = SIZES[options.scale], options.out / "bank"
    layers = size.layers if options.bank_layers is None else options.bank_layers
    # a toy model is never right; paid at random its vectors are at least not zero
    task = make("chain_sum", control="random_reward" if options.scale == "tiny" else "")
    experiment = rloo(task, options.model, steps=size.steps, prompts=size.prompts, samples=size.samples)
    evaluation = replace(experiment.evaluation, samples=size.answers, limit=size.limit)
    if options.scale == "tiny":
        evaluation = replace(evaluation, shots=0)
    experiment = replace(experiment, evaluation=evaluation)
    with Progress() as progress:
        home = sweep_layers(
            experiment, folder, layers=layers, seeds=size.seeds, all_layers=True, lr=size.lr, reporter=progress
        )
    model = load(options.model, dtype=torch.float32 if exact else dtype_of(home))
    return Bank(model, task, evaluation, folder, home, layers, size.seeds)


def keep(options: Options, name: str, reading: Reading) -> None:
    """Tables and figures of a script, below `options.out`."""
    reading.save(Run.create(options.out / name, kind="analysis", status="done", model=options.model))
