"""Where batches come from. `Rollouts`: the policy answers problems of a task and the task judges the answers.

The problems of a step are a function of the seed and the step alone (shuffled epochs), and so is every random draw,
which is why a resumed run needs no state from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from steerlab.batches import RolloutBatch
from steerlab.errors import UsageError
from steerlab.rollouts import Policy, Rows, Sampling
from steerlab.rollouts.sampler import check_fit
from steerlab.runs import CostLedger
from steerlab.tasks import Problem, Task, encode


@dataclass(frozen=True)
class Drawn:
    """A batch and what a person may want to see of it: numbers for the metrics, texts for the log."""

    batch: RolloutBatch
    metrics: dict[str, float]
    texts: list[dict[str, object]] = field(default_factory=list)


@runtime_checkable
class Source(Protocol):
    """Makes the batch of a step."""

    def next(self, step: int) -> Drawn: ...


@dataclass(frozen=True)
class Rollouts:
    """task: problems and rewards. prompts, samples: problems per step and completions of each. max_rows: completions
    decoded at once."""

    task: Task
    prompts: int = 8
    samples: int = 8
    sampling: Sampling = Sampling()
    max_rows: int = 256

    def __post_init__(self) -> None:
        for name, value in (("prompts", self.prompts), ("samples", self.samples), ("max_rows", self.max_rows)):
            if value < 1:
                raise UsageError(f"{name} is {value}; training needs at least 1")
        if self.sampling.top_p < 1:
            raise UsageError(f"top_p is {self.sampling.top_p}; training needs 1, samples of the policy itself")
        if self.sampling.temperature == 0:
            raise UsageError(
                "temperature is 0 (greedy): all samples of a prompt are the same; train at a temperature above 0"
            )

    def open(self, policy: Policy, seed: int, ledger: CostLedger) -> RolloutSource:
        """The source of one run. Raises UsageError if the task has no training problems or a prompt does not fit."""
        return RolloutSource(self, policy, seed, ledger)


class RolloutSource:
    """`Rollouts` at work with one policy."""

    def __init__(self, spec: Rollouts, policy: Policy, seed: int, ledger: CostLedger) -> None:
        self.spec, self.policy, self.seed, self.ledger = spec, policy, seed, ledger
        self.problems = spec.task.problems("train")
        if not self.problems:
            raise UsageError(f"task {spec.task.name} has no training problems; give it a larger train size")
        self.n_names = 1 + max(p.id for p in self.problems)
        self.encoded = [tuple(encode(spec.task.prompt(p), policy.model.tokenizer)) for p in self.problems]
        check_fit(policy.model, self.encoded, spec.sampling)

    def chosen(self, step: int) -> list[int]:
        """Indices of the problems of a step: consecutive pieces of epochs, each epoch shuffled anew."""
        n, k = len(self.problems), self.spec.prompts
        places = np.arange(step * k, (step + 1) * k)
        orders = {int(e): np.random.default_rng([self.seed, int(e)]).permutation(n) for e in set(places // n)}
        return [int(orders[int(place // n)][place % n]) for place in places]

    def next(self, step: int) -> Drawn:
        """Sample, judge, pack."""
        chosen = self.chosen(step)
        problems, prompts = [self.problems[i] for i in chosen], tuple(self.encoded[i] for i in chosen)
        # A problem that comes twice in one step (few problems) must not get the same completions twice.
        names = [
            p.id + self.n_names * chosen[:i].count(c) for i, (p, c) in enumerate(zip(problems, chosen, strict=True))
        ]
        rows = Rows.grid(names, self.spec.samples)
        with self.ledger.time("rollout_s"):
            done = self.policy.sample(
                prompts, rows, self.spec.sampling, seed=self.seed, step=step, max_rows=self.spec.max_rows
            )
        tokens = [done.tokens[i, : done.lengths[i]].tolist() for i in range(len(rows))]
        texts = self.policy.model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        asked = [problems[i] for i in rows.prompt.tolist()]
        with self.ledger.time("reward_s"):
            judged = self.spec.task.judge(asked, texts)
        rewards = torch.tensor([j.reward for j in judged], dtype=torch.float32)
        correct = torch.tensor([j.correct for j in judged])
        self.ledger.add(tokens_prompt=sum(map(len, prompts)), tokens_completion=int(done.lengths.sum()))
        batch = RolloutBatch(
            prompts=prompts,
            group=rows.prompt,
            completions=done.tokens,
            lengths=done.lengths,
            logprobs=done.logprobs,
            rewards=rewards,
            correct=correct,
            temperature=self.spec.sampling.temperature,
        )
        return Drawn(batch, self.measured(batch, done.finished), told(step, asked, rows, texts, rewards, correct))

    def measured(self, batch: RolloutBatch, finished: torch.Tensor) -> dict[str, float]:
        """What the learning curve shows. `signal_share`: groups whose rewards are not all equal."""
        by_group = batch.rewards.view(len(batch.prompts), -1)
        return {
            "reward": float(batch.rewards.mean()),
            "correct": float(batch.correct.float().mean()),
            "signal_share": float((by_group != by_group[:, :1]).any(1).float().mean()),
            "entropy_nats": float(-batch.logprobs.sum() / batch.n_tokens),
            "completion_tokens": float(batch.lengths.float().mean()),
            "finished_share": float(finished.float().mean()),
        }


def told(
    step: int, asked: list[Problem], rows: Rows, texts: list[str], rewards: torch.Tensor, correct: torch.Tensor
) -> list[dict[str, object]]:
    """One record per completion, for the run's rollout log."""
    return [
        {
            "step": step,
            "problem": asked[i].id,
            "sample": int(rows.sample[i]),
            "text": texts[i],
            "reward": float(rewards[i]),
            "correct": bool(correct[i]),
        }
        for i in range(len(texts))
    ]
