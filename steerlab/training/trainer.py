"""The one gradient loop: source → objective → updater, blind to what any of them is.

A run's whole random state is (seed, step), because every draw is a function of them; so a checkpoint is the adapter,
the optimiser and the counters, written after every step in one atomic file. A run killed at any moment goes on
from the last finished step and ends with the same bytes. What could change the bytes (dtype, threads, micro-batch
budget) is fixed at step 0 in the manifest and used again on resume.
Left out, for the engine to come: several processes, halving the micro-batch when memory runs out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerlab.adapters import Adapter
from steerlab.batches import RolloutBatch
from steerlab.errors import RunFailed
from steerlab.rollouts import Policy
from steerlab.runs import CostLedger, Run, give_back_memory
from steerlab.training.experiment import Experiment

EMA_STEPS = 10


@dataclass(frozen=True)
class StepDone:
    """What the trainer says after each step; reporters render it."""

    step: int
    steps: int
    metrics: dict[str, float]


@dataclass
class Trainer:
    """Fits `policy.adapter` by `experiment`, keeping everything in `run`."""

    experiment: Experiment
    policy: Policy
    run: Run
    on_step: Callable[[StepDone], None] | None = None
    ledger: CostLedger = field(default_factory=CostLedger)

    def fit(self) -> Adapter:
        """Train from the last checkpoint (or from the start) to the end; returns the adapter.

        Raises RunFailed on a non-finite loss; the last good checkpoint stays.
        """
        experiment, adapter = self.experiment, self.adapter
        self.updater = experiment.updater.open(adapter.parameters(), experiment.steps)
        start, self.reward_ema = self.resume()
        source = experiment.source.open(self.policy, experiment.seed, self.ledger)
        for step in range(start, experiment.steps):
            began = time.perf_counter()
            drawn = source.next(step)
            with self.ledger.time("update_s"):
                learned = self.update(step, experiment.objective.prepare(drawn.batch))
            self.count()
            give_back_memory()
            metrics = {**drawn.metrics, **learned, "reward_ema": self.smoothed(drawn.metrics["reward"])}
            wall = time.perf_counter() - began
            metrics |= {"tokens_per_s": drawn.batch.n_tokens / wall, "wall_s": wall}
            self.run.log_rollouts(drawn.texts)
            self.run.log({"step": step, **metrics})
            self.run.save_checkpoint(step + 1, self.tensors(), self.counters())
            if self.on_step is not None:
                self.on_step(StepDone(step, experiment.steps, metrics))
        return adapter

    @property
    def adapter(self) -> Adapter:
        if self.policy.adapter is None:
            raise ValueError("the policy has no adapter to train")
        return self.policy.adapter

    def update(self, step: int, batch: RolloutBatch) -> dict[str, float]:
        """Gradients over micro-batches, then one optimiser step. A batch without a signal has zero gradient."""
        value, metrics = 0.0, {}
        for parameter in self.adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for micro in batch.micro_batches(self.experiment.token_budget):
            loss = self.experiment.objective(self.policy, micro)
            loss.value.backward()
            value += float(loss.value.detach())
            for name, amount in loss.metrics.items():
                metrics[name] = max(amount, metrics.get(name, amount))
        self.refuse_non_finite(step, value)
        return {"loss": value, **metrics, **self.updater.update(step)}

    def refuse_non_finite(self, step: int, value: float) -> None:
        """Stop before a bad gradient reaches the parameters, naming the step and where."""
        bad = [name for name, p in self.named() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        if math.isfinite(value) and not bad:
            return
        place = (
            f"gradient at {', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}" if bad else "every gradient is finite"
        )
        kept = f"the checkpoint of step {step} stays" if step else "there is no checkpoint yet"
        raise RunFailed(
            f"loss {value} at step {step} ({place}); {kept}; lower the learning rate "
            f"(now {self.experiment.updater.lr:g}) or use dtype fp32 in a new run"
        )

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(zip(self.adapter.snapshot(), self.adapter.parameters(), strict=True))

    def smoothed(self, reward: float) -> float:
        """Exponential moving mean of the reward over about EMA_STEPS steps."""
        share = 2 / (EMA_STEPS + 1)
        self.reward_ema = reward if self.reward_ema is None else (1 - share) * self.reward_ema + share * reward
        return self.reward_ema

    def count(self) -> None:
        """What a step adds to the cost ledger."""
        self.ledger.add(steps=1, exchanged_bytes=4 * self.adapter.n_parameters)
        self.ledger.trained_parameters = self.adapter.n_parameters
        self.ledger.optimiser_bytes = self.updater.state_bytes

    def tensors(self) -> dict[str, Tensor]:
        adapter = {f"adapter/{name}": t for name, t in self.adapter.snapshot().items()}
        return adapter | {f"optimiser/{name}": t for name, t in self.updater.snapshot().items()}

    def counters(self) -> dict[str, object]:
        return {"reward_ema": self.reward_ema, "cost": self.ledger.to_dict()}

    def resume(self) -> tuple[int, float | None]:
        """Put the last checkpoint back, if there is one; drop log lines of steps that will be done again."""
        found = self.run.load_checkpoint()
        if found is None:
            self.run.truncate(0)
            return 0, None
        step, tensors, state = found

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.adapter.restore(part("adapter/"))
        self.updater.restore(part("optimiser/"))
        self.ledger.add(**state["cost"])
        self.run.truncate(step)
        return step, state["reward_ema"]
