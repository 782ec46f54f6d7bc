"""One process of a launch, for test_world.py: trains in the world that its environment describes.

    python one_of_several.py MODE FOLDER      MODE: whole, shard (weights in pieces), stop (interrupted after a step)

FOLDER holds `model` (a saved model) and `sums.csv`; the run goes to FOLDER/MODE, the leader's first gradient to
FOLDER/gradient.safetensors, and what every process ends with to FOLDER/MODE-RANK.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from steerlab.errors import RunFailed
from steerlab.execute import Silent, execute
from steerlab.models import fused, load
from steerlab.recipes import rloo
from steerlab.rollouts import Policy
from steerlab.runs import Run, tensors_sha256
from steerlab.tasks import Judgement, Problem, make
from steerlab.tasks.controls import RandomReward
from steerlab.training import Experiment, StepDone, Trainer
from steerlab.training.world import World


def experiment(folder: Path) -> Experiment:
    """Three steps of three prompts (an odd number, so that the shares differ) with random rewards."""
    task = make(str(folder / "sums.csv"), control="random_reward", train=20, test=5)
    made = rloo(task, str(folder / "model"), steps=3, prompts=3, samples=4, max_new_tokens=5, dtype="fp32")
    return replace(made, evaluation=replace(made.evaluation, samples=2, shots=2))


def first_gradient(folder: Path, world: World) -> dict[str, torch.Tensor]:
    """The gradient of the first step, summed over the world."""
    what = experiment(folder)
    model = load(what.model, dtype="fp32")
    run = Run(folder / "nowhere", {"engine": {"token_budget": 64}})
    trainer = Trainer(what, Policy(model, what.adapter.init(model)), run, world=world)
    trainer.begin()
    drawn = trainer.source.next(0)
    batch, _ = trainer.pool(what.objective.prepare(drawn.batch), drawn.tally)
    trainer.gradients(batch)
    gradients = {name: p.grad for name, p in trainer.named() if p.grad is not None}
    sent = world.sum_(list(gradients.values()))
    assert sent <= 2 * 4 * trainer.adapter.n_parameters
    return gradients


def fused_without_measuring() -> Callable[..., Any]:
    """Runs that are compared must compute alike, however busy the machine was when each began. Returns what it was."""
    original = fused.measured_choice
    fused.measured_choice = lambda *_, **__: "fused"  # type: ignore[assignment]
    return original


def judge_one_by_one() -> Callable[..., Any]:
    """Random rewards are drawn from the whole batch; here from each completion alone, as real rewards are. Returns the
    original method, to put back."""
    original = RandomReward.judge

    def judge(self: RandomReward, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        return [original(self, [problem], [text])[0] for problem, text in zip(problems, texts, strict=True)]

    RandomReward.judge = judge
    return original


class Interrupted(Silent):
    def step(self, done: StepDone) -> None:
        raise KeyboardInterrupt("enough")


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    judge_one_by_one()
    fused_without_measuring()
    world = World.from_environment()
    ended: dict[str, object] = {"size": world.size}
    try:
        if mode == "whole":
            gradients = first_gradient(folder, world)
            if world.leads:
                save_file(gradients, folder / "gradient.safetensors")
        what = experiment(folder)
        model = load(what.model, dtype="fp32")
        stop = Interrupted() if mode == "stop" else None
        run = execute(what, folder / mode, model=model, reporter=stop, shard=mode == "shard")
        held = (p.to_local() if isinstance(p, DTensor) else p for block in model.blocks for p in block.parameters())
        ended["held"] = sum(p.numel() for p in held)
        ended |= {"status": run.manifest["status"], "cost": run.manifest["cost"], "folder": str(run.folder)}
        ended["checkpoint"] = tensors_sha256(run.load_checkpoint()[1])
    except (RunFailed, KeyboardInterrupt) as error:
        ended |= {"error": type(error).__name__, "said": str(error)}
    (folder / f"{mode}-{world.rank}.json").write_text(json.dumps(ended))
    sys.exit(1 if "error" in ended else 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
