"""Where batches come from. `Rollouts`: the policy answers problems of a task and the task judges the answers.

The problems of a step are a function of the seed and the step alone (shuffled epochs), and so is every random draw,
which is why a resumed run needs no state from here. A step comes in two halves, what is to be sampled and what becomes
of it, so that whoever samples may be another: several runs decoded as one batch, for instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from steerlab.batches import Batch, RolloutBatch, Slopes
from steerlab.errors import UsageError
from steerlab.models import LanguageModel
from steerlab.rollouts import Completions, Policy, Rows, Sampling
from steerlab.rollouts.sampler import check_fit
from steerlab.runs import CostLedger
from steerlab.runs import encode as encode_parts
from steerlab.tasks import Problem, Task, encode
from steerlab.training.world import ALONE, World

KEPT_BYTES = 2 << 30  # kept from sampling at a time; beyond it the update begins at the bottom and applies the head


@dataclass(frozen=True)
class Tally:
    """What a step adds up to, or one process's share of it, so that shares can be added.

    ratios: name of a metric → (sum, count). prompt_tokens, completion_tokens: read and drawn, as the cost ledger counts
    them.
    """

    ratios: dict[str, tuple[float, float]]
    prompt_tokens: int
    completion_tokens: int

    def __add__(self, other: Tally) -> Tally:
        ratios = {name: (a + other.ratios[name][0], n + other.ratios[name][1]) for name, (a, n) in self.ratios.items()}
        return Tally(ratios, self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)

    @property
    def tokens(self) -> int:
        """Those whose pace a person watches: drawn ones, or where none are drawn, read ones."""
        return self.completion_tokens or self.prompt_tokens

    @property
    def metrics(self) -> dict[str, float]:
        return {name: total / n for name, (total, n) in self.ratios.items()}


@dataclass(frozen=True)
class Drawn:
    """A batch and what a person may want to see of it: numbers for the metrics, texts for the log."""

    batch: Batch
    tally: Tally
    texts: list[dict[str, object]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of this batch alone."""
        return self.tally.metrics


@dataclass(frozen=True)
class Request:
    """What is to be sampled in a step: the arguments of `Policy.sample`, and which problem each prompt asks.

    prompts, problems: token ids and what they ask, one entry per group. rows: completions wanted, by prompt. keep: also
    hidden states below the lowest trained layer, for an update that begins there, and the head's slopes.
    """

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    rows: Rows
    sampling: Sampling
    seed: int
    step: int
    max_rows: int
    keep: bool = False

    def sample(self, policy: Policy) -> Completions:
        """What `policy` answers."""
        return policy.sample(
            self.prompts,
            self.rows,
            self.sampling,
            seed=self.seed,
            step=self.step,
            max_rows=self.max_rows,
            keep=self.keep,
        )


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

    @property
    def longest(self) -> int:
        return self.sampling.max_new_tokens

    @property
    def watched(self) -> str:
        return "reward"

    def facts(self) -> dict[str, str]:
        reward = str(encode_parts(self.task).get("rewards", self.task.name))
        return {"task": self.task.name, "reward": reward}

    def open(self, policy: Policy, seed: int, ledger: CostLedger, world: World = ALONE) -> RolloutSource:
        """The source of one run; in a world of several processes, of this process's share of every step's prompts.

        Raises UsageError if the task has no training problems, a prompt does not fit, or a process would have none.
        """
        return RolloutSource(self, policy, seed, ledger, world)


def keepable(model: LanguageModel, rows: int, sampling: Sampling) -> bool:
    """Whether a hidden state and a slope of every token of so many completions may be kept while they are sampled."""
    return 2 * rows * sampling.max_new_tokens * model.d_model * model.dtype.itemsize <= KEPT_BYTES


