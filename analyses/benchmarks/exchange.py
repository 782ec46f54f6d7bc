"""What two processes tell each other per step, and how long the step takes, against one process with the same work.

Workload W through the trainer itself (`training/trainer.py`: source, objective, gradients, exchange, updater, log,
checkpoint). Two processes take two prompts each and one thread each, joined by gloo on this machine; one process takes
all four and both threads. Bytes are the cost ledger's `exchanged_bytes`: what a process sends of gradients. Claim: at
most 2·L·d·4 bytes per step and process for steering vectors at all L layers (`share_of_bound` ≤ 1), where data-parallel
training of a whole model would send 2·4 bytes per weight. Seconds are of whole steps, sides in turns.

    uv run python analyses/benchmarks/exchange.py --out analyses/benchmarks/results
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro
import workload
from rl_step import batch_of
from workload import MIB, Dtype, Peaks, Row, Side, StepInfo, Workload

from steerlab.training.world import ALONE, World

if TYPE_CHECKING:
    from steerlab.models import LanguageModel
    from steerlab.rollouts import Completions, Policy
    from steerlab.runs import CostLedger
    from steerlab.training.sources import Drawn, Request

COLUMNS = ("dtype", "case", "ratio", "spread", "ours", "rival", "exchanged_bytes", "bound_bytes", "share_of_bound")


@dataclass(frozen=True)
class Options(workload.Options):
    """threads: of the machine, shared by the processes of a side."""

    dtypes: tuple[Dtype, ...] = ("bf16",)
    processes: int = 2
    serve: bool = False  # run the steps of one process, one per line on standard input


@dataclass(frozen=True)
class Forced:
    """The workload as a source: this process's share of its prompts, with the lengths and rewards that it states."""

    work: Workload

    def facts(self) -> dict[str, str]:
        return {"task": "the workload, which judges nothing"}

    @property
    def watched(self) -> str:
        return "reward"

    @property
    def longest(self) -> int:
        return max(self.work.lengths)

    def open(self, policy: Policy, seed: int, ledger: CostLedger, world: World = ALONE) -> ForcedSource:
        return ForcedSource(self.work, policy, seed, ledger, world)


@dataclass(frozen=True)
class ForcedSource:
    """`Forced` at work with one policy."""

    work: Workload
    policy: Policy
    seed: int
    ledger: CostLedger
    world: World

    def request(self, step: int) -> Request:
        from steerlab.rollouts import Rows, Sampling
        from steerlab.training.sources import Request

        mine = replace(self.work, groups=tuple(self.world.share(self.work.groups)))
        names = self.world.share(range(len(self.work.groups)))
        rows = replace(Rows.grid(names, mine.group_size), limit=torch.tensor(mine.lengths))
        sampling, keep = Sampling(max_new_tokens=max(mine.lengths)), self.policy.adapter.first_block > 0
        return Request((), mine.prompts, rows, sampling, self.seed, step, max_rows=256, keep=keep)

    def receive(self, step: int, request: Request, completions: Completions) -> Drawn:  # noqa: ARG002
        from steerlab.training.sources import Drawn, tally

        mine = replace(self.work, groups=tuple(self.world.share(self.work.groups)))
        batch = batch_of(mine, request.rows, completions, self.policy)
        return Drawn(batch, tally(batch, completions.finished))

    def next(self, step: int) -> Drawn:
        request = self.request(step)
        with self.ledger.time("rollout_s"), workload.without_end(self.policy.model, self.work.eos):
            completions = request.sample(self.policy)
        return self.receive(step, request, completions)


def make_step(model: LanguageModel, work: Workload, world: World, folder: Path) -> Callable[[], StepInfo]:
    """A function that runs one step of the trainer in `world` and reports it."""
    from steerlab.adapters import Steering
    from steerlab.objectives import PolicyGradient
    from steerlab.rollouts import Evaluation, Policy
    from steerlab.runs import Run
    from steerlab.training import AdamW, Experiment, Trainer

    experiment = Experiment(
        "exchange", model.name, Steering(), Forced(work), PolicyGradient(), AdamW(lr=1e-3), Evaluation(), steps=1_000
    )
    run = Run(folder, {})
    trainer = Trainer(experiment, Policy(model, experiment.adapter.init(model)), run, world=world)
    trainer.begin()
    steps, peaks = iter(range(1_000)), Peaks()

    def step() -> StepInfo:
        peaks.start()
        before, number, start = replace(trainer.ledger), next(steps), time.perf_counter()
        trainer.learn(number, trainer.source.next(number))
        wall_s, ledger = time.perf_counter() - start, trainer.ledger
        rollout_s = ledger.rollout_s - before.rollout_s
        return StepInfo(
            wall_s=wall_s,
            rollout_s=rollout_s,
            update_s=wall_s - rollout_s,
            prompt_tokens=ledger.tokens_prompt - before.tokens_prompt,
            completion_tokens=ledger.tokens_completion - before.tokens_completion,
            exchanged_bytes=ledger.exchanged_bytes - before.exchanged_bytes,
            **peaks.stop(),
        )

    return step


def serve(options: Options) -> None:
    """One process of a side, alone or not as its environment says."""
    from steerlab.training.world import leave

    torch.set_num_threads(options.threads)
    world = World.from_environment()
    model, work = workload.subject(options.scale, options.dtypes[0])
    with tempfile.TemporaryDirectory() as folder:
        workload.serve(make_step(model, work, world, Path(folder)))
    leave()


def launched(n: int) -> list[dict[str, str]]:
    """The environments of n processes that belong together."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]


def compare(model: LanguageModel, work: Workload, options: Options) -> Row:
    """One row of the table: ratio is one process's seconds ÷ those of several."""
    arguments = [str(Path(__file__).resolve()), "--serve", "--scale", options.scale]
    arguments += ["--dtypes", workload.dtype_name(model), "--threads"]
    each = max(1, options.threads // options.processes)
    several = Side([*arguments, str(each)], launched(options.processes))
    alone = Side([*arguments, str(options.threads)])
    _, *pairs = workload.in_turns([several.step, alone.step], options.repeats)
    several.close(), alone.close()
    assert all(pair[0].completion_tokens == pair[1].completion_tokens == sum(work.lengths) for pair in pairs)
    (sent,) = {pair[0].exchanged_bytes for pair in pairs}
    bound = 2 * model.n_layers * model.d_model * 4
    return {
        "case": f"{options.processes} processes, 1 process",
        **workload.compared([pair[0].wall_s for pair in pairs], [pair[1].wall_s for pair in pairs]),
        "exchanged_bytes": sent,
        "bound_bytes": bound,
        "share_of_bound": sent / bound,
        "whole_model_bytes": 2 * 4 * sum(p.numel() for p in model.hf.parameters()),
        "peak_mib": [max(pair[side].peak_bytes for pair in pairs) / MIB for side in (0, 1)],
        "completion_tokens": sum(work.lengths),
        "threads_per_process": [each, options.threads],
    }


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON; or serves."""
    if options.serve:
        serve(options)
        return []
    return workload.table(options, COLUMNS, "exchange", lambda model, work: [compare(model, work, options)])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
