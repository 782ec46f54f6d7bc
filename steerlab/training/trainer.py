"""The one gradient loop: source → objective → updater, blind to what any of them is.

A run's whole random state is (seed, step), because every draw is a function of them; so a checkpoint is the adapter,
the optimiser and the counters, written after every step in one atomic file. A run killed at any moment goes on
from the last finished step and ends with the same bytes. What could change the bytes (dtype, threads, micro-batch
budget) is fixed at step 0 in the manifest and used again on resume.

`fit` is `begin` and then `learn` for what the source draws, step by step; whoever samples for several runs at once
calls them himself. In a world of several processes each has its share of a step; what they exchange is said in
`world.py`, and all of them take the same optimiser step. When memory runs out in the update, the micro-batch is halved
and the update of the same batch begun again.
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerlab.adapters import Adapter
from steerlab.batches import Batch
from steerlab.errors import RunFailed
from steerlab.models import engine
from steerlab.rollouts import Policy
from steerlab.runs import CostLedger, Run, give_back_memory, ran_out
from steerlab.training import memory
from steerlab.training.experiment import Experiment
from steerlab.training.sharding import Shards
from steerlab.training.sources import Drawn, Source, Tally
from steerlab.training.world import ALONE, World

EMA_STEPS = 10


@dataclass(frozen=True)
class StepDone:
    """What the trainer says after each step; reporters render it."""

    step: int
    steps: int
    metrics: dict[str, float]


@dataclass
class Trainer:
    """Fits `policy.adapter` by `experiment`, keeping everything in `run` (which only the world's leader writes).

    shards: the model's weights in pieces, where they are; the policy is then a `ShardedPolicy`.
    on_step: hears of every step. on_notice: hears, in one line, of what a person should know and need not act on.
    """

    experiment: Experiment
    policy: Policy
    run: Run
    on_step: Callable[[StepDone], None] | None = None
    ledger: CostLedger = field(default_factory=CostLedger)
    world: World = ALONE
    on_notice: Callable[[str], None] | None = None
    shards: Shards | None = None

    def fit(self) -> Adapter:
        """Train from the last checkpoint (or from the start) to the end; returns the adapter.

        Raises RunFailed on a non-finite loss, or if memory does not suffice for one row; the last good
        checkpoint stays.
        """
        for step in range(self.begin(), self.experiment.steps):
            self.learn(step, self.source.next(step))
        return self.adapter

    def begin(self) -> int:
        """Open updater and source and put the last checkpoint back. Returns the first step to do."""
        experiment = self.experiment
        self.watched = experiment.source.watched
        self.updater = experiment.updater.open(self.adapter.parameters(), experiment.steps)
        self.settle()
        self.token_budget: int = self.engine["token_budget"]
        start, self.ema = self.resume()
        self.source: Source = experiment.source.open(self.policy, experiment.seed, self.ledger, self.world)
        self.clock = time.perf_counter()
        return start

    def learn(self, step: int, drawn: Drawn) -> None:
        """One update from what was drawn for `step`, and all that is kept of it. `wall_s` is since the last step."""
        with self.ledger.time("update_s"):
            batch, tally = self.pool(self.experiment.objective.prepare(drawn.batch), drawn.tally)
            self.spare = drawn.batch.idle()
            learned = self.update(step, batch)
        self.count(tally)
        give_back_memory()
        metrics = {**tally.metrics, **learned}
        metrics[f"{self.watched}_ema"] = self.smoothed(metrics[self.watched])
        wall, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        metrics |= {
            "tokens_per_s": tally.tokens / wall,
            "wall_s": wall,
            "token_budget": float(self.token_budget),
        }
        texts = self.world.to_leader(drawn.texts)
        if self.world.leads:
            self.run.log_rollouts(text for part in texts for text in part)
            self.run.log({"step": step, **metrics})
            self.run.save_checkpoint(step + 1, self.tensors(), self.counters())
        if self.on_step is not None:
            self.on_step(StepDone(step, self.experiment.steps, metrics))

    @property
    def adapter(self) -> Adapter:
        if self.policy.adapter is None:
            raise ValueError("the policy has no adapter to train")
        return self.policy.adapter

    def pool(self, batch: Batch, tally: Tally) -> tuple[Batch, Tally]:
        """This process's share with the denominator of the whole step, and what the whole step adds up to."""
        parts = self.world.gather((batch.denominator, tally))
        denominators = [d for d, _ in parts if d is not None]
        whole = batch.over(sum(denominators) if denominators else None)
        return whole, functools.reduce(operator.add, (t for _, t in parts))

    def update(self, step: int, batch: Batch) -> dict[str, float]:
        """Gradients of all processes together, then one optimiser step. No signal anywhere is a zero gradient."""
        value, metrics = self.gradients(batch)
        self.ledger.add(exchanged_bytes=self.world.sum_([p.grad for _, p in self.named() if p.grad is not None]))
        parts = self.world.gather((value, metrics, self.token_budget))
        value = sum(v for v, _, _ in parts)
        least = min(budget for _, _, budget in parts)
        if least < self.token_budget:
            self.shrink(least, "the update of another process")
        metrics = {name: max(m[name] for _, m, _ in parts if name in m) for _, m, _ in parts for name in m}
        self.refuse_non_finite(step, value)
        metrics |= self.updater.update(step)
        if bad := [name for name, p in self.named() if not bool(torch.isfinite(p).all())]:
            raise self.broken(step, f"the update of step {step} overflowed at {few(bad)}")
        return {"loss": value, **metrics}

    def gradients(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Leave the gradient of a batch in the parameters, in smaller micro-batches if memory runs out; returns the
        loss and the objective's largest metrics. Raises RunFailed when memory does not suffice for one row.
        """
        while True:
            try:
                return self.attempt(batch)
            except (MemoryError, RuntimeError) as error:
                if not ran_out(error):
                    raise
                if self.shards is not None:
                    raise RunFailed(
                        f"memory ran out in the update; with weights in pieces no process can repeat it alone: start a "
                        f"new run with a token_budget below {self.token_budget:,}"
                    ) from error
                said = str(error).partition("\n")[0][:120]
            self.halve(batch, said)  # outside the handler, whose traceback keeps what the attempt had in memory

    def attempt(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """The same with the micro-batches as they are, from zero gradients."""
        value, metrics = 0.0, {}
        for parameter in self.adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for micro, weight in self.micro_batches(batch):
            loss = self.experiment.objective(self.policy, micro)
            (weight * loss.value).backward()
            if weight == 0:
                continue
            value += float(loss.value.detach())
            for name, amount in loss.metrics.items():
                metrics[name] = max(amount, metrics.get(name, amount))
        return value, metrics

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Pieces of a batch that fit the memory, each with the weight of its loss."""
        if self.shards is not None:
            return self.shards.even(batch, self.spare, self.token_budget)
        return ((micro, 1.0) for micro in batch.micro_batches(self.token_budget))

    def halve(self, batch: Batch, said: str) -> None:
        """Take half as many tokens at a time from now on as the largest micro-batch had. Raises RunFailed if that is no
        less than one row (a completion, a text)."""
        tried = list(batch.micro_batches(self.token_budget))
        if max(map(len, tried)) == 1:
            raise RunFailed(
                f"memory ran out on a single completion or text ({said}); free some and resume, or start a new run "
                "with fewer new tokens or shorter texts, dtype bf16, higher layers only, or a smaller model"
            )
        largest = max(micro.n_fed for micro in tried)
        self.shrink(max(1, min(self.token_budget, largest) // 2), "the update")
        give_back_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def shrink(self, token_budget: int, where: str) -> None:
        """Take fewer tokens at a time from now on, and say so."""
        self.token_budget = token_budget
        if self.on_notice is not None:
            self.on_notice(f"memory ran out in {where}: at most {token_budget:,} tokens at a time from now on")

    def refuse_non_finite(self, step: int, value: float) -> None:
        """Stop before a bad gradient reaches the parameters, naming the step and where."""
        bad = [name for name, p in self.named() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        if math.isfinite(value) and not bad:
            return
        place = f"gradient at {few(bad)}" if bad else "every gradient is finite"
        raise self.broken(step, f"loss {value} at step {step} ({place})")

    def broken(self, step: int, what: str) -> RunFailed:
        """The error of a step whose numbers are no use."""
        kept = f"the checkpoint of step {step} stays" if step else "there is no checkpoint yet"
        rate = self.experiment.updater.lr
        return RunFailed(f"{what}; {kept}; lower the learning rate (now {rate:g}) or use dtype fp32 in a new run")

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(zip(self.adapter.snapshot(), self.adapter.parameters(), strict=True))

    def smoothed(self, value: float) -> float:
        """Exponential moving mean of the watched metric over about EMA_STEPS steps."""
        share = 2 / (EMA_STEPS + 1)
        self.ema = value if self.ema is None else (1 - share) * self.ema + share * value
        return self.ema

    def count(self, tally: Tally) -> None:
        """What a step adds to the cost ledger."""
        self.ledger.add(steps=1, tokens_prompt=tally.prompt_tokens, tokens_completion=tally.completion_tokens)
        self.ledger.trained_parameters = self.adapter.n_parameters
        self.ledger.optimiser_bytes = self.updater.state_bytes

    def tensors(self) -> dict[str, Tensor]:
        adapter = {f"adapter/{name}": t for name, t in self.adapter.snapshot().items()}
        return adapter | {f"optimiser/{name}": t for name, t in self.updater.snapshot().items()}

    def counters(self) -> dict[str, object]:
        return {f"{self.watched}_ema": self.ema, "token_budget": self.token_budget, "cost": self.ledger.to_dict()}

    def settle(self, like: Mapping[str, Any] | None = None) -> None:
        """`engine`: how this machine does the work, chosen when the run begins and kept in its manifest from then on.

        token_budget: tokens per micro-batch. processes: how many began the run; a resume may have any number,
        which changes the rounding of sums and nothing else. products, kernels, steps: what the leader measures to be
        faster (`models/engine.py`), also put in force here. like: what another run settled for the same model, of which
        only the budget is chosen anew. Raises UsageError if this machine cannot do what the run was begun with.
        """

        def chosen() -> dict[str, Any]:
            known = self.run.manifest.get("engine", like)
            if known is not None:
                return dict(known)
            whole = self.shards is None
            choice = engine.tune(self.policy.model, self.world.local_size) if whole else engine.PLAIN
            return {"processes": self.world.size, **choice}

        self.engine: dict[str, Any] = self.world.from_leader(chosen)
        self.put_in_force()
        # Of the memory that the packed copy leaves.
        budget = self.experiment.token_budget or memory.budget_for(
            self.policy.model,
            self.experiment.source.longest,
            self.world.local_size,
            self.adapter.keeps_inputs,
        )
        smallest = min(self.world.gather(budget))

        def kept() -> dict[str, Any]:
            if "engine" not in self.run.manifest:
                self.run.update(engine={**self.engine, "token_budget": smallest})
            return self.run.manifest["engine"]

        self.engine = self.world.from_leader(kept)

    def put_in_force(self) -> None:
        """Have the model, which runs may share, compute as this run does."""
        engine.use(self.policy.model, self.engine if self.shards is None else engine.PLAIN)

    def resume(self) -> tuple[int, float | None]:
        """Put the last checkpoint back, if there is one; drop log lines of steps that will be done again."""

        def found() -> tuple[int, dict[str, Tensor], Any] | None:
            kept = self.run.load_checkpoint()
            self.run.truncate(kept[0] if kept else 0)
            return kept

        checkpoint = self.world.from_leader(found)
        if checkpoint is None:
            return 0, None
        step, tensors, state = checkpoint

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.adapter.restore(part("adapter/"))
        self.updater.restore(part("optimiser/"))
        self.ledger.add(**state["cost"])
        self.token_budget = state.get("token_budget", self.token_budget)
        return step, state[f"{self.watched}_ema"]


def few(names: list[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