class RolloutSource:
    """`Rollouts` at work with one policy: a step at once or in two halves, `next` being `receive` of what its own
    policy answers."""

    def __init__(self, spec: Rollouts, policy: Policy, seed: int, ledger: CostLedger, world: World = ALONE) -> None:
        self.spec, self.policy, self.seed, self.ledger, self.world = spec, policy, seed, ledger, world
        if spec.prompts < world.size:
            raise UsageError(
                f"{spec.prompts} prompts per step are too few for {world.size} processes; start at most {spec.prompts}"
            )
        self.problems = spec.task.problems("train")
        if not self.problems:
            raise UsageError(f"task {spec.task.name} has no training problems; give it a larger train size")
        self.n_names = 1 + max(p.id for p in self.problems)
        self.encoded = [tuple(encode(spec.task.prompt(p), policy.model.tokenizer)) for p in self.problems]
        check_fit(policy.model, self.encoded, spec.sampling)
        self.first_block = 0 if policy.adapter is None else policy.adapter.first_block
        rows = spec.prompts * spec.samples  # of all processes: a rule for the run
        self.keeps = keepable(policy.model, rows, spec.sampling)

    def chosen(self, step: int) -> list[int]:
        """Indices of the problems of a step."""
        return epochs(len(self.problems), self.spec.prompts, self.seed, step)

    def request(self, step: int) -> Request:
        """The problems of a step (of this process's share of it) and the completions wanted of each."""
        chosen = self.chosen(step)
        # A problem that comes twice in one step (few problems) must not get the same completions twice.
        names = [self.problems[c].id + self.n_names * chosen[:i].count(c) for i, c in enumerate(chosen)]
        mine = self.world.share(chosen)
        return Request(
            problems=tuple(self.problems[c] for c in mine),
            prompts=tuple(self.encoded[c] for c in mine),
            rows=Rows.grid(self.world.share(names), self.spec.samples),
            sampling=self.spec.sampling,
            seed=self.seed,
            step=step,
            max_rows=self.spec.max_rows,
            keep=self.keeps,
        )

    def receive(self, step: int, request: Request, completions: Completions) -> Drawn:
        """Judge and pack."""
        rows = request.rows
        tokens = [completions.tokens[i, : completions.lengths[i]].tolist() for i in range(len(rows))]
        texts = self.policy.model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        asked = [request.problems[i] for i in rows.prompt.tolist()]
        with self.ledger.time("reward_s"):
            judged = self.spec.task.judge(asked, texts)
        rewards = torch.tensor([j.reward for j in judged], dtype=torch.float32)
        correct = torch.tensor([j.correct for j in judged])
        slopes = completions.slopes if request.keep else None
        batch = RolloutBatch(
            prompts=request.prompts,
            group=rows.prompt,
            completions=completions.tokens,
            lengths=completions.lengths,
            logprobs=completions.logprobs,
            rewards=rewards,
            correct=correct,
            temperature=request.sampling.temperature,
            kept=completions.kept(self.first_block, len(request.prompts)) if request.keep else None,
            slopes=None if slopes is None else Slopes(slopes, self.policy.numbers),
        )
        return Drawn(batch, tally(batch, completions.finished), told(step, asked, rows, texts, rewards, correct))

    def next(self, step: int) -> Drawn:
        """Sample, judge, pack."""
        request = self.request(step)
        with self.ledger.time("rollout_s"):
            completions = request.sample(self.policy)
        return self.receive(step, request, completions)


def epochs(n: int, k: int, seed: int, step: int) -> list[int]:
    """Which k of n things a step takes: consecutive pieces of epochs, each epoch shuffled anew."""
    places = np.arange(step * k, (step + 1) * k)
    orders = {int(e): np.random.default_rng([seed, int(e)]).permutation(n) for e in set(places // n)}
    return [int(orders[int(place // n)][place % n]) for place in places]


def tally(batch: RolloutBatch, finished: torch.Tensor) -> Tally:
    """What the learning curve shows. `signal_share`: groups whose rewards are not all equal."""
    n, n_tokens = float(len(batch)), float(batch.n_tokens)
    by_group = batch.rewards.view(len(batch.prompts), -1)
    signal = (by_group != by_group[:, :1]).any(1)
    return Tally(
        ratios={
            "reward": (float(batch.rewards.double().sum()), n),
            "correct": (float(batch.correct.sum()), n),
            "signal_share": (float(signal.sum()), float(len(signal))),
            "entropy_nats": (-float(batch.logprobs.double().sum()), n_tokens),
            "completion_tokens": (n_tokens, n),
            "finished_share": (float(finished.sum()), n),
        },
        prompt_tokens=sum(map(len, batch.prompts)),
        completion_tokens=batch.n_tokens,
    )


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
